"""Finds guides and rewards by name through entry points, the built-in ones like everybody else's.

Groups: `guiderail.guides` (classes derived from Guide) and `guiderail.rewards` (from Reward). What is
configured and cannot be loaded is an error; nothing is skipped silently.
"""

from collections.abc import Collection
from importlib.metadata import entry_points
from typing import TypeVar

from guiderail.guides.core.errors import PluginError
from guiderail.guides.core.guide import Guide
from guiderail.guides.core.reward import Reward

T = TypeVar("T", Guide, Reward)


def load_guides(only: Collection[str] | None = None) -> dict[str, type[Guide]]:
    """Load all installed guides, or just those named. Raises PluginError."""
    return _load("guiderail.guides", Guide, only)  # type: ignore[type-abstract]


def load_rewards(only: Collection[str] | None = None) -> dict[str, type[Reward]]:
    """Load all installed reward classes, or just those named. Raises PluginError."""
    return _load("guiderail.rewards", Reward, only)  # type: ignore[type-abstract]


def describe(cls: type[Guide] | type[Reward]) -> str:
    """The first line of the class's docstring: its public description."""
    return (cls.__doc__ or "").strip().partition("\n")[0]


def _load(group: str, kind: type[T], only: Collection[str] | None) -> dict[str, type[T]]:
    found = {point.name: point for point in entry_points(group=group)}
    names = sorted(found) if only is None else list(only)
    loaded: dict[str, type[T]] = {}
    for name in names:
        point = found.get(name)
        if point is None:
            raise PluginError(f"no entry point '{name}' in group {group}; installed: {', '.join(sorted(found))}")
        try:
            cls = point.load()
        except Exception as error:
            raise PluginError(f"{group} '{name}' ({point.value}) does not load: {error!r}") from error
        if not (isinstance(cls, type) and issubclass(cls, kind)):
            raise PluginError(f"{group} '{name}' ({point.value}) is not a subclass of {kind.__name__}")
        if not describe(cls):
            raise PluginError(f"{group} '{name}' ({point.value}) has no docstring to describe it")
        try:
            cls.Params()
        except ValueError as error:
            raise PluginError(f"{group} '{name}': every parameter needs a default: {error}") from error
        loaded[name] = cls
    return loaded

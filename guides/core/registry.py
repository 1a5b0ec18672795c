"""Finds guides and rewards by name through entry points, the built-in ones like everybody else's.

Groups: `guiderail.guides` (classes derived from Guide) and `guiderail.rewards` (from Reward). What is
configured and cannot be loaded is an error; nothing is skipped silently.
"""

from collections.abc import Collection, Mapping
from importlib.metadata import EntryPoint, entry_points
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


def make_rewards(classes: Mapping[str, type[Reward]]) -> dict[str, Reward]:
    """One reward of each class. Raises PluginError naming the one that cannot be made."""
    made: dict[str, Reward] = {}
    for name, cls in classes.items():
        try:
            made[name] = cls()
        except Exception as error:
            raise PluginError(f"reward '{name}' cannot be made: {error!r}; leave it out with --rewards") from error
    return made


def describe(cls: type[Guide] | type[Reward]) -> str:
    """The first line of the class's docstring: its public description."""
    return (cls.__doc__ or "").strip().partition("\n")[0]


def checked_plugin(cls: type[Guide] | type[Reward], called: str) -> None:
    """Raise PluginError unless the class describes itself and has parameters with defaults and a JSON schema."""
    if not describe(cls):
        raise PluginError(f"{called} has no docstring to describe it")
    try:
        cls.Params()
        cls.Params.model_json_schema()
    except ValueError as error:
        raise PluginError(f"{called}: every parameter needs a default: {error}") from error
    except Exception as error:
        raise PluginError(f"{called}: its parameters have no JSON schema: {error}") from error


def _load(group: str, kind: type[T], only: Collection[str] | None) -> dict[str, type[T]]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        other = found.setdefault(point.name, point)
        if other.value != point.value and (only is None or point.name in only):
            raise PluginError(f"{group} '{point.name}' is in two packages: {_source(other)} and {_source(point)}")
    names = sorted(found) if only is None else list(only)
    loaded: dict[str, type[T]] = {}
    for name in names:
        if name not in found:
            raise PluginError(f"no entry point '{name}' in group {group}; installed: {', '.join(sorted(found))}")
        point = found[name]
        try:
            cls = point.load()
        except Exception as error:
            raise PluginError(f"{group} '{name}' ({point.value}) does not load: {error!r}") from error
        if not (isinstance(cls, type) and issubclass(cls, kind)):
            raise PluginError(f"{group} '{name}' ({point.value}) is not a subclass of {kind.__name__}")
        checked_plugin(cls, f"{group} '{name}' ({point.value})")
        loaded[name] = cls
    return loaded


def _source(point: EntryPoint) -> str:
    """The package that an entry point comes from, and what it names."""
    return f"{point.dist.name if point.dist is not None else 'unknown'} ({point.value})"

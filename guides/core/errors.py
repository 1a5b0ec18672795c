"""Errors that guides, rewards and engines raise. The server turns them into HTTP bodies."""

import sys
import traceback
from dataclasses import dataclass
from pathlib import Path


class GuiderailError(Exception):
    """Base of all errors that Guiderail raises on purpose."""


class RequestError(GuiderailError):
    """The request asks for something impossible. `param` is the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class TooLong(RequestError, ValueError):
    """A conversation, or an answer, is longer than what is to read it."""


@dataclass(frozen=True, slots=True)
class AlignmentField:
    """A field of the request's alignment, by its name there."""

    name: str


@dataclass(frozen=True, slots=True)
class GuideField:
    """A field of the guide's own parameters, by its name there."""

    name: str


class FieldError(RequestError):
    """A RequestError about a field whose place in the request the part that raises it does not know.

    parts: the message, in which fields stand as such; the first one is at fault.
    """

    def __init__(self, field: AlignmentField | GuideField, *parts: str | AlignmentField | GuideField) -> None:
        self.field = field
        self.parts = (field, *parts)
        super().__init__(
            "".join(part if isinstance(part, str) else f"'{part.name}'" for part in self.parts), field.name
        )


class EngineUnavailable(GuiderailError):
    """The engine is down, starting or was lost while the request ran. Trying again later may work."""


class RewardFailed(GuiderailError):
    """A reward could not score. Carries the reward's name; no value is made up in its place."""

    def __init__(self, reward: str, reason: str) -> None:
        super().__init__(f"reward '{reward}' failed: {reason}")
        self.reward = reward


class GuideFailed(GuiderailError):
    """A guide broke: it raised what is no error of ours, or did not keep to its contract. Carries its name."""

    def __init__(self, guide: str, reason: str) -> None:
        super().__init__(f"guide '{guide}' failed: {reason}")
        self.guide = guide


class DeadlinePassed(GuiderailError):
    """The deadline passed before there was anything to return."""


class PluginError(GuiderailError):
    """A guide or reward that is configured cannot be loaded."""


def told(error: BaseException) -> str:
    """The kind of an error of a plugin's and what it says."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # whatever its __str__ does
        return type(error).__name__


def raised_at(error: BaseException, by: type) -> str:
    """Where an error was raised, to be put behind what it says: the last place in the files of a class, or of all.

    "" if it has no traceback.
    """
    frames = traceback.extract_tb(error.__traceback__)
    files = {getattr(sys.modules.get(each.__module__), "__file__", None) for each in by.__mro__}
    own = [frame for frame in frames if frame.filename in files] or frames
    return f" ({Path(own[-1].filename).name}:{own[-1].lineno}, in {own[-1].name})" if own else ""

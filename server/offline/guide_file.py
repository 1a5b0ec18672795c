"""Files with a guide: the guide's class, the rewards beside it, and the lines at which they fail."""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from guiderail.guides.core.errors import GuiderailError
from guiderail.guides.core.guide import Guide
from guiderail.guides.core.registry import checked_plugin
from guiderail.guides.core.reward import Reward

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GuideFile:
    """A guide's file: the guide's class, and the rewards that the file defines, by the names of their classes."""

    path: Path
    guide: type[Guide]
    rewards: Mapping[str, type[Reward]]


def read_guide(path: Path, name: str | None) -> GuideFile:
    """Import a file and find its guide, the class called `name` if that is given. Raises GuiderailError."""
    module = _imported(path)
    guides = {cls.__name__: cls for cls in _defined(module, Guide)}  # type: ignore[type-abstract]
    if not guides:
        raise GuiderailError(f"{path}: no class in it derives from guiderail.guides.Guide, with a 'run' of its own")
    if name is None and len(guides) > 1:
        raise GuiderailError(f"{path}: has the guides {', '.join(guides)}; choose one with --guide")
    if name is not None and name not in guides:
        raise GuiderailError(f"{path}: has no guide '{name}'; it has {', '.join(guides)}")
    guide = guides[name or next(iter(guides))]
    rewards = {cls.__name__: cls for cls in _defined(module, Reward)}  # type: ignore[type-abstract]
    checked_plugin(guide, _named(path, guide))
    for reward in rewards.values():
        checked_plugin(reward, _named(path, reward))
    return GuideFile(path, guide, rewards)


def _named(path: Path, cls: type) -> str:
    return f"{path}:{inspect.getsourcelines(cls)[1]}: {cls.__name__}"


def _imported(path: Path) -> ModuleType:
    if not path.is_file():
        raise GuiderailError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise GuiderailError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where annotations are looked up
    sys.path.append(str(path.resolve().parent))  # for modules beside it
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise GuiderailError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        raise GuiderailError(f"{path}:{lines[-1] if lines else 1}: {type(error).__name__}: {error}") from error
    return module


def _defined(module: ModuleType, base: type[T]) -> list[type[T]]:
    """Classes below `base` that the module defines and that can be made."""
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, base)]
    return [cls for cls in classes if cls.__module__ == module.__name__ and not inspect.isabstract(cls)]


def place_of(error: BaseException, file: GuideFile) -> str:
    """The line of the guide's file where the error, or the one that it came of, was raised; else that of the class."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for each in reversed(chain):
        frames = [f for f in traceback.extract_tb(each.__traceback__) if f.filename == str(file.path)]
        if frames:
            return f"{file.path}:{frames[-1].lineno}: in {frames[-1].name}"
    return f"{file.path}:{inspect.getsourcelines(file.guide)[1]}"

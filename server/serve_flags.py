"""Command-line flags, derived from the settings: one for each field that has a description."""

import argparse
from collections.abc import Iterable, Sequence
from types import NoneType
from typing import get_args, get_origin

from pydantic.fields import FieldInfo

from guiderail.server.settings import Repeated, Settings, SettingsError

FIELDS = {name: field for name, field in Settings.model_fields.items() if field.description is not None}


def add_flags(parser: argparse._ActionsContainer, names: Iterable[str] = FIELDS) -> None:
    """Add the flags of the settings called `names`; those that are not given leave no attribute behind."""
    for name in names:
        flag, field = flag_of(name), FIELDS[name]
        repeated, kind = _repeated(field), _kind(field)
        if repeated is not None:
            help = f"{field.description}; may be repeated"
            parser.add_argument(flag, action="append", metavar=repeated.metavar, help=help)
        elif kind is bool:
            parser.add_argument(flag, action="store_const", const=True, help=field.description)
        elif kind is list:
            parser.add_argument(flag, metavar="A,B", help=field.description)
        else:
            parser.add_argument(flag, type=kind if kind in (int, float) else str, help=_with_default(field))


def flag_of(name: str) -> str:
    """Return the flag of a setting, such as --max-num-seqs."""
    return f"--{name.replace('_', '-')}"


def given(args: argparse.Namespace, names: Iterable[str] = FIELDS) -> dict[str, object]:
    """Return the settings that the flags give, as `settings.load` takes them. Raises GuiderailError."""
    found: dict[str, object] = {}
    for name in names:
        if not hasattr(args, name):
            continue
        value = found[name] = getattr(args, name)
        repeated = _repeated(FIELDS[name])
        if repeated is not None and repeated.read is not None:
            found[name] = _by_name(name, [repeated.read(item) for item in value])
        elif repeated is not None and _kind(FIELDS[name]) is dict:
            pairs = [item.partition("=") for item in value]
            if not all(key and path for key, _, path in pairs):
                raise SettingsError(f"{flag_of(name)} takes {repeated.metavar}")
            found[name] = _by_name(name, [(key, path) for key, _, path in pairs])
    return found


def _by_name(name: str, items: Sequence[tuple[str, object]]) -> dict[str, object]:
    """The items of a repeated flag by their names. Raises SettingsError for a name that is given twice."""
    found = dict(items)
    for key in found:
        if sum(key == other for other, _ in items) > 1:
            raise SettingsError(f"{flag_of(name)} {key}: this name is given twice")
    return found


def _repeated(field: FieldInfo) -> Repeated | None:
    return next((each for each in field.metadata if isinstance(each, Repeated)), None)


def _kind(field: FieldInfo) -> object:
    """The type of a value, `list` for any list."""
    kinds = [kind for kind in get_args(field.annotation) if kind is not NoneType]
    kind = kinds[0] if NoneType in get_args(field.annotation) else field.annotation
    return get_origin(kind) or kind


def _with_default(field: FieldInfo) -> str:
    default = field.default
    if isinstance(default, int | float):
        return f"{field.description} ({default:g})"
    return f"{field.description} ({default})" if isinstance(default, str) else field.description or ""

"""API keys: those of the flag, and a file of named ones that is read again on SIGHUP. Elsewhere a key is its name."""

import hmac
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from guiderail.guides.core.errors import GuiderailError

log = logging.getLogger("guiderail.server")

MAX_KEYS = 256  # each name is a label of metrics
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(r"[\x21-\x7e]{1,512}")  # what a header can carry


class KeysError(GuiderailError):
    """The file of API keys is wrong. No message of it has a key."""


class Keys:
    """The keys that are accepted now."""

    def __init__(self, given: Sequence[str], file: Path | None = None) -> None:
        """given: keys without names, called key1, key2, ... Raises KeysError for a file that is wrong."""
        self._given = {f"key{number}": key for number, key in enumerate(given, start=1)}
        self._file = file
        self._keys = self._all()

    def __bool__(self) -> bool:
        return bool(self._keys)

    @property
    def names(self) -> list[str]:
        """The names of the keys."""
        return list(self._keys)

    def name_of(self, given: bytes) -> str | None:
        """Return the name of a key, None if there is none such. All are compared, so that the time tells nothing."""
        found = None
        for name, key in self._keys.items():
            if hmac.compare_digest(given, key):
                found = name
        return found

    def reload(self) -> None:
        """Read the file again. One that is wrong is logged, and the keys stay as they are."""
        try:
            self._keys = self._all()
        except KeysError as error:
            log.error("%s; the keys stay as they were", error)
        else:
            log.warning("read %d API keys: %s", len(self._keys), ", ".join(self._keys))

    def _all(self) -> dict[str, bytes]:
        named = {} if self._file is None else read_keys(self._file)
        if both := self._given.keys() & named.keys():
            raise KeysError(f"--api-key-file {self._file}: {min(both)} is what a key given with --api-key is called")
        keys = {name: key.encode() for name, key in (self._given | named).items()}
        if len(set(keys.values())) < len(keys):
            raise KeysError(
                f"--api-key-file {self._file}: two names have the same key" if named else "--api-key: twice"
            )
        return keys


def read_keys(file: Path) -> dict[str, str]:
    """Return the keys of a file by name: lines `name: key`, which are YAML, or a JSON object. Raises KeysError."""
    where = f"--api-key-file {file}"
    try:
        found = yaml.load(file.expanduser().read_text("utf-8-sig"), _Strings)  # a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise KeysError(f"{where}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from error
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        at = "" if line is None else f" (line {line + 1})"
        raise KeysError(f"{where}: expected lines of the form name: key{at}") from None  # whose text has the key
    if not isinstance(found, dict) or not found:
        raise KeysError(f"{where}: expected lines of the form name: key")
    if len(found) > MAX_KEYS:
        raise KeysError(f"{where}: {len(found)} keys; at most {MAX_KEYS} are allowed")
    for name, key in found.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise KeysError(f"{where}: a name has 1 to 64 letters, digits, dots, underscores and hyphens")
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise KeysError(f"{where}: the key of {name} must be 1 to 512 ASCII characters without spaces")
    return found


class _Strings(yaml.SafeLoader):
    """Reads every scalar as the text that stands there (a key may be all digits), and refuses a name given twice."""


def _mapping(loader: _Strings, node: yaml.MappingNode) -> dict[object, object]:
    pairs = [(loader.construct_object(key), loader.construct_object(value)) for key, value in node.value]
    names = [name for name, _ in pairs]
    if len(set(map(str, names))) < len(names):
        raise yaml.YAMLError("a name is given twice")
    return dict(pairs)


_Strings.yaml_implicit_resolvers = {}
_Strings.add_constructor("tag:yaml.org,2002:map", _mapping)

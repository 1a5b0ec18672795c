"""Options of another server as operators give them: flags, addresses, keys. Imports nothing heavy: settings do."""

import os
from urllib.parse import urlsplit

from guiderail.guides.core.errors import GuiderailError


def named_options(text: str, first: str, usage: str) -> tuple[str, dict[str, str]]:
    """Split NAME=VALUE[,key=value...] into the name and the options, with VALUE as the option `first`.

    Raises GuiderailError with `usage`, which says what the flag takes.
    """
    name, equals, rest = text.partition("=")
    value, *options = rest.split(",")
    pairs = [option.partition("=") for option in options]
    if not (name and equals and value and all(key and given for key, _, given in pairs)):
        raise GuiderailError(f"{usage}; got '{text}'")
    return name, {first: value, **{key: given for key, _, given in pairs}}


def api_key(variable: str | None) -> str | None:
    """Return the key in an environment variable, "" if that is unset or empty; None without a variable."""
    return os.environ.get(variable, "").strip() if variable is not None else None


def usable_url(value: str) -> str:
    """Check a server's base URL and return it without a trailing slash. Raises ValueError."""
    url = urlsplit(value)
    if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment or url.port == 0:
        raise ValueError(f"'{value}' is not of the form http://host:port")
    if url.username is not None:
        raise ValueError("a URL shows up in messages: name the key's environment variable with key_env")
    return value.rstrip("/")

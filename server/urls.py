"""What addresses of other servers may be. Imports nothing heavy."""

from urllib.parse import urlsplit


def usable_url(value: str) -> str:
    """A server's base URL, without a slash at its end. Raises ValueError."""
    url = urlsplit(value)
    if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment or url.port == 0:
        raise ValueError(f"'{value}' is not of the form http://host:port")
    if url.username is not None:
        raise ValueError("a URL shows up in messages: name the key's environment variable with key_env")
    return value.rstrip("/")

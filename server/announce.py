"""Messages to the operator on standard error: lines, steps of the start with their times, a request to try."""

import sys
import time
from collections.abc import Callable

from guiderail.server.settings import Settings


def say(text: str) -> None:
    """Print a line for the operator."""
    print(f"guiderail: {text}", file=sys.stderr, flush=True)


def steps() -> Callable[[str], None]:
    """Return a function that tells the operator what is being waited for, with the seconds since this call."""
    began = time.monotonic()
    return lambda text: say(f"{time.monotonic() - began:4.0f} s  {text}")


def example(settings: Settings, url: str, *, chat: bool) -> str:
    """A request to copy: answers chosen by the rule `length`, or a plain one where that is not served."""
    asked = '"messages": [{"role": "user", "content": "Why is the sky blue?"}]' if chat else '"prompt": "The sky is"'
    aligned = settings.rewards is None or "length" in settings.rewards
    body = f'{{{asked}, "max_tokens": 40' + (', "alignment": {"rewards": ["length"]}' if aligned else "") + "}"
    key = ' -H "Authorization: Bearer $KEY"' if settings.api_key else ""
    return f"curl -s {url}/v1/{'chat/' if chat else ''}completions{key} -H 'Content-Type: application/json' -d '{body}'"

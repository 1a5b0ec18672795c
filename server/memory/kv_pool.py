"""Default sizes of a reward model's KV pool, the memory for keys and values."""

from collections.abc import Callable

import psutil

from guiderail.guides.core.errors import GuiderailError

GIB = 2**30
PASS_TOKENS = 8192  # tokens of one forward pass of a reward model
LEAST_POOL = GIB // 2  # bytes, however short the texts: candidates of many requests keep their prefixes there


def default_pool(longest: int | None, kv_token: int) -> int:
    """Return the bytes for a text as long as the model reads and a pass besides, at least LEAST_POOL.

    longest: tokens, None if the model has no limit. kv_token: bytes of one token's keys and values.
    """
    return max(LEAST_POOL, ((longest or 0) + PASS_TOKENS) * kv_token)


def least_pool(longest: int | None, kv_token: int) -> int:
    """Return the fewest bytes that a reward model runs with: for a pass, or for the longest text if that is shorter."""
    return min(longest or PASS_TOKENS, PASS_TOKENS) * kv_token


def host_pool(
    longest: int | None, kv_token: int, available: Callable[[], int] = lambda: int(psutil.virtual_memory().available)
) -> int:
    """Return the default for a model on the CPU, at most half of the memory that is available now.

    Raises GuiderailError if that is less than `least_pool`.
    """
    half = available() // 2
    if half < (least := least_pool(longest, kv_token)):
        raise GuiderailError(
            f"keys and values of {least // kv_token:,} tokens take {gib(least)}, and of the memory {gib(2 * half)} are "
            "available: free some, or say with kv_gb= how much this reward model may take"
        )
    return min(half, default_pool(longest, kv_token))


def gib(size: float) -> str:
    """Format bytes as GiB."""
    return f"{size / GIB:.1f} GiB"

"""How much memory the keys and values of a reward model get where the operator does not say."""

from collections.abc import Callable

import psutil

from guiderail.guides.core.errors import GuiderailError

GIB = 2**30
PASS_TOKENS = 8192  # of one forward pass of a reward model
LEAST_POOL = GIB // 2  # bytes, however little a model reads: candidates of many requests keep their prefixes there


def default_pool(longest: int | None, kv_token: int) -> int:
    """Bytes for one text as long as the model reads and a pass beside it, at least LEAST_POOL.

    longest: tokens, None if the model has no limit. kv_token: bytes of one token's keys and values.
    """
    return max(LEAST_POOL, ((longest or 0) + PASS_TOKENS) * kv_token)


def least_pool(longest: int | None, kv_token: int) -> int:
    """Bytes without which a reward model is not run: for a pass, or for all that the model reads if that is less."""
    return min(longest or PASS_TOKENS, PASS_TOKENS) * kv_token


def host_pool(
    longest: int | None, kv_token: int, available: Callable[[], int] = lambda: int(psutil.virtual_memory().available)
) -> int:
    """The default for a model on the CPU, out of half of the memory that is available now.

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
    """Bytes as GiB for a person to read."""
    return f"{size / GIB:.1f} GiB"

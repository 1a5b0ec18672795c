"""Seeds of everything that a request leaves to chance: named streams that share nothing.

The rule. The very first sequence of the first answer has the request's own seed, so that plain sampling with a seed is
what vLLM gives for it. Everything else (more candidates, later steps, rollouts, selections, calibration, further
answers) has seeds that a hash makes of the request's seed, the answer's number, the stream's name and the step.
Therefore requests with neighbouring seeds share nothing, and neither do two streams, answers or steps of one request.
A request without a seed has none for anything.

Seeds made here lie in [0, 2**63). They are never a sentinel: vLLM takes -1 for "no seed", so a request's own -1 is
hashed like the rest. Of one step they differ in the lowest 32 bits, which is all that torch's CPU generator reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NoReturn

DRAW, ROLLOUT, PICK, POOL_SIZE, CALIBRATION = "draw", "rollout", "pick", "pool size", "calibration"
SENTINELS = frozenset({-1})  # seeds that mean "none" to an engine


@dataclass(frozen=True, slots=True)
class Seeds:
    """The seeds of one answer. request: the request's own seed; answer: number of the answer in the request."""

    request: int | None
    answer: int = 0

    def stream(self, n: int, name: str = DRAW, step: int = 0) -> Sequence[int | None]:
        """Seeds [n] of a step of a stream: int64, distinct, the same for the same arguments; None without a seed."""
        if self.request is None:
            return [None] * n
        text = f"{self.request}\0{self.answer}\0{name}\0{step}"
        digest = blake2b(text.encode(), digest_size=16, person=b"guiderail seeds").digest()
        start, stride = int.from_bytes(digest[:8]), int.from_bytes(digest[8:]) | 1
        seeds = [(start + number * stride) % 2**63 for number in range(n)]  # an odd stride: all differ modulo 2**32
        if n and (name, step, self.answer) == (DRAW, 0, 0) and self.request not in SENTINELS:
            seeds[0] = self.request
        return seeds

    def __call__(self, *args: object, **named: object) -> NoReturn:
        """Refuse the way in which guides asked a Context for seeds before there were Seeds of it."""
        raise TypeError("ctx.seeds(n, step, stream) is ctx.seeds.stream(n, name, step) now")

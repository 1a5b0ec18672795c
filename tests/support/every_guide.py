"""Every guide that searches, in small sizes, and a policy that says what it is told, for tests that run them all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tabular_context import Scores

from guiderail.guides.args import Args
from guiderail.guides.best_of_n import BestOfN
from guiderail.guides.controlled_decoding import ControlledDecoding
from guiderail.guides.core.guide import Guide
from guiderail.guides.core.policy import PolicySpec
from guiderail.guides.deal import Deal
from guiderail.guides.speculative_rejection import SpeculativeRejection
from guiderail.guides.transfer_q import TransferQ

STEPWISE: dict[str, Callable[[], Guide]] = {
    "controlled_decoding": lambda: ControlledDecoding(ControlledDecoding.Params(k=3, block=3)),
    "controlled_decoding-rollouts": lambda: ControlledDecoding(
        ControlledDecoding.Params(k=3, block=2, rollouts=2, horizon=2)
    ),
    "transfer_q": lambda: TransferQ(TransferQ.Params(top_k=3, lookahead=3)),
    "transfer_q-blocks": lambda: TransferQ(TransferQ.Params(top_k=3, block=4, lookahead=2, rollouts=2)),
    "transfer_q-indirect": lambda: TransferQ(
        TransferQ.Params(
            top_k=3, lookahead=None, rollouts=2, baseline=PolicySpec(model="adapter"), baseline_reward="other"
        )
    ),
    "args": lambda: Args(Args.Params(top_k=3)),
    "deal": lambda: Deal(Deal.Params(top_k=3, lookahead=2)),
    "deal-beams": lambda: Deal(Deal.Params(beams=3, top_k=3, lookahead=2)),
    "deal-no-lookahead": lambda: Deal(Deal.Params(beams=2, top_k=3, lookahead=0)),
}
WHOLE: dict[str, Callable[[], Guide]] = {
    "speculative_rejection": lambda: SpeculativeRejection(SpeculativeRejection.Params(n=6, interval=2)),
    "speculative_rejection-segments": lambda: SpeculativeRejection(SpeculativeRejection.Params(n=6)),
    "best_of_n": lambda: BestOfN(BestOfN.Params(n=3)),
}
EVERY = STEPWISE | WHOLE
REWARDS = {"r": 1.0, "other": 0.0}  # weights by name


@dataclass(frozen=True)
class Script:
    """A policy that says the tokens of a script, then the end of the sequence.

    Where min_tokens or the like bars the script's token, the lowest token that is left takes its place: each is half
    as likely as the one before it, so that no two answers tie, and all are so unlikely that no search leaves the script.
    """

    tokens: Sequence[int]
    vocabulary: int

    def distribution(self, prefix: Sequence[int]) -> np.ndarray:
        p = 1e-6 * 0.5 ** np.arange(self.vocabulary)
        p[self.tokens[len(prefix)] if len(prefix) < len(self.tokens) else 0] = 1.0
        return p / p.sum()


class Endless:
    """A policy over `vocabulary` letters that never ends, and whose distribution depends on the last token alone."""

    def __init__(self, vocabulary: int = 5, seed: int = 0, end: float = 0.0) -> None:
        """end: probability of the end of the sequence at each token."""
        p = np.exp(np.random.default_rng(seed).standard_normal((vocabulary, vocabulary)))
        p[:, 0] = 0
        self._table = np.concatenate([np.full((vocabulary, 1), end), (1 - end) * p[:, 1:] / p.sum(1)[:, None]], axis=1)

    def distribution(self, prefix: Sequence[int]) -> np.ndarray:
        row: np.ndarray = self._table[prefix[-1] if prefix else 0]
        return row


class Values:
    """A reward of any answer, partial or whole: a hash of its tokens in [0, 1), or the same for all."""

    def __init__(self, salt: int = 0, *, constant: float | None = None) -> None:
        self._salt = salt
        self._constant = constant

    def __getitem__(self, ids: Sequence[int]) -> float:
        if self._constant is not None:
            return self._constant
        return float(np.random.default_rng([self._salt, *ids]).random())


def random_scores() -> Scores:
    """Of REWARDS, each its own."""
    return Scores({name: Values(i) for i, name in enumerate(REWARDS)}, partial=Values(99).__getitem__)


def flat_scores() -> Scores:
    """Nothing is better than anything else."""
    ones = Values(constant=1.0)
    return Scores(dict.fromkeys(REWARDS, ones), partial=ones.__getitem__)

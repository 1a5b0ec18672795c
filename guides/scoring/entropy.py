"""Measures of how concentrated a distribution is: a selection's weights, a policy's next token."""

import math
from collections.abc import Sequence

import numpy as np

from guiderail.guides.core.types import TokenLogprob
from guiderail.guides.scoring.transforms import Array


def effective_sample_size(weights: Array) -> float:
    """(sum w)^2 / sum w^2: the number of equal weights that these amount to, from 1 to their number."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def token_entropy(logprobs: Sequence[TokenLogprob] | None) -> dict[str, float | None]:
    """The policy's uncertainty, as means over the tokens that list their likeliest alternatives; None if none does.

    `token_entropy` (nats) is that of the distribution over these tokens and "any other", a lower bound of the whole
    one's; `top_mass` is the probability they hold together.
    """
    entropies, masses = [], []
    for token in logprobs or ():
        if not token.top:
            continue
        p = np.exp([logprob for _, logprob in token.top])
        mass = min(1.0, float(p.sum()))
        outcomes = np.append(p, 1.0 - mass)
        outcomes = outcomes[outcomes > 0]
        entropies.append(-float((outcomes * np.log(outcomes)).sum()))
        masses.append(mass)
    if not masses:
        return {"token_entropy": None, "top_mass": None}
    return {"token_entropy": math.fsum(entropies) / len(entropies), "top_mass": math.fsum(masses) / len(masses)}

"""transform -> combine -> select: from raw rewards to the chosen candidate, as small pure functions."""

from guiderail.guides.pipeline.combine import COMBINES, Combine
from guiderail.guides.pipeline.diagnostics import effective_sample_size, over_optimised, token_entropy
from guiderail.guides.pipeline.select import SELECTIONS, Choice, Pool, Selection
from guiderail.guides.pipeline.terms import RewardTerm
from guiderail.guides.pipeline.transforms import IDENTITY, Chain, ChainError, parse_chain

__all__ = [
    "COMBINES",
    "IDENTITY",
    "SELECTIONS",
    "Chain",
    "ChainError",
    "Choice",
    "Combine",
    "Pool",
    "RewardTerm",
    "Selection",
    "effective_sample_size",
    "over_optimised",
    "parse_chain",
    "token_entropy",
]

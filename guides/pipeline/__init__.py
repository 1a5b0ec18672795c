"""transform -> combine -> select: from raw rewards to the chosen candidate, as small pure functions."""

from guiderail.guides.pipeline.combine import COMBINES, Combine
from guiderail.guides.pipeline.diagnostics import effective_sample_size, moved_far, over_optimised, token_entropy
from guiderail.guides.pipeline.origin import POOL_KINDS, Origin, PoolKind
from guiderail.guides.pipeline.select import SELECTIONS, Choice, Pool, Selection
from guiderail.guides.pipeline.terms import RewardTerm
from guiderail.guides.pipeline.transforms import IDENTITY, Chain, ChainError, parse_chain

__all__ = [
    "COMBINES",
    "IDENTITY",
    "POOL_KINDS",
    "SELECTIONS",
    "Chain",
    "ChainError",
    "Choice",
    "Combine",
    "Origin",
    "Pool",
    "PoolKind",
    "RewardTerm",
    "Selection",
    "effective_sample_size",
    "moved_far",
    "over_optimised",
    "parse_chain",
    "token_entropy",
]

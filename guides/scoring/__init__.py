"""transform -> combine -> select: from raw rewards to the chosen candidate. Knows no engine and no single guide."""

from guiderail.guides.scoring.chain import IDENTITY, Chain, ChainError, RewardTerm, parse_chain
from guiderail.guides.scoring.combine import COMBINES, Combine
from guiderail.guides.scoring.kl import POOL_KINDS, Origin, PoolKind
from guiderail.guides.scoring.selection.best import SELECTIONS, Choice, Pool, Selection
from guiderail.guides.scoring.selection_report import effective_sample_size, moved_far, over_optimised, token_entropy

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

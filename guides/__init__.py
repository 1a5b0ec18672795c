"""Guides and the vocabulary they share with rewards: what a plugin author imports.

Importing this needs neither vllm nor torch.
"""

from guiderail.guides.best_of_n import draw_scored
from guiderail.guides.core.context import Context
from guiderail.guides.core.errors import DeadlinePassed, GuiderailError, RewardFailed
from guiderail.guides.core.guide import Engine, Guide, Helpers, Params, Rollouts, Scorer, ScoreResult, answer_events
from guiderail.guides.core.reward import Reward, Services, TextReward, answer_texts
from guiderail.guides.core.types import Answer, Candidate, Delta, Event, Final, Message, Scored, ScoreGroup, Token

__all__ = [
    "Answer",
    "Candidate",
    "Context",
    "DeadlinePassed",
    "Delta",
    "Engine",
    "Event",
    "Final",
    "Guide",
    "GuiderailError",
    "Helpers",
    "Message",
    "Params",
    "Reward",
    "RewardFailed",
    "Rollouts",
    "ScoreGroup",
    "ScoreResult",
    "Scored",
    "Scorer",
    "Services",
    "TextReward",
    "Token",
    "answer_events",
    "answer_texts",
    "draw_scored",
]

"""The public API: all that a guide or a reward of somebody else's imports. Importing it needs neither vllm nor torch.

README.md beside this file grows a guide from ten lines to one that decodes in steps.
"""

from guiderail.guides.best_of_n import Drawn, draw_scored, in_place
from guiderail.guides.core.context import Context
from guiderail.guides.core.errors import (
    AlignmentField,
    DeadlinePassed,
    EngineUnavailable,
    FieldError,
    GuideField,
    GuiderailError,
    RequestError,
    RewardFailed,
)
from guiderail.guides.core.guide import Guide, answer_events
from guiderail.guides.core.interfaces import Engine, Renderer, Rollouts, Scorer, ScoreResult, Services
from guiderail.guides.core.policy import Policy, PolicySpec
from guiderail.guides.core.reward import Reward, TextReward, answer_texts, instructions, prompt_text
from guiderail.guides.core.types import (
    Answer,
    Candidate,
    Delta,
    Event,
    Final,
    Message,
    Params,
    SamplingSpec,
    Scored,
    ScoreGroup,
    Token,
    TokenLogprob,
    TokenPrompt,
)
from guiderail.guides.scoring.kl import Origin, PoolKind
from guiderail.guides.scoring.pipeline import Pick
from guiderail.guides.scoring.scores import Scores
from guiderail.guides.search.lookahead import Lookahead, Weigh, roll_forward, successors, value
from guiderail.guides.search.sequence import Piece, roll_out
from guiderail.guides.search.stepwise import MAX_TOP_K, UNKEPT, UNKEPT_BY_BLOCKS, Steps, draw_blocks, top_tokens
from guiderail.guides.search.transcript import Transcript

__all__ = [
    "MAX_TOP_K",
    "UNKEPT",
    "UNKEPT_BY_BLOCKS",
    "AlignmentField",
    "Answer",
    "Candidate",
    "Context",
    "DeadlinePassed",
    "Delta",
    "Drawn",
    "Engine",
    "EngineUnavailable",
    "Event",
    "FieldError",
    "Final",
    "Guide",
    "GuideField",
    "GuiderailError",
    "Lookahead",
    "Message",
    "Origin",
    "Params",
    "Pick",
    "Piece",
    "Policy",
    "PolicySpec",
    "PoolKind",
    "Renderer",
    "RequestError",
    "Reward",
    "RewardFailed",
    "Rollouts",
    "SamplingSpec",
    "ScoreGroup",
    "ScoreResult",
    "Scored",
    "Scorer",
    "Scores",
    "Services",
    "Steps",
    "TextReward",
    "Token",
    "TokenLogprob",
    "TokenPrompt",
    "Transcript",
    "Weigh",
    "answer_events",
    "answer_texts",
    "draw_blocks",
    "draw_scored",
    "in_place",
    "instructions",
    "prompt_text",
    "roll_forward",
    "roll_out",
    "successors",
    "top_tokens",
    "value",
]

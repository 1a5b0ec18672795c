"""Rewards from small published text classifiers. They say what their scorer says, not what is safe or kind.

Both are loaded when the server starts. The profanity model is a pickle, which runs code when it is
loaded: only the pinned release of its package is accepted.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import NoReturn

from guiderail.guides.core.interfaces import ScoreResult, Services
from guiderail.guides.core.reward import TextReward, answer_texts
from guiderail.guides.core.types import Params, ScoreGroup

PROFANITY_VERSION = "1.9.1"


def _not_started(text: object) -> NoReturn:
    raise RuntimeError("the classifier is not loaded yet")


class Offensive(TextReward):
    """Minus the probability of offensive wording by alt-profanity-check, in [-1, 0]: higher is cleaner."""

    def __init__(self) -> None:
        self._predict: Callable[[Sequence[str]], Sequence[float]] = _not_started

    async def start(self, services: Services) -> None:
        installed = version("alt-profanity-check")
        if installed != PROFANITY_VERSION:
            raise RuntimeError(f"alt-profanity-check {installed} is installed; only {PROFANITY_VERSION} is trusted")
        from profanity_check import predict_prob

        self._predict = predict_prob

    def revision(self) -> str:
        return f"alt-profanity-check {PROFANITY_VERSION}"

    def _score(self, groups: Sequence[ScoreGroup]) -> list[ScoreResult]:
        values = [-float(p) for p in self._predict([text for group in groups for text in answer_texts(group)])]
        results, start = [], 0
        for group in groups:
            results.append(ScoreResult(tuple(values[start : start + len(group.answers)])))
            start += len(group.answers)
        return results

    def score_text(self, prompt: str, answer: str, params: Params) -> float:
        return -float(self._predict([answer])[0])


class Sentiment(TextReward):
    """Sentiment of the answer by the VADER lexicon: its compound value, in [-1, 1]."""

    def __init__(self) -> None:
        self._polarity: Callable[[str], Mapping[str, float]] = _not_started

    async def start(self, services: Services) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self._polarity = SentimentIntensityAnalyzer().polarity_scores

    def revision(self) -> str:
        return f"vaderSentiment {version('vaderSentiment')}"

    def score_text(self, prompt: str, answer: str, params: Params) -> float:
        return float(self._polarity(answer)["compound"])

"""The served model as judge: its probability of yes, rather than no, to a question about the answer.

The instructions that the answer was given under (system messages, where there are any), the question, the answer and
the rubric come in this order, so that judging many answers to one question shares the prefix. All but the rubric are
quoted in the prompt (verdicts.py).
"""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from pydantic import Field

from guiderail.guides.core.interfaces import ScoreResult, Services
from guiderail.guides.core.reward import Reward, answer_texts, begun, instructions, prompt_text
from guiderail.guides.core.types import Params, ScoreGroup
from guiderail.server.rewards.verdicts import Verdicts, quoted


class JudgeParams(Params):
    rubric: str = Field(
        default="Is this a helpful, correct and polite answer to the question?",
        min_length=1,
        max_length=8192,
        description="A yes-or-no question about the answer; yes is good.",
    )
    adapter: str | None = Field(default=None, description="LoRA adapter that judges; default: the served model.")


class Judge(Reward[JudgeParams]):
    """Probability of yes against no when the served model is asked a question about the answer, in [0, 1]."""

    Params = JudgeParams

    batched: ClassVar[bool] = False
    asks_engine: ClassVar[bool] = True

    def __init__(self) -> None:
        self._verdicts: Verdicts | None = None

    async def start(self, services: Services) -> None:
        refusal = "this tokenizer gives yes and no the same first token, so it cannot judge"
        self._verdicts = Verdicts(services, ("Yes", "No"), refusal)

    def check(self, params: JudgeParams, services: Services) -> None:
        if params.adapter is not None and params.adapter not in services.adapters:
            known = ", ".join(sorted(services.adapters)) or "none"
            raise ValueError(f"'adapter': no LoRA adapter '{params.adapter}'; loaded: {known}")

    def room(self, group: ScoreGroup[JudgeParams]) -> int | None:
        """What question and rubric leave of the context. Raises TooLong."""
        if self._verdicts is None:
            return None
        left = self._verdicts.room(_question(group, begun(group.messages)))
        if left is None:
            return None
        for answer in answer_texts(group):
            if len(quoted(answer).encode(errors="replace")) > left:  # as many tokens at most
                self._verdicts.room(_question(group, answer))
        return left

    async def score(self, groups: Sequence[ScoreGroup[JudgeParams]]) -> list[ScoreResult]:
        assert self._verdicts is not None
        results = []
        for group in groups:
            texts = map(partial(_question, group), answer_texts(group))
            values, tokens = await self._verdicts.ask(texts, group.params.adapter)
            results.append(ScoreResult(tuple(values), tokens))
        return results


def _question(group: ScoreGroup[JudgeParams], answer: str) -> str:
    told = instructions(group.messages)
    given = f"Instructions:\n{quoted(told)}\n\n" if told else ""
    text = f"{given}Question:\n{quoted(prompt_text(group.messages))}\n\nAnswer:\n{quoted(answer)}\n\n"
    return f"{text}{group.params.rubric} Reply with Yes or No only."

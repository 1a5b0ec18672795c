"""The served model as judge: how likely it says yes, rather than no, to a question about the answer.

Read from the log-probabilities of the next token, so a verdict costs a prompt and no generation. The
instructions that the answer was given under (system messages, where there are any), the question, the answer and the
rubric come in this order, so that judging many answers to one question shares the prefix. All but the rubric stand in
it as quotes (quoting.py).
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from guiderail.guides.core import guide as base
from guiderail.guides.core.guide import ScoreResult
from guiderail.guides.core.reward import Reward, Services, answer_texts, instructions, prompt_text
from guiderail.guides.core.types import Message, ScoreGroup, TokenPrompt
from guiderail.server.rewards.quoting import quoted

YES, NO = "Yes", "No"


class Judge(Reward):
    """Probability of yes against no when the served model is asked a question about the answer, in [0, 1]."""

    class Params(base.Params):
        rubric: str = Field(
            default="Is this a helpful, correct and polite answer to the question?",
            min_length=1,
            max_length=8192,
            description="A yes-or-no question about the answer; yes is good.",
        )
        adapter: str | None = Field(default=None, description="LoRA adapter that judges; default: the served model.")

    batched: ClassVar[bool] = False

    def __init__(self) -> None:
        self._services: Services | None = None
        self._verdicts = (0, 0)

    async def start(self, services: Services) -> None:
        self._services = services
        # After a template's generation prompt the reply starts at once, after "Reply:" with a space.
        space = "" if services.renderer.has_chat_template else " "
        yes, no = (services.renderer.encode(space + word)[0] for word in (YES, NO))
        if yes == no:
            raise ValueError("this tokenizer gives yes and no the same first token, so it cannot judge")
        self._verdicts = (yes, no)

    def check(self, params: Any, services: Services) -> None:
        if params.adapter is not None and params.adapter not in services.adapters:
            known = ", ".join(sorted(services.adapters)) or "none"
            raise ValueError(f"'adapter': no LoRA adapter '{params.adapter}'; loaded: {known}")

    async def score(self, groups: Sequence[ScoreGroup]) -> list[ScoreResult]:
        services = self._services
        assert services is not None
        results = []
        for group in groups:
            prompts = [self._prompt(services, group, text) for text in answer_texts(group)]
            verdicts = [(token,) for token in self._verdicts] * len(prompts)
            rows = await services.engine.answer_logprobs([p for p in prompts for _ in self._verdicts], verdicts)
            values = tuple(yes_probability(yes[0], no[0]) for yes, no in zip(rows[::2], rows[1::2], strict=True))
            results.append(ScoreResult(values, sum(len(p.token_ids) for p in prompts)))
        return results

    @staticmethod
    def _prompt(services: Services, group: ScoreGroup, answer: str) -> TokenPrompt:
        question = quoted(prompt_text(group.messages))
        told = instructions(group.messages)
        given = f"Instructions:\n{quoted(told)}\n\n" if told else ""
        text = f"{given}Question:\n{question}\n\nAnswer:\n{quoted(answer)}\n\n{group.params.rubric} "
        text += "Reply with Yes or No only."
        if services.renderer.has_chat_template:
            prompt = services.renderer.render([Message("user", text)])
            return TokenPrompt(prompt.token_ids, group.params.adapter)
        ids = services.renderer.encode(text + "\nReply:", add_special_tokens=True)
        return TokenPrompt(tuple(ids), group.params.adapter)


def yes_probability(yes: float, no: float) -> float:
    """P(yes) / (P(yes) + P(no)) from the two log-probabilities, without underflow."""
    return 1.0 / (1.0 + math.exp(min(no - yes, 700.0)))

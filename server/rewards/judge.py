"""The served model as judge: how likely it says yes, rather than no, to a question about the answer.

Read from the next token's log-probabilities, so a verdict costs one prompt and no generation. The
question, the answer and the rubric come in this order, so that judging many answers to one question
shares the prefix.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from guiderail.guides import base
from guiderail.guides.base import ScoreResult
from guiderail.guides.reward import Reward, Services, prompt_text
from guiderail.guides.types import Message, ScoreGroup, TokenPrompt

YES = ("Yes", " Yes", "yes", " yes")
NO = ("No", " No", "no", " no")


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
        self._yes: tuple[int, ...] = ()
        self._no: tuple[int, ...] = ()

    async def start(self, services: Services) -> None:
        self._services = services
        self._yes = _first_tokens(services, YES)
        self._no = _first_tokens(services, NO)
        if set(self._yes) & set(self._no):
            raise ValueError("this tokenizer gives yes and no the same first token, so it cannot judge")

    def check(self, params: Any, services: Services) -> None:
        if params.adapter is not None and params.adapter not in services.adapters:
            known = ", ".join(sorted(services.adapters)) or "none"
            raise ValueError(f"'adapter': no LoRA adapter '{params.adapter}'; loaded: {known}")

    async def score(self, groups: Sequence[ScoreGroup]) -> list[ScoreResult]:
        services = self._services
        assert services is not None
        results = []
        for group in groups:
            prompts = [self._prompt(services, group, answer.text) for answer in group.answers]
            rows = await services.engine.next_token_logprobs(prompts, token_ids=(*self._yes, *self._no))
            values = tuple(yes_probability(row, self._yes, self._no) for row in rows)
            results.append(ScoreResult(values, sum(len(p.token_ids) for p in prompts)))
        return results

    @staticmethod
    def _prompt(services: Services, group: ScoreGroup, answer: str) -> TokenPrompt:
        question = prompt_text(group.messages)
        text = f"Question:\n{question}\n\nAnswer:\n{answer}\n\n{group.params.rubric} Reply with Yes or No only."
        if services.renderer.has_chat_template:
            prompt = services.renderer.render([Message("user", text)])
            return TokenPrompt(prompt.token_ids, group.params.adapter)
        ids = services.renderer.encode(text + "\nReply:", add_special_tokens=True)
        return TokenPrompt(tuple(ids), group.params.adapter)


def yes_probability(row: dict[int, float], yes: Sequence[int], no: Sequence[int]) -> float:
    """P(yes) / (P(yes) + P(no)) from next-token log-probabilities, summed over spellings."""
    p_yes = math.fsum(math.exp(row[token]) for token in yes)
    p_no = math.fsum(math.exp(row[token]) for token in no)
    if p_yes + p_no == 0.0:
        raise ValueError("the model gives neither yes nor no any probability")
    return p_yes / (p_yes + p_no)


def _first_tokens(services: Services, spellings: Sequence[str]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(services.renderer.encode(text)[0] for text in spellings))

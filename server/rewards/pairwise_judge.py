"""The served model as judge between two answers: its probability of naming the first as the better one.

Both orders are asked and averaged, which takes out a preference for a place (position bias: Zheng et al. 2023,
arXiv 2306.05685). Question and answers are quoted in the prompt (verdicts.py). What is too long is cut, and the prompt
says so outside of the quote.
"""

import asyncio
from collections.abc import Callable, Sequence

from guiderail.guides.core.interfaces import Services
from guiderail.guides.core.reward import instructions, prompt_text
from guiderail.guides.core.types import Message
from guiderail.server.rewards.verdicts import Verdicts, quoted

CUT = "(The rest is cut off.)"


class PairwiseJudge:
    """Compares answers by asking the served model which of two is better."""

    def __init__(self, services: Services, *, max_tokens: int = 512) -> None:
        """max_tokens: of the question and of each answer, which are cut behind them: three times as many, the criterion
        and some sixty tokens must fit the model's context. Raises ValueError if the tokenizer cannot tell A from B.
        """
        self._services = services
        self._max_tokens = max_tokens
        refusal = "this tokenizer gives A and B the same first token, so the model cannot judge pairs"
        self._verdicts = Verdicts(services, ("A", "B"), refusal)

    async def prefer(
        self, messages: Sequence[Message], criterion: str, answers: Sequence[str], pairs: Sequence[tuple[int, int]]
    ) -> list[float]:
        """Return for each pair (i, j) of indices the probability that answers[i] beats answers[j], in [0, 1].

        `criterion` is a question such as "Which answer is more helpful?". All pairs are asked in one batch,
        equal prompts once. The value of (i, j) is exactly 1 minus that of (j, i), and 0.5 for equal answers.
        Raises what the engine raises.
        """
        texts = await asyncio.to_thread(self._texts, messages, criterion, answers, pairs)
        asked = list(dict.fromkeys(texts.values()))
        found, _ = await self._verdicts.ask(asked)
        names_a = dict(zip(asked, found, strict=True))

        def beats(i: int, j: int) -> float:
            if i > j:  # the same sum for both orders, so that they are complements to the last bit
                return 1 - beats(j, i)
            value = (names_a[texts[i, j]] + (1 - names_a[texts[j, i]])) / 2
            return 1 - (1 - value)  # on the grid on which 1 - x is exact

        return [beats(i, j) for i, j in pairs]

    def _texts(
        self, messages: Sequence[Message], criterion: str, answers: Sequence[str], pairs: Sequence[tuple[int, int]]
    ) -> dict[tuple[int, int], str]:
        """Return the questions about all pairs, in both orders."""
        told, question = self._asked(messages)
        quotes = {index: self._quote(answers[index]) for index in {index for pair in pairs for index in pair}}
        return {
            (first, second): f"{told}Question:\n{question}\n\nAnswer A:\n{quotes[first]}\n\nAnswer B:\n{quotes[second]}"
            f"\n\n{criterion} Reply with A or B only."
            for i, j in pairs
            for first, second in ((i, j), (j, i))
        }

    def _asked(self, messages: Sequence[Message]) -> tuple[str, str]:
        """Return instructions (with a heading) and question: together they have the tokens of one quoted text."""
        told = instructions(messages)
        if not told:
            return "", self._quote(prompt_text(messages))
        half = self._max_tokens // 2
        return f"Instructions:\n{self._quote(told, half)}\n\n", self._quote(prompt_text(messages), half)

    def _quote(self, text: str, max_tokens: int | None = None) -> str:
        whole, limit = text, max_tokens or self._max_tokens
        while len(ids := self._services.renderer.encode(text, plain=True)) > limit:
            text = text[: min(len(text) - 1, len(text) * limit // len(ids))]
        lines = quoted(text)
        return lines if text == whole else f"{lines}\n{CUT}"


class ServedJudge:
    """The pairwise judge of a server, made at its first comparison: only a started engine knows its context."""

    def __init__(self, services: Services, *, max_tokens: Callable[[], int]) -> None:
        """max_tokens: PairwiseJudge's, once the engine has started."""
        self._services = services
        self._max_tokens = max_tokens
        self._judge: PairwiseJudge | None = None

    async def prefer(
        self, messages: Sequence[Message], criterion: str, answers: Sequence[str], pairs: Sequence[tuple[int, int]]
    ) -> list[float]:
        """Return PairwiseJudge's probabilities. Raises ValueError besides if the tokenizer cannot tell A from B."""
        if self._judge is None:
            self._judge = PairwiseJudge(self._services, max_tokens=self._max_tokens())
        return await self._judge.prefer(messages, criterion, answers, pairs)

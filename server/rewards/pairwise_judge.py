"""The served model as judge between two answers: how likely it names the first as the better one.

Read from the log-probabilities of the reply's first token, "A" against "B", so a verdict costs two prompts
and no generation. Both orders are asked and averaged, which takes out a preference for a place (position
bias: Zheng et al. 2023, arXiv 2306.05685). Question and answers stand in the prompt as quotes: each of their
lines begins with "> ", and what could be a special token of some tokenizer is broken up, so that no text can
look like a part of the prompt. What is too long is cut, and the prompt says so outside of the quote.
"""

from collections.abc import Sequence

from guiderail.guides.core.reward import Services, instructions, prompt_text
from guiderail.guides.core.types import Message, TokenPrompt
from guiderail.server.rewards.llm_judge import yes_probability
from guiderail.server.rewards.quoting import quoted

CUT = "(The rest is cut off.)"


class PairwiseJudge:
    """Compares answers by asking the served model which of two is better."""

    def __init__(self, services: Services, *, max_tokens: int = 512) -> None:
        """Question and answers are cut after `max_tokens` tokens each: three of them, the criterion and some
        sixty tokens must fit the model's context. Raises ValueError if the tokenizer cannot tell A from B.
        """
        self._services = services
        self._max_tokens = max_tokens
        # After a template's generation prompt the reply starts at once, after "Reply:" with a space.
        space = "" if services.renderer.has_chat_template else " "
        first, second = (services.renderer.encode(space + letter)[0] for letter in "AB")
        if first == second:
            raise ValueError("this tokenizer gives A and B the same first token, so the model cannot judge pairs")
        self._verdicts = ((first,), (second,))

    async def prefer(
        self, messages: Sequence[Message], criterion: str, answers: Sequence[str], pairs: Sequence[tuple[int, int]]
    ) -> list[float]:
        """For each pair (i, j) of indices: the probability that answers[i] beats answers[j], in [0, 1].

        `criterion` is a question such as "Which answer is more helpful?". All pairs are asked in one batch,
        equal prompts once. The value of (i, j) is exactly 1 minus that of (j, i), and 0.5 for equal answers.
        Raises what the engine raises.
        """
        told, question = self._asked(messages)
        quotes = {index: self._quote(answers[index]) for index in {index for pair in pairs for index in pair}}
        texts = {
            (first, second): f"{told}Question:\n{question}\n\nAnswer A:\n{quotes[first]}\n\nAnswer B:\n{quotes[second]}"
            f"\n\n{criterion} Reply with A or B only."
            for i, j in pairs
            for first, second in ((i, j), (j, i))
        }
        prompts = {text: self._prompt(text) for text in dict.fromkeys(texts.values())}
        rows = await self._services.engine.answer_logprobs(
            [prompt for prompt in prompts.values() for _ in self._verdicts], self._verdicts * len(prompts)
        )
        names_a = {text: yes_probability(a[0], b[0]) for text, a, b in zip(prompts, rows[::2], rows[1::2], strict=True)}

        def beats(i: int, j: int) -> float:
            if i > j:  # the same sum for both orders, so that they are complements to the last bit
                return 1 - beats(j, i)
            value = (names_a[texts[i, j]] + (1 - names_a[texts[j, i]])) / 2
            return 1 - (1 - value)  # on the grid on which 1 - x is exact

        return [beats(i, j) for i, j in pairs]

    def _asked(self, messages: Sequence[Message]) -> tuple[str, str]:
        """What the answers were given under, with its heading, and the question: together within the tokens of one."""
        told = instructions(messages)
        if not told:
            return "", self._quote(prompt_text(messages))
        half = self._max_tokens // 2
        return f"Instructions:\n{self._quote(told, half)}\n\n", self._quote(prompt_text(messages), half)

    def _quote(self, text: str, max_tokens: int | None = None) -> str:
        whole, limit = text, max_tokens or self._max_tokens
        while len(ids := self._services.renderer.encode(text)) > limit:
            text = text[: min(len(text) - 1, len(text) * limit // len(ids))]
        lines = quoted(text)
        return lines if text == whole else f"{lines}\n{CUT}"

    def _prompt(self, text: str) -> TokenPrompt:
        renderer = self._services.renderer
        if renderer.has_chat_template:
            return renderer.render([Message("user", text)])
        return TokenPrompt(tuple(renderer.encode(text + "\nReply:", add_special_tokens=True)))

"""Rewards that are rules over the answer's text: keywords, length, regular expression, JSON schema.

Words, patterns and schemas come from requests and can take for ever on an answer: server/bounded works with them.
"""

import asyncio
import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import Field

from guiderail.guides.core.errors import RequestError
from guiderail.guides.core.interfaces import ScoreResult, Services
from guiderail.guides.core.reward import Reward, TextReward, answer_texts, prompt_text
from guiderail.guides.core.types import P_co, Params, ScoreGroup
from guiderail.server.bounded.bounded import Json, bounded
from guiderail.server.bounded.sizes import MAX_PATTERN_CHARS, check_pattern_size, check_schema_size

PART_ANSWERS, PART_CHARS = 32, 100_000  # of one job: each has a second
MAX_WORD_CHARS = 16_384  # of all words of `keywords`
STOP_WORDS = frozenset(
    """
    about after also because been before being both could does doing down each else ever from have
    having here into just like make many more most much must only other ought over please same should
    some such than that their them then there these they this those through under until very want were
    what when where which while whom whose will with would write your yours
    """.split()  # noqa: SIM905
)


class _Rule(Reward[P_co]):
    """A reward of the answer's text alone that is computed under the limits of server/bounded."""

    batched: ClassVar[bool] = False  # one request's patterns wait for their turn, and not those of others with them

    async def close(self) -> None:
        bounded().stop()

    @abstractmethod
    def job(self, prompt: str, params: P_co) -> tuple[Json, ...]:  # type: ignore[misc]  # as in Reward.check
        """The name and the arguments of the job in server/bounded/jobs.py that scores answers; they come last."""
        ...

    async def score(self, groups: Sequence[ScoreGroup[P_co]]) -> list[ScoreResult]:
        return [await self._score(group) for group in groups]

    async def _score(self, group: ScoreGroup[P_co]) -> ScoreResult:
        name, *args = self.job(prompt_text(group.messages), group.params)
        jobs = [
            asyncio.wrap_future(bounded().submit(str(name), *args, part, owner=group.owner))
            for part in _parts(answer_texts(group))
        ]
        try:
            found = await asyncio.gather(*jobs)
        except ValueError as refusal:
            raise RequestError(f"what it is given {refusal}") from refusal
        finally:
            for each in jobs:
                each.cancel()
        return ScoreResult(tuple(value for values in found for value in _numbers(values)))


def _numbers(values: Json) -> Iterator[float]:
    assert isinstance(values, list)
    for value in values:
        assert isinstance(value, float)
        yield value


def _parts(answers: Sequence[str]) -> Iterator[list[str]]:
    """Cut answers into parts that take about the same time."""
    left = iter(answers)
    part: list[str] = []
    for answer in left:
        if part and (len(part) >= PART_ANSWERS or sum(map(len, part)) + len(answer) > PART_CHARS):
            yield part
            part = []
        part.append(answer)
    if part:
        yield part


class KeywordsParams(Params):
    words: list[str] = Field(
        default=[], max_length=256, description="Words or phrases to cover; empty: content words of the question."
    )
    match: Literal["word", "prefix"] = Field(
        default="word", description="'prefix' also accepts longer forms: 'run' is covered by 'running'."
    )
    case_sensitive: bool = False


class Keywords(_Rule[KeywordsParams]):
    """Fraction of the given words that the answer contains (by default the question's own content words)."""

    Params = KeywordsParams

    def check(self, params: KeywordsParams, services: Services) -> None:
        if any(not word.strip() for word in params.words):
            raise ValueError("'words' must not contain empty words")
        if (chars := sum(map(len, params.words))) > MAX_WORD_CHARS:
            raise ValueError(f"'words' have {chars} characters; at most {MAX_WORD_CHARS} are allowed")

    def job(self, prompt: str, params: KeywordsParams) -> tuple[Json, ...]:
        words = params.words or content_words(prompt)
        return "find_words", words, params.match == "prefix", params.case_sensitive


def content_words(text: str) -> list[str]:
    """Return the distinct lower-case words of at least four letters that are not stop words, in order."""
    words = (word.lower() for word in re.findall(r"[^\W\d_]{4,}", text))
    return list(dict.fromkeys(word for word in words if word not in STOP_WORDS))


class LengthParams(Params):
    target: int = Field(default=60, ge=1, le=1_000_000, description="Wanted length, in `unit`s.")
    unit: Literal["words", "characters", "sentences"] = "words"


class Length(TextReward[LengthParams]):
    """Closeness to a target length: minus the relative distance, 0 at the target."""

    Params = LengthParams

    def score_text(self, prompt: str, answer: str, params: LengthParams) -> float:
        distance = abs(measure(answer, params.unit) - params.target)
        return -float(distance / params.target)


def measure(text: str, unit: str) -> int:
    """Return the length of a text in "words" (separated by space), "characters", or "sentences" (runs of . ! or ?)."""
    if unit == "words":
        return len(text.split())
    if unit == "characters":
        return len(text)
    return sum(bool(part.strip()) for part in re.split(r"[.!?]+", text)[:-1])


class RegexParams(Params):
    pattern: str = Field(default=r"""[.!?]["')\]]*\s*$""", min_length=1, max_length=MAX_PATTERN_CHARS)
    mode: Literal["search", "fullmatch", "absent"] = Field(
        default="search", description="'absent' turns it round: 1 if the pattern is nowhere in the answer."
    )
    ignore_case: bool = False


class Regex(_Rule[RegexParams]):
    """1 if the answer matches a regular expression, else 0 (by default: it ends as a sentence does)."""

    Params = RegexParams

    def check(self, params: RegexParams, services: Services) -> None:
        try:
            check_pattern_size(params.pattern)
        except ValueError as error:
            raise ValueError(f"'pattern' {error}") from error

    async def vet(self, params: RegexParams, owner: str = "") -> None:
        try:
            await bounded().vet("check_pattern", params.pattern, owner)
        except ValueError as error:
            raise ValueError(f"'pattern' {error}") from error

    def job(self, prompt: str, params: RegexParams) -> tuple[Json, ...]:
        return "match_pattern", params.pattern, params.mode, params.ignore_case


class JsonSchemaParams(Params):
    schema_: dict[str, Any] = Field(
        default={}, alias="schema", description="JSON Schema (2020-12); empty: any JSON will do."
    )

    @cached_property
    def text(self) -> str:
        """The schema as JSON."""
        return json.dumps(self.schema_)


class JsonSchema(_Rule[JsonSchemaParams]):
    """1 if the answer is JSON that satisfies a schema, 0.5 if it is other JSON, 0 if it is not JSON."""

    Params = JsonSchemaParams

    def check(self, params: JsonSchemaParams, services: Services) -> None:
        try:
            check_schema_size(params.schema_)
        except ValueError as error:
            raise ValueError(f"'schema' {error}") from error

    async def vet(self, params: JsonSchemaParams, owner: str = "") -> None:
        try:
            await bounded().vet("check_schema", params.text, owner)
        except ValueError as error:
            raise ValueError(f"'schema' {error}") from error

    def job(self, prompt: str, params: JsonSchemaParams) -> tuple[Json, ...]:
        return "validate", params.text

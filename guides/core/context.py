"""The Context: all that a guide sees of the server, for one answer.

A guide draws sequences from the policy with `generate`, has candidates scored with `score`, and chooses with `select`.
What that costs is counted, and deadline and token budget are kept, alike for every guide.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self

from guiderail.guides.core.dialogue import Dialogue
from guiderail.guides.core.interfaces import Engine, Rollouts
from guiderail.guides.core.metering import Limits, MeteredEngine, Spend
from guiderail.guides.core.seeds import Seeds
from guiderail.guides.core.tasks import Background
from guiderail.guides.core.types import Candidate, SamplingSpec, TokenPrompt
from guiderail.guides.scoring.kl import Origin
from guiderail.guides.scoring.pipeline import Judging, Pick, RewardPipeline, Scorers
from guiderail.guides.scoring.scores import Scores
from guiderail.guides.scoring.selection_report import SelectionReport

ALL_ALIKE = (
    "greedy decoding (temperature 0 or top_k 1) makes all draws after one prompt the same: they cost their tokens, and "
    "leave nothing to select from"
)


RENAMED = {
    "answer": "dialogue.answer", "begun": "dialogue.begun", "calibration": "pipeline.asked.calibration",
    "clean": "dialogue.clean", "combine": "pipeline.asked.combine", "decoder": "dialogue.decoder",
    "group": "dialogue.group", "helpers": "dialogue.renderer", "limits": "engine.limits",
    "messages": "dialogue.messages", "over": "engine.over", "pick": "select", "prompter": "dialogue.prompter",
    "rate": "score, which gives a table of combined scores", "render": "dialogue.render",
    "rewards": "pipeline.asked.rewards", "selection": "pipeline.asked.selection", "tell": "telling",
    "told": "dialogue.told", "view": "dialogue.view",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Context:
    """Everything a guide may use for one answer. What is fitted beside the guide's work ends with `async with`.

    seeds: of this answer; a guide that draws more than once numbers its draws: `seeds.stream(n, "draw", step)`.
    report: what clients are told of the answer; a guide may add to it.
    """

    engine: MeteredEngine
    dialogue: Dialogue
    pipeline: RewardPipeline
    seeds: Seeds
    report: SelectionReport
    background: Background

    @classmethod
    def of(
        cls,
        dialogue: Dialogue,
        asked: Judging,
        engine: Engine,
        scorers: Scorers,
        *,
        limits: Limits,
        spend: Spend,
        request: str,
        answer: int = 0,
    ) -> Self:
        """The Context of a request's answer of number `answer`. request: the request's id, which no other one has."""
        metered, seeds = MeteredEngine(engine, limits, spend), Seeds(dialogue.sampling.seed, answer)
        report, background = SelectionReport(), Background()
        pipeline = RewardPipeline(dialogue, asked, scorers, metered, seeds, report, request, background)
        return cls(metered, dialogue, pipeline, seeds, report, background)

    @property
    def prompt(self) -> TokenPrompt:
        """The prompt of the policy that writes the answer."""
        return self.dialogue.prompt

    @property
    def sampling(self) -> SamplingSpec:
        """Sampling of the answer."""
        return self.dialogue.sampling

    @property
    def spend(self) -> Spend:
        """Cost of the request so far."""
        return self.engine.spend

    def telling(self, texts: Sequence[str]) -> Self:
        """The Context of an answer one of whose policies is told these texts: rewards read them."""
        return self._of(self.dialogue.telling(texts))

    def with_policy(self, prompt: TokenPrompt, sampling: SamplingSpec | None = None) -> Self:
        """The Context of the answer that another policy writes; candidates and what calibrates are drawn from it."""
        return self._of(replace(self.dialogue, prompt=prompt, sampling=sampling or self.sampling))

    def _of(self, dialogue: Dialogue) -> Self:
        return replace(self, dialogue=dialogue, pipeline=self.pipeline.of(dialogue))

    def generate(self, prompts: Sequence[TokenPrompt], sampling: SamplingSpec, seeds: Sequence[int | None]) -> Rollouts:
        """Continue prompts[i] with seeds[i]; counted in `spend` and cut off at the request's limits."""
        self.pipeline.begin()
        if (sampling.temperature == 0 or sampling.top_k == 1) and len(set(prompts)) < len(prompts):
            self.report.warn(ALL_ALIKE)
        return self.engine.generate(prompts, self.pipeline.sampling(sampling), seeds)

    async def next_tokens(self, prompts: Sequence[TokenPrompt], top_k: int) -> list[list[tuple[int, float]]]:
        """After each prompt the `top_k` likeliest tokens, likeliest first, and their log-probabilities (temperature 1).

        Costs one generated token for each prompt.
        """
        self.pipeline.begin()
        return await self.engine.next_tokens(prompts, top_k)

    async def score(self, candidates: Sequence[Candidate]) -> Scores:
        """Scores of the candidates as a group. Raises RewardFailed if a reward fails."""
        return await self.pipeline.score(candidates)

    async def select(self, scores: Scores, origin: Origin | None = None) -> Pick:
        """The choice of the request's selection rule. Raises RequestError if it cannot choose.

        origin: how the candidates were made; None: the answer's KL from the policy is reported as unknown.
        """
        return await self.pipeline.select(scores, origin)

    if not TYPE_CHECKING:  # a type checker would take every name for one that is there

        def __getattr__(self, name: str) -> NoReturn:
            now = f"; it is ctx.{RENAMED[name]} now" if name in RENAMED else ""
            raise AttributeError(f"a Context has no '{name}'{now}", name=name, obj=self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.background.close()

"""POST /v1/rewards/score: raw, transformed and combined scores of given answers, without generating candidates."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from guiderail.guides.core.context import Context
from guiderail.guides.core.dialogue import Dialogue
from guiderail.guides.core.errors import FieldError
from guiderail.guides.core.metering import Limits, Spend
from guiderail.guides.core.reward import next_turn
from guiderail.guides.core.tasks import together
from guiderail.guides.core.types import Candidate, SamplingSpec
from guiderail.guides.scoring import Combine, RewardTerm
from guiderail.guides.scoring.calibration import CalibrationSpec
from guiderail.guides.scoring.pipeline import Judging
from guiderail.guides.scoring.selection.best import Argmax
from guiderail.server.openai_errors import bad_request
from guiderail.server.requests.admission import Work
from guiderail.server.requests.clients import NOBODY, Client
from guiderail.server.requests.lengths import room as room_of
from guiderail.server.requests.run import admitted
from guiderail.server.requests.schemas import ScoreInput, ScoreRequest
from guiderail.server.requests.specs import read_calibration, read_name, read_rewards
from guiderail.server.requests.wire import unknown_warnings
from guiderail.server.state import ServerState

SCORED_AT_ONCE = 64  # inputs of a request: enough to fill the batches of a reward model
ASKING_AT_ONCE = 4  # the same where a reward asks the engine, which takes a part of each one's questions at a time
ASKED_ROWS = 16  # sequences of one request for scores in the engine, at least


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring(Work):
    """A request for scores, ready to run: for each input its Context and the answers."""

    inputs: tuple[tuple[Context, list[Candidate]], ...]
    ignored: tuple[str, ...]


def scoring(state: ServerState, request: ScoreRequest, client: Client = NOBODY) -> Scoring:
    """Check and render a request for scores. Raises ApiError (400), or RequestError for what cannot be rendered."""
    asked = read_rewards(request.rewards, "rewards"), read_name(request.combine, "combine")
    spec = read_calibration(request.calibration, "calibration")
    spend, request_id = Spend(), uuid.uuid4().hex
    pipelines = {count: state.resolver.pipeline(*asked, count) for count in {len(i.answers) for i in request.inputs}}
    inputs = tuple(
        _context(state, request, item, pipelines[len(item.answers)], spec, spend, request_id) for item in request.inputs
    )
    rows, tokens = _cost(state, inputs)
    return Scoring(
        label="score", spend=spend, rows=rows, tokens=tokens, client=client, inputs=inputs, ignored=request.ignored
    )


@dataclass(frozen=True, slots=True)
class Scores:
    """The response to a request for scores: what stands in it for each input, and the rest."""

    data: list[dict[str, object]]
    rest: dict[str, object]


async def score(state: ServerState, work: Scoring) -> Scores:
    """Run the request, once admitted; return the response. Raises ApiError (429), or RewardFailed if a reward fails."""
    at_once = ASKING_AT_ONCE if any(_asking(state, ctx) for ctx, _ in work.inputs) else SCORED_AT_ONCE
    try:
        async with admitted(state, work):
            scored = await together((_score(ctx, candidates) for ctx, candidates in work.inputs), at_once)
    except FieldError as error:  # here the fields of an alignment stand in the body itself
        raise bad_request(str(error), error.param) from error
    told = (warning for ctx, _ in work.inputs for warning in ctx.report.warnings)
    warnings = list(dict.fromkeys([*unknown_warnings(work.ignored), *told]))
    usage = {"reward_tokens": work.spend.reward_tokens, "calibration_tokens": work.spend.calibration_tokens}
    data: list[dict[str, object]] = [{"index": index, **each} for index, each in enumerate(scored)]
    return Scores(data, {"object": "list", "usage": usage, "warnings": warnings})


def _asking(state: ServerState, ctx: Context) -> int:
    """Rewards of an input that ask the engine."""
    return sum(state.rewards[term.name].asks_engine for term in ctx.pipeline.asked.rewards)


def _cost(state: ServerState, inputs: Sequence[tuple[Context, list[Candidate]]]) -> tuple[int, int]:
    """The sequences and tokens that scores take of the engine at most: calibration draws, and answers that rewards
    ask the engine about, each behind its prompt; of these it has a part at a time. A request that takes none counts as
    one sequence of the tokens that its rewards read.
    """
    draws = asked = tokens = 0
    for ctx, candidates in inputs:
        terms, asking = len(ctx.pipeline.asked.rewards), _asking(state, ctx)
        read = sum(len(candidate.token_ids) for candidate in candidates)
        draws += ctx.pipeline.asked.draws
        asked += len(candidates) * asking
        tokens += terms * read + asking * len(candidates) * len(ctx.prompt.token_ids)
        tokens += ctx.pipeline.asked.draws * ctx.sampling.max_tokens
    return max(1, draws + min(asked, max(ASKED_ROWS, state.settings.rows // 4))), tokens


async def _score(ctx: Context, candidates: list[Candidate]) -> dict[str, object]:
    async with ctx:
        scores = await ctx.score(candidates)
    answers = [
        {"index": c.index, "rewards": c.rewards, "transformed": c.transformed, "score": c.combined}
        for c in scores.candidates
    ]
    return {"answers": answers, "calibration": ctx.report.calibration, "warnings": ctx.report.warnings}


def _context(
    state: ServerState,
    request: ScoreRequest,
    item: ScoreInput,
    pipeline: tuple[tuple[RewardTerm, ...], Combine],
    calibration: CalibrationSpec,
    spend: Spend,
    request_id: str,
) -> tuple[Context, list[Candidate]]:
    terms, combine = pipeline
    messages = tuple(m.message for m in item.messages)
    prompt = next_turn(state.renderer, messages)
    room = state.engine.max_model_len - len(prompt.token_ids)
    if room < 1 and any(term.chain.needs_sample for term in terms):
        raise bad_request("an input leaves no room in the model's context for calibration", "inputs")
    candidates = []
    for index, answer in enumerate(item.answers):
        text, partial = (answer, False) if isinstance(answer, str) else (answer.text, answer.partial)
        reason = "partial" if partial else "stop"
        candidates.append(Candidate(index, text, tuple(state.renderer.encode(text, plain=True)), reason))
    dialogue = Dialogue(
        messages=messages,
        prompt=prompt,
        sampling=SamplingSpec(max(1, min(room, request.max_tokens)), request.temperature, seed=request.seed),
        renderer=state.renderer,
        model_name=state.settings.model_name,
    )
    answers = (dialogue.answer(c.text, c.token_ids, partial=c.finish_reason == "partial") for c in candidates)
    room_of(state.rewards, terms, dialogue, tuple(answers))
    ctx = Context.of(
        dialogue, Judging(terms, combine, Argmax(), calibration), state.engine, state.scorers,
        limits=Limits(), spend=spend, request=request_id,
    )  # fmt: skip
    return ctx, candidates

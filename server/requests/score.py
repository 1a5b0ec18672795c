"""POST /v1/rewards/score: raw, transformed and combined scores of given answers, without generating candidates."""

from typing import Any

from guiderail.guides.core.budget import Spend
from guiderail.guides.core.context import Context
from guiderail.guides.core.guide import Limits
from guiderail.guides.core.tasks import together
from guiderail.guides.core.types import Candidate, SamplingSpec
from guiderail.guides.scoring.calibration_sample import CalibrationSpec
from guiderail.guides.scoring.selection.best import Argmax
from guiderail.server.api.schemas import ScoreInput, ScoreRequest
from guiderail.server.openai_errors import bad_request
from guiderail.server.requests.parsing import parse
from guiderail.server.state import ServerState


async def score_request(state: ServerState, request: ScoreRequest) -> dict[str, Any]:
    """The response body. Raises ApiError for bad rewards, RewardFailed if one fails."""
    spec: CalibrationSpec = parse(CalibrationSpec, dict(request.calibration), "calibration")
    spend = Spend()
    jobs = [_context(state, request, item, spec, spend) for item in request.inputs]
    inputs = await together(_score(ctx, candidates) for ctx, candidates in jobs)
    data = [{"index": index, **scored} for index, scored in enumerate(inputs)]
    warnings = list(dict.fromkeys(warning for ctx, _ in jobs for warning in ctx.report.warnings))
    usage = {"reward_tokens": spend.reward_tokens, "calibration_tokens": spend.calibration_tokens}
    return {"object": "list", "data": data, "usage": usage, "warnings": warnings}


async def _score(ctx: Context, candidates: list[Candidate]) -> dict[str, Any]:
    async with ctx:
        await ctx.score(candidates)
    ctx.rate(candidates)
    answers = [
        {"index": c.index, "rewards": c.rewards, "transformed": c.transformed, "score": c.combined} for c in candidates
    ]
    return {"answers": answers, "calibration": ctx.report.calibration, "warnings": ctx.report.warnings}


def _context(
    state: ServerState, request: ScoreRequest, item: ScoreInput, calibration: CalibrationSpec, spend: Spend
) -> tuple[Context, list[Candidate]]:
    terms, combine = state.resolver.pipeline(list(request.rewards), request.combine, len(item.answers))
    messages = tuple(m.message for m in item.messages)
    goes_on = messages[-1].role == "assistant"
    prompt = state.renderer.render(messages, add_generation_prompt=not goes_on, continue_final_message=goes_on)
    room = state.engine.max_model_len - len(prompt.token_ids)
    if room < 1 and any(term.chain.needs_sample for term in terms):
        raise bad_request("an input leaves no room in the model's context for calibration", "inputs")
    candidates = []
    for index, answer in enumerate(item.answers):
        text, partial = (answer, False) if isinstance(answer, str) else (answer.text, answer.partial)
        reason = "partial" if partial else "stop"
        candidates.append(Candidate(index, text, tuple(state.renderer.encode(text, plain=True)), reason))
    ctx = Context(
        engine=state.engine,
        scorer=state.scorer,
        helpers=state.helpers,
        messages=messages,
        prompt=prompt,
        sampling=SamplingSpec(max(1, min(room, request.max_tokens)), request.temperature, seed=request.seed),
        rewards=terms,
        combine=combine,
        selection=Argmax(),
        calibration=calibration,
        limits=Limits(),
        spend=spend,
    )
    return ctx, candidates

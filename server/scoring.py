"""POST /v1/rewards/score: scores given answers with the server's rewards, without generating anything."""

from typing import Any

from guiderail.guides.pipeline import combine
from guiderail.guides.tasks import together
from guiderail.guides.types import Answer, ScoreGroup
from guiderail.server.protocol import ScoreInput, ScoreRequest
from guiderail.server.state import ServerState


async def score_request(state: ServerState, request: ScoreRequest) -> dict[str, Any]:
    """The response body. Raises ApiError for bad rewards, RewardFailed if one fails."""
    terms = state.resolver.terms(list(request.rewards))
    groups = [(item, term) for item in request.inputs for term in terms]
    results = iter(
        await together(
            state.scorer.score(term.name, _group(state, item, term.params), id(request)) for item, term in groups
        )
    )
    data, tokens = [], 0
    for index, item in enumerate(request.inputs):
        scored = [next(results) for _ in terms]
        tokens += sum(result.tokens for result in scored)
        answers = []
        for i in range(len(item.answers)):
            raw = {term.label: result.values[i] for term, result in zip(terms, scored, strict=True)}
            answers.append({"index": i, "rewards": raw, "score": combine(terms, raw)})
        data.append({"index": index, "answers": answers})
    return {"object": "list", "data": data, "usage": {"reward_tokens": tokens}}


def _group(state: ServerState, item: ScoreInput, params: Any) -> ScoreGroup:
    messages = tuple(m.message for m in item.messages)
    goes_on = messages[-1].role == "assistant"
    prompt = state.renderer.render(messages, add_generation_prompt=not goes_on, continue_final_message=goes_on)
    answers = []
    for answer in item.answers:
        text, partial = (answer, False) if isinstance(answer, str) else (answer.text, answer.partial)
        answers.append(Answer(text, tuple(state.renderer.encode(text)), partial))
    return ScoreGroup(messages, prompt, tuple(answers), params)

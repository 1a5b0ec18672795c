"""A scripted vLLM pooling server: the wire format of `POST /pooling`, known values, and faults on order."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web
from scripted_server import ScriptedServer

from guiderail.guides.core.types import Answer, Message, ScoreGroup, TokenPrompt
from guiderail.server.rewards.models.loading import model_reward
from guiderail.server.rewards.models.remote_reward import RemotePooler, RemoteReward, connect
from guiderail.server.rewards.models.reward_spec import RewardModelSpec

NO_SERVICES: Any = None


def logits(tokens: list[int], heads: int) -> list[float]:
    """Values of the scripted model: [sum/100, sum/100 - 1, ...]."""
    return [sum(tokens) / 100 - head for head in range(heads)]


class ScriptedPooling(ScriptedServer):
    """Answers as vLLM does unless `fault` does something else, which is asked after the checks at start.

    reads_option: whether `use_activation` is read. activation: what it turns on; None: nothing, as for a model
    trained by regression.
    """

    def __init__(self, heads: int = 2, *, models: tuple[str, ...] = ("rm",), key: str | None = None) -> None:
        super().__init__(models, 96, key)
        self.heads = heads
        self.reads_option = True
        self.activation: Callable[[float], float] | None = lambda x: 1 / (1 + math.exp(-x))
        self.app.router.add_post("/pooling", self._pooling)

    async def _pooling(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if (answer := await self.faulted(request, body)) is not None:
            return answer
        option = body.get("use_activation", True) if self.reads_option else True
        if not isinstance(option, bool):
            return web.json_response({"error": {"message": "use_activation: not a boolean"}}, status=400)
        rows = [logits(tokens, self.heads) for tokens in body["input"]]
        if option and self.activation is not None:
            rows = [[self.activation(value) for value in row] for row in rows]
        items = [{"index": i, "object": "pooling", "data": row} for i, row in enumerate(rows)]
        return web.json_response({"object": "list", "model": body["model"], "data": items[::-1]})


async def drop(request: web.Request) -> None:
    """A fault: the connection is cut before anything is sent."""
    assert request.transport is not None
    request.transport.abort()
    await asyncio.sleep(3600)


@asynccontextmanager
async def pooler(*servers: ScriptedPooling, **options: Any) -> AsyncIterator[RemotePooler]:
    """A backend over running servers, which forget what the checks at start sent."""
    arguments: dict[str, Any] = {"probe": [3, 4, 5], "model": None, "key": None, "heads": None} | options
    backend = await connect([server.url for server in servers], **arguments)
    for server in servers:
        server.seen.clear()
        server.peak = 0
    yield backend
    await backend.close()


def served(path: str, **options: Any) -> Any:
    """The reward of `--reward name=path,backend=vllm,...`."""
    return model_reward(RewardModelSpec(path=path, backend="vllm", **options), Path("/nonexistent"), print)


def group(text: str) -> ScoreGroup:
    """One answer to a question of two words."""
    return ScoreGroup((Message("user", "w1 w2"),), TokenPrompt((1,)), (Answer(text),), RemoteReward.Params())

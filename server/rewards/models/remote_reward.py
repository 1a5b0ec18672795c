"""Remote vLLM pooling servers (`vllm serve MODEL --runner pooling`) as a reward model's backend, over HTTP.

The wire format is vLLM 0.32's `POST /pooling` with token ids in and `use_activation` false, which gives logits:
/classify gives the same numbers, but here `task` is said and a server that was started for another one
(embeddings, values per token) refuses it in words. `encoding_format` is "float": JSON carries a float32
exactly, and for a value or two a sequence base64 saves nothing.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Annotated, ClassVar

from pydantic import Field, FiniteFloat

from guiderail.guides.core.tasks import together
from guiderail.server.engines.engine_stats import RunnerStats
from guiderail.server.remote.remote_client import NoResponse, RemoteClient, RemoteError, ResponseBody, parse_body
from guiderail.server.rewards.models.neural import NeuralReward

READ_S = 60.0
ATTEMPTS = 3
IN_FLIGHT = 32  # HTTP requests of one reward at a time
CHUNK = 64  # sequences in one of them
BLOCK = 32  # tokens; prefixes are compared a block at a time
REMEMBERED = 1 << 16  # blocks
SLACK = 16384  # tokens that one server may have in flight above another before affinity gives way

log = logging.getLogger("guiderail.reward")


class _Item(ResponseBody):
    index: int
    data: Annotated[list[FiniteFloat], Field(min_length=1)]


class _Scores(ResponseBody):
    data: list[_Item]


class RemoteReward(NeuralReward):
    """A reward model's raw value of the answer to the conversation (its own tokenizer and chat template)."""

    batched: ClassVar[bool] = False  # the remote server batches, so calls go out while others are in flight


async def connect(
    urls: Sequence[str], *, probe: Sequence[int], model: str | None, key: str | None, heads: int | None
) -> "RemotePooler":
    """Return a backend over these servers, each of them checked by scoring the token ids of `probe`.

    model: its name on the servers (None: the one they serve). heads: how many values it has (None: as many as
    the first answer). Raises RemoteError naming the server that is not there, serves another model or hides
    its raw values behind an activation.
    """
    pooler = RemotePooler(urls, key)
    try:
        for url in pooler.urls:
            await pooler.check(url, probe, model, heads)
            heads = pooler.heads
    except BaseException:
        await pooler.close()
        raise
    return pooler


class RemotePooler:
    """guiderail.server.rewards.models.backend.Backend over HTTP; made by `connect`.

    `stats` counts the tokens asked for: what the servers' caches saved is in their own metrics.
    """

    def __init__(self, urls: Sequence[str], key: str | None) -> None:
        self.urls = tuple(urls)
        self.heads = 0
        self.longest: int | None = None
        self.stats = RunnerStats()
        self._names: dict[str, str] = {}
        self._router = PrefixRouter(self.urls)
        self._turns = asyncio.Semaphore(IN_FLIGHT)
        self._remote = RemoteClient(key, IN_FLIGHT, READ_S)

    @property
    def up(self) -> bool:
        """True: whether its servers are there, only a request finds out."""
        return True

    async def check(self, url: str, probe: Sequence[int], model: str | None, heads: int | None) -> None:
        """Ask a server for its model, score `probe`, and set heads and longest input. Raises RemoteError."""
        found = await self._remote.model(url, model)
        self._names[url] = found.id
        limits = [limit for limit in (self.longest, found.max_model_len) if limit is not None]
        self.longest = min(limits, default=None)
        (raw,) = await self._ask(url, [probe])
        if heads is not None and len(raw) != heads:
            raise RemoteError(url, f"gives {len(raw)} values a sequence where the model has {heads} heads")
        self.heads = len(raw)
        # Alike either way: the model has no activation, or the server does not read the option. One that does
        # read it refuses a value that is not a boolean.
        (activated,) = await self._ask(url, [probe], True)
        if all(abs(a - b) < 0.01 for a, b in zip(raw, activated, strict=True)):
            try:
                await self._ask(url, [probe], "neither")
            except RemoteError as error:
                if error.status in (400, 422):
                    return
                raise
            raise RemoteError(url, "does not read use_activation, so its values may be activated; use vLLM 0.32")

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return [S][heads] raw values. Raises RuntimeError if a server does not give them."""
        routes: dict[str, list[int]] = {}
        for index, tokens in enumerate(sequences):
            routes.setdefault(self._router.pick(tokens), []).append(index)
        parts = [
            (url, indexes[start : start + CHUNK])
            for url, indexes in routes.items()
            for start in range(0, len(indexes), CHUNK)
        ]
        try:
            found = await together(self._score(url, [sequences[i] for i in indexes]) for url, indexes in parts)
        except RemoteError as error:
            log.warning("%s", error)
            raise RuntimeError(f"the remote server {error.fault}") from error  # its address is not the client's
        finally:
            for url, indexes in routes.items():
                self._router.done(url, sum(len(sequences[index]) for index in indexes))
        order = (index for _, indexes in parts for index in indexes)
        values = dict(zip(order, (each for part in found for each in part), strict=True))
        return [values[index] for index in range(len(sequences))]

    async def _score(self, home: str, sequences: list[Sequence[int]]) -> list[list[float]]:
        """Score one chunk at its home or, if that cannot be reached, at the next server."""
        first = self.urls.index(home)
        async with self._turns:
            for attempt, url in enumerate(islice(cycle(self.urls), first, first + ATTEMPTS), start=1):
                try:
                    values = await self._ask(url, sequences)
                    break
                except NoResponse:
                    if attempt == ATTEMPTS:
                        raise
        for each in values:
            if len(each) != self.heads:
                raise RemoteError(url, f"gave {len(each)} values a sequence where the model has {self.heads} heads")
        self.stats.tokens_asked += sum(map(len, sequences))
        self.stats.passes += 1
        return values

    async def _ask(
        self, url: str, sequences: Sequence[Sequence[int]], activation: bool | str = False
    ) -> list[list[float]]:
        """Send one request and return the values of these sequences, in their order."""
        body = {
            "model": self._names[url],
            "task": "classify",
            "input": [list(tokens) for tokens in sequences],
            "use_activation": activation,
            "encoding_format": "float",
        }
        items = parse_body(url, _Scores, await self._remote.exchange(url, "POST", "/pooling", body)).data
        if sorted(item.index for item in items) != list(range(len(sequences))):
            raise RemoteError(url, f"answered {len(items)} sequences of {len(sequences)}, or others")
        return [item.data for item in sorted(items, key=lambda item: item.index)]

    async def close(self) -> None:
        """Close the connections."""
        await self._remote.close()


class PrefixRouter:
    """Choice of the server for a sequence: the one that most of it went to before, as that has it in its cache.

    Where there is none, or it has much more in flight than another, the servers take turns, less busy ones first.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self._turn = deque(urls)
        self._load = dict.fromkeys(urls, 0)
        self._homes: dict[int, str] = {}  # by the hash of a prefix of whole blocks, the longest unused first

    def pick(self, tokens: Sequence[int]) -> str:
        """Return the server for this sequence, which counts as in flight there until `done`."""
        keys: list[int] = []
        for end in range(BLOCK, len(tokens) + 1, BLOCK):
            keys.append(hash((keys[-1] if keys else 0, *tokens[end - BLOCK : end])))
        depth = next((n for n in range(len(keys), 0, -1) if keys[n - 1] in self._homes), 0)
        url = self._homes[keys[depth - 1]] if depth else self._turn[0]
        if 2 * depth * BLOCK < len(tokens) or self._load[url] > min(self._load.values()) + SLACK:
            url = min(self._turn, key=self._load.__getitem__)
            self._turn.remove(url)
            self._turn.append(url)
        for key in keys:
            self._homes.pop(key, None)
            self._homes[key] = url
        while len(self._homes) > REMEMBERED:
            del self._homes[next(iter(self._homes))]
        self._load[url] += len(tokens)
        return url

    def done(self, url: str, tokens: int) -> None:
        """Count so many tokens as no longer in flight at a server."""
        self._load[url] -= tokens

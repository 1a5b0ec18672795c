"""A scripted vLLM server for a remote policy: /tokenize, and /v1/completions that counts on from the prompt's end."""

from collections.abc import Callable

from aiohttp import web
from scripted_server import ScriptedServer


class ScriptedCompletions(ScriptedServer):
    """Continues [..., t] with t + 1, t + 2, ... unless `fault` does something else.

    offset: added to every token id of /tokenize; anything but 0 is another tokenizer.
    """

    def __init__(self, encode: Callable[[str], list[int]], *, key: str | None = None) -> None:
        super().__init__(("aligned-model",), 512, key)
        self.encode = encode
        self.offset = 0
        self.app.router.add_post("/tokenize", self._tokenize)
        self.app.router.add_post("/v1/completions", self._complete)

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"tokens": [token + self.offset for token in self.encode(body["prompt"])]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if (answer := await self.faulted(request, body)) is not None:
            return answer
        last = body["prompt"][-1]
        ids = [last + 1 + i for i in range(body["max_tokens"])]
        choice = {"index": 0, "text": " ".join(map(str, ids)), "finish_reason": "length", "stop_reason": None}
        return web.json_response({"choices": [{**choice, "token_ids": ids, "prompt_token_ids": body["prompt"]}]})

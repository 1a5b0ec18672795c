"""Logprobs' `bytes` and `text_offset` are those of the delivered text, also where characters span tokens."""

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fakes import LetterRenderer, ScriptedEngine, make_state
from serving import serving
from tabular_engine import TabularRenderer

from guiderail.guides.core.types import Delta, TokenLogprob, TokenPrompt
from guiderail.server.api.bodies import spelled
from guiderail.server.rewards.rules import Length

FACE, ROCKET = "😀".encode(), "🚀".encode()
TOKENS = {
    1: b"Hi ",
    2: FACE[:2],
    3: FACE[2:],
    4: ROCKET[:3],
    5: ROCKET[3:] + b" yes",
    6: "é".encode(),
    7: b".",
    8: FACE[:1],
}
WRITTEN = [1, 2, 3, 4, 5, 6, 7, 8]
TEXT = "Hi 😀🚀 yesé."


class Spelling(LetterRenderer, TabularRenderer):
    """Prompts of letters, answers of bytes."""

    def __init__(self) -> None:
        TabularRenderer.__init__(self, TOKENS)

    decode = TabularRenderer.decode
    token_text = TabularRenderer.token_text
    token_bytes = TabularRenderer.token_bytes


class Writing(ScriptedEngine):
    """Streams WRITTEN a token at a time, its text as far as it has whole characters and stops before `stop`."""

    async def deltas(self, row: int, prompt: TokenPrompt, params: Any, request_id: str) -> Any:
        sampling, _ = params
        whole = TEXT
        for stop in sampling.stop:
            whole = whole.split(stop)[0]
        shown, raw = 0, b""
        for n, token in enumerate(WRITTEN, start=1):
            raw += TOKENS[token]
            upto = min(len(raw.decode(errors="ignore")), len(whole))
            logprobs = (
                (TokenLogprob(token, -0.5, ((token, -0.5), (2, -1.0))),) if sampling.logprobs is not None else None
            )
            last = n == len(WRITTEN)
            yield Delta(row, whole[shown:upto], (token,), "stop" if last else None, None, logprobs)
            shown = max(shown, upto)


def rows(stream: str) -> tuple[str, list[Any], list[int]]:
    text, content, offsets = "", [], []
    for line in stream.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                text += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
                content += (choice["logprobs"] or {}).get("content") or []
                offsets += (choice["logprobs"] or {}).get("text_offset") or []
    return text, content, offsets


@pytest.mark.parametrize("guide", [{"name": "sampling"}, {"name": "best_of_n", "n": 2}])
@pytest.mark.parametrize(
    ("stop", "wanted", "covered"), [([], TEXT, TEXT), (["."], TEXT[:-1], TEXT[:-1]), (["yes"], "Hi 😀🚀 ", "Hi 😀")]
)
async def test_bytes_join_to_the_text_and_offsets_point_into_it(
    guide: dict[str, Any], stop: list[str] | None, wanted: str, covered: str
) -> None:
    """A token that reaches into what a stop string cuts is left out, and with it the parts of its first character."""
    state = replace(make_state(Writing(max_model_len=1000), {"length": Length()}), renderer=Spelling())
    rewards = [] if guide["name"] == "sampling" else ["length"]
    body: dict[str, Any] = {"stop": stop, "alignment": {"guide": guide, "rewards": rewards}}
    async with serving(state) as url, httpx.AsyncClient(base_url=url) as client:
        chat = {**body, "messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 2}
        (choice,) = (await client.post("/v1/chat/completions", json=chat)).json()["choices"]
        streamed = rows((await client.post("/v1/chat/completions", json={**chat, "stream": True})).text)
        assert choice["message"]["content"] == streamed[0] == wanted
        for content in (choice["logprobs"]["content"], streamed[1]):
            assert b"".join(bytes(each["bytes"]) for each in content) == covered.encode()
            assert content[1]["bytes"] == list(FACE[:2])
            assert [bytes(top["bytes"]) for top in content[0]["top_logprobs"]] == [b"Hi ", FACE[:2]]
        text = {**body, "prompt": "Hi", "logprobs": 2}
        (choice,) = (await client.post("/v1/completions", json=text)).json()["choices"]
        streamed = rows((await client.post("/v1/completions", json={**text, "stream": True})).text)
        assert choice["text"] == streamed[0] == wanted
        offsets = [0, 3, 3, 4, 4, 9, 10][: len(choice["logprobs"]["tokens"])]
        assert choice["logprobs"]["text_offset"] == streamed[2] == offsets


@pytest.mark.parametrize(
    ("ids", "part", "expected"),
    [
        ([1], "Hi ", [("Hi ", b"Hi ")]),
        ([2, 3], "😀", [("\ufffd", FACE[:2]), ("\ufffd\ufffd", FACE[2:])]),
        ([9], "Yes", [("Yes", b"Yes")]),  # " Yes" at a text's start, of which the decoder drops the space
        ([3], "😀", [("?", None)]),  # the first half stands in the prompt
        ([8], "\ufffd", [("?", None)]),  # no character at all
        ([0], "$", [("?", None)]),  # a tokenizer that does not tell
    ],
)
def test_bytes_that_are_not_the_texts_are_null(ids: list[int], part: str, expected: Any) -> None:
    class Telling:
        @staticmethod
        def token_bytes(token: int) -> bytes | None:
            return {**TOKENS, 9: b" Yes"}.get(token)

        @staticmethod
        def token_text(token: int) -> str:
            return "?"

    renderer: Any = Telling()
    assert spelled([TokenLogprob(i, -1.0, offset=5, part=part) for i in ids], renderer) == expected

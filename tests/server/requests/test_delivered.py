"""Log-probabilities cover the delivered text: what was cut, held back or ended the answer is not in them."""

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fakes import LetterRenderer, ScriptedEngine, make_state
from serving import serving
from tabular_engine import TabularRenderer

from guiderail.guides.core.decoder import Decoder
from guiderail.guides.core.types import Delta, TokenLogprob, TokenPrompt
from guiderail.guides.prompters import Urial
from guiderail.server.requests.delivered import Delivered
from guiderail.server.rewards.rules import Length

CUT = "Good.\n```\n\n# Query:\n```\nSecret?"


def entries(ids: Any) -> list[TokenLogprob]:
    return [TokenLogprob(i, -1.0 - n) for n, i in enumerate(ids)]


def letters(text: str) -> Any:
    return tuple(map(ord, text))


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("written", "wanted"), [(CUT, "Good."), ("\n Good.\n```", "Good."), ("Good", "Good"), ("```\n# Query:\n```", "")]
)
def test_what_a_cleaner_cuts_is_in_no_log_probability(written: str, wanted: str, size: int) -> None:
    cleaner, delivered = Urial().cleaner(), Delivered(Decoder(LetterRenderer(), TokenPrompt((1, 2))))
    told, shown = "", ""
    for start in range(0, len(written), size):
        piece = written[start : start + size]
        shown += (sent := cleaner.push(piece))
        told += "".join(chr(each.token_id) for each in delivered.take(entries(letters(piece)), piece, sent))
        assert shown.startswith(told)  # never before the text
    shown += (rest := cleaner.finish())
    told += "".join(chr(each.token_id) for each in delivered.take([], "", rest))
    assert told == shown == wanted


def test_tokens_that_reach_into_what_is_cut_are_left_out_and_parts_of_a_character_come_with_it() -> None:
    texts = {1: b"Hi", 2: "é".encode()[:1], 3: "é".encode()[1:], 4: b"! Ser", 5: b"vus", 6: "ü".encode()[:1]}
    delivered = Delivered(Decoder(TabularRenderer(texts), TokenPrompt((1000, 1001))))
    rows = entries((1, 2, 3, 4, 5, 6, 0))
    assert delivered.take(rows[:2], "Hi", "Hi") == (replace(rows[0], part="Hi"),)
    both = tuple(replace(row, offset=2, part="é") for row in rows[1:3])
    assert delivered.take(rows[2:3], "é", "é") == both
    assert delivered.take(rows[3:], "! ", "! ") == ()  # "! Ser" has text that was not sent; no end of sequence
    assert delivered.take([], "", "") == ()


class Lettered(ScriptedEngine):
    """One token a letter, whose text lags behind as vLLM's does with stop strings, cut before `stop`."""

    async def deltas(self, row: int, prompt: TokenPrompt, params: Any, request_id: str) -> Any:
        sampling, _ = params
        ends = [at for stop in sampling.stop if (at := CUT.find(stop)) >= 0]
        text = CUT[: min(ends, default=len(CUT))]
        for i, letter in enumerate(CUT):
            top = ((ord(letter), -0.5), (ord("?"), -2.0))
            row_logprobs = None if sampling.logprobs is None else (TokenLogprob(ord(letter), -0.5, top),)
            last = i + 1 == len(CUT)
            shown = text[i - 4 :] if last else text[max(0, i - 4) : max(0, i - 3)]
            yield Delta(row, shown, (ord(letter),), "stop" if last else None, None, row_logprobs)


GUIDES = [{"name": "sampling"}, {"name": "best_of_n", "n": 2}]


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize(("how", "wanted"), [({"stop": ["d."]}, "Goo"), ({"prompter": "urial"}, "Good."), ({}, CUT)])
async def test_responses_tell_no_probability_of_what_was_cut(guide: Any, how: dict[str, Any], wanted: str) -> None:
    """Chats and completions, streamed and whole; the tokens are counted all the same."""
    state = make_state(Lettered(max_model_len=100_000), {"length": Length()})
    rewards = [] if guide["name"] == "sampling" else ["length"]
    alignment = {"guide": guide, "rewards": rewards, "prompter": how.get("prompter", "template")}
    body = {"alignment": alignment, **{k: v for k, v in how.items() if k == "stop"}}
    async with serving(state) as url, httpx.AsyncClient(base_url=url) as client:
        chat = {**body, "messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 2}
        answer = (await client.post("/v1/chat/completions", json=chat)).json()
        (choice,) = answer["choices"]
        rows = choice["logprobs"]["content"]
        assert choice["message"]["content"] == wanted
        assert "".join(row["token"] for row in rows) == choice["message"]["content"]
        assert all(len(row["top_logprobs"]) == 2 for row in rows)
        assert answer["usage"]["completion_tokens"] == len(CUT)
        stream = await client.post("/v1/chat/completions", json={**chat, "stream": True})
        text, told = streamed(stream.text)
        assert text == told == choice["message"]["content"]
        if "prompter" not in how:
            whole = (await client.post("/v1/completions", json={**body, "prompt": "Hi", "logprobs": 2})).json()
            assert "".join(whole["choices"][0]["logprobs"]["tokens"]) == whole["choices"][0]["text"] == text


def streamed(body: str) -> tuple[str, str]:
    """Text and tokens of the log-probabilities of a streamed answer; at no point more of these than of the text."""
    text, told = "", ""
    for line in body.splitlines():
        if not line.startswith("data: {"):
            continue
        for choice in json.loads(line[6:])["choices"]:
            text += choice["delta"].get("content", "")
            told += "".join(row["token"] for row in (choice["logprobs"] or {"content": []})["content"])
            assert text.startswith(told)
    return text, told

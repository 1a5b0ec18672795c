"""Servers that leave things out, send null, or end their answers otherwise: every request keeps its outcome."""

import json
from typing import Any

import pytest
from loadtest_harness import load_test
from timed_server import Scripted

from guiderail.loadtest.load.runner import Load
from guiderail.loadtest.load.traffic import TrafficClass
from guiderail.loadtest.report.page import page
from guiderail.loadtest.report.saving import json_text, requests_text


def lines(*data: Any, end: str = "\n\n") -> str:
    events = [each if isinstance(each, str) else json.dumps(each) for each in data]
    return "\n\n".join(f"data: {each}" for each in events) + end


def chunk(text: str | None, reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}], **more}


DONE = "[DONE]"
HELLO = (chunk("Hel"), chunk("lo"), chunk(None, "stop"))
COUNTED, WITHOUT = {"prompt_tokens": 5, "completion_tokens": 9}, {"choices": [], "usage": None}

STREAMS: dict[str, tuple[str, str, str, int]] = {  # body, outcome, part of its error, output tokens
    "null usage": (lines(*HELLO, WITHOUT, DONE), "completed", "", 2),
    "null counts": (lines(*HELLO, {"usage": dict.fromkeys(COUNTED)}, DONE), "completed", "", 2),
    "no completion count": (lines(*HELLO, {"usage": {"prompt_tokens": 5}}, DONE), "completed", "", 2),
    "null prompt count": (lines(*HELLO, {"usage": COUNTED | {"prompt_tokens": None}}, DONE), "completed", "", 9),
    "counts that are none": (lines(*HELLO, {"usage": {"completion_tokens": "9"}}, DONE), "completed", "", 2),
    "a negative count": (lines(*HELLO, {"usage": COUNTED | {"completion_tokens": -1}}, DONE), "completed", "", 2),
    "a huge count": (lines(*HELLO, {"usage": COUNTED | {"completion_tokens": 10**400}}, DONE), "completed", "", 2),
    "a usage of another kind": (lines(*HELLO, {"usage": [1]}, DONE), "completed", "", 2),
    "usage in every chunk": (lines(*(c | {"usage": COUNTED} for c in HELLO), DONE), "completed", "", 9),
    "null events": (lines("null", *HELLO, "null", DONE), "completed", "", 2),
    "empty events": (lines("", *HELLO, " ", DONE), "completed", "", 2),
    "no final newline": (lines(*HELLO, DONE, end=""), "completed", "", 2),
    "one final newline": (lines(*HELLO, DONE, end="\n"), "completed", "", 2),
    "carriage returns": (lines(*HELLO, DONE).replace("\n", "\r\n"), "completed", "", 2),
    "a byte order mark": ("\ufeff" + lines(*HELLO, DONE), "completed", "", 2),
    "space around [DONE]": (lines(*HELLO, " [DONE] "), "completed", "", 2),
    "no [DONE]": (lines(*HELLO), "completed", "", 2),
    "no [DONE], no newline": (lines(*HELLO, end=""), "completed", "", 2),
    "no [DONE], cut off": (lines(*HELLO[:2]), "stream_error", "without [DONE]", 2),
    "one choice of two ends": (
        lines({"choices": [{"index": 1, "delta": {"content": "a"}}]}, *HELLO), "stream_error", "without [DONE]", 3,
    ),
    "cut off in an event": (lines(*HELLO[:2])[:-9], "stream_error", "not a JSON object", 1),
    "nothing at all": ("", "stream_error", "without [DONE]", 0),
    "no choices": (lines({"id": "x"}, {"choices": None}, *HELLO, DONE), "completed", "", 2),
    "null choices in the list": (lines({"choices": [None]}, *HELLO, DONE), "completed", "", 2),
    "null delta": (lines({"choices": [{"delta": None}]}, *HELLO, DONE), "completed", "", 2),
    "null error": (lines(*(c | {"error": None} for c in HELLO), DONE), "completed", "", 2),
    "an error in the middle": (lines(HELLO[0], {"error": {"message": "out of luck"}}, DONE), "stream_error", "luck", 1),
    "a named error event": (f"{lines(HELLO[0])}event: error\ndata: null\n\n", "stream_error", "not a JSON", 1),
    "nested too deep": (lines(HELLO[0], "[" * 100_000), "stream_error", "not a JSON object", 1),
    "half an emoji": (lines(chunk("\ud83d", "stop"), DONE), "completed", "", 1),
    "half an emoji in an error": (lines({"error": "\ud83d"}), "stream_error", "?", 0),
    "a reason of another kind": (lines(chunk("a", {"stop": 1}), DONE), "completed", "", 1),  # type: ignore[arg-type]
    "an alignment of another kind": (
        lines(*HELLO, {"alignment": {"choices": [None, {"score": "x", "rewards": {"r": None}, "stopped_by": {}}],
              "spend": {"total_s": 10**400, "x": None}, "config": "none"}}, DONE), "completed", "", 2,
    ),
    "an alignment in short": (lines(*HELLO, {"alignment": {"choices": 3, "spend": [1]}}, DONE), "completed", "", 2),
}  # fmt: skip

MESSAGE = {"message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}
WHOLE: dict[str, tuple[str, str, str, int]] = {
    "null usage": (json.dumps({"choices": [MESSAGE], "usage": None}), "completed", "", 0),
    "null counts": (json.dumps({"choices": [MESSAGE], "usage": dict.fromkeys(COUNTED)}), "completed", "", 0),
    "null content": (json.dumps({"choices": [{"message": {"content": None}}], "usage": COUNTED}), "completed", "", 9),
    "null message": (json.dumps({"choices": [{"message": None}], "usage": COUNTED}), "completed", "", 9),
    "content in parts": (
        json.dumps({"choices": [{"message": {"content": [1]}}], "usage": COUNTED}),
        "completed",
        "",
        9,
    ),
    "a byte order mark": ("\ufeff" + json.dumps({"choices": [MESSAGE], "usage": COUNTED}), "completed", "", 9),
    "no choices": (json.dumps({"object": "x"}), "stream_error", "no choices", 0),
    "null choices": (json.dumps({"choices": None}), "stream_error", "no choices", 0),
    "an error": (json.dumps({"error": {"message": "out of luck"}}), "stream_error", "luck", 0),
    "null": ("null", "stream_error", "not a JSON object", 0),
    "nested too deep": ("[" * 100_000, "stream_error", "not a JSON object", 0),
    "no JSON": ("{", "stream_error", "not a JSON object", 0),
}


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_whatever_a_server_sends_is_the_outcome_of_that_request_alone(server: Scripted, stream: bool) -> None:
    cases = STREAMS if stream else WHOLE
    classes = [
        TrafficClass(name=name, stream=stream, body={"script": {"raw": body[0]}}) for name, body in cases.items()
    ]
    count = 12 * len(cases)
    result, runs = await load_test(server, classes, Load(max_concurrency=4, count=count), detailed=True)
    (run,) = runs
    assert result["sent"] == sum(result["outcomes"].values()) == count
    seen = set()
    for record in run.records:
        _, outcome, error, tokens = cases[record.class_name]
        seen.add(record.class_name)
        assert (record.class_name, record.outcome) == (record.class_name, outcome), record.error
        assert error in record.error, record.class_name
        assert bool(error) == bool(record.error), record.class_name
        assert record.output_tokens == tokens, record.class_name
    assert seen == set(cases)
    for saved in (json_text(result), requests_text(runs), page(result, runs)):
        saved.encode()


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "Wed, 21 Oct 2026 07:28:00 GMT"])
async def test_a_retry_after_that_is_no_time_is_none(server: Scripted, seconds: str) -> None:
    server.retry_after = seconds
    busy = [TrafficClass(name="busy", body={"script": {"fault": 429}})]
    result, runs = await load_test(server, busy, Load(max_concurrency=1, count=3))
    assert result["outcomes"]["rejected_429"] == 3
    assert {record.retry_after_s for record in runs[0].records} == {None}
    json_text(result)

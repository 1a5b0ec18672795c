"""The parser of server-sent events, and the reader of answers, fed in every possible piece."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guiderail.loadtest.client.answer import AnswerReader
from guiderail.loadtest.client.event_stream import SseParser
from guiderail.loadtest.report.records import Outcome, Record

STREAM = (
    'data: {"a": 1}\n\n'
    ": keep-alive\n\n"
    "event: error\ndata: first\ndata:second é\n\n"
    "id: 7\nretry: 10\n\n"
    "data: x\r\n\r\n"
    "data: [DONE]\n\n"
    "data: unfinished"
).encode()
EVENTS = [("", b'{"a": 1}'), ("error", "first\nsecond é".encode()), ("", b"x"), ("", b"[DONE]")]


@given(st.lists(st.integers(0, len(STREAM))))
def test_pieces_do_not_matter(cuts: list[int]) -> None:
    parser, events = SseParser(), []
    ends = [*sorted(cuts), len(STREAM)]
    for start, end in zip([0, *ends], ends, strict=False):
        events += parser.feed(STREAM[start:end])
    assert events == EVENTS


def read(*events: bytes, name: str = "") -> Record:
    record = Record(0, "c", "id", scheduled=0.0, sent=0.0)
    reader = AnswerReader(record, keep_text=True)
    for i, data in enumerate(events):
        reader.event(name if i == len(events) - 1 else "", data, float(i + 1))
    return record


def chunk(text: str) -> bytes:
    return b'{"choices": [{"delta": {"content": "%s"}}]}' % text.encode()


def test_only_chunks_with_text_are_timed() -> None:
    opening, closing = chunk(""), b'{"choices": [{"delta": {}, "finish_reason": "stop"}]}'
    tool = b'{"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]}'
    record = read(opening, chunk("a"), tool, chunk("b"), closing, b"[DONE]", chunk("late"))
    assert record.chunks == [2, 3, 4]
    assert (record.ttft, record.e2el, record.itls) == (2, 6, [1, 1])
    assert (record.outcome, record.finish_reason, record.text) == (Outcome.COMPLETED, "stop", "ab")
    assert (record.output_tokens, record.tokens_counted) == (3, False)


def test_an_answer_without_text_has_its_first_text_at_its_end() -> None:
    record = read(chunk(""), b"[DONE]")
    assert (record.ttft, record.tpot, record.itls) == (2, None, [])


def test_scores_of_several_choices_are_averaged() -> None:
    record = read(
        b'{"choices": [], "alignment": {"config": {"guide": {"name": "g"}}, "spend": {"total_s": 2, "x": "y"}, '
        b'"choices": [{"score": 1, "rewards": {"r": 2}, "stopped_by": null}, {"score": 4, "rewards": {"r": 4, "q": 1},'
        b' "stopped_by": "budget"}]}}',
        b"[DONE]",
    )
    assert (record.guide, record.score, record.rewards) == ("g", 2.5, {"q": 1, "r": 3})
    assert (record.spend, record.stopped_by) == ({"total_s": 2}, "budget")


@pytest.mark.parametrize(
    ("data", "name", "says"),
    [
        (b'{"error": {"message": "no"}}', "", "no"),
        (b'{"error": "plain"}', "", "plain"),
        (b'{"message": "named"}', "error", "named"),
        (b"{not json", "", "not a JSON object"),
        (b"[1]", "", "not a JSON object"),
        (b'{"choices": [], "alignment": {"choices": [{"score": NaN}]}}', "", "not a JSON object"),
        (b'{"choices": ["odd"]}', "", "not shaped like an answer"),
    ],
)
def test_errors_inside_a_stream_are_errors_whatever_follows(data: bytes, name: str, says: str) -> None:
    record = read(chunk("a"), data, name=name)
    assert record.outcome is Outcome.STREAM_ERROR
    assert says in record.error
    assert record.end == 2
    assert not math.isnan(record.e2el)

"""Read answers, streamed and whole, into a record: arrival times, tokens, and the alignment object.

`alignment` is Guiderail's (its shape is in server/api/responses.py and guides/core/metering.py); other servers send
none, and the fields stay empty. Errors inside a 200 are OpenAI's: an object `error`, or an event of that name. What a
server leaves out, or sends as null, stays unknown: tokens are then counted as chunks.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from guiderail.loadtest.load.text_file import parse_json
from guiderail.loadtest.report.records import Outcome, Record

TEXT_FIELDS = ("content", "text", "reasoning_content", "reasoning", "tool_calls", "refusal")
LARGEST = 2.0**53  # no count, score or duration is larger; beyond it sums would lose units or overflow
NOTHING = (b"", b"null")  # data that some servers send to keep a connection alive


class AnswerReader:
    """Reads one answer. Afterwards the record has an outcome if the server said how it ended."""

    def __init__(self, record: Record, keep_text: bool) -> None:
        self._record = record
        self._texts: list[str] | None = [] if keep_text else None
        self._tokens: int | None = None
        self._unfinished: dict[object, bool] = {}  # by the index of a choice

    @property
    def done(self) -> bool:
        """True once the answer has ended, successfully or not."""
        return self._record.outcome is not None

    def event(self, name: str, data: bytes, now: float) -> None:
        """Take one event of a stream. Events after the end change nothing."""
        record, content = self._record, data.strip()
        if self.done or (content in NOTHING and name != "error"):
            return
        if content == b"[DONE]":
            self.end(Outcome.COMPLETED, now)
            return
        chunk = self._object(data, now)
        if chunk is None or self._failed(name, chunk, now):
            return
        with self._expected_shape(now):
            texts = []
            for choice in chunk.get("choices") or ():
                if choice is None:
                    continue
                delta = choice.get("delta") or choice
                texts += [delta[key] for key in TEXT_FIELDS if delta.get(key)]
                self._finish(choice)
            if texts:
                record.chunks.append(now)
                self._keep(texts)
            self._usage_and_alignment(chunk)

    def end_of_stream(self, now: float) -> None:
        """Take the end of a stream's body. Without [DONE] it is whole if every choice said why it finished."""
        if self._unfinished and not any(self._unfinished.values()):
            self.end(Outcome.COMPLETED, now)
        else:
            self.end(Outcome.STREAM_ERROR, now, "the stream ended without [DONE]")

    def body(self, data: bytes, now: float) -> None:
        """Take a whole JSON answer."""
        answer = self._object(data, now)
        if answer is None or self._failed("", answer, now):
            return
        with self._expected_shape(now):
            if not answer.get("choices"):
                self.end(Outcome.STREAM_ERROR, now, "the answer has no choices")
                return
            for choice in answer["choices"]:
                if choice is None:
                    continue
                self._keep([choice.get("text") or (choice.get("message") or {}).get("content")])
                self._finish(choice)
            self._usage_and_alignment(answer)
            self.end(Outcome.COMPLETED, now)

    def end(self, outcome: Outcome, now: float, error: str = "") -> None:
        """End the answer for a reason that it did not give itself. Does nothing if it has ended already."""
        record = self._record
        if self.done:
            return
        record.outcome, record.end, record.error = outcome, now, _printable(error)
        record.text = _printable("".join(self._texts or ()))
        if self._tokens is None:  # the server did not say
            record.output_tokens, record.tokens_counted = len(record.chunks), False
        else:
            record.output_tokens = self._tokens

    def _keep(self, texts: list[Any]) -> None:
        if self._texts is not None:
            self._texts += [text for text in texts if isinstance(text, str)]

    def _finish(self, choice: Mapping[str, Any]) -> None:
        index, reason = str(choice.get("index", 0)), choice.get("finish_reason")
        self._unfinished[index] = not reason and self._unfinished.get(index, True)
        if isinstance(reason, str) and reason:
            self._record.finish_reason = reason

    def _object(self, data: bytes, now: float) -> dict[str, Any] | None:
        try:
            value = parse_json(data.decode("utf-8-sig"))
        except ValueError:
            value = None
        if not isinstance(value, dict):
            self.end(Outcome.STREAM_ERROR, now, f"not a JSON object: {data[:80].decode(errors='replace')}")
            return None
        return value

    @contextmanager
    def _expected_shape(self, now: float) -> Iterator[None]:
        try:
            yield
        except (AttributeError, KeyError, TypeError) as error:
            self.end(Outcome.STREAM_ERROR, now, f"not shaped like an answer: {type(error).__name__}: {error}")

    def _failed(self, name: str, body: Mapping[str, Any], now: float) -> bool:
        fault = body.get("error")
        if not fault and name != "error":
            return False
        self.end(Outcome.STREAM_ERROR, now, error_text(fault or body))
        return True

    def _usage_and_alignment(self, body: Mapping[str, Any]) -> None:
        record, usage = self._record, _mapping(body.get("usage"))
        prompt, completion = _number(usage.get("prompt_tokens")), _number(usage.get("completion_tokens"))
        record.prompt_tokens = record.prompt_tokens if prompt is None or prompt < 0 else int(prompt)
        self._tokens = self._tokens if completion is None or completion < 0 else int(completion)
        report = body.get("alignment")
        if not isinstance(report, dict):
            return
        given = report.get("choices")
        choices = [_mapping(choice) for choice in given] if isinstance(given, list) else []
        scores = [score for choice in choices if (score := _number(choice.get("score"))) is not None]
        record.score = sum(scores) / len(scores) if scores else None
        rewards = [_mapping(choice.get("rewards")) for choice in choices]
        for label in sorted({label for each in rewards for label in each}):
            values = [value for each in rewards if (value := _number(each.get(label))) is not None]
            if values:
                record.rewards[label] = sum(values) / len(values)
        record.stopped_by = next((c["stopped_by"] for c in choices if _text(c.get("stopped_by"))), None)
        record.guide = _text(_mapping(_mapping(report.get("config")).get("guide")).get("name"))
        spend = {key: _number(value) for key, value in _mapping(report.get("spend")).items()}
        record.spend = {key: value for key, value in spend.items() if value is not None}


def error_text(fault: object) -> str:
    """The message of an error object of any shape, at most 300 characters."""
    if isinstance(fault, dict):
        fault = fault.get("message") or fault.get("detail") or fault.get("type") or fault
    return str(fault)[:300]


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _number(value: object) -> int | float | None:
    """The value if it is a number that sums can hold, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) <= LARGEST else None  # type: ignore[return-value,arg-type]


def _printable(text: str) -> str:
    """The text without lone surrogates, which no file can hold."""
    return text.encode(errors="replace").decode()

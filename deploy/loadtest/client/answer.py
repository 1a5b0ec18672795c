"""Read answers, streamed and whole, into a record: arrival times, tokens, and the alignment object.

`alignment` is Guiderail's (its shape is in server/api/responses.py and guides/core/metering.py); other servers send
none, and the fields stay empty. Errors inside a 200 are OpenAI's: an object `error`, or an event of that name.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from guiderail.loadtest.report.records import Outcome, Record

TEXT_FIELDS = ("content", "text", "reasoning_content", "reasoning", "tool_calls", "refusal")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


DECODER = json.JSONDecoder(parse_constant=_refuse)


class AnswerReader:
    """Reads one answer. Afterwards the record has an outcome if the server said how it ended."""

    def __init__(self, record: Record, keep_text: bool) -> None:
        self._record = record
        self._texts: list[str] | None = [] if keep_text else None

    @property
    def done(self) -> bool:
        """True once the answer has ended, successfully or not."""
        return self._record.outcome is not None

    def event(self, name: str, data: bytes, now: float) -> None:
        """Take one event of a stream. Events after the end change nothing."""
        record = self._record
        if self.done:
            return
        if data == b"[DONE]":
            self.end(Outcome.COMPLETED, now)
            return
        chunk = self._object(data, now)
        if chunk is None or self._failed(name, chunk, now):
            return
        with self._expected_shape(now):
            texts = []
            for choice in chunk.get("choices") or ():
                delta = choice.get("delta") or choice
                texts += [delta[key] for key in TEXT_FIELDS if delta.get(key)]
                record.finish_reason = choice.get("finish_reason") or record.finish_reason
            if texts:
                record.chunks.append(now)
                if self._texts is not None:
                    self._texts += [text for text in texts if isinstance(text, str)]
            self._usage_and_alignment(chunk)

    def body(self, data: bytes, now: float) -> None:
        """Take a whole JSON answer."""
        answer = self._object(data, now)
        if answer is None or self._failed("", answer, now):
            return
        with self._expected_shape(now):
            for choice in answer["choices"]:
                text = choice.get("text") or choice.get("message", {}).get("content")
                if self._texts is not None and text:
                    self._texts.append(text)
                self._record.finish_reason = choice.get("finish_reason")
            self._usage_and_alignment(answer)
            self.end(Outcome.COMPLETED, now)

    def end(self, outcome: Outcome, now: float, error: str = "") -> None:
        """End the answer for a reason that it did not give itself. Does nothing if it has ended already."""
        record = self._record
        if self.done:
            return
        record.outcome, record.end, record.error = outcome, now, error
        record.text = "".join(self._texts or ())
        if record.prompt_tokens is None:  # the server gave no usage
            record.output_tokens, record.tokens_counted = len(record.chunks), False

    def _object(self, data: bytes, now: float) -> dict[str, Any] | None:
        try:
            value = DECODER.decode(data.decode())
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
        record = self._record
        if usage := body.get("usage"):
            record.prompt_tokens = usage.get("prompt_tokens", 0)
            record.output_tokens = usage.get("completion_tokens", 0)
        report = body.get("alignment")
        if not isinstance(report, dict):
            return
        choices = report.get("choices") or []
        scores = [choice["score"] for choice in choices if choice.get("score") is not None]
        record.score = sum(scores) / len(scores) if scores else None
        labels = {label for choice in choices for label in choice.get("rewards") or {}}
        for label in sorted(labels):
            values = [choice["rewards"][label] for choice in choices if label in (choice.get("rewards") or {})]
            record.rewards[label] = sum(values) / len(values)
        record.stopped_by = next((c["stopped_by"] for c in choices if c.get("stopped_by")), None)
        record.guide = ((report.get("config") or {}).get("guide") or {}).get("name")
        spend = report.get("spend") or {}
        record.spend = {key: value for key, value in spend.items() if isinstance(value, int | float)}


def error_text(fault: object) -> str:
    """The message of an error object of any shape, at most 300 characters."""
    if isinstance(fault, dict):
        fault = fault.get("message") or fault.get("detail") or fault.get("type") or fault
    return str(fault)[:300]

"""The next request: its class, prompt and body, and the point at which the client hangs up, if it does.

Everything is drawn from the seed and the request's number alone, so two servers get the same requests in the same
order, however fast they answer.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from guiderail.loadtest.load.prompts import Prompt, as_body, load
from guiderail.loadtest.load.traffic import TrafficClass
from guiderail.loadtest.loadtest_error import LoadtestError


@dataclass(frozen=True, slots=True)
class Cancellation:
    """Clients that hang up: a `rate` of them, after a uniformly random number of chunks with text and/or seconds
    after the send, whichever comes first."""

    rate: float = 0.0
    chunks: tuple[int, int] | None = (1, 16)
    seconds: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Requests:
    """Fields common to all requests, from the flags. A class's own fields override `body`."""

    base_url: str
    endpoint: str
    model: str
    body: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int = 128
    prompts: Sequence[Prompt] = ()
    unique_prompts: bool = False
    slos: Mapping[str, float] = field(default_factory=dict)
    cancellation: Cancellation = Cancellation()
    id_prefix: str = "loadtest-"


@dataclass(frozen=True, slots=True)
class Call:
    """One request, ready to be sent."""

    index: int
    class_name: str
    request_id: str
    url: str
    body: bytes
    slos: Mapping[str, float]
    cancel_after_chunks: int | None = None
    cancel_after_s: float | None = None


class Plan:
    """An endless iterator of calls."""

    def __init__(self, classes: Sequence[TrafficClass], requests: Requests, seed: int) -> None:
        self._classes, self._requests, self._seed = classes, requests, seed
        shares = np.array([kind.share for kind in classes])
        self._shares = shares / shares.sum()
        self._prompts = [load(kind.prompts) if kind.prompts else requests.prompts for kind in classes]
        self._orders: list[list[int]] = [[] for _ in classes]
        self._next = 0
        for kind, own in zip(classes, self._prompts, strict=True):
            _check(kind, requests, own)

    @property
    def prompt_counts(self) -> dict[str, int]:
        """Different prompts by class."""
        return {kind.name: len(own) for kind, own in zip(self._classes, self._prompts, strict=True)}

    def __next__(self) -> Call:
        index = self._next
        self._next += 1
        rng = np.random.default_rng([self._seed, index])
        which = int(rng.choice(len(self._classes), p=self._shares))
        kind, common = self._classes[which], self._requests
        endpoint = kind.endpoint or common.endpoint
        body = {
            "model": kind.model or common.model,
            **as_body(self._prompt(which), is_chat(endpoint), self._prefix(index)),
            "max_tokens": kind.max_tokens or common.max_tokens,
            "stream": kind.stream,
            **({"stream_options": {"include_usage": True}} if _streams(kind, common) else {}),
            **common.body,
            **({"alignment": kind.alignment} if kind.alignment is not None else {}),
            **({"priority": kind.priority} if kind.priority is not None else {}),
            **kind.body,
        }
        cancel = common.cancellation
        rate = cancel.rate if kind.cancellation_rate is None else kind.cancellation_rate
        hangs_up = rng.random() < rate
        chunks = int(rng.integers(*cancel.chunks, endpoint=True)) if hangs_up and cancel.chunks else None
        seconds = float(rng.uniform(*cancel.seconds)) if hangs_up and cancel.seconds else None
        return Call(
            index,
            kind.name,
            f"{common.id_prefix}{index}",
            common.base_url + endpoint,
            json.dumps(body).encode(),
            common.slos if kind.goodput is None else kind.goodput.model_dump(exclude_none=True),
            chunks,
            seconds,
        )

    def __iter__(self) -> "Plan":
        return self

    def _prompt(self, which: int) -> Prompt:
        """The next prompt: every one once in random order, then all again in another order."""
        own, order = self._prompts[which], self._orders[which]
        if not order:
            rng = np.random.default_rng([self._seed, self._next, which])
            order += rng.permutation(len(own)).tolist()
        return own[order.pop()]

    def _prefix(self, index: int) -> str:
        return f"({self._seed}-{index}) " if self._requests.unique_prompts else ""


def is_chat(endpoint: str) -> bool:
    """True if an endpoint takes messages rather than a prompt. Raises LoadtestError if it takes neither."""
    if endpoint.endswith("/chat/completions"):
        return True
    if endpoint.endswith("/completions"):
        return False
    raise LoadtestError(f"endpoint '{endpoint}' is neither .../chat/completions nor .../completions")


def _streams(kind: TrafficClass, common: Requests) -> bool:
    """True if the answers of a class come as streams: its body and --extra-body may say so too."""
    return bool({"stream": kind.stream, **common.body, **kind.body}["stream"])


def _check(kind: TrafficClass, common: Requests, own: Sequence[Prompt]) -> None:
    chat = is_chat(kind.endpoint or common.endpoint)
    for prompt in own:
        as_body(prompt, chat, "x" if common.unique_prompts else "")
    rate = common.cancellation.rate if kind.cancellation_rate is None else kind.cancellation_rate
    if rate > 0 and not _streams(kind, common) and common.cancellation.seconds is None:
        raise LoadtestError(f"class '{kind.name}' does not stream: to cancel its requests give --cancel-after-s")

"""Parts shared by the benchmarks of guides: requests on the path that HTTP takes, and raw results kept on disk."""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from report import ROOT, Target, write_section

from guiderail.server.api.bodies import Body, ChatBody, TextBody
from guiderail.server.api.responses import whole
from guiderail.server.offline.prompt_file import read_prompts
from guiderail.server.requests import build
from guiderail.server.requests.schemas import ChatRequest, CompletionRequest
from guiderail.server.settings import OperatorLimits
from guiderail.server.state import ServerState

HEAD = "hh-harmless-smollm2-135m"  # the bundled reward head, served as `harmless`
EVERYDAY = ROOT / "deploy" / "prompts" / "everyday.jsonl"
MORE = ROOT / "deploy" / "prompts" / "more.jsonl"
# A benchmark's requests wait in its own process, and none may be refused.
LIMITS = OperatorLimits(max_candidates=4096, max_queue=10_000, max_queue_tokens=10**9)
QUIET_S = 1.2  # vLLM's idle processes poll for a second after their last work


class Raw:
    """Raw results by key, written as JSON lines as they come, so that an interrupted run can be resumed."""

    def __init__(self, path: Path, settings: dict[str, Any], *, resume: bool) -> None:
        """Raise SystemExit if there are results of other settings to resume, or any where none are wanted."""
        self._found: dict[str, Any] = {}
        settings = json.loads(json.dumps(settings))
        if path.exists():
            if not resume:
                raise SystemExit(f"{path} exists: give --resume to continue it, or another --raw")
            head, *rows = _lines(path.read_text())
            if head["settings"] != settings:
                raise SystemExit(f"{path} was made with other settings: {head['settings']}")
            self._found = {row["key"]: row["value"] for row in rows}
            self._file = path.open("a")
            self._file.write("\n")  # the last line may have been cut off
        else:
            self._file = path.open("w")
            self._put({"settings": settings})
        print(f"raw results: {path} ({len(self._found)} there)", file=sys.stderr)

    async def get(self, key: str, make: Callable[[], Awaitable[Any]]) -> Any:
        """Return the value of a key: the one found, or else the result of `make`."""
        if key not in self._found:
            self._found[key] = json.loads(json.dumps(await make()))
            self._put({"key": key, "value": self._found[key]})
            print(f"  {key}", file=sys.stderr, flush=True)
        return self._found[key]

    def _put(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def _lines(text: str) -> list[dict[str, Any]]:
    """The lines of a raw file; one that was cut off is left out."""
    rows = []
    for line in text.splitlines():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


async def ask(state: ServerState, **body: Any) -> dict[str, Any]:
    """The response to a chat request, or to a text completion if it has a `prompt`, with `wall_s` in it."""
    started = time.perf_counter()
    asked: Body
    if "prompt" in body:
        asked = TextBody(
            build.completion(state, CompletionRequest.model_validate(body), time.monotonic()), state.renderer
        )
    else:
        asked = ChatBody(build.chat(state, ChatRequest.model_validate(body), time.monotonic()), state.renderer)
    response = await whole(state, asked)
    return response | {"wall_s": time.perf_counter() - started}


async def at_once(work: Sequence[Callable[[], Awaitable[Any]]], limit: int) -> list[Any]:
    """Results of all the work, at most `limit` of it in flight."""
    room = asyncio.Semaphore(limit)

    async def one(each: Callable[[], Awaitable[Any]]) -> Any:
        async with room:
            return await each()

    return await asyncio.gather(*map(one, work))


async def seconds(work: Awaitable[Any]) -> float:
    """Seconds that the work takes, from a quiet start."""
    await asyncio.sleep(QUIET_S)
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


def questions(path: Path) -> list[str]:
    """The user's messages of a prompt file."""
    return [messages[-1].content for messages in read_prompts(path).prompts]


def user(text: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


def publish(
    rehearse: bool,
    key: str,
    title: str,
    command: str,
    lines: list[str],
    data: dict[str, Any],
    targets: Sequence[Target] = (),
) -> None:
    """Write the section; a rehearsal only prints it."""
    if rehearse:
        print("\n".join([f"## {title} (rehearsal: nothing is written)", "", *lines, ""]))
    else:
        write_section(key, title, command, lines, data, targets)

"""Ask a server, in process or over a socket, and say what is wrong with its answer."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import httpx
from fuzz_strategies import Described
from nasty_bodies import CHAT, SCORE, Sent

HANG_S = 120.0  # marks a hang, on a machine however busy
SEEDED = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 6, "temperature": 1, "seed": 5}

Idle = Callable[[], Awaitable[str]]  # what is still going on in the server, "" if nothing is


def strict(text: str | bytes) -> Any:
    """The value of a JSON text, which NaN and the like are not. Raises ValueError."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text.decode() if isinstance(text, bytes) else text, parse_constant=refuse)


async def describe(client: httpx.AsyncClient) -> Described:
    """What the server says of itself."""
    found = [(await client.get(path)).json() for path in ("/openapi.json", "/v1/guides", "/v1/rewards", "/v1/models")]
    named = [{each["name"]: each["parameters"] for each in listed["data"]} for listed in found[1:3]]
    return Described(found[0], *named, found[3]["data"][0]["id"])


async def seeded(client: httpx.AsyncClient) -> Any:
    """An answer that is the same each time."""
    answer = await client.post(CHAT, json=SEEDED)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


async def fault(client: httpx.AsyncClient, sent: Sent, idle: Idle) -> str:
    """What is wrong with the answer to a request and with what it leaves behind; "" if nothing is."""
    try:
        async with asyncio.timeout(HANG_S):
            request = client.build_request(sent.method, sent.path, content=sent.content, headers=dict(sent.headers))
            answer = await client.send(request)
            wrong = _wrong(sent, answer)
            return wrong or await idle()
    except TimeoutError:
        return "it hangs"
    except httpx.HTTPError as error:
        return f"broken connection: {type(error).__name__}"
    except Exception as error:  # in process the server's exceptions come out here
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        place = "" if trace is None else f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}"
        return f"unhandled {type(error).__name__} at {place}: {str(error)[:200]}"


def _wrong(sent: Sent, answer: httpx.Response) -> str:
    status, kind = answer.status_code, answer.headers.get("content-type", "")
    if sent.method == "HEAD" or status == 204:
        wrong = "a body where there is none" if answer.content else ""
        return wrong or (f"status {status}" if status >= 500 else "")
    if status >= 400:
        return _wrong_error(status, kind, answer.content)
    if sent.method == "OPTIONS":
        return ""
    if "/metrics" in sent.path:
        return "" if answer.content.startswith(b"# HELP") else "no metrics"
    if kind.startswith("text/event-stream"):
        return _wrong_stream(answer.content)
    try:
        body = strict(answer.content)
    except ValueError as error:
        return f"{status} that is no JSON: {error}"
    if sent.method == "POST" and sent.path == SCORE:
        return "" if body["object"] == "list" and body["data"] else "no scores"
    if sent.method == "POST":
        choices = body.get("choices")
        fine = choices and all(isinstance(choice.get("finish_reason"), str) for choice in choices)
        return "" if fine else f"no choices with ends: {answer.text[:200]}"
    return ""


def _wrong_error(status: int, kind: str, content: bytes) -> str:
    try:
        error = strict(content)["error"]
        shape = {name: type(each) for name, each in error.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{status} {kind} that is no error of OpenAI's: {content[:200]!r}"
    if not kind.startswith("application/json"):
        return f"{status} of type {kind}"
    if set(shape) != {"message", "type", "param", "code"} or {shape["message"], shape["type"]} != {str}:
        return f"{status} with an error of another shape: {content[:200]!r}"
    if not error["message"] or not {shape["param"], shape["code"]} <= {str, type(None)}:
        return f"{status} with an error of another shape: {content[:200]!r}"
    return _wrong_status(status, error)


def _wrong_status(status: int, error: dict[str, Any]) -> str:
    if status < 500 or (status == 504 and error["code"] == "deadline_exceeded"):  # the client's own deadline
        return ""
    message = re.sub(r"\d+", "#", error["message"])[:120]
    return f"{status} {error['code']}: {message}"


def _wrong_stream(content: bytes) -> str:
    events = [each for each in content.split(b"\n\n") if each and not each.startswith(b":")]
    if not events or events[-1] != b"data: [DONE]":
        return "a stream without [DONE]"
    for event in events[:-1]:
        try:
            value = strict(event.removeprefix(b"data: "))
        except ValueError:
            return f"an event that is no JSON: {event[:200]!r}"
        if "error" in value:
            error = value["error"]
            return _wrong_status(500 if error["type"] == "server_error" else 400, error)
    return ""

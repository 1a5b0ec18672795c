"""Requests and connections that keep a server from its others, each as bytes ready to be sent.

The sizes are those with which they were found: some took the server for minutes.
"""

import json
from collections.abc import Callable, Iterator

from nasty_bodies import CHAT, SCORE, TEXT, doubling, formed, messages

WORDS = "All work and no play makes a dull day. "
HOST = "Host: 127.0.0.1\r\n"


def head(path: str, length: int) -> bytes:
    """The head of a POST of JSON."""
    return f"POST {path} HTTP/1.1\r\n{HOST}Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n".encode()


def request(path: str, body: object) -> bytes:
    """A whole POST."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head(path, len(content)) + content


def scored(inputs: int, answers: int, *rewards: object, turns: int = 1) -> bytes:
    conversation = [{"role": "user", "content": "Say something."}] * turns
    each = {"messages": conversation, "answers": [f"Answer {i}." for i in range(answers)]}
    return request(SCORE, {"inputs": [each] * inputs, "rewards": list(rewards)})


def best_of_64_with_bias() -> bytes:
    alignment = {"guide": {"name": "best_of_n", "n": 64}, "rewards": ["length"]}
    bias = {str(token): 0.5 for token in range(300, 49_152)}
    return request(CHAT, messages() | {"max_tokens": 32, "logit_bias": bias, "alignment": alignment})


# One request each, sent whole; by the name of the case.
BODIES: dict[str, Callable[[], bytes]] = {
    "a million messages that are numbers": lambda: request(CHAT, b'{"messages": [' + b"1," * 999_999 + b"1]}"),
    "a content of 15 MB": lambda: request(CHAT, messages("a" * 15_000_000)),
    "a content of 6 MB of words": lambda: request(CHAT, messages(WORDS * 150_000)),
    "a prompt of 7 MB": lambda: request(TEXT, {"prompt": WORDS * 180_000, "max_tokens": 4}),
    "100,000 messages": lambda: request(CHAT, {"messages": [{"role": "user", "content": "a"}] * 100_000}),
    "5 million token ids": lambda: request(TEXT, b'{"prompt": [' + b"5," * 4_999_999 + b"5]}"),
    "5,000 rewards": lambda: request(CHAT, messages() | {"alignment": {"rewards": [{"name": "length", "label": f"r{i}"} for i in range(5000)]}}),
    "a bias on every token, best of 64": best_of_64_with_bias,
    "200 x 1,024 answers to score": lambda: scored(200, 1024, "length"),
    "256 inputs of 1,023 messages": lambda: scored(256, 1, "length", turns=1023),
    "a schema of doubling references": lambda: request(CHAT, formed(doubling(38)).content),
    "100,000 properties": lambda: request(CHAT, formed({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(100_000)}}).content),
    "an enum of 12,000": lambda: request(CHAT, formed({"enum": [f"value {i}" for i in range(12_000)]}).content),
    "a regex of 1.5 million repeats": lambda: scored(1, 1, {"name": "regex", "pattern": "a{1500000}"}),
    "the judge on 1,024 answers": lambda: scored(1, 1024, "judge"),
    "the judge on 64 x 1,024 answers": lambda: scored(64, 1024, "judge"),
}  # fmt: skip

# (number of connections, what each sends at once, what it sends then, a byte a second)
CONNECTIONS: dict[str, tuple[int, bytes, bytes]] = {
    "400 idle connections": (400, b"", b""),
    "200 half headers": (200, f"POST {CHAT} HTTP/1.1\r\n{HOST}X-Half: ".encode(), b"a" * 600),
    "200 bodies of a byte a second": (200, head(CHAT, 10_000), b" " * 600),
}


def drip(rest: bytes) -> Iterator[bytes]:
    """A byte at a time."""
    return (rest[i : i + 1] for i in range(len(rest)))

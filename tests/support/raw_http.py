"""HTTP as bytes on a socket, for what clients of libraries cannot be made to send."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    """A response as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """Its error, which has OpenAI's shape."""
        assert self.headers["content-type"] == "application/json"
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        return error


class Raw:
    """A connection to a server, for the time of the block."""

    def __init__(self, url: str) -> None:
        self._at = urlsplit(url)

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_connection(self._at.hostname, self._at.port)
        return self

    async def __aexit__(self, *error: object) -> None:
        self.writer.close()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, *, head: bool = False) -> Answer:
        """The next response. head: to a HEAD, which has no body."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)
        }
        status = int(lines[0].split()[1])
        body = b""
        if headers.get("transfer-encoding") == "chunked" and not head:
            while size := int(await self.reader.readline(), 16):
                body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readline()
        elif not head:
            body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return Answer(status, headers, body)

    async def closed(self) -> bytes:
        """What still comes until the server closes the connection."""
        return await self.reader.read()


async def exchange(url: str, data: bytes, *, head: bool = False) -> Answer:
    """The answer to bytes on a connection of their own."""
    async with Raw(url) as raw:
        await raw.send(data)
        return await raw.answer(head=head)


def post(path: str, body: bytes, *headers: str) -> bytes:
    """A POST with its Content-Length."""
    lines = [f"POST {path} HTTP/1.1", "Host: h", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body

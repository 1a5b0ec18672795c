"""HTTP client for other servers of models. Its errors never contain the key."""

from typing import TypeVar

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError

from guiderail.guides.core.errors import GuiderailError

CONNECT_S = 5.0


class RemoteError(GuiderailError):
    """A server cannot be reached, or its response is unusable. `fault` describes it without the address."""

    def __init__(self, url: str, fault: str, detail: str = "", status: int | None = None) -> None:
        super().__init__(f"{url} {fault}" + (f": {detail}" if detail else ""))
        self.fault = fault
        self.detail = detail
        self.status = status


class NoResponse(RemoteError):
    """The connection failed before any response, so it is safe to retry."""


class ResponseBody(BaseModel):
    """Fields of a response that are relied on; others are ignored."""

    model_config = ConfigDict(strict=True)


class RemoteModel(ResponseBody):
    """One model of a server's list."""

    id: str
    max_model_len: int | None = None


class _Models(ResponseBody):
    data: list[RemoteModel]


Body = TypeVar("Body", bound=ResponseBody)


class RemoteClient:
    """Requests to servers with one bearer key over at most `in_flight` connections."""

    def __init__(self, key: str | None, in_flight: int, read_s: float) -> None:
        """read_s: seconds for which a server may stay silent."""
        self._read_s = read_s
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key is not None else {},
            timeout=httpx.Timeout(read_s, connect=CONNECT_S, pool=None),
            limits=httpx.Limits(max_connections=in_flight, max_keepalive_connections=in_flight),
        )

    async def model(self, url: str, name: str | None) -> RemoteModel:
        """Return the served model of this name; with None the only one. Raises RemoteError."""
        listed = parse_body(url, _Models, await self.exchange(url, "GET", "/v1/models")).data
        found = [each for each in listed if name in (None, each.id)]
        if len(found) != 1:
            names = ", ".join(each.id for each in listed) or "nothing"
            raise RemoteError(url, f"serves {names}; " + ("say which with model=" if found else f"there is no {name}"))
        return found[0]

    async def exchange(self, url: str, method: str, path: str, body: object = None) -> bytes:
        """Return the body of a response with status 200. Raises NoResponse or RemoteError."""
        try:
            try:
                response = await self._client.send(
                    self._client.build_request(method, url + path, json=body), stream=True
                )
            except (httpx.NetworkError, httpx.ConnectTimeout, httpx.RemoteProtocolError) as error:
                raise NoResponse(url, f"cannot be reached ({type(error).__name__})", str(error)) from error
            try:
                content = await response.aread()
            finally:
                await response.aclose()
        except httpx.ReadTimeout as error:
            raise RemoteError(url, f"sent nothing for {self._read_s:g} s") from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise RemoteError(url, f"broke off ({type(error).__name__})", str(error)) from error
        if response.status_code != 200:
            detail = content[:300].decode(errors="replace")
            status = response.status_code
            raise RemoteError(url, f"answered {path} with status {status}", detail, status)
        return content

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


def parse_body(url: str, kind: type[Body], content: bytes) -> Body:
    """Validate a body. Raises RemoteError if it is not of this kind."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RemoteError(url, "sent a body that cannot be used", f"{where}: {first['msg']}") from error

"""The listener: bound but silent until it serves, any free port, refusals that name the address."""

import asyncio
import socket

import httpx
import pytest
from fakes import ScriptedEngine, make_state

from guiderail.guides.core.errors import GuiderailError
from guiderail.server.api.listener import Listener


async def app(scope: object, receive: object, send: object) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
    await send({"type": "http.response.body", "body": b"here"})  # type: ignore[operator]


async def test_it_holds_the_address_and_refuses_connections_until_it_serves() -> None:
    listener = Listener("127.0.0.1", 0)
    assert listener.url == f"http://127.0.0.1:{listener.port}"
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", listener.port)):
        pass
    with pytest.raises(OSError, match="in use"), socket.socket() as other:
        other.bind(("127.0.0.1", listener.port))

    stop, said = asyncio.Event(), []
    serving = asyncio.create_task(listener.run(app, make_state(ScriptedEngine()), stop, said.append))
    async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(retries=5)) as client:
        assert (await client.get(listener.url)).text == "here"
    stop.set()
    await serving
    assert said == ["finishing requests in flight"]
    Listener("127.0.0.1", listener.port).close()  # it is free again, though a connection of it may linger


async def test_a_name_with_several_addresses_has_one_port(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: both)
    listener = Listener("localhost", 0)
    for address in ("::1", "127.0.0.1"):
        with (
            pytest.raises(OSError, match="in use"),
            socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as other,
        ):
            other.bind((address, listener.port))
    listener.close()


@pytest.mark.parametrize(("host", "why"), [("192.0.2.1", "assign requested address"), ("no.such.host.invalid", "")])
def test_an_address_that_cannot_be_had_is_named(host: str, why: str) -> None:
    with pytest.raises(
        GuiderailError, match=f"cannot listen on http://{host}:8000: .*{why}.*; choose with --host and --port"
    ):
        Listener(host, 8000)


async def test_who_listens_first_keeps_a_port_that_two_have_bound() -> None:
    first = Listener("127.0.0.1", 0)
    second = Listener("127.0.0.1", first.port)  # Linux allows it while neither listens
    stop = asyncio.Event()
    serving = asyncio.create_task(first.run(app, make_state(ScriptedEngine()), stop, print))
    await asyncio.sleep(0.1)
    with pytest.raises(GuiderailError, match="in use"):
        await second.run(app, make_state(ScriptedEngine()), stop, print)
    stop.set()
    await serving
    second.close()


def test_an_ipv6_address_is_bracketed() -> None:
    listener = Listener("::1", 0)
    assert listener.url == f"http://[::1]:{listener.port}"
    listener.close()

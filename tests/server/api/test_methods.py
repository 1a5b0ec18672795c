"""Methods, paths, headers and encodings as clients send them: every answer is JSON in OpenAI's shape."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fakes import ScriptedEngine, make_state
from raw_http import Raw, exchange, post
from serving import serving

CHAT = json.dumps({"messages": [{"role": "user", "content": "q"}], "max_tokens": 4}).encode()
PATH = "/v1/chat/completions"
GETS = ["/v1/models", "/v1/models/fake", "/v1/guides", "/v1/rewards", "/health", "/ready", "/version", "/metrics"]
POSTS = [PATH, "/v1/completions", "/v1/rewards/score"]


@pytest_asyncio.fixture
async def url() -> AsyncIterator[str]:
    async with serving(make_state(ScriptedEngine())) as url:
        yield url


@pytest_asyncio.fixture
async def client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url) as client:
        yield client


def fault(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


class TestMethods:
    @pytest.mark.parametrize("path", [*GETS, "/openapi.json", "/docs"])
    async def test_head_is_get_without_its_body(self, client: httpx.AsyncClient, path: str) -> None:
        whole, head = await client.get(path), await client.head(path)
        assert head.status_code == whole.status_code == 200
        assert head.content == b""
        assert head.headers["content-type"] == whole.headers["content-type"]
        if path != "/metrics":  # which has counted meanwhile
            assert head.headers["content-length"] == whole.headers["content-length"]

    @pytest.mark.parametrize(
        ("path", "allowed"),
        [*((path, "GET, HEAD, OPTIONS") for path in GETS), *((path, "OPTIONS, POST") for path in POSTS)],
    )
    async def test_what_a_path_allows(self, client: httpx.AsyncClient, path: str, allowed: str) -> None:
        asked = await client.options(path)
        assert (asked.status_code, asked.headers["allow"], asked.content) == (204, allowed, b"")
        for method in ("PUT", "DELETE", "PATCH", "GET" if path in POSTS else "POST"):
            refused = await client.request(method, path)
            assert (refused.status_code, refused.headers["allow"]) == (405, allowed)
            error = fault(refused)
            assert error["code"] == "method_not_allowed"
            assert method in error["message"]
            assert allowed in error["message"]

    async def test_head_of_a_route_for_post(self, client: httpx.AsyncClient) -> None:
        refused = await client.head(PATH)
        assert (refused.status_code, refused.headers["allow"], refused.content) == (405, "OPTIONS, POST", b"")

    @pytest.mark.parametrize("method", ["GET", "POST", "PUT", "OPTIONS", "DELETE"])
    @pytest.mark.parametrize("path", ["/", "/v1", "/v1/nothing", "/%ff%00", "/v1/models/../x", "//v1/models"])
    async def test_an_unknown_path(self, client: httpx.AsyncClient, method: str, path: str) -> None:
        answer = await client.request(method, path)
        assert answer.status_code == 404
        assert fault(answer)["code"] == "not_found"


class TestPaths:
    @pytest.mark.parametrize("path", [*GETS, *POSTS])
    async def test_a_slash_at_the_end_changes_nothing(self, client: httpx.AsyncClient, path: str) -> None:
        bodies = {"/v1/completions": b'{"prompt": "q"}', PATH: CHAT}
        score = b'{"inputs": [{"messages": [{"role": "user", "content": "q"}], "answers": ["1"]}], "rewards": ["last_digit"]}'
        if path in POSTS:
            answer = await client.post(f"{path}/", content=bodies.get(path, score))
        else:
            answer = await client.get(f"{path}//")
        assert answer.status_code == 200

    @pytest.mark.parametrize("query", ["?", "?a=b&a=c", "?%zz=%", "?" + "x" * 20_000, "?%00%ff&&=&"])
    async def test_a_query_is_ignored(self, url: str, query: str) -> None:
        answer = await exchange(url, f"GET /v1/models{query} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        assert answer.status == 200

    @pytest.mark.parametrize("target", ["/v1/%zz", "/v1/%", "/%e2%82", "/v1/mod%65ls%00"])
    async def test_invalid_percent_encoding_is_an_unknown_path(self, url: str, target: str) -> None:
        answer = await exchange(url, f"GET {target} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        assert (answer.status, answer.error["code"]) == (404, "not_found")

    async def test_percent_encoding_and_absolute_targets(self, url: str) -> None:
        for target in ("/v1/mod%65ls", "http://somewhere/v1/models"):
            answer = await exchange(url, f"GET {target} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            assert answer.status == 200


async def test_a_model_by_its_name() -> None:
    state = make_state(ScriptedEngine(), lora={"org/ada pter": "/x"}, profiles={"careful": {}})
    async with serving(state) as url, httpx.AsyncClient(base_url=url) as client:
        listed = (await client.get("/v1/models")).json()["data"]
        names = [each["id"] for each in listed]
        assert names == ["fake", "org/ada pter", "fake@careful", "org/ada pter@careful"]
        for each in listed:
            assert (await client.get(f"/v1/models/{each['id']}")).json() == each
        assert (await client.get("/v1/models/org%2Fada%20pter")).json() == listed[1]
        for name in ("nope", "fake@nope", "org", "fake/x", "%00", "%ff", "x" * 5000, "org/ada pter/models"):
            answer = await client.get(f"/v1/models/{name}")
            assert answer.status_code == 404
            error = fault(answer)
            assert (error["code"], error["param"]) == ("model_not_found", "model")
            assert "'fake'" in error["message"]
            assert len(error["message"]) < 400


class TestBodies:
    @pytest.mark.parametrize(
        "kind",
        [
            None, "text/plain", "application/json; charset=utf-8", 'application/json; charset="UTF-8"',
            "application/vnd.api+json", "application/x-www-form-urlencoded", "application/json;charset=US-ASCII",
            "nonsense", "; ;=", "application/json; profile=\xe9", "*/*",
        ],
    )  # fmt: skip
    async def test_any_content_type_that_is_utf_8(self, url: str, kind: str | None) -> None:
        headers = [] if kind is None else [f"Content-Type: {kind}"]
        async with Raw(url) as raw:
            await raw.send(post(PATH, CHAT, *headers, "Accept: image/png").decode().encode("latin-1"))
            assert (await raw.answer()).status == 200

    @pytest.mark.parametrize("charset", ["utf-16", "ISO-8859-1", "utf-7", "nope"])
    async def test_another_charset_is_refused_by_name(self, client: httpx.AsyncClient, charset: str) -> None:
        for path in POSTS:
            kind = {"Content-Type": f"application/json; charset={charset}"}
            refused = await client.post(path, content=CHAT, headers=kind)
            assert refused.status_code == 415
            assert charset.lower() in fault(refused)["message"]

    @pytest.mark.parametrize("encoding", ["gzip", "br", "zstd", "deflate", "gzip, identity"])
    async def test_an_encoding_is_refused_by_name(self, client: httpx.AsyncClient, encoding: str) -> None:
        for path in POSTS:
            refused = await client.post(path, content=CHAT, headers={"Content-Encoding": encoding})
            assert refused.status_code == 415
            assert encoding in fault(refused)["message"]
        assert (await client.post(PATH, content=CHAT, headers={"Content-Encoding": "identity"})).status_code == 200

    async def test_a_body_in_chunks(self, url: str) -> None:
        head = f"POST {PATH} HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        chunks = b"".join(b"%x;ext=1\r\n%c\r\n" % (1, byte) for byte in CHAT) + b"0\r\nTrailer: x\r\n\r\n"
        assert (await exchange(url, head + chunks)).status == 200

    @pytest.mark.parametrize("chunk", [b"zz\r\n", b"-1\r\n", b"ffffffffffffffffff\r\n", b"1\r\nxx"])
    async def test_chunks_that_are_none(self, url: str, chunk: bytes) -> None:
        answer = await exchange(url, f"POST {PATH} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + chunk)
        assert (answer.status, answer.error["code"]) == (400, "invalid_http")

    async def test_a_client_that_waits_to_be_told_to_continue(self, url: str) -> None:
        async with Raw(url) as raw:
            whole = post(PATH, CHAT, "Expect: 100-continue")
            await raw.send(whole.removesuffix(CHAT))
            assert (await raw.answer()).status == 100
            await raw.send(CHAT)
            assert (await raw.answer()).status == 200

    async def test_a_body_too_large_is_refused_before_it_is_sent(self, url: str) -> None:
        async with Raw(url) as raw:
            await raw.send(f"POST {PATH} HTTP/1.1\r\nContent-Length: {2**40}\r\nExpect: 100-continue\r\n\r\n".encode())
            answer = await raw.answer()
        assert (answer.status, answer.error["code"]) == (413, "body_too_large")

    async def test_a_body_for_a_route_that_takes_none(self, url: str) -> None:
        async with Raw(url) as raw:
            await raw.send(b"GET /v1/models HTTP/1.1\r\nContent-Length: 3\r\n\r\nabcGET /health HTTP/1.1\r\n\r\n")
            assert (await raw.answer()).status == 200
            assert b"ok" in (await raw.answer()).body


class TestNoHttp:
    @pytest.mark.parametrize(
        "data",
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the beginning of TLS
            b"hello\r\n\r\n", b"GET /\r\n\r\n", b"GET  / HTTP/1.1\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"BREW / HTTP/1.1\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n", b"GET ?x HTTP/1.1\r\n\r\n",
            b"CONNECT h:80 HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nNo colon\r\n\r\n", b"GET / HTTP/1.1\r\nA: \x00\r\n\r\n",
            b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n", b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            b"GET / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"GET / HTTP/1.1\r\nA : b\r\n\r\n", b"GET / HTTP/1.1\n\n\x80",
        ],
    )  # fmt: skip
    async def test_it_is_refused_as_json(self, url: str, data: bytes) -> None:
        async with Raw(url) as raw:
            await raw.send(data)
            answer = await raw.answer()
            assert answer.status in (400, 404)  # some of it is a request by llhttp's lights
            assert answer.error["code"] in ("invalid_http", "not_found")
            assert answer.headers["x-request-id"]
            if answer.status == 400:
                assert answer.headers["connection"] == "close"
                assert await raw.closed() == b""

    @pytest.mark.parametrize(
        "head",
        [
            b"GET /%b HTTP/1.1\r\n" % (b"x" * 70_000),
            b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000,
            b"GET / HTTP/1.1\r\nA: " + b"x" * 300_000,
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"A: b\r\n" * 20_000,
        ],
    )
    async def test_headers_without_end(self, url: str, head: bytes) -> None:
        async with Raw(url) as raw:
            await raw.send(head)
            answer = await raw.answer()
            if answer.status == 404:  # the answer to the fourth came before its trailers did
                answer = await raw.answer()
            assert (answer.status, answer.error["code"]) == (431, "headers_too_large")
            assert await raw.closed() == b""

    async def test_long_headers_within_the_limit(self, url: str) -> None:
        head = b"GET /health?%b HTTP/1.1\r\n" % (b"x" * 20_000) + b"A: %b\r\n" % (b"x" * 20_000) * 2
        async with Raw(url) as raw:
            for start in range(0, len(head), 5000):
                await raw.send(head[start : start + 5000])
                await asyncio.sleep(0.001)
            await raw.send(b"\r\n")
            assert (await raw.answer()).status == 200

    @pytest.mark.parametrize("to", ["h2c", "websocket"])  # the first by Java's client, with each first request
    @pytest.mark.parametrize("chunked", [False, True])
    async def test_an_upgrade_is_ignored(self, url: str, to: str, chunked: bool) -> None:
        upgrade = f"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: {to}\r\nHTTP2-Settings: AAEAAEAA\r\n"
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(CHAT), CHAT) if chunked else CHAT
        length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(CHAT)}"
        data = f"POST {PATH} HTTP/1.1\r\n{upgrade}{length}\r\n\r\n".encode() + body
        for split in (len(data), len(data) - len(body), len(data) - 9):
            async with Raw(url) as raw:
                await raw.send(data[:split])
                await asyncio.sleep(0.01)
                await raw.send(data[split:])
                assert (await raw.answer()).status == 200
                assert await raw.closed() == b""

    async def test_an_upgrade_with_chunks_that_are_none(self, url: str) -> None:
        upgrade = "Connection: Upgrade\r\nUpgrade: h2c\r\nTransfer-Encoding: chunked"
        answer = await exchange(url, f"POST {PATH} HTTP/1.1\r\n{upgrade}\r\n\r\nzz\r\n".encode())
        assert (answer.status, answer.error["code"]) == (400, "invalid_http")

    async def test_what_follows_an_answer_that_has_begun_ends_the_connection(self, url: str) -> None:
        async with Raw(url) as raw:
            await raw.send(b"GET /health HTTP/1.1\r\n\r\n")
            assert (await raw.answer()).status == 200
            await raw.send(b"\x00\x01")
            assert (await raw.answer()).status == 400

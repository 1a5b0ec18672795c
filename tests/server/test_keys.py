"""API keys: their file, its faults, reading it again, and that requests are known by a key's name and nothing more."""

import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes import ScriptedEngine, make_state
from serving import serving

from guiderail.server.keys import Keys, KeysError

BODY = {"messages": [{"role": "user", "content": "q"}], "max_tokens": 4}


@pytest.mark.parametrize(
    "text",
    [
        "alice: sk-1\nbob: '12345'\n",
        "# ours\nalice: sk-1\n\nbob: 12345\n",
        "\ufeffalice: sk-1\r\nbob: 12345\r\n",
        json.dumps({"alice": "sk-1", "bob": "12345"}),
    ],
)
def test_lines_and_json_are_read(text: str, tmp_path: Path) -> None:
    (file := tmp_path / "keys").write_text(text)
    keys = Keys(["sk-flag"], file)
    assert [keys.name_of(each) for each in (b"sk-1", b"12345", b"sk-flag", b"sk-", b"", b"\xff")] == [
        "alice", "bob", "key1", None, None, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected lines"),
        ("sk-secret\n", "expected lines"),
        ("- sk-secret\n", "expected lines"),
        ("alice: [sk-secret\n", "expected lines of the form name: key (line 2)"),
        ("alice: sk-secret\nalice: sk-other\n", "expected lines"),
        ("alice: sk-secret\nbob: sk-secret\n", "two names have the same key"),
        ("alice: two words\n", "the key of alice"),
        ("alice:\n", "the key of alice"),
        ("alice: {a: sk-secret}\n", "the key of alice"),
        ("a b: sk-secret\n", "a name has"),
        ("key1: sk-secret\n", "key1 is what a key given with --api-key is called"),
        ("\n".join(f"k{i}: sk-secret{i}" for i in range(300)), "at most 256"),
    ],
)
def test_a_wrong_file_is_refused_and_no_message_has_a_key(text: str, said: str, tmp_path: Path) -> None:
    (file := tmp_path / "keys").write_text(text)
    with pytest.raises(KeysError) as error:
        Keys(["sk-flag"], file)
    assert said in str(error.value)
    assert "secret" not in str(error.value)
    assert "two words" not in str(error.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="No such file"):
        Keys([], tmp_path / "none")


def test_the_file_is_read_again_and_a_wrong_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (file := tmp_path / "keys").write_text("alice: sk-1\n")
    keys = Keys([], file)
    file.write_text("bob: sk-2\n")
    with caplog.at_level(logging.WARNING):
        keys.reload()
        assert (keys.name_of(b"sk-1"), keys.name_of(b"sk-2")) == (None, "bob")
        file.write_text("bob: [\n")
        keys.reload()
    assert keys.name_of(b"sk-2") == "bob"
    assert caplog.records[-1].levelname == "ERROR"
    assert "the keys stay as they were" in caplog.messages[-1]
    assert "sk-" not in caplog.text


async def test_over_http_keys_have_limits_of_their_own_and_names_in_metrics(tmp_path: Path) -> None:
    (file := tmp_path / "keys").write_text("alice: sk-1\nbob: sk-2\n")
    engine = ScriptedEngine(lambda seed: ["w"] * 1000, step_s=0.01)
    state = make_state(engine, api_key_file=file, limits={"max_client_requests": 1})
    async with serving(state) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:

        def post(key: str, **more: Any) -> Any:
            return client.post("/v1/chat/completions", json=BODY | more, headers={"Authorization": f"Bearer {key}"})

        assert (await client.post("/v1/chat/completions", json=BODY)).status_code == 401
        assert (await post("sk-3")).status_code == 401
        assert (await client.get("/health")).status_code == 200
        body = BODY | {"stream": True, "max_tokens": 500}
        alice = {"Authorization": "Bearer sk-1"}
        async with client.stream("POST", "/v1/chat/completions", json=body, headers=alice) as running:
            await anext(running.aiter_lines())
            refused = await post("sk-1")
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "client_limit")
            assert int(refused.headers["retry-after"]) >= 1
            assert (
                "API key 'alice' has 1 requests in flight; one client may have 1" in refused.json()["error"]["message"]
            )
            assert (await post("sk-2")).status_code == 200
        metrics = (await client.get("/metrics", headers=alice)).text
    assert 'guiderail:client_requests_total{client="bob",model_name="fake",outcome="success"} 1.0' in metrics
    assert 'client="alice",model_name="fake",outcome="overloaded"} 1.0' in metrics
    assert "sk-" not in metrics


async def test_without_keys_addresses_are_clients_and_no_labels() -> None:
    async with serving(make_state(ScriptedEngine())) as url, httpx.AsyncClient(base_url=url) as client:
        assert (await client.post("/v1/chat/completions", json=BODY)).status_code == 200
        metrics = (await client.get("/metrics")).text
    assert 'guiderail:client_requests_total{client="",model_name="fake",outcome="success"} 1.0' in metrics
    assert "127.0.0.1" not in metrics

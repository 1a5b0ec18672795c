"""A policy on another server: its wire format, dropping, faults; and which engine a prompt goes to."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from fakes import LetterRenderer
from scripted_completions import ScriptedCompletions
from waiting import until

from guiderail.guides.core.errors import EngineUnavailable, GuiderailError, RequestError
from guiderail.guides.core.interfaces import Services
from guiderail.guides.core.types import Delta, SamplingSpec, TokenPrompt
from guiderail.guides.logit_mix import LogitMix
from guiderail.guides.transfer_q import TransferQ
from guiderail.server.engines.policies import RemotePolicySpec, parse_flag
from guiderail.server.engines.remote_policy import RemotePolicy
from guiderail.server.engines.supervised import SupervisedEngine
from guiderail.server.engines.vllm_fields import body_of

NO_ENGINE: Any = None


@asynccontextmanager
async def policy(server: ScriptedCompletions, **options: Any) -> AsyncIterator[RemotePolicy]:
    """A started policy named `aligned`; the server forgets what the checks at start sent."""
    remote = RemotePolicy("aligned", RemotePolicySpec(url=server.url, **options))
    try:
        await remote.start(LetterRenderer())
        server.seen.clear()
        yield remote
    finally:
        await remote.close()


def scripted(**options: Any) -> ScriptedCompletions:
    return ScriptedCompletions(LetterRenderer().encode, **options)


def prompts(*last: int) -> list[TokenPrompt]:
    return [TokenPrompt((1, token), "aligned") for token in last]


async def all_of(remote: Any, *args: Any, **options: Any) -> list[Delta]:
    async with remote.generate(*args, **options) as rollouts:
        return sorted([delta async for delta in rollouts], key=lambda delta: delta.row)


async def never(request: web.Request) -> None:
    await asyncio.sleep(3600)


async def test_sequences_are_requests_of_their_own_with_their_seeds() -> None:
    async with scripted() as server, policy(server) as remote:
        spec = SamplingSpec(3, temperature=0.5, stop=("\n",), logit_bias={7: 1.5}, min_tokens=1)
        deltas = await all_of(remote, prompts(10, 20), spec, seeds=[5, None])
        assert deltas == [
            Delta(0, "11 12 13", (11, 12, 13), "length", None),
            Delta(1, "21 22 23", (21, 22, 23), "length", None),
        ]
        first, second = sorted(server.seen, key=lambda body: body["prompt"])
        assert first["prompt"] == [1, 10]
        assert first["model"] == "aligned-model"
        assert first["seed"] == 5
        assert "seed" not in second
        assert {**body_of(spec), "return_token_ids": True}.items() <= first.items()
        assert first["logit_bias"] == {"7": 1.5}
        assert first["stop"] == ["\n"]


async def test_a_dropped_sequence_frees_the_server_and_hurts_no_other() -> None:
    async with scripted() as server, policy(server) as remote:

        async def slow_first(request: web.Request) -> None:
            if (await request.json())["prompt"][-1] == 10:
                await never(request)

        server.fault = slow_first
        async with remote.generate(prompts(10, 20), SamplingSpec(2)) as rollouts:
            deltas = []
            async for delta in rollouts:
                deltas.append(delta)
                await rollouts.drop(0)
        assert [(d.row, d.finish_reason) for d in deltas] == [(1, "length"), (0, "dropped")]
        await until(lambda: server.given_up == 1 and not server.running, 5)


async def test_a_deadline_ends_sequences_and_leaving_frees_them() -> None:
    async with scripted() as server, policy(server) as remote:
        server.fault = never
        (delta,) = await all_of(remote, prompts(10), SamplingSpec(2), deadline=time.monotonic() + 0.1)
        assert delta == Delta(0, "", (), "deadline")
        task = asyncio.create_task(all_of(remote, prompts(10, 20, 30), SamplingSpec(2)))
        await until(lambda: server.running == 3, 5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: server.given_up == 4 and not server.running, 5)


async def test_a_lost_connection_is_tried_again_once() -> None:
    async with scripted() as server, policy(server) as remote:
        cuts = 1

        async def cut(request: web.Request) -> None:
            nonlocal cuts
            cuts -= 1
            if cuts >= 0:
                assert request.transport is not None
                request.transport.abort()
                await asyncio.sleep(3600)

        server.fault = cut
        assert [d.token_ids for d in await all_of(remote, prompts(10), SamplingSpec(1))] == [(11,)]
        cuts = 2
        with pytest.raises(EngineUnavailable, match="policy 'aligned': its server cannot be reached"):
            await all_of(remote, prompts(10), SamplingSpec(1))


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [(400, RequestError, r"refuses the request: .*too long"), (503, EngineUnavailable, "status 503")],
)
async def test_refusals(status: int, error: type[GuiderailError], said: str) -> None:
    async with scripted() as server, policy(server) as remote:

        async def refuse(request: web.Request) -> web.Response:
            return web.json_response({"error": {"message": "too long"}}, status=status)

        server.fault = refuse
        with pytest.raises(error, match=said) as caught:
            await all_of(remote, prompts(10), SamplingSpec(1))
        assert server.url not in str(caught.value)  # it is the operator's, not the client's


class TestStart:
    async def test_another_tokenizer_is_refused(self) -> None:
        async with scripted() as server:
            server.offset = 1
            with pytest.raises(EngineUnavailable, match=r"policy .aligned.: .* has another tokenizer"):
                async with policy(server):
                    pass

    async def test_a_server_that_gives_no_token_ids_is_refused(self) -> None:
        async with scripted() as server:

            async def no_ids(request: web.Request) -> web.Response:
                return web.json_response({"choices": [{"text": "a", "finish_reason": "length"}]})

            server.fault = no_ids
            with pytest.raises(EngineUnavailable, match="token_ids: Field required"):
                async with policy(server):
                    pass

    async def test_the_key_is_sent_and_its_absence_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("POLICY_KEY", "secret")
        async with scripted(key="secret") as server:
            async with policy(server, key_env="POLICY_KEY"):
                pass
            with pytest.raises(EngineUnavailable, match="status 401"):
                async with policy(server):
                    pass
        monkeypatch.delenv("POLICY_KEY")
        with pytest.raises(EngineUnavailable, match="POLICY_KEY is not set"):
            RemotePolicy("aligned", RemotePolicySpec(url="http://127.0.0.1:9", key_env="POLICY_KEY"))

    async def test_another_model_is_refused(self) -> None:
        async with scripted() as server:
            with pytest.raises(EngineUnavailable, match="serves aligned-model; there is no other"):
                async with policy(server, model="other"):
                    pass


class TestDispatch:
    async def test_prompts_go_to_the_policy_that_they_name(self) -> None:
        async with scripted() as server, policy(server) as remote:
            engine = SupervisedEngine(NO_ENGINE, remote={"aligned": remote})
            assert [d.token_ids for d in await all_of(engine, prompts(10), SamplingSpec(1))] == [(11,)]
            with pytest.raises(EngineUnavailable, match="the engine is down"):
                await all_of(engine, [TokenPrompt((1,))], SamplingSpec(1))
            with pytest.raises(RequestError, match="apart from others"):
                await all_of(engine, [TokenPrompt((1,)), *prompts(10)], SamplingSpec(1))
            with pytest.raises(RequestError, match="no log-probabilities"):
                await engine.next_token_logprobs(prompts(10), 3)

    def test_guides_that_mix_refuse_it_and_those_that_roll_out_take_it(self) -> None:
        services = Services(NO_ENGINE, LetterRenderer(), model_name="base", remote=frozenset({"aligned"}))
        spec: dict[str, Any] = {"model": "aligned"}
        TransferQ(TransferQ.Params(baseline=spec)).check(services)
        with pytest.raises(ValueError, match="'aligned' is on another server: it can be a baseline"):
            LogitMix(LogitMix.Params(policies=[spec])).check(services)
        with pytest.raises(ValueError, match="no policy 'else'; known: aligned, base"):
            TransferQ(TransferQ.Params(baseline={"model": "else"})).check(services)


def test_flags() -> None:
    name, fields = parse_flag("aligned=http://host:1/,model=m,key_env=K")
    assert (name, RemotePolicySpec(**fields)) == (
        "aligned", RemotePolicySpec(url="http://host:1", model="m", key_env="K"),
    )  # fmt: skip
    with pytest.raises(GuiderailError, match="--policy takes"):
        parse_flag("aligned")
    with pytest.raises(ValueError, match="not of the form"):
        RemotePolicySpec(url="host:1")
    with pytest.raises(ValueError, match="key_env"):
        RemotePolicySpec(url="http://user:pw@host:1")

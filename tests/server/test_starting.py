"""The start of a server: faults found before the engine, what it says, and imports ahead of time."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import Faulty, LetterRenderer, ScriptedEngine

from guiderail.guides import Reward
from guiderail.guides.core.errors import EngineUnavailable, GuiderailError, PluginError
from guiderail.guides.core.interfaces import Services
from guiderail.server import cli
from guiderail.server import runtime as serve
from guiderail.server.announce import example, steps
from guiderail.server.ending import Ending
from guiderail.server.rewards.models.loading import check_source
from guiderail.server.rewards.models.reward_spec import RewardModelSpec
from guiderail.server.rewards.rules import Length
from guiderail.server.runtime import start_rewards
from guiderail.server.settings import Settings


class TestFaults:
    def test_a_path_that_is_not_there_is_said_by_its_own_flag_and_no_engine_starts(self) -> None:
        command = [sys.executable, "-P", "-m", "guiderail.server.cli", "serve", "--port", "0", "--reward", "help=/nope"]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 1
        assert run.stderr.startswith("guiderail: --reward help: /nope: not an embedded model")
        assert run.stderr.count("\n") == 1, "nothing else was begun"

    @pytest.mark.parametrize(
        ("flags", "says"),
        [
            (["--rewards", "length,nope"], "no entry point 'nope' in group guiderail.rewards"),
            (["--guides", "nope"], "no entry point 'nope' in group guiderail.guides"),
            (["--reward", "length=owner/name"], "--reward length: there is already a reward of this name"),
        ],
        ids=["reward", "guide", "taken"],
    )
    def test_plugins_are_looked_at_before_anything_takes_its_time(
        self, flags: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def too_early(*given: object) -> None:
            raise AssertionError("a model is prepared before the plugins are looked at")

        monkeypatch.setattr(serve.catalogue, "resolve", too_early)
        monkeypatch.setattr(serve.forkserver, "start_preload", too_early)
        assert cli.main(["serve", "--port", "0", *flags]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"guiderail: {says}")
        assert said.count("\n") == 1

    async def test_a_reward_that_cannot_be_made_is_named(self) -> None:
        class Broken(Faulty):
            """Cannot be made."""

            def __init__(self) -> None:
                raise KeyError("no such thing")

        with pytest.raises(PluginError, match=r"reward 'broken' cannot be made: KeyError\('no such thing'\)"):
            serve.make_rewards({"fine": Length, "broken": Broken})

    @pytest.mark.parametrize("lack", ["config.json", "safetensors", "base", "head.safetensors"])
    def test_a_folder_that_lacks_something_is_named(self, lack: str, tmp_path: Path) -> None:
        if lack == "safetensors":
            (tmp_path / "config.json").write_text("{}")
        elif lack in ("base", "head.safetensors"):
            base = "/nope" if lack == "base" else "smollm2-135m-instruct"
            card = {"format": "guiderail-reward-head", "version": 1, "base": base, "hidden_size": 8}
            (tmp_path / "reward.json").write_text(json.dumps(card))
        with pytest.raises(GuiderailError, match=f"--reward help: .*{'/nope' if lack == 'base' else lack}"):
            check_source("help", RewardModelSpec(path=str(tmp_path)))

    def test_what_can_be_loaded_passes(self, reward_head: str) -> None:
        check_source("help", RewardModelSpec(path=reward_head))
        check_source("help", RewardModelSpec(path="owner/name"))

    async def test_rewards_that_ask_for_the_engine_wait_for_it_and_broken_ones_do_not(self) -> None:
        class Asks(Faulty):
            """Needs the engine to start."""

            async def start(self, services: Services) -> None:
                services.engine.generate([], None)  # type: ignore[arg-type]

        class Broken(Faulty):
            """Does not start."""

            async def start(self, services: Services) -> None:
                raise OSError("a file is missing")

        engine = ScriptedEngine(up=False)
        services = Services(engine, LetterRenderer())
        asks: dict[str, Reward] = {"fine": Faulty(), "asks": Asks()}
        waiting = await start_rewards(asks, services, engine_comes=True)
        assert list(waiting) == ["asks"]
        with pytest.raises(PluginError, match="'asks'") as failure:
            await start_rewards(asks, services)
        assert isinstance(failure.value.__cause__, EngineUnavailable)
        with pytest.raises(PluginError, match=r"'broken'.*a file is missing"):
            await start_rewards({"broken": Broken()}, services, engine_comes=True)


class TestWords:
    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as end:
            cli.main(["--version"])
        assert end.value.code == 0
        assert capsys.readouterr().out.startswith("guiderail 0.")

    def test_steps_have_times(self, capsys: pytest.CaptureFixture[str]) -> None:
        steps()("loading")
        assert capsys.readouterr().err == "guiderail:    0 s  loading\n"

    @pytest.mark.parametrize("chat", [True, False])
    @pytest.mark.parametrize("rewards", [None, ["length"], ["regex"]])
    def test_the_request_to_try_is_one_that_is_served(self, chat: bool, rewards: list[str] | None) -> None:
        text = example(Settings(rewards=rewards), "http://h:1", chat=chat)
        body = json.loads(text.partition("-d '")[2].removesuffix("'"))
        assert ("messages" in body) == chat == ("/v1/chat/completions" in text)
        assert ("alignment" in body) == (rewards != ["regex"])
        assert "$KEY" in example(Settings(api_key=["k"]), "http://h:1", chat=chat)


async def test_a_start_says_what_it_waits_for_and_takes_the_rewards_first(
    model_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole start, but with a scripted engine in place of vLLM's."""

    class Local(ScriptedEngine):
        """A scripted engine that can be ended."""

        async def close(self) -> None:
            self.up = False

    order: list[str] = []

    async def build(settings: object, say: Callable[[str], None]) -> Local:
        say("importing vLLM")
        order.append("engine")
        return Local()

    async def started(self: Length, services: Services) -> None:
        order.append("reward")

    monkeypatch.setattr(serve, "build", build)
    monkeypatch.setattr(serve.forkserver, "start_preload", lambda: order.append("imports"))
    monkeypatch.setattr(Length, "start", started)
    settings = Settings(guides=["sampling"], rewards=["length"])
    with Ending(asyncio.Event()) as ending:
        async with serve.running(settings, ending) as state:
            assert state.engine.up
            assert ending.orderly
    assert order == ["imports", "reward", "engine"]
    said = capsys.readouterr().err
    assert [line.split(" s  ")[1] for line in said.splitlines() if " s  " in line] == [
        "preparing smollm2-135m-instruct", "loading rewards", "importing vLLM",
    ]  # fmt: skip

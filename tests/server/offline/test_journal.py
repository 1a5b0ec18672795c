"""The journal: what is kept, what is refused, what a torn file costs; and commands that are killed in the middle."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import ScriptedEngine, make_state
from offline_commands import parsed
from safetensors.numpy import load_file

from guiderail.guides import TextReward
from guiderail.guides.core.errors import GuiderailError, RewardFailed
from guiderail.guides.core.types import ScoreGroup
from guiderail.server.models import catalogue
from guiderail.server.offline import calibrate, options
from guiderail.server.offline import offline_state as offline
from guiderail.server.offline.evaluate import curve, partial
from guiderail.server.offline.evaluate import reward_pairs as rewards
from guiderail.server.offline.journal import Journal, JournalError, beside, whole_folder

EVERYDAY = Path(__file__).parents[3] / "deploy" / "prompts" / "everyday.jsonl"


class TestJournal:
    def test_the_next_run_goes_on_and_a_finished_one_leaves_nothing(self, tmp_path: Path) -> None:
        path, said = tmp_path / "o.progress.jsonl", []
        with Journal(path, {"seed": 1}, said.append) as journal:
            assert "a" not in journal
            assert not path.exists(), "nothing is kept yet"
            journal.keep("a", [1.5, "x"])
        with Journal(path, {"seed": 1}, said.append) as journal:
            assert journal.resumed
            assert journal["a"] == [1.5, "x"]
            journal.keep("b", None)
            journal.finish()
        assert not path.exists()
        assert "1 finished items are kept" in said[0]
        assert "resuming from 1 finished items" in said[1]
        assert len(said) == 2

    def test_another_run_is_refused_by_what_differs(self, tmp_path: Path) -> None:
        path = tmp_path / "o.progress.jsonl"
        with Journal(path, {"seed": 1, "data": "x"}) as journal:
            journal.pin(weights="w1")
            journal.keep("a", 1)
        before = path.read_bytes()
        with pytest.raises(JournalError, match=r"another seed \(1, now 2\)"):
            Journal(path, {"seed": 2, "data": "x"})
        with Journal(path, {"seed": 1, "data": "x"}) as journal, pytest.raises(JournalError, match="another weights"):
            journal.pin(weights="w2")
        assert path.read_bytes() == before

    @pytest.mark.parametrize("torn", [b'["b", ', b'["b", 2]', b"\x00\x00\x00", b'["b", 2]\xff\n["c", 3]\n'])
    def test_a_line_that_was_cut_off_is_dropped_with_what_follows(self, torn: bytes, tmp_path: Path) -> None:
        path = tmp_path / "o.progress.jsonl"
        with Journal(path) as journal:
            journal.keep("a", 1)
        path.write_bytes(path.read_bytes() + torn)
        with Journal(path) as journal:
            assert "b" not in journal
            journal.keep("b", 5)
        with Journal(path) as journal:
            assert (journal["a"], journal["b"]) == (1, 5)

    def test_a_first_line_that_was_cut_off_begins_anew(self, tmp_path: Path) -> None:
        path = tmp_path / "o.progress.jsonl"
        path.write_bytes(b'{"guiderail": "0')
        with Journal(path, {"seed": 3}) as journal:
            journal.keep("a", 1)
        with Journal(path, {"seed": 3}) as journal:
            assert journal["a"] == 1

    def test_a_file_of_somebody_elses_is_left_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "o.progress.jsonl"
        path.write_text('{"mine": 1}\n')
        with pytest.raises(JournalError, match="move it away"):
            Journal(path)
        assert path.read_text() == '{"mine": 1}\n'

    def test_two_processes_do_not_write_one_file(self, tmp_path: Path) -> None:
        path = tmp_path / "o.progress.jsonl"
        with Journal(path) as journal:
            journal.keep("a", 1)
            with pytest.raises(JournalError, match="another process"):
                Journal(path)

    def test_failures_end_a_run_once_they_outnumber_successes(self) -> None:
        said: list[str] = []
        journal = Journal(say=said.append)
        for number in range(8):
            journal.fail(f"item {number}", ValueError("no"))
        with pytest.raises(ValueError, match="no"):
            journal.fail("item 8", ValueError("no"))
        assert said[0] == "item 0 is left out: no"
        for number in range(20):
            journal.keep(str(number), 0)
        journal.fail("item 9", ValueError("no"))

    def test_a_folder_is_whole_or_absent(self, tmp_path: Path) -> None:
        out = tmp_path / "deep" / "out"
        with pytest.raises(KeyboardInterrupt), whole_folder(out) as folder:
            (folder / "a").write_text("half")
            raise KeyboardInterrupt
        assert not out.exists()
        out.mkdir()  # an empty one may be there
        with whole_folder(out) as folder:
            (folder / "b").write_text("whole")
        assert [path.name for path in out.iterdir()] == ["b"]
        assert [path.name for path in out.parent.iterdir()] == ["out"]


main_task: list["asyncio.Task[Any]"] = []


async def stop() -> None:
    """Ctrl-C in the middle of a command."""
    main_task[-1].cancel()
    await asyncio.sleep(60)


class Digits(TextReward):
    """The last digit of the answer's first word; stops the run after so many answers."""

    def __init__(self, answers: int | None = None, revision: str = "1") -> None:
        self.left = answers
        self.scored = 0
        self._revision = revision

    def revision(self) -> str:
        return self._revision

    def score_text(self, prompt: str, answer: str, params: Any) -> float:
        if "bad" in answer:
            raise ValueError("it is too long for this reward")
        return float(sum(map(ord, answer)) % 10) + len(prompt) / 7

    async def score(self, groups: Sequence[ScoreGroup]) -> Any:
        answers = sum(len(group.answers) for group in groups)
        if self.left is not None and self.scored + answers > self.left:
            await stop()
        values = self._score(groups)
        self.scored += answers
        return values


class Drawing(ScriptedEngine):
    """Counts the answers that it is asked for; stops the run after so many."""

    def __init__(self, answers: int | None = None) -> None:
        super().__init__(script=lambda seed: [f"w{seed * 7 % 10}", " " + "abc"[seed % 3], " z"][: 1 + seed % 3])
        self.left = answers
        self.asked: list[int] = []

    async def deltas(self, row: int, prompt: Any, params: Any, request_id: str) -> Any:
        async for delta in super().deltas(row, prompt, params, request_id):
            if delta.finish_reason is not None:
                if self.left is not None and len(self.asked) >= self.left:
                    await stop()
                self.asked.append(params[1])
            yield delta


def pairs_file(folder: Path, *, bad: Sequence[int] = (), count: int = 40) -> Path:
    path = folder / "pairs.jsonl"
    rows = [
        {
            "messages": [{"role": "user", "content": f"q{i}"}],
            "chosen": f"yes {i * 13}" + " bad" * (i in bad),
            "rejected": f"no {i * 7}",
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


COMMANDS = {
    "rewards": (rewards, ["--reward", "digits"]),
    "curve": (curve, ["--proxy", "digits", "--gold", "last_digit", "-m", "20", "--limit", "7"]),
    "partial": (partial, ["--reward", "digits", "-m", "6", "--max-tokens", "4", "--limit", "7"]),
    "calibrate": (calibrate, ["--reward", "digits", "-n", "20"]),
}


class Bench:
    """Runs a command over fakes, interrupted where the fakes say so."""

    def __init__(self, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._patch = folder, monkeypatch
        self.module, words = COMMANDS[name]
        given = ["--pairs", str(pairs_file(folder))] if name == "rewards" else ["--prompts", str(self._prompts())]
        self.words = [*given, *words]
        monkeypatch.setattr(catalogue, "resolve", lambda *args: str(folder / "weights"))
        self.weights("w1")

    def weights(self, text: str) -> None:
        (self.folder / "weights").mkdir(exist_ok=True)
        (self.folder / "weights" / "config.json").write_text(text)

    def _prompts(self) -> Path:
        path = self.folder / "prompts.jsonl"
        path.write_text("".join(EVERYDAY.read_text().splitlines(keepends=True)[:9]))
        return path

    def out(self, name: str) -> Path:
        return self.folder / (f"{name}.safetensors" if self.module is calibrate else name)

    def run(self, name: str, engine: Drawing, reward: Digits, *more: str) -> int:
        def run(settings: Any, main: Any, *, engine: bool = True) -> int:
            return run_main(main)

        def run_main(main: Any) -> int:
            async def whole() -> int:
                task = asyncio.current_task()
                assert task is not None
                main_task.append(task)
                try:
                    result: int = await main(make_state(engine, {"digits": reward}))
                except asyncio.CancelledError:
                    return 130
                return result

            return asyncio.run(whole())

        self._patch.setattr(offline, "run_offline", run)
        status: int = self.module.run(parsed(self.module, *self.words, *more, "--out", str(self.out(name))))
        return status

    def result(self, name: str) -> Any:
        out = self.out(name)
        if self.module is calibrate:
            return {key: tensor.tolist() for key, tensor in load_file(out).items()}
        return json.loads((out / "report.json").read_text())


@pytest.mark.parametrize("name", COMMANDS)
class TestInterrupted:
    def test_a_resumed_run_ends_as_an_uninterrupted_one(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench = Bench(name, tmp_path, monkeypatch)
        whole, every = Drawing(), Digits()
        assert bench.run("whole", whole, every) == 0
        kept = beside(bench.out("parts"))
        stops = [(Drawing(), Digits(10)), (Drawing(), Digits(66))]
        if name != "rewards":
            stops = [(Drawing(11), Digits()), (Drawing(15), Digits()), (Drawing(), Digits(24)), (Drawing(), Digits(70))]
        asked: list[int] = []
        scored = 0
        for engine, reward in stops:
            assert bench.run("parts", engine, reward) == 130
            assert not bench.out("parts").exists(), "complete or absent"
            asked += engine.asked
            scored += reward.scored
            assert kept.exists() or not (asked or scored)
        assert scored > 0
        engine, reward = Drawing(), Digits()
        assert bench.run("parts", engine, reward) == 0
        assert "resuming from" in capsys.readouterr().err
        assert bench.result("parts") == bench.result("whole")
        assert sorted(asked + engine.asked) == sorted(whole.asked), "no answer is drawn twice"
        assert scored + reward.scored == every.scored, "no answer is scored twice"
        assert not kept.exists()

    @pytest.mark.parametrize("what", ["arguments", "data", "weights", "reward"])
    def test_what_another_run_kept_is_refused(
        self, what: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bench = Bench(name, tmp_path, monkeypatch)
        assert bench.run("o", Drawing(), Digits(24)) == 130
        more: list[str] = []
        match what:
            case "arguments":
                more = ["--limit", "9"] if name == "rewards" else ["--seed", "5"]
            case "data":
                path = Path(bench.words[1])
                path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
            case "weights":
                bench.weights("w2")
        engine, reward = Drawing(), Digits(revision="2" if what == "reward" else "1")
        with pytest.raises(JournalError, match="run with another"):
            bench.run("o", engine, reward, *more)
        assert engine.asked == []
        assert reward.scored == 0


class TestFailingItems:
    def test_a_pair_that_fails_is_named_and_the_rest_is_reported(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bench = Bench("rewards", tmp_path, monkeypatch)
        pairs_file(tmp_path, bad=[3, 20])
        assert bench.run("o", Drawing(), Digits()) == 0
        report = bench.result("o")
        assert report["pairs"]["pairs"] == 38
        assert report["failed"].keys() == {"the pair of line 4", "the pair of line 21"}
        assert "too long for this reward" in report["failed"]["the pair of line 4"]
        assert "the pair of line 21 is left out" in capsys.readouterr().err

    def test_the_first_pair_may_fail(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        bench = Bench("rewards", tmp_path, monkeypatch)
        pairs_file(tmp_path, bad=[0])
        assert bench.run("o", Drawing(), Digits()) == 0
        assert bench.result("o")["pairs"]["pairs"] == 39

    def test_a_reward_that_fails_on_everything_ends_the_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bench = Bench("rewards", tmp_path, monkeypatch)
        pairs_file(tmp_path, bad=range(40))
        with pytest.raises(RewardFailed, match="too long"):
            bench.run("o", Drawing(), Digits())
        pairs_file(tmp_path, bad=range(3), count=3)
        with pytest.raises(GuiderailError, match=r"nothing is left: .*too long"):
            bench.run("o", Drawing(), Digits())

    async def test_a_prompt_that_fails_is_left_out_of_the_curve(self) -> None:
        class Touchy(Digits):
            """Digits, but not for one prompt."""

            def score_text(self, prompt: str, answer: str, params: Any) -> float:
                if prompt == "second":
                    raise ValueError("no")
                return super().score_text(prompt, answer, params)

        from guiderail.guides.core.types import Message, SamplingSpec

        prompts = [(Message("user", text),) for text in ("first", "second", "third")]
        named = [options.parse_reward("last_digit", "proxy"), options.parse_reward("touchy", "gold")]
        state, journal = make_state(Drawing(), {"touchy": Touchy()}), Journal()
        metrics = await curve.evaluate_curve(state, prompts, named, 4, [1, 2], SamplingSpec(4, seed=1), journal)
        assert journal.failed.keys() == {"prompt 2"}
        assert metrics["spearman_within_prompts"]["prompts"] <= 2

"""`guiderail try-guide`: a guide of a file on the scripted policy, and the place of its faults."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guiderail.guides.core.errors import RequestError
from guiderail.guides.core.types import Message, SamplingSpec, TokenPrompt
from guiderail.server.cli import main
from guiderail.server.offline.scripted_policy import EOS, TABLE, ScriptedPolicy, ScriptedRenderer

ROOT = Path(__file__).resolve().parents[3]
TUTORIAL = (ROOT / "guides" / "README.md").read_text().partition("\n## Write your own\n")[2]
GUIDES = "\n\n".join(re.findall(r"^```python\n(.*?)^```", TUTORIAL, re.MULTILINE | re.DOTALL))
HEAD = '''from guiderail.guides import Guide, Params, RequestError, TextReward, answer_events, draw_scored


class Mine(Guide):
    """Draws answers."""

    steers = False

    async def run(self, ctx):
        drawn = await draw_scored(ctx, 2)
'''
Tried = Callable[..., tuple[int, str, str]]
BREAK = "        raise KeyError('here')\n        yield\n"
ANSWER = "        for event in answer_events(drawn[1], drawn, None):\n            yield event\n"


def write(folder: Path, text: str) -> str:
    file = folder / "mine.py"
    file.write_text(text)
    return str(file)


@pytest.fixture
def tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Tried:
    """Runs the command on a file's text: (exit status, what was printed, errors without the folder's name)."""

    def run(text: str, *args: str) -> tuple[int, str, str]:
        status = main(["try-guide", write(tmp_path, text), "Why?", *args])
        out, err = capsys.readouterr()
        return status, out, err.replace(f"{tmp_path}/", "")

    return run


@pytest.mark.parametrize("guide", ["Shortest", "Best", "Blocks", "Careful"])
def test_the_guides_of_the_tutorial_answer(guide: str, tried: Tried) -> None:
    status, out, err = tried(GUIDES, "--guide", guide)
    assert (status, err) == (0, "")
    assert re.search(r"^>.*'$", out, re.MULTILINE)
    assert re.search(r"^answer \((stop|length)\): \w", out, re.MULTILINE)
    assert (out.count("length -") >= 1) == (guide != "Shortest")  # the reward `length`, unless none is needed
    assert tried(GUIDES, "--guide", guide)[1] == out
    assert tried(GUIDES, "--guide", guide, "--seed", "5")[1] != out or guide == "Careful"  # which draws nothing


def test_parameters_rewards_and_the_rule_are_those_given(tried: Tried) -> None:
    args = ["--guide", "Best", "--params", '{"n": 3}', "--select", '{"name": "softmax", "beta": 1}', "--rewards"]
    status, out, _ = tried(GUIDES, *args, "Exclamations", '{"name": "length", "weight": 0, "label": "words"}')
    assert status == 0
    assert len(re.findall(r"^[> ] +\d  .*Exclamations \d  words -", out, re.MULTILINE)) == 3


def test_a_guide_with_an_end_of_its_own_tells_it(tried: Tried) -> None:
    own = GUIDES.replace("async for event in steps.end():", 'async for event in steps.end("content_filter", "tired"):')
    own = own.replace("while steps.go_on(n):", "while steps.go_on(n) and steps.count < 1:")
    status, out, _ = tried(own, "--guide", "Blocks", "--params", '{"block": 3}')
    assert status == 0
    assert "answer (content_filter): " in out


@pytest.mark.parametrize(
    ("text", "args", "said"),
    [
        (HEAD + BREAK, [], "mine.py:11: in run: guide 'Mine' failed: KeyError: 'here'"),
        (HEAD + "        if False:\n            yield\n", [], "mine.py:4: guide 'Mine' failed: it ended without a Final"),
        (HEAD + "        raise RequestError('no')\n        yield\n", [], "mine.py:11: in run: no"),
        (HEAD + "        yield 3\n", [], "mine.py:4: guide 'Mine' failed: it yielded a value of type int"),
        (HEAD + "        yeild 3\n", [], "mine.py:11: invalid syntax"),
        (HEAD + ANSWER + "\n\nx = 1 / 0\n", [], "mine.py:15: ZeroDivisionError: division by zero"),
        ("x = 1\n", [], "mine.py: no class in it derives from guiderail.guides.Guide"),
        (HEAD.replace('    """Draws answers."""\n', "") + ANSWER, [], "mine.py:4: Mine has no docstring"),
        (GUIDES, [], "mine.py: has the guides Shortest, Best, Blocks, Careful; choose one with --guide"),
        (GUIDES, ["--guide", "Worst"], "mine.py: has no guide 'Worst'"),
        (GUIDES, ["--guide", "Best", "--params", '{"n": 0}'], "mine.py: 'alignment.guide.n'"),
        (GUIDES, ["--guide", "Best", "--params", "n=3"], "--params n=3: not JSON"),
        (GUIDES, ["--guide", "Best", "--rewards", "nonsense"], "'nonsense'"),
        (GUIDES, ["--guide", "Best", "--rewards", '{"weight": 1}'], '"name" is missing'),
    ],
)  # fmt: skip
def test_faults_are_told_with_their_place(text: str, args: list[str], said: str, tried: Tried) -> None:
    status, out, err = tried(text, *args)
    assert status == 1
    assert said in err
    assert "Traceback" not in out + err


def test_a_fault_of_a_reward_in_the_file_is_placed_there(tried: Tried) -> None:
    reward = '\n\nclass Bad(TextReward):\n    """Bad."""\n\n    def score_text(self, prompt, answer, params):\n'
    reward += "        return 1 / 0\n"
    _, _, err = tried(HEAD + ANSWER + reward, "--rewards", "Bad")
    assert "mine.py:19: in score_text: reward 'Bad' failed: ZeroDivisionError" in err


def test_tokens_that_are_not_the_answers_are_told(tried: Tried) -> None:
    wrong = "        for event in answer_events(drawn[0], drawn, None):\n            yield event\n"
    wrong = wrong.replace("yield event", "yield replace(event, chosen=1) if hasattr(event, 'chosen') else event")
    status, out, _ = tried("from dataclasses import replace\n" + HEAD + wrong)
    assert status == 0
    assert "warning: its Tokens have another text" in out


async def played(sampling: SamplingSpec, n: int, prompt: tuple[int, ...] = ()) -> list[Any]:
    """(text, tokens, finish_reason) of n sequences."""
    texts: list[str] = [""] * n
    ids: list[tuple[int, ...]] = [()] * n
    ends: list[str | None] = [None] * n
    policy = ScriptedPolicy(ScriptedRenderer())
    async with policy.generate([TokenPrompt(prompt)] * n, sampling, seeds=list(range(n))) as rollouts:
        async for delta in rollouts:
            texts[delta.row] += delta.text
            ids[delta.row] += delta.token_ids
            ends[delta.row] = delta.finish_reason
    return list(zip(texts, ids, ends, strict=True))


async def test_the_script_keeps_the_sampling_it_knows() -> None:
    renderer = ScriptedRenderer()
    for text, ids, end in await played(SamplingSpec(12), 40):
        assert text == renderer.decode(ids)
        assert (end == "stop") == (ids[-1] == EOS)
        assert end == "stop" or len(ids) == 12
    whole = await played(SamplingSpec(40, stream=False), 8)
    assert whole == await played(SamplingSpec(40), 8)
    for stop in (".", " fo"):
        for text, _, end in await played(SamplingSpec(400, stop=(stop,), min_tokens=2), 20):
            assert end == "stop"
            assert stop not in text[8:]
    assert all(len(ids) >= 30 for _, ids, _ in await played(SamplingSpec(40, min_tokens=30), 20))
    assert len({text for text, _, _ in await played(SamplingSpec(20, temperature=0.0), 5)}) == 1


async def test_draws_of_the_script_follow_its_probabilities() -> None:
    policy, renderer = ScriptedPolicy(ScriptedRenderer()), ScriptedRenderer()
    prompt = TokenPrompt(tuple(renderer.encode("user: hi. The")))
    (top,) = await policy.next_token_logprobs([prompt], 20)
    assert list(top.values()) == sorted(top.values(), reverse=True)
    first = [ids[0] for _, ids, _ in await played(SamplingSpec(1), 4000, prompt.token_ids)]
    for token, logprob in list(top.items())[:5]:
        assert first.count(token) / 4000 == pytest.approx(np.exp(logprob), abs=0.04)
    assert all(p.sum() == pytest.approx(1) for p in TABLE.values())
    ((known,),) = await policy.answer_logprobs([prompt], [[next(iter(top))]])
    assert known == next(iter(top.values()))


@pytest.mark.parametrize("text", ["The red fox waits.", "Äpfel: 3 fox!", ""])
def test_any_text_comes_back(text: str) -> None:
    renderer = ScriptedRenderer()
    assert renderer.decode(renderer.encode(text)) == text


def test_a_conversation_is_one_line_a_message() -> None:
    renderer = ScriptedRenderer()
    prompt = renderer.render([Message("user", "hi")])
    assert renderer.decode(prompt.token_ids) == "user: hi\nassistant:"


@pytest.mark.parametrize("field", [{"top_p": 0.5}, {"json_schema": {}}])
def test_what_the_script_does_not_know_is_refused(field: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=f"no {next(iter(field))}"):
        ScriptedPolicy(ScriptedRenderer()).generate([TokenPrompt(())], SamplingSpec(3, **field))  # type: ignore[arg-type]

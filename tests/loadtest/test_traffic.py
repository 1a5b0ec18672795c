"""Classes of traffic, prompts, and the plan that is drawn from them."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from guiderail.loadtest.load import prompts, traffic
from guiderail.loadtest.load.plan import Call, Cancellation, Plan, Requests
from guiderail.loadtest.load.traffic import TrafficClass
from guiderail.loadtest.loadtest_error import LoadtestError

YAML = """
classes:
  - {name: plain, share: 70, max_tokens: 32}
  - {name: best_of_8, share: 20, alignment: {guide: {name: best_of_n, n: 8}}, priority: 2, stream: false}
  - {name: upbeat, share: 10, alignment: upbeat, endpoint: /v1/completions, model: other, body: {stop: x, top_p: 0.5},
     goodput: {e2el: 900}, cancellation_rate: 1}
"""


def requests(**fields: Any) -> Requests:
    base: dict[str, Any] = {
        "base_url": "http://s", "endpoint": "/v1/chat/completions", "model": "m",
        "prompts": tuple("abcdefg"), "body": {"top_p": 0.9}, "slos": {"ttft": 5.0},
    }  # fmt: skip
    return Requests(**base | fields)


def draw(plan: Plan, count: int) -> list[Call]:
    return [next(plan) for _ in range(count)]


@pytest.fixture
def classes(tmp_path: Path) -> list[TrafficClass]:
    file = tmp_path / "traffic.yaml"
    file.write_text(YAML)
    return traffic.load(file)


def test_shares_and_fields_of_the_classes(classes: list[TrafficClass]) -> None:
    calls = draw(Plan(classes, requests(), seed=1), 3000)
    counts = Counter(call.class_name for call in calls)
    assert [counts[name] / 3000 for name in ("plain", "best_of_8", "upbeat")] == pytest.approx(
        [0.7, 0.2, 0.1], abs=0.03
    )
    first = {name: next(call for call in calls if call.class_name == name) for name in counts}
    plain, best, upbeat = (json.loads(first[name].body) for name in ("plain", "best_of_8", "upbeat"))
    assert plain["messages"][0]["content"] in "abcdefg"
    assert plain | {"messages": 0} == {
        "model": "m", "messages": 0, "max_tokens": 32, "stream": True, "stream_options": {"include_usage": True},
        "top_p": 0.9,
    }  # fmt: skip
    assert (best["alignment"], best["priority"], best["stream"]) == ({"guide": {"name": "best_of_n", "n": 8}}, 2, False)
    assert "stream_options" not in best
    assert (upbeat["alignment"], upbeat["model"], upbeat["stop"], upbeat["top_p"]) == ("upbeat", "other", "x", 0.5)
    assert upbeat["prompt"] in "abcdefg"
    assert first["upbeat"].url == "http://s/v1/completions"
    assert (first["plain"].slos, first["upbeat"].slos) == ({"ttft": 5.0}, {"e2el": 900.0})
    assert all((c.cancel_after_chunks is not None) == (c.class_name == "upbeat") for c in calls)


def test_the_seed_alone_decides_what_is_sent(classes: list[TrafficClass]) -> None:
    cancelling = requests(cancellation=Cancellation(0.3, (1, 4), (0.1, 0.2)))
    one, same, other = (draw(Plan(classes, cancelling, seed), 50) for seed in (3, 3, 4))
    assert one == same
    assert [c.body for c in one] != [c.body for c in other]


def test_every_prompt_comes_before_one_comes_again() -> None:
    plan = Plan([TrafficClass()], requests(), seed=0)
    assert plan.prompt_counts == {"default": 7}
    texts = [json.loads(call.body)["messages"][0]["content"] for call in draw(plan, 21)]
    rounds = [texts[0:7], texts[7:14], texts[14:21]]
    assert all(sorted(each) == list("abcdefg") for each in rounds)
    assert rounds[0] != rounds[1]


def test_unique_prompts_never_repeat_and_differ_from_their_first_characters() -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    plan = Plan([TrafficClass()], requests(prompts=("a", turns), unique_prompts=True), seed=5)
    messages = [json.loads(call.body)["messages"] for call in draw(plan, 10)]
    assert len({m[0]["content"] for m in messages}) == 10
    assert all(m[0]["content"].startswith(f"(5-{i}) ") for i, m in enumerate(messages))
    assert turns[0]["content"] == "s"


def test_as_many_hang_up_as_asked_within_the_ranges() -> None:
    plan = Plan([TrafficClass()], requests(cancellation=Cancellation(0.25, (2, 5), (0.5, 1.5))), seed=0)
    calls = draw(plan, 2000)
    leaving = [call for call in calls if call.cancel_after_chunks is not None]
    assert len(leaving) / 2000 == pytest.approx(0.25, abs=0.03)
    assert {call.cancel_after_chunks for call in leaving} == {2, 3, 4, 5}
    seconds = [call.cancel_after_s for call in leaving if call.cancel_after_s is not None]
    assert len(seconds) == len(leaving)
    assert 0.5 <= min(seconds) < 0.6 < 1.4 < max(seconds) <= 1.5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("classes: [{name: a, share: 0}]", r"classes\[0\]\.share: .*greater than 0"),
        ("classes: [{name: a}, {name: b, max_tokens: many}]", r"classes\[1\]\.max_tokens: .*integer"),
        ("classes: [{name: a, guide: best_of_n}]", r"classes\[0\]\.guide: .*known: name, share, endpoint"),
        ("classes: [{name: a, goodput: {ttfs: 3}}]", r"classes\[0\]\.goodput\.ttfs: .*known: ttft, tpot, e2el"),
        ("classes: [{name: a, goodput: {ttft: -3}}]", r"classes\[0\]\.goodput\.ttft: "),
        ("classes: [{name: a, cancellation_rate: 2}]", r"classes\[0\]\.cancellation_rate: "),
        ("classes: [{name: a}, {name: a}]", r"classes\[1\]\.name: 'a' occurs twice"),
        ("classes: []", r"classes: .*at least 1"),
        ("classes: [{name: a}]\nrate: 3", r"rate: .*known: classes"),
        ("- name: a", r"expected a mapping with the key 'classes'"),
        ("classes: [", r"traffic\.yaml: "),
    ],
)
def test_errors_of_the_yaml_name_the_field(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "traffic.yaml"
    file.write_text(text)
    with pytest.raises(LoadtestError, match=says):
        traffic.load(file)


def test_prompts_of_a_file(tmp_path: Path, classes: list[TrafficClass]) -> None:
    turns = [{"role": "user", "content": "hi"}]
    (tmp_path / "p.jsonl").write_text(f'"one"\n\n{{"prompt": "two"}}\n{json.dumps({"messages": turns})}\n')
    assert prompts.load(tmp_path / "p.jsonl") == ["one", "two", turns]
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    assert prompts.load(tmp_path / "p.txt") == ["one", "two"]
    (tmp_path / "t.yaml").write_text("classes: [{name: a, prompts: p.txt}]")  # beside the YAML file
    plan = Plan(traffic.load(tmp_path / "t.yaml"), requests(), seed=0)
    assert plan.prompt_counts == {"a": 2}
    for name, text, says in (
        ("bad.jsonl", '"ok"\n{"text": "x"}', r"bad\.jsonl:2: expected a string"),
        ("worse.jsonl", "{", r"worse\.jsonl:1: "),
        ("empty.txt", "\n", "no prompt"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(LoadtestError, match=says):
            prompts.load(tmp_path / name)
    with pytest.raises(LoadtestError, match="missing"):
        prompts.load(tmp_path / "missing.txt")
    with pytest.raises(LoadtestError, match="need a chat endpoint"):
        Plan([TrafficClass()], requests(prompts=(turns,), endpoint="/v1/completions"), seed=0)
    with pytest.raises(LoadtestError, match="endpoint '/v1/embeddings' is neither"):
        Plan(classes, requests(endpoint="/v1/embeddings"), seed=0)


def test_the_shipped_prompts_are_many_short_and_different() -> None:
    shipped = prompts.shipped()
    assert len(shipped) == len(set(map(str, shipped))) >= 60
    assert all(isinstance(text, str) and 4 <= len(text.split()) <= 20 for text in shipped)

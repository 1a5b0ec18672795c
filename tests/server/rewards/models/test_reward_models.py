"""Reward models from their folders: the cut that a head was trained with, broken heads, and what `--reward` takes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_reward import WORDS, tiny_head

from guiderail.guides.core.errors import GuiderailError
from guiderail.guides.core.types import Answer, Message, ScoreGroup, TokenPrompt
from guiderail.server.memory import kv_pool
from guiderail.server.memory.shares import RewardShare
from guiderail.server.rewards.models import model_resources
from guiderail.server.rewards.models.loading import load_model, model_reward
from guiderail.server.rewards.models.reward_spec import RewardModelSpec, parse_flag

SERVICES: Any = None
ASK = (Message("user", " ".join(WORDS[:30])),)


def group(*answers: Answer, params: Any) -> ScoreGroup:
    return ScoreGroup(ASK, TokenPrompt((1,)), answers, params)


def trained_features(head: str, answer: str, max_tokens: int) -> tuple[Any, int]:
    """The state that `guiderail rewards train` fits a head on [H], and how many tokens it cuts off."""
    from guiderail.server.models.renderer import ChatRenderer
    from guiderail.server.offline.train import features

    base = json.loads((Path(head) / "reward.json").read_text())["base"]
    renderer = ChatRenderer(base)
    tokens = features.answer_tokens(renderer, features.end_of_turn(renderer), ASK, answer, max_tokens)
    return features.features(features.load_backbone(base), [tokens.ids])[0], tokens.cut


@pytest.mark.parametrize("length", [5, 40, 75], ids=["not cut", "into the question", "into the answer"])
async def test_a_head_scores_what_it_was_trained_on(length: int, tmp_path: Path) -> None:
    """The last max_tokens tokens, and an answer of any length, past the base's positions too."""
    from safetensors.torch import load_file

    head = tiny_head(tmp_path, max_tokens=45)
    answer = " ".join((WORDS * 2)[3 : 3 + length])
    state, cut = trained_features(head, answer, 45)
    assert (cut > 0) == (length != 5)
    whole, _ = trained_features(head, answer, 1000)
    weight = load_file(f"{head}/head.safetensors")["score.weight"]
    reward = model_reward(RewardModelSpec(path=head, dtype="float32"), tmp_path, print)
    await reward.start(SERVICES)
    (result,) = await reward.score([group(Answer(answer), params=reward.Params())])
    await reward.close()
    assert result.values[0] == pytest.approx(float(state @ weight[0]), abs=1e-4)
    assert result.tokens == min(45, 3 + 30 + 3 + length)  # <s> user ... </s> <s> assistant ... </s>
    if cut:
        assert abs(result.values[0] - float(whole @ weight[0])) > 1e-2


async def test_a_partial_answer_is_cut_on_the_same_side(tmp_path: Path) -> None:
    head = tiny_head(tmp_path, max_tokens=10)
    reward = model_reward(RewardModelSpec(path=head, dtype="float32"), tmp_path, print)
    await reward.start(SERVICES)
    words = WORDS[3:43]
    answers = [Answer(" ".join(each), partial=True) for each in (words, words[-10:], words[-9:])]
    (result,) = await reward.score([group(*answers, params=reward.Params())])
    await reward.close()
    assert result.values[0] == pytest.approx(result.values[1], abs=1e-5)
    assert result.values[0] != pytest.approx(result.values[2], abs=1e-3)
    assert result.tokens == 30


async def test_it_reads_all_that_the_model_reads_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the least that every model gets (1 MiB here, 2,048 tokens) would not hold it."""
    monkeypatch.setattr(kv_pool, "LEAST_POOL", 2**20)
    head = tiny_head(tmp_path, positions=2540)
    reward = model_reward(RewardModelSpec(path=head, dtype="float32"), tmp_path, print)
    await reward.start(SERVICES)
    (result,) = await reward.score([group(Answer(" ".join(WORDS * 31)), params=reward.Params())])
    assert result.tokens == 31 * 80 + 36
    await reward.close()


@pytest.mark.parametrize(("kv_gb", "share"), [(1 / 1024, None), (None, RewardShare("cpu", kv=2**20))])
async def test_with_less_memory_it_reads_less_and_says_so(
    kv_gb: float | None, share: RewardShare | None, tmp_path: Path
) -> None:
    """1 MiB holds 2,048 tokens of the tiny model (512 bytes each)."""
    spec = RewardModelSpec(path=tiny_head(tmp_path, positions=30_000), dtype="float32", kv_gb=kv_gb)
    said: list[str] = []
    reward = model_reward(spec, tmp_path, said.append, share)
    await reward.start(SERVICES)
    assert any("reads 30,000 tokens, but there is memory for 2,048 of them (see kv_gb)" in line for line in said)
    fits, too_long = Answer(" ".join(WORDS * 25)), Answer(" ".join(WORDS * 26))
    assert (await reward.score([group(fits, params=reward.Params())]))[0].tokens == 2036
    with pytest.raises(ValueError, match="have 2116 tokens; the model reads 2048"):
        await reward.score([group(too_long, params=reward.Params())])
    await reward.close()


@pytest.mark.parametrize(
    ("options", "share", "context", "kv_gb", "device"),
    [
        ({}, None, None, True, None),  # as on this machine: all that it reads
        ({"kv_gb": 1 / 1024}, None, 2048 - 128, True, None),
        ({}, RewardShare("cuda:1", 2**30, 0.3), None, False, 1),
        ({}, RewardShare("cuda:1", 2**20, 0.3), 4096 - 128, False, 1),
        ({"kv_gb": 0.5}, RewardShare("cuda:0", 2**29, 0.2), None, True, 0),
    ],
    ids=["cpu", "little of a cpu", "gpu", "little of a gpu", "so much of a gpu"],
)
def test_a_pooling_engine_has_its_part(
    options: dict[str, Any],
    share: RewardShare | None,
    context: int | None,
    kv_gb: bool,
    device: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU its share, of which vLLM takes what it measures to be left, unless keys and values were fixed."""
    cpu = device is None
    monkeypatch.setattr(model_resources, "on_cpu", lambda: cpu)
    tiny_head(tmp_path, positions=30_000)
    spec = RewardModelSpec(path="x", backend="vllm", dtype="float32" if cpu else "auto", **options)
    made = model_resources.pooling_settings(spec, str(tmp_path / "base"), share, print)
    assert (made.max_model_len, made.device) == (context, device)
    assert (made.kv_cache_gb is not None) == kv_gb
    assert made.gpu_memory_utilization == (share.utilization if share else 0.9)


def test_a_pooling_engine_of_a_kind_that_is_not_known_is_left_to_vllm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "brand-new"}')
    made = model_resources.pooling_settings(RewardModelSpec(path="x", backend="vllm"), str(tmp_path), None, print)
    assert (made.max_model_len, made.kv_cache_gb) == (None, kv_pool.LEAST_POOL / 2**30)


async def test_it_runs_where_it_was_placed_within_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from guiderail.server.rewards.models import loading

    limits: list[tuple[float, str]] = []
    devices: list[str | None] = []

    def load(path: str, cache: Path, dtype: str, say: Any, device: str | None) -> Any:
        devices.append(device)
        return load_model(path, cache, dtype, say, "cpu")

    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda part, device: limits.append((part, device))
    )
    monkeypatch.setattr(loading, "load_model", load)
    spec = RewardModelSpec(path=tiny_head(tmp_path), dtype="float32")
    reward = model_reward(spec, tmp_path, print, RewardShare("cuda:1", kv=2**20, limit=0.25))
    await reward.start(SERVICES)
    await reward.close()
    assert (devices, limits) == (["cuda:1"], [(0.25, "cuda:1")])


async def test_without_max_tokens_too_long_is_an_error(tmp_path: Path) -> None:
    reward = model_reward(RewardModelSpec(path=tiny_head(tmp_path)), tmp_path, print)
    await reward.start(SERVICES)
    answers = (Answer("w1"), Answer(" ".join(WORDS)))
    with pytest.raises(ValueError, match=r"have 116 tokens; the model reads 96"):
        await reward.score([group(*answers, params=reward.Params())])
    await reward.close()


def test_the_bundled_head_says_that_it_cuts() -> None:
    from guiderail.server.rewards.models.loading import BUNDLED, head_card

    for name, folder in BUNDLED.items():
        card = head_card(name)
        assert card is not None
        assert f"{card['max_tokens']} tokens" in (text := " ".join((folder / "README.md").read_text().split()))
        assert "cut when it is served" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "reward.json"),
        ("[]", "not a reward head of version 1"),
        ('{"format": "guiderail-reward-head", "version": 2}', "not a reward head of version 1"),
        ('{"format": "guiderail-reward-head", "version": 1, "max_tokens": 0}', "max_tokens must be"),
        ('{"format": "guiderail-reward-head", "version": 1, "max_tokens": "512"}', "max_tokens must be"),
    ],
)
def test_a_broken_head_is_found_before_anything_starts(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "reward.json").write_text(content)
    with pytest.raises(GuiderailError, match=message):
        model_reward(RewardModelSpec(path=str(tmp_path)), tmp_path, print)


def test_a_remote_flag() -> None:
    name, options = parse_flag("good=some/model,backend=vllm,url=https://a:1/x/|http://b,head=1,model=rm,key_env=KEY")
    spec = RewardModelSpec.model_validate(options)
    assert (name, spec.urls, spec.head, spec.model) == ("good", ("https://a:1/x", "http://b"), 1, "rm")
    assert RewardModelSpec(path="p").urls == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("url=http://a", "url needs backend=vllm"),
        ("backend=vllm,url=a:8000", "'a:8000' is not of the form"),
        ("backend=vllm,url=http://a|", "'' is not of the form"),
        ("backend=vllm,url=http://a:99999", "Port out of range"),
        ("backend=vllm,url=http://a?x=1", "is not of the form"),
        ("backend=vllm,url=http://me:secret@a", "key_env"),
        ("backend=vllm,url=http://a,dtype=float32", "dtype is the remote server's own option"),
        ("backend=vllm,url=http://a,kv_gb=1", "kv_gb is the remote server's own option"),
        ("backend=vllm,model=x", "model is for a remote server and needs url"),
        ("key_env=X", "key_env is for a remote server and needs url"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardModelSpec.model_validate(parse_flag(f"r=path,{options}")[1])

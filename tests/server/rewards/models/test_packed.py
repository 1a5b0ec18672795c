"""The packed runner against transformers' own scores, one sequence at a time, for four architectures."""

import copy
import itertools
import random
from typing import Any

import pytest
import torch
from tiny_configs import CONFIGS, SMALL
from transformers import AutoModel

from guiderail.server.engines.vllm.native_ops import native_ops
from guiderail.server.rewards.models.cpu_rotary import speed_up_rotary
from guiderail.server.rewards.models.packed import PackedRunner


def build(
    name: str, dtype: Any = torch.float32, capacity: int = 2000, heads: int = 2, hidden: int = 48, **options: int
) -> tuple[PackedRunner, Any]:
    """A runner and a function that scores one sequence with transformers in float32."""
    torch.manual_seed(0)
    plain = AutoModel.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation="eager").eval()
    for parameter in plain.parameters():  # norms too, so that a forgotten one shows
        parameter.data += 0.1 * torch.randn_like(parameter)
    weight = torch.randn(heads, hidden)
    twin = AutoModel.from_config(copy.deepcopy(CONFIGS[name]), dtype=dtype)
    twin.load_state_dict(plain.state_dict())
    runner = PackedRunner(twin.to(dtype), weight, capacity=capacity, **options)

    def one(tokens: list[int]) -> Any:
        with torch.no_grad():
            return plain(torch.tensor([tokens])).last_hidden_state[0, -1] @ weight.T

    return runner, one


def tokens(count: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(97) for _ in range(count)]


def error(runner: PackedRunner, one: Any, sequences: list[list[int]]) -> float:
    got = runner.score(sequences)
    return max((got[i] - one(s)).abs().max().item() for i, s in enumerate(sequences))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_packed_scores_equal_one_by_one(name: str) -> None:
    """Unequal lengths, two groups, then longer answers over kept prefixes, then rollouts of those: 1e-4 in float32."""
    runner, one = build(name)
    prompts = [tokens(40, 1), tokens(7, 2)]
    answers = [p + tokens(n, n) for p, n in itertools.product(prompts, (1, 17, 5, 33))]
    assert error(runner, one, answers) < 1e-4
    longer = [a + tokens(n, 50 + n) for a, n in zip(answers, (3, 1, 8, 2, 9, 4, 1, 6), strict=True)]
    computed = runner.stats.tokens_computed
    assert error(runner, one, longer) < 1e-4
    assert runner.stats.tokens_computed - computed == 34  # the new tokens and no more
    rollouts = [a + tokens(4, 90 + i) for a in longer[:3] for i in range(3)]
    assert error(runner, one, rollouts) < 1e-4


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_native_operations_are_in_use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and rotary embedding of rows whose width the native operations take, and the same scores without them."""
    wide = {**SMALL, "hidden_size": 96, "head_dim": 32}
    monkeypatch.setitem(CONFIGS, name, type(CONFIGS[name])(**wide, sliding_window=16 if name == "gemma3" else None))
    runner, one = build(name, hidden=96)
    called = {"rms_norm": 0, "rotary_embedding": 0}
    ops = native_ops()

    def count(name: str, inner: Any) -> None:
        def counting(*args: Any) -> Any:
            called[name] += 1
            return inner(*args)

        monkeypatch.setattr(ops, name, counting)

    for operation in called:
        count(operation, getattr(ops, operation))
    sequences = [tokens(40, 1) + tokens(n, n) for n in (1, 5, 20)]
    assert error(runner, one, sequences) < 1e-4
    norms = {"llama": 2, "qwen3": 4, "gemma3": 6}[name]  # of a layer
    assert called == {"rms_norm": 3 * norms, "rotary_embedding": 3}


def test_rotary_embedding_of_another_kind_is_left_alone() -> None:
    """GLM turns neighbours instead of halves, and a part of each head."""
    from transformers import GlmConfig

    config = GlmConfig(**{**SMALL, "hidden_size": 96, "head_dim": 32, "pad_token_id": 0})
    model = AutoModel.from_config(config)
    speed_up_rotary(model, native_ops())
    assert all("forward" not in vars(module) for module in model.modules())


def test_the_control_differs() -> None:
    runner, one = build("llama")
    runner.score([tokens(40, 1) + [3]])
    other = tokens(40, 2) + [3]
    assert (runner.score([tokens(40, 1) + [3]])[0] - one(other)).abs().max() > 0.1


def test_scoring_again_costs_nothing_and_a_prefix_one_token() -> None:
    runner, one = build("llama")
    sequence = tokens(30, 1)
    first = runner.score([sequence])
    computed = runner.stats.tokens_computed
    assert torch.equal(runner.score([sequence, sequence]), torch.cat([first, first]))
    assert runner.stats.tokens_computed == computed
    assert error(runner, one, [sequence[:20]]) < 1e-4
    assert runner.stats.tokens_computed == computed + 1
    assert error(runner, one, [sequence, sequence[:20], sequence[:1]]) < 1e-4


def test_eviction_keeps_scores_right() -> None:
    runner, one = build("llama", capacity=128)
    for seed in range(12):
        prompt = tokens(30, seed % 3)
        assert error(runner, one, [prompt + tokens(n, seed * 10 + n) for n in (2, 9, 20)]) < 1e-4
        assert runner.cached_tokens <= 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_score_does_not_depend_on_its_neighbours(dtype: Any) -> None:
    """One candidate alone and in ten different batches: 1e-4 in float32; in bfloat16 3% of the scores' spread."""
    runner, _ = build("llama", dtype)
    prompt, candidate = tokens(40, 1), tokens(12, 2)
    alone = runner.score([prompt + candidate])[0]
    spread = runner.score([prompt + tokens(12, 100 + i) for i in range(50)]).std(0)
    for batch in range(10):
        runner.clear()
        others = [tokens(random.Random(batch).randrange(1, 60), 7 * batch + i) for i in range(batch + 1)]
        shared = [prompt + tokens(9, 900 + batch)]
        got = runner.score([*others, prompt + candidate, *shared])[len(others)]
        limit = torch.full_like(spread, 1e-4) if dtype == torch.float32 else 0.03 * spread
        assert ((got - alone).abs() <= limit).all(), (got - alone, limit)


def test_bfloat16_is_near_float32() -> None:
    runner, one = build("llama", torch.bfloat16)
    sequences = [tokens(40, 1) + tokens(n, n) for n in (1, 5, 20)]
    values = torch.stack([one(s) for s in sequences])
    assert (runner.score(sequences) - values).abs().max() < 0.05 * values.abs().max() + 0.1


def test_a_failing_pass_leaves_the_cache_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, one = build("llama")
    prompt = tokens(30, 1)
    runner.score([prompt + [1]])
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_forward", lambda *a: (_ for _ in ()).throw(RuntimeError("no memory")))
        with pytest.raises(RuntimeError, match="no memory"):
            runner.score([prompt + [2, 3]])
    assert error(runner, one, [prompt + [2, 3], prompt + [1]]) < 1e-4


def test_lengths_that_cannot_be_scored_are_refused() -> None:
    runner, _ = build("llama", capacity=64)
    for sequence in ([], tokens(65, 1)):
        with pytest.raises(ValueError, match="1 to 64"):
            runner.score([sequence])


@pytest.mark.parametrize("name", ["llama", "gemma2 with soft-cap and window"])
def test_a_text_longer_than_a_pass_is_read_in_several(name: str) -> None:
    """Up to all that the pool holds, beside short ones, and again when most of it is known."""
    runner, one = build(name, capacity=200, max_pass_tokens=32)
    long = tokens(200, 1)
    assert error(runner, one, [tokens(5, 2), long, tokens(7, 3)]) < 1e-4
    runner.clear()
    passes = runner.stats.passes
    assert error(runner, one, [long[:100]]) < 1e-4
    assert runner.stats.passes == passes + 4
    computed = runner.stats.tokens_computed
    assert error(runner, one, [long[:100] + tokens(n, n) for n in (3, 40, 90)]) < 1e-4
    assert runner.stats.tokens_computed <= computed + 3 + 40 + 90 + 3


def counted(runner: PackedRunner) -> list[int]:
    """New tokens of each pass from now on."""
    found: list[int] = []
    forward = runner._forward

    def counting(work: Any) -> Any:
        found.append(len(work.ids))
        return forward(work)

    runner._forward = counting  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("capacity", [4096 // 32, 65536 // 32, 10240 // 32])
def test_passes_are_packed_by_new_tokens(capacity: int) -> None:
    """[2048 | 64 x 512] at an 8B model's settings, by 32: five passes of 8192 new tokens, and not 64, in any pool."""
    runner, one = build("llama", capacity=capacity, max_pass_tokens=8192 // 32)
    prompt = tokens(2048 // 32, 1)
    sequences = [[*prompt, i, *tokens(512 // 32 - 1, 10 + i)] for i in range(64)]
    passes = counted(runner)
    assert error(runner, one, sequences) < 1e-4
    assert passes == [256, 256, 256, 256, 64]
    assert runner.stats.tokens_computed == sum(passes) == 64 + 64 * 16
    assert runner.stats.tokens_cached == 63 * 64


def test_a_conversation_longer_than_a_pass_is_computed_in_several() -> None:
    runner, one = build("llama", capacity=150, max_pass_tokens=40)
    prompt = tokens(110, 1)
    passes = counted(runner)
    assert error(runner, one, [prompt + tokens(n, n) for n in (30, 3, 17)]) < 1e-4
    assert max(passes) <= 40
    assert sum(passes) == 110 + 30 + 3 + 17


def test_answers_that_go_on_from_one_that_passes() -> None:
    """A pool that is full of its batch: prefixes, continuations and repetitions of what was not kept."""
    runner, one = build("llama", capacity=32, max_pass_tokens=200)
    prompt = tokens(20, 1)
    long = prompt + tokens(12, 2)
    sequences = [long, prompt + tokens(11, 3), prompt + tokens(11, 3), (prompt + tokens(11, 3))[:25]]
    sequences += [prompt + tokens(10, 3 + i) for i in range(6)] + [prompt + tokens(9, 5) + [1, 2], long]
    assert error(runner, one, sequences) < 1e-4
    assert error(runner, one, list(reversed(sequences))) < 1e-4
    assert runner.cached_tokens <= 32


def test_a_pass_reads_nothing_back_but_the_scores() -> None:
    """The host never asks the device for something that it knows: each such question waits for all that was launched."""
    from torch.utils._python_dispatch import TorchDispatchMode

    runner, _ = build("gemma2 with soft-cap and window")  # its attention has no values to look at, unlike fused blocks
    read: list[str] = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero"):
                read.append(str(func))
            return func(*args, **(kwargs or {}))

    prompt = tokens(30, 1)
    with Reads():
        runner.score([prompt + tokens(n, n) for n in (3, 8, 20)])
    assert len(read) <= 3, read  # the longest position, which attention reads on the CPU, once a layer


@pytest.mark.parametrize("name", list(CONFIGS))
def test_warming_up_compiles_all_that_scoring_launches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled after it, whatever is scored: shared prefixes, one token, deep trees, one head or two."""
    from launches import recorded, warmed_up

    runner, _ = build(name)
    with recorded(monkeypatch) as launches:
        warm = warmed_up(runner, launches)
        prompt = tokens(40, 1)
        runner.score([[5]])
        runner.score([prompt + tokens(n, n) for n in (1, 16, 17, 40)])
        runner.score([prompt[:n] + tokens(2, n) for n in range(1, 40)])
        runner.score([prompt[:16]])
        assert len(launches) > 3 * len(warm)
        assert set(launches) - warm == set()
        assert len(warm) <= 4
    assert runner.stats.tokens_asked > 0

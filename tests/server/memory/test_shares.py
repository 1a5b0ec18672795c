"""The plan of GPU memory with the numbers of real cards and models: what fits, how it is shared, that it outlives a restart."""

from dataclasses import replace
from itertools import product

import pytest

from guiderail.guides.core.errors import GuiderailError
from guiderail.server.memory.devices import Gpu
from guiderail.server.memory.kv_pool import GIB, LEAST_POOL, PASS_TOKENS, default_pool, host_pool, least_pool
from guiderail.server.memory.shares import CONTEXT, EngineNeed, Plan, PlanError, RewardNeed, plan

MIB = 2**20
H200 = Gpu(0, "NVIDIA H200", 143_155 * MIB, 142_600 * MIB)
A100 = Gpu(0, "NVIDIA A100-SXM4-80GB", 81_038 * MIB, 80_500 * MIB)
L4 = Gpu(0, "NVIDIA L4", 22_563 * MIB, 22_300 * MIB)

# Llama 3.1 8B, Qwen2.5 1.5B and 0.5B, Llama 2 7B (no grouped heads), Llama 3.1 70B: bytes in bfloat16 and by the shapes
# of their configurations, of one whole context for the engine.
ENGINE_8B = EngineNeed(16_060_522_496, 131_072 * 131_072, GIB)
ENGINE_1B5 = EngineNeed(3_087_428_608, 28_672 * 32_768, GIB)
ENGINE_70B = EngineNeed(141_107_412_992, 327_680 * 131_072, GIB)
REWARD_8B = RewardNeed("big", "packed", 15_009_857_536, 1_900 * MIB, 131_072, 131_072)
REWARD_7B = RewardNeed("mha", "packed", 13_214_359_552, 1_600 * MIB, 524_288, 4096)
REWARD_0B5 = RewardNeed("small", "packed", 988_097_536, 500 * MIB, 12_288, 32_768)

CARDS = {"H200": (H200,), "A100": (A100,), "L4": (L4,), "two": (A100, replace(A100, index=1))}
ENGINES = {"8B": ENGINE_8B, "1.5B": ENGINE_1B5, "none": None}
REWARDS = {
    "8B": (REWARD_8B,),
    "7B": (REWARD_7B,),
    "0.5B": (REWARD_0B5,),
    "8B in vLLM": (replace(REWARD_8B, backend="vllm"),),
    "both": (REWARD_8B, replace(REWARD_0B5, backend="vllm")),
    "nothing": (),
}


def survives_a_restart(
    made: Plan, gpus: tuple[Gpu, ...], engine: EngineNeed | None, rewards: tuple[RewardNeed, ...]
) -> None:
    """Each vLLM process finds the part free that it asks for, while everybody else holds all that the plan grants."""
    for gpu in gpus:
        device = f"cuda:{gpu.index}"
        here = [(each, made.rewards[each.name]) for each in rewards if made.rewards[each.name].device == device]
        held = [share.utilization * gpu.total + CONTEXT for _, share in here if share.utilization is not None]
        limits = {share.limit * gpu.total for _, share in here if share.limit is not None}
        if limits:
            own = sum(need.weights + need.work + (share.kv or 0) for need, share in here if need.backend == "packed")
            assert own <= max(limits) + 1, "the packed models' own part is within their limit"
            assert len(limits) == 1, "which is one for the process"
            held.append(limits.pop() + CONTEXT)
        if engine is not None and gpu.index < engine.gpus:
            assert made.engine is not None
            held.append(made.engine.utilization * gpu.total + CONTEXT)
        assert sum(held) <= gpu.free + 1


@pytest.mark.parametrize(("card", "engine", "reward"), [*product(CARDS, ENGINES, REWARDS)])
def test_a_plan_gives_all_what_they_need_or_there_is_none(card: str, engine: str, reward: str) -> None:
    gpus, own, needs = CARDS[card], ENGINES[engine], REWARDS[reward]
    least = (own.weights + own.work + own.context if own else 0) + sum(each.least for each in needs)
    try:
        made = plan(gpus, 0.9, own, needs)
    except PlanError:
        assert least > 0.9 * gpus[0].total - 3 * CONTEXT
        return
    survives_a_restart(made, gpus, own, needs)
    assert set(made.rewards) == {each.name for each in needs}
    for need in needs:
        assert need.floor <= (made.rewards[need.name].kv or 0) <= need.wish
    if own is not None:
        assert made.engine is not None
        engine_bytes = made.engine.utilization * gpus[0].total
        assert engine_bytes >= own.weights + own.work + own.context - gpus[0].total / 10_000
        assert made.engine.utilization <= 0.9


def test_8b_and_8b_on_an_h200_read_all_they_read() -> None:
    made = plan((H200,), 0.9, ENGINE_8B, [REWARD_8B])
    assert made.engine is not None
    share = made.rewards["big"]
    assert (share.device, share.utilization) == ("cuda:0", None)
    assert (share.kv or 0) // REWARD_8B.kv_token == 131_072 + PASS_TOKENS
    reward = REWARD_8B.weights + REWARD_8B.work + (share.kv or 0)
    assert made.engine.utilization == pytest.approx(0.9 - reward / H200.total, abs=1e-4)
    assert "reward big 32.8 GiB (packed, weights 14.0 GiB, keys and values of 139,264 tokens)" in made.lines[0]
    assert "engine 93.0 GiB (0.67 of the whole, weights 15.0 GiB)" in made.lines[0]


def test_small_models_fit_an_l4() -> None:
    made = plan((L4,), 0.9, ENGINE_1B5, [REWARD_0B5])
    assert made.engine is not None
    assert made.engine.utilization > 0.75
    assert made.rewards["small"].kv == LEAST_POOL  # 40,960 tokens take 0.47 GiB


def test_a_pool_gives_way_before_the_start_is_refused_and_the_start_says_so() -> None:
    card = Gpu(0, "card", 56 * GIB, 56 * GIB)
    made = plan((card,), 0.9, ENGINE_8B, [REWARD_8B])
    tokens = (made.rewards["big"].kv or 0) // REWARD_8B.kv_token
    assert PASS_TOKENS <= tokens < 131_072
    assert (
        f"keys and values of {tokens:,} tokens: longer texts are refused, though the model reads 131,072"
        in made.lines[0]
    )
    assert made.engine is not None  # and the engine keeps one whole context
    assert made.engine.utilization * card.total == pytest.approx(sum((16_060_522_496, 2**34, GIB)), rel=1e-3)
    survives_a_restart(made, (card,), ENGINE_8B, (REWARD_8B,))


def test_two_pools_give_way_alike() -> None:
    twin = replace(REWARD_8B, name="twin")
    made = plan((Gpu(0, "card", 70 * GIB, 70 * GIB),), 0.95, ENGINE_8B, [REWARD_8B, twin])
    assert made.rewards["big"].kv == made.rewards["twin"].kv
    assert REWARD_8B.floor < (made.rewards["big"].kv or 0) < REWARD_8B.wish


def test_what_does_not_fit_is_said_with_what_to_change() -> None:
    with pytest.raises(PlanError) as raised:
        plan((L4,), 0.9, ENGINE_8B, [REWARD_8B])
    text = str(raised.value)
    assert text.startswith("GPU 0 (NVIDIA L4) has 22.0 GiB, 21.8 GiB of them free; of these 19.8 GiB can be used")
    assert "the engine 32.0 GiB (weights 15.0 GiB, keys and values of one whole context 16.0 GiB)" in text
    assert "reward big 16.8 GiB (weights 14.0 GiB)" in text
    for advice in ("--gpu-memory-utilization", "--max-model-len", "device=cpu", "quantised"):
        assert advice in text
    assert "--tensor-parallel-size" not in text  # there is one GPU
    assert "cuda:N" not in text


@pytest.mark.parametrize(
    ("gpus", "engine", "reward", "advice"),
    [
        ((A100, replace(A100, index=1)), ENGINE_70B, REWARD_0B5, "raise --tensor-parallel-size"),
        (
            (A100, replace(A100, index=1)),
            ENGINE_8B,
            replace(REWARD_8B, device="cuda:1", kv=80 * GIB),
            "the reward's kv_gb",
        ),
        ((A100,), replace(ENGINE_8B, kv=60 * GIB), REWARD_0B5, "lower --kv-cache-gb"),
        ((replace(A100, free=20 * GIB),), ENGINE_8B, REWARD_0B5, "end what else holds memory on it"),
    ],
)
def test_the_advice_is_of_the_case(gpus: tuple[Gpu, ...], engine: EngineNeed, reward: RewardNeed, advice: str) -> None:
    with pytest.raises(PlanError, match=advice):
        plan(gpus, 0.9, engine, [reward])


def test_vllm_rewards_have_a_share_of_their_own() -> None:
    need = replace(REWARD_8B, backend="vllm")
    made = plan((H200,), 0.9, ENGINE_8B, [need])
    share = made.rewards["big"]
    assert share.utilization == pytest.approx((need.least - need.floor + need.wish) / H200.total)
    assert made.engine is not None
    assert made.engine.utilization + share.utilization <= 0.9
    assert share.limit is None  # the model is not in our own process


def test_a_second_gpu_takes_the_rewards() -> None:
    gpus = (A100, replace(A100, index=1))
    made = plan(gpus, 0.9, ENGINE_8B, [REWARD_8B, REWARD_0B5])
    assert {share.device for share in made.rewards.values()} == {"cuda:1"}
    assert made.engine is not None
    assert made.engine.utilization == pytest.approx(0.9, abs=1e-4)


def test_rewards_spread_over_the_gpus_that_are_free_of_the_engine() -> None:
    gpus = (H200, replace(A100, index=1), replace(A100, index=2))
    made = plan(gpus, 0.9, ENGINE_8B, [replace(REWARD_8B, name=name) for name in "ab"])
    assert {share.device for share in made.rewards.values()} == {"cuda:1", "cuda:2"}


def test_where_a_reward_goes_does_not_depend_on_the_order_of_the_flags() -> None:
    gpus = (A100, replace(A100, index=1), replace(A100, index=2))
    forth = plan(gpus, 0.9, ENGINE_8B, [REWARD_8B, REWARD_0B5])
    assert forth.rewards == plan(gpus, 0.9, ENGINE_8B, [REWARD_0B5, REWARD_8B]).rewards
    assert {share.device for share in forth.rewards.values()} == {"cuda:1", "cuda:2"}


def test_where_no_other_gpu_has_room_it_is_the_engines() -> None:
    made = plan((H200, replace(L4, index=1, free=4 * GIB)), 0.9, ENGINE_8B, [REWARD_8B])
    assert made.rewards["big"].device == "cuda:0"


def test_the_engine_over_two_gpus_leaves_the_reward_the_emptier_one() -> None:
    gpus = (A100, replace(A100, index=1, free=A100.free))
    engine = replace(ENGINE_70B, gpus=2, context=20 * GIB)
    with pytest.raises(PlanError, match="GPU 0"):
        plan((L4, replace(L4, index=1)), 0.9, engine, [])
    gpus = (H200, replace(H200, index=1))
    made = plan(gpus, 0.9, engine, [REWARD_8B])
    assert made.engine is not None
    assert made.rewards["big"].device == "cuda:0"
    assert made.engine.utilization * H200.total == pytest.approx(
        0.9 * H200.total - REWARD_8B.least - 131_072 * 131_072, rel=0.01
    )
    survives_a_restart(made, gpus, engine, (REWARD_8B,))
    with pytest.raises(PlanError, match="--tensor-parallel-size 3: only 2 GPUs"):
        plan(gpus, 0.9, replace(engine, gpus=3), [])


def test_a_device_that_the_operator_names_is_taken() -> None:
    gpus = (A100, replace(A100, index=1))
    made = plan(gpus, 0.9, ENGINE_1B5, [replace(REWARD_0B5, device="cuda:0")])
    assert made.rewards["small"].device == "cuda:0"
    with pytest.raises(PlanError, match=r"--reward small: there is no cuda:7; there is cuda:0, cuda:1, and cpu"):
        plan(gpus, 0.9, ENGINE_1B5, [replace(REWARD_0B5, device="cuda:7")])


def test_fixed_keys_and_values_are_what_they_get() -> None:
    engine, reward = replace(ENGINE_8B, kv=20 * GIB), replace(REWARD_8B, kv=GIB)
    made = plan((H200,), 0.9, engine, [reward])
    assert made.rewards["big"].kv == GIB
    assert made.engine is not None
    assert made.engine.kv == 20 * GIB
    assert made.engine.utilization * H200.total == pytest.approx(engine.weights + engine.work + 20 * GIB, rel=1e-3)


def test_memory_that_others_hold_is_not_planned() -> None:
    made = plan((replace(H200, free=60 * GIB),), 0.9, ENGINE_8B, [REWARD_0B5])
    assert made.engine is not None
    assert made.engine.utilization < 60 * GIB / H200.total
    survives_a_restart(made, (replace(H200, free=60 * GIB),), ENGINE_8B, (REWARD_0B5,))


def test_without_an_engine_the_rewards_have_the_gpu() -> None:
    made = plan((L4,), 0.9, None, [REWARD_0B5])
    assert made.engine is None
    assert made.lines[0].startswith("GPU 0 (NVIDIA L4, 21.8 GiB of 22.0 GiB free): reward small")


def test_an_engine_of_unknown_size_is_left_to_vllm() -> None:
    made = plan((A100,), 0.9, EngineNeed(0, 0, GIB), [REWARD_0B5])
    assert made.engine is not None
    assert 0.8 < made.engine.utilization < 0.9


@pytest.mark.parametrize(
    ("longest", "kv_token", "tokens"),
    [
        (131_072, 131_072, 139_264),  # Llama 3.1 8B: 0.5 GiB held 4,096 of them
        (4096, 524_288, 12_288),  # Llama 2 7B, without grouped heads: 1,024
        (2048, 23_040, 23_301),  # SmolLM2 135M: as much as before
        (None, 23_040, 23_301),
    ],
)
def test_the_default_pool_holds_what_the_model_reads(longest: int | None, kv_token: int, tokens: int) -> None:
    assert default_pool(longest, kv_token) // kv_token == tokens


def test_on_the_cpu_half_of_the_memory_is_the_bound() -> None:
    assert host_pool(4096, 524_288, lambda: 64 * GIB) == 12_288 * 524_288
    assert host_pool(32_768, 524_288, lambda: 16 * GIB) == 8 * GIB
    with pytest.raises(
        GuiderailError, match=r"keys and values of 4,096 tokens take 2.0 GiB, and of the memory 3.0 GiB"
    ):
        host_pool(4096, 524_288, lambda: 3 * GIB)
    assert least_pool(4096, 524_288) == 2 * GIB

"""Mixed policies under vLLM's V2 model runner: the class over stand-ins for the runner's state, and a run on a GPU."""

import itertools
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_checks import needs_gpu
from launches import recorded
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor, LogitsProcRequestState

from guiderail.guides.core.types import Mixed, SamplingSpec, TokenPrompt
from guiderail.server.engines.vllm.mixture import runner_v2
from guiderail.server.engines.vllm.mixture.mixing import Row, draw, warm_up
from guiderail.server.engines.vllm.mixture.recipe import Recipe
from guiderail.server.engines.vllm.mixture.runner_v2 import MixedPolicies

V, SLOTS = 12, 6


@dataclass
class Runner:
    """Slots and steps as the V2 runner has them: a slot keeps its place, rows come in another order each step."""

    prompt_len: Any = field(default_factory=lambda: np.zeros(SLOTS, dtype=np.int32))
    prefill_len: Any = field(default_factory=lambda: np.zeros(SLOTS, dtype=np.int32))
    computed: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        nothing: Any = None
        states = LogitsProcRequestState(
            torch.device("cpu"), SLOTS, V, nothing, SimpleNamespace(np=self.prompt_len),
            SimpleNamespace(np=self.prefill_len), nothing,
        )  # fmt: skip
        self.processor = MixedPolicies(nothing, states)

    def add(self, slot: int, params: SamplingParams, prompt: int, output: int = 0) -> bool:
        """A request with `prompt` tokens that resumes behind `output` of its own."""
        self.prompt_len[slot], self.prefill_len[slot] = prompt, prompt + output
        self.computed[slot] = 0
        return self.processor.add_request(slot, params)

    def step(self, chunks: dict[int, int], seed: int = 0) -> tuple[torch.Tensor, list[int | None]]:
        """Rows in the order of `chunks`, which says how many tokens each feeds; the logits before and the tokens."""
        for slot, tokens in chunks.items():
            self.computed[slot] += tokens
        slots = np.array(list(chunks), dtype=np.int32)
        lengths = np.array([self.computed[slot] for slot in chunks], dtype=np.int32)
        mapping = torch.from_numpy(slots)
        logits = 2 * torch.randn(len(slots), V, generator=torch.Generator().manual_seed(seed))
        context = LogitsContext(
            expanded_idx_mapping=mapping, idx_mapping=mapping, idx_mapping_np=slots,
            expanded_local_pos=torch.zeros_like(mapping), input_ids=torch.zeros_like(mapping),
            pos=torch.from_numpy(lengths - 1), seq_lens_upper_bound_np=lengths,
        )  # fmt: skip
        self.processor.apply_staged_writes()
        after = self.processor.apply(logits.clone(), context)
        tokens = [int(row.argmax()) if (row > -torch.inf).sum() == 1 else None for row in after]
        for row, token in enumerate(tokens):
            if token is None:
                assert (after[row] == logits[row]).all()
        return logits, tokens


def member(role: int, name: str = "g") -> SamplingParams:
    head: dict[str, Any] = {"weights": [0.5], "seed": 4} if role == 0 else {}
    return SamplingParams(extra_args=Recipe(name, role, 2, **head).extra_args())


def drawn(logits: torch.Tensor, rows: tuple[int, int], place: int) -> int:
    recipes = [Recipe("g", 0, 2, weights=[0.5], seed=4), Recipe("g", 1, 2)]
    return int(draw(logits, [[Row(i, r, place) for i, r in zip(rows, recipes, strict=True)]])[0])


def test_it_is_a_processor_of_the_v2_interface() -> None:
    assert issubclass(MixedPolicies, LogitsProcessor)
    assert not MixedPolicies.__abstractmethods__
    assert MixedPolicies.validate_params(member(0)) is None


def test_rows_are_found_by_slot_whatever_their_order_and_their_prompts_length() -> None:
    runner = Runner()
    assert runner.add(5, member(0), prompt=3)
    assert runner.add(2, member(1), prompt=9)
    assert not runner.add(0, SamplingParams(), prompt=4)
    logits, tokens = runner.step({0: 4, 5: 3, 2: 9})
    want = drawn(logits, (1, 2), 0)
    assert tokens == [None, want, want]
    logits, tokens = runner.step({2: 1, 0: 1, 5: 1}, seed=1)
    want = drawn(logits, (2, 0), 1)
    assert tokens == [want, None, want]


def test_a_row_inside_its_prompt_is_not_in_step() -> None:
    runner = Runner()
    runner.add(0, member(0), prompt=3)
    runner.add(1, member(1), prompt=8)
    _, tokens = runner.step({0: 3, 1: 5})
    assert tokens[0] is not None
    assert tokens[1] is None, "its token is thrown away"
    _, tokens = runner.step({0: 1, 1: 3}, seed=1)
    assert tokens[0] != tokens[1]


def test_both_preempted_rows_go_on_in_step_where_they_were() -> None:
    runner = Runner()
    runner.add(0, member(0), prompt=3, output=4)
    runner.add(1, member(1), prompt=8, output=4)
    logits, tokens = runner.step({1: 12, 0: 7})
    want = drawn(logits, (1, 0), 4)
    assert tokens == [want, want]


def test_a_slot_forgets_its_last_request() -> None:
    runner = Runner()
    runner.add(0, member(0), prompt=2)
    runner.add(1, member(1), prompt=2)
    runner.step({0: 2, 1: 2})
    runner.add(1, SamplingParams(), prompt=2)
    _, tokens = runner.step({0: 1, 1: 2}, seed=1)
    assert tokens[0] is not None
    assert tokens[1] is None


def test_several_rows_of_logits_a_request_are_refused() -> None:
    runner = Runner()
    runner.add(0, member(0), prompt=2)
    mapping = torch.tensor([0, 0])
    context = LogitsContext(mapping, mapping[:1], np.array([0]), mapping, mapping, mapping, np.array([3]))
    with pytest.raises(RuntimeError, match="speculative"):
        runner.processor.apply(torch.zeros(2, V), context)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpus_kernels_are_compiled_before_the_first_request(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[tuple[int, torch.device]] = []
    monkeypatch.setattr(runner_v2, "warm_up", lambda vocabulary, where: warmed.append((vocabulary, where)))
    nothing: Any = SimpleNamespace(np=np.zeros(SLOTS, dtype=np.int32))
    where = torch.device(device)
    MixedPolicies(nothing, LogitsProcRequestState(where, SLOTS, V, nothing, nothing, nothing, nothing))
    assert warmed == ([(V, where)] if device == "cuda" else [])


@needs_gpu
async def test_mixing_on_a_gpu(model_path: str) -> None:
    """The runner that vLLM picks there: a policy mixed with itself is greedy as ever, and answers stay repeatable."""
    from guiderail.server.engines.vllm.engine import build
    from guiderail.server.engines.vllm.engine_args import EngineSettings

    engine = await build(EngineSettings(model=model_path, max_model_len=512, gpu_memory_utilization=0.3))

    async def answer(prompt: TokenPrompt, temperature: float) -> list[int]:
        tokens: list[int] = []
        spec = SamplingSpec(16, temperature, ignore_eos=True)
        async with engine.generate([prompt], spec, seeds=[3]) as rollouts:
            async for delta in rollouts:
                tokens += delta.token_ids
        return tokens

    try:
        ids, other = tuple(range(300, 340)), tuple(range(500, 575))
        plain = await answer(TokenPrompt(ids), 0.0)
        assert await answer(TokenPrompt(ids, None, (Mixed(ids, None, 1.0),)), 0.0) == plain
        mixed = TokenPrompt(ids, None, (Mixed(other, None, 2.0),))
        first = await answer(mixed, 1.0)
        assert first == await answer(mixed, 1.0)
        assert await answer(mixed, 0.0) != plain
        assert engine.num_running() == 0
    finally:
        await engine.close()


def test_warming_up_compiles_all_that_drawing_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One group or three, two policies or three, with cuts and without."""
    vocabulary = 4099
    with recorded(monkeypatch) as launches:
        warm_up(vocabulary, torch.device("cpu"))
        warm = set(launches)
        for groups, size, top_k in itertools.product((1, 3), (2, 3), (0, 5)):
            recipes = [
                [Recipe(group=str(g), role=role, size=size, weights=(0.5,) * (size - 1), temperature=1.0, seed=1,
                        top_k=top_k, top_p=1.0, min_p=0.0) for role in range(size)]
                for g in range(groups)
            ]  # fmt: skip
            rows = [[Row(g * size + i, recipe, 0) for i, recipe in enumerate(group)] for g, group in enumerate(recipes)]
            draw(torch.zeros(groups * size, vocabulary), rows)
    assert len(launches) == 4 + 2 * 8
    assert set(launches) == warm

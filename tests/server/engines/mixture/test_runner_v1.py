"""Mixed policies under vLLM's V1 model runner: sequences that come, go, move in its batch, and fall out of step."""

from typing import Any

import pytest
import torch
from mixtures import V, drawn, emitted, policies
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

from guiderail.server.engines.vllm.mixture.recipe import Recipe
from guiderail.server.engines.vllm.mixture.runner_v1 import MixedPolicies


class Batch:
    """The persistent batch of vLLM's V1 runner, as far as a logits processor sees it."""

    def __init__(self) -> None:
        self.processor: Any = MixedPolicies(None, torch.device("cpu"), False)  # type: ignore[arg-type]
        self.outputs: dict[int, list[int]] = {}

    def update(
        self,
        removed: tuple[int, ...] = (),
        added: dict[int, Any] | None = None,
        moved: tuple[tuple[int, int, bool], ...] = (),
    ) -> None:
        """added: SamplingParams by index, or (params, prompt, output). moved: (from, to, whether they swap)."""
        news = []
        for index, what in (added or {}).items():
            params, prompt, output = what if isinstance(what, tuple) else (what, [1, 2], [])
            self.outputs[index] = output
            news.append((index, params, prompt, output))
        for index in removed:
            self.outputs.pop(index)
        for a, b, swap in moved:
            mine, theirs = self.outputs.pop(a), self.outputs.pop(b, None)
            self.outputs[b] = mine
            if swap and theirs is not None:
                self.outputs[a] = theirs
        ways = (MoveDirectionality.UNIDIRECTIONAL, MoveDirectionality.SWAP)
        moves = [(a, b, ways[swap]) for a, b, swap in moved]
        self.processor.update_state(BatchUpdate(len(self.outputs), removed, news, moves))

    def step(self, logits: torch.Tensor, discarded: tuple[int, ...] = ()) -> list[int | None]:
        """One step; sequences that are `discarded` do not grow by what they emit."""
        self.processor.apply(logits)
        tokens = emitted(logits)
        for index, output in self.outputs.items():
            if index not in discarded:
                output.append(tokens[index] if tokens[index] is not None else -5)
        return tokens


def member(role: int, size: int = 2, name: str = "g", **more: Any) -> SamplingParams:
    head = {"weights": [1.0] * (size - 1), "seed": 4} if role == 0 else {}
    recipe = {k: more.pop(k) for k in list(more) if k in Recipe.__slots__}
    return SamplingParams(extra_args=Recipe(name, role, size, **(head | recipe)).extra_args(), **more)


PLAIN = SamplingParams()


def test_groups_are_followed_through_the_batch() -> None:
    batch = Batch()
    batch.update(added={0: PLAIN, 1: member(0), 2: PLAIN, 3: member(1)})
    logits = policies(4)
    want = drawn(logits, [1, 3], 0)
    assert batch.step(logits) == [None, want, None, want]
    batch.update(removed=(0,), moved=((3, 0, False),))  # the last row fills the gap
    logits = policies(3, seed=1)
    want = drawn(logits, [1, 0], 1)
    assert batch.step(logits) == [want, want, None]
    batch.update(moved=((1, 2, True),))
    logits = policies(3, seed=2)
    want = drawn(logits, [2, 0], 2)
    assert batch.step(logits) == [want, None, want]
    batch.update(added={3: member(1, name="h"), 4: member(0, name="h")})
    logits = policies(5, seed=3)
    want, other = drawn(logits, [2, 0], 3), drawn(logits, [4, 3], 0)
    assert batch.step(logits) == [want, None, want, other, other]
    batch.update(removed=(3, 4))
    batch.update(added={3: PLAIN, 2: PLAIN})  # a plain sequence in the place of a mixed one
    tokens = batch.step(policies(4, seed=4))
    assert tokens[1:] == [None, None, None]
    assert tokens[0] is not None, "its partner has gone: it is out of step, not plain"


def test_a_missing_partner_is_seen_and_never_caught_up_with() -> None:
    batch = Batch()
    batch.update(added={0: member(0), 1: member(1)})
    batch.step(policies(2))
    mine = batch.outputs[1]
    batch.update(removed=(1,))  # preempted
    (alone, *_) = batch.step(policies(1))
    batch.update(added={1: (member(1), [1, 2], mine)})  # it comes back where it was
    for _ in range(3):
        batch.step(policies(2))
    main, partner = batch.outputs[0], batch.outputs[1]
    assert main[0] == partner[0]
    assert main[1] == alone
    assert all(a != b for a, b in zip(main[1:], partner[1:], strict=False))


@pytest.mark.parametrize("garbage", range(4))
def test_logits_from_inside_a_prompt_are_not_taken_for_an_answer(garbage: int) -> None:
    """The partner's prompt takes two steps: in the first its logits are those of some prompt token."""
    batch = Batch()
    batch.update(added={0: member(0, temperature=0), 1: member(1)})
    logits = torch.zeros(2, V)
    logits[1, garbage] = 50.0
    assert batch.step(logits, discarded=(1,))[0] == garbage
    batch.step(policies(2, seed=garbage))
    main, partner = batch.outputs[0], batch.outputs[1]
    assert len(partner) == 1
    assert partner[0] != main[0] == garbage


@pytest.mark.parametrize("garbage", range(4))
def test_it_is_remembered_what_a_partner_emitted_that_has_gone(garbage: int) -> None:
    batch = Batch()
    batch.update(added={0: member(0, temperature=0), 1: member(1)})
    logits = torch.zeros(2, V)
    logits[1, garbage] = 50.0
    batch.step(logits, discarded=(1,))
    batch.update(removed=(0, 1))
    batch.update(added={0: (member(1), [1, 2], [])})
    assert batch.step(policies(1))[0] != garbage


def test_penalties_act_on_the_served_policy_before_the_mixing() -> None:
    penalties = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.6}
    output, prompt = [3, 3, 8], [5, 6, 3]
    batch = Batch()
    batch.update(added={0: (member(0, weights=[0.5], **penalties), prompt, output), 1: (member(1), [1], list(output))})
    logits = policies(2, seed=8)
    main = logits[0].clone()
    for token in {*prompt, *output}:
        main[token] = main[token] / 1.6 if main[token] > 0 else main[token] * 1.6
    for token in set(output):
        main[token] -= 0.7 + 0.4 * output.count(token)
    want = drawn(torch.stack((main, logits[1])), [0, 1], 3, weights=[0.5])
    assert batch.step(logits) == [want, want]


def test_memory_of_groups_is_bounded() -> None:
    batch = Batch()
    for i in range(5000):
        batch.update(added={0: member(0, name=str(i)), 1: member(1, name=str(i))})
        batch.update(removed=(0, 1))
    assert len(batch.processor._outputs) <= 4096
    assert not batch.processor._rows

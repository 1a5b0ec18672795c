"""Mixed policies inside the engine: the law that is drawn, and rows that come, go, move and fall out of step."""

from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

from guiderail.kernels import reference
from guiderail.server.engines.mixed import Recipe
from guiderail.server.engines.vllm_mix_v1 import MixedPolicies
from guiderail.server.engines.vllm_mixing import Row, draw, emit

V = 12


def policies(n: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(n, V, generator=torch.Generator().manual_seed(seed))


def group(rows: list[int], position: int = 0, name: str = "g", **recipe: Any) -> list[Row]:
    """The rows of a group, in step at `position`."""
    heads = [Recipe(name, 0, len(rows), **({"weights": [1.0] * (len(rows) - 1)} | recipe))]
    heads += [Recipe(name, role, len(rows)) for role in range(1, len(rows))]
    return [Row(row, head, position) for row, head in zip(rows, heads, strict=True)]


def shares(logits: torch.Tensor, n: int = 6000, **recipe: Any) -> torch.Tensor:
    """How often each token is drawn over n places of an answer."""
    rows = list(range(logits.shape[0]))
    tokens = draw(logits, [group(rows, place, **recipe) for place in range(n)])
    return torch.bincount(tokens, minlength=V) / n


def law(logits: torch.Tensor, weights: list[float], temperature: float = 1.0) -> torch.Tensor:
    """(pi_0 * prod pi_i^w_i)^(1/T), from each policy's own log-softmax: the definition."""
    logprobs = torch.log_softmax(logits.double(), 1)
    mixed = logprobs[0] + sum(w * p for w, p in zip(weights, logprobs[1:], strict=True))
    return torch.softmax(mixed / temperature, 0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("weights", [[1.0], [-0.6], [0.3, 2.0], [0.5, -1.0, 0.25, 0.1]], ids=str)
def test_the_mixture_is_drawn(weights: list[float], temperature: float) -> None:
    logits = policies(1 + len(weights), seed=len(weights), scale=0.7)
    found = shares(logits, weights=weights, temperature=temperature, seed=3)
    wanted = law(logits, weights, temperature)
    assert (found - wanted).abs().sum() / 2 < 0.03
    assert (found - law(logits, weights, temperature / 2)).abs().sum() / 2 > 0.05, "the control: sharpened twice"


def test_the_law_is_the_kernels_reference() -> None:
    logits, weights = policies(2), torch.tensor([0.7])
    none = torch.empty((1, 0))
    other = torch.log_softmax(logits[1:].double(), 1)
    z = reference.tilted_logits(torch.log_softmax(logits[:1].double(), 1), none, none, None, other, weights)
    assert torch.allclose(torch.softmax(z[0], 0), law(logits, [0.7]))


def test_mixing_with_itself_is_another_temperature() -> None:
    one = policies(1)
    logits = one.expand(2, V).contiguous()
    for seed in range(300):
        (mixed,) = draw(logits, [group([0, 1], weights=[0.6], temperature=1.0, seed=seed)])
        (alone,) = draw(one, [group([0], temperature=1 / 1.6, seed=seed)])
        assert mixed == alone


def test_weight_zero_silences_a_policy_even_where_it_is_infinite() -> None:
    logits = policies(2)
    logits[1, ::2] = -torch.inf
    for seed in range(100):
        (mixed,) = draw(logits, [group([0, 1], weights=[0.0], seed=seed)])
        (alone,) = draw(logits[:1], [group([0], seed=seed)])
        assert mixed == alone


def test_greedy_takes_the_best_of_the_mixture_whatever_is_cut() -> None:
    logits = policies(2)
    wanted = (logits[0] + 0.8 * logits[1]).argmax()
    for cut in ({}, {"top_p": 0.01}, {"top_k": 3, "min_p": 0.5}):
        beside = group([0, 1], name="h", weights=[0.8], temperature=2.0, top_k=5)
        tokens = draw(logits, [group([0, 1], weights=[0.8], temperature=0.0, **cut), beside])
        assert tokens[0] == wanted


@pytest.mark.parametrize(
    "cut", [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 6, "top_p": 0.8, "min_p": 0.05}], ids=str
)
def test_cuts_apply_to_the_tempered_mixture(cut: dict[str, float]) -> None:
    """In vLLM's order: min_p, then top_k, then top_p of what is left."""
    logits, weights, temperature = policies(2, seed=4), [0.5], 1.3
    p = law(logits, weights, temperature)
    p = torch.where(p < cut.get("min_p", 0) * p.max(), 0, p)
    order = p.argsort(descending=True)
    p[order[int(cut.get("top_k", V)) :]] = 0
    p /= p.sum()
    before = p[order].cumsum(0) - p[order]
    p[order[before >= cut.get("top_p", 1.0)]] = 0
    p /= p.sum()
    found = shares(logits, weights=weights, temperature=temperature, seed=9, **cut)
    assert ((found > 0) == (p > 0)).all()
    assert (found - p).abs().sum() / 2 < 0.03


def test_a_draw_depends_on_seed_and_place_alone() -> None:
    logits = policies(5)
    mine = group([3, 1], 7, seed=5)
    (alone,) = draw(logits, [mine])
    tokens = draw(logits, [group([0, 1, 2], 2, "h", seed=5), mine, group([4, 0], 7, "i", seed=6)])
    assert tokens[1] == alone
    other_places = draw(logits, [group([3, 1], place, seed=5) for place in range(50)])
    assert len(set(other_places.tolist())) > 3
    negative = draw(logits, [group([3, 1], place, seed=-5) for place in range(50)])
    assert negative.tolist() != other_places.tolist()


def emitted(logits: torch.Tensor) -> list[int | None]:
    """The one token left of each row; None where a row was not touched."""
    return [int(row.argmax()) if (row > -torch.inf).sum() == 1 else None for row in logits]


def test_rows_in_step_emit_one_token_and_others_are_left_alone() -> None:
    logits = policies(5)
    before = logits.clone()
    wanted = draw(logits, [group([4, 0], 3, seed=1)])[0]
    emit(logits, group([4, 0], 3, seed=1))
    assert emitted(logits) == [wanted, None, None, None, wanted]
    assert (logits[1:4] == before[1:4]).all()


def test_rows_out_of_step_emit_different_tokens() -> None:
    main, partner, third = group([0, 1, 2], 3)
    behind = Row(1, partner.recipe, 2)
    for rows in ([main, partner], [main, behind, third], [partner], [main]):
        logits = policies(3)
        emit(logits, rows)
        tokens = [t for t in emitted(logits) if t is not None]
        assert len(set(tokens)) == len(rows)


def test_not_a_number_parts_the_rows() -> None:
    logits = policies(2)
    logits[1, 4] = torch.nan
    emit(logits, group([0, 1]))
    a, b = emitted(logits)
    assert a is not None
    assert a != b


def test_a_replay_is_emitted_before_anything_is_drawn() -> None:
    rows = group([0, 1], 2)
    told = [
        Row(r.index, Recipe(**{**{f: getattr(r.recipe, f) for f in r.recipe.__slots__}, "replay": [9, 8, 7]}), 2)
        for r in rows
    ]
    logits = policies(2)
    emit(logits, told)
    assert emitted(logits) == [7, 7]


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
        """One step; rows that are `discarded` do not grow by what they emit."""
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


def drawn(logits: torch.Tensor, rows: list[int], place: int, **recipe: Any) -> int:
    return int(draw(logits, [group(rows, place, **({"seed": 4} | recipe))])[0])


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
    batch.update(added={3: PLAIN, 2: PLAIN})  # a plain row in the place of a mixed one
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


def test_recipes_survive_the_way_to_the_engine() -> None:
    import msgspec

    recipe = Recipe("g", 0, 3, [1, 2], [0.5, -1.0], -7, 0.3, 4, 0.9, 0.1)
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(recipe.extra_args()))
    assert Recipe.of(sent) == recipe
    assert Recipe.of(None) is Recipe.of({"other": 1}) is None
    assert np.isclose(Recipe.of(sent).temperature, 0.3)  # type: ignore[union-attr]

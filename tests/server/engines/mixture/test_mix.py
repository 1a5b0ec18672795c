"""Mixed policies inside the engine: the distribution that is drawn, and what sequences emit in and out of step."""

from typing import Any

import kernel_reference
import numpy as np
import pytest
import torch
from kernel_checks import on_path
from mixtures import V, emitted, group, policies

from guiderail.server.engines.vllm.mixture import mixing as vllm_mixing
from guiderail.server.engines.vllm.mixture.mixing import Row, _uniform, draw, emit
from guiderail.server.engines.vllm.mixture.recipe import Recipe


def shares(logits: torch.Tensor, n: int = 6000, **recipe: Any) -> torch.Tensor:
    """Counts of each token over n places of an answer."""
    rows = list(range(logits.shape[0]))
    tokens = draw(logits, [group(rows, place, **recipe) for place in range(n)])
    return torch.bincount(tokens, minlength=V) / n


def distribution(logits: torch.Tensor, weights: list[float], temperature: float = 1.0) -> torch.Tensor:
    """(pi_0 * prod pi_i^w_i)^(1/T), from each policy's own log-softmax: the definition."""
    logprobs = torch.log_softmax(logits.double(), 1)
    mixed = logprobs[0] + sum(w * p for w, p in zip(weights, logprobs[1:], strict=True))
    return torch.softmax(mixed / temperature, 0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("weights", [[1.0], [-0.6], [0.3, 2.0], [0.5, -1.0, 0.25, 0.1]], ids=str)
def test_the_mixture_is_drawn(weights: list[float], temperature: float) -> None:
    logits = policies(1 + len(weights), seed=len(weights), scale=0.7)
    found = shares(logits, weights=weights, temperature=temperature, seed=3)
    wanted = distribution(logits, weights, temperature)
    assert (found - wanted).abs().sum() / 2 < 0.03
    assert (found - distribution(logits, weights, temperature / 2)).abs().sum() / 2 > 0.05, (
        "the control: sharpened twice"
    )


def test_the_distribution_is_the_kernels_reference() -> None:
    logits, weights = policies(2), torch.tensor([0.7])
    other = torch.log_softmax(logits[1:].double(), 1)
    z = kernel_reference.tilted_logits(torch.log_softmax(logits[:1].double(), 1), other, weights)
    assert torch.allclose(torch.softmax(z[0], 0), distribution(logits, [0.7]))


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
    p = distribution(logits, weights, temperature)
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


def test_a_group_that_cuts_does_not_round_its_neighbours_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind is drawn by its own operations, in whichever order they come."""
    logits = policies(4)
    cut: list[tuple[int, ...]] = []
    original = vllm_mixing._cut

    def spy(z: Any, temperatures: Any, heads: Any) -> Any:
        cut.append(tuple(head.top_k for head in heads))
        return original(z, temperatures, heads)

    monkeypatch.setattr(vllm_mixing, "_cut", spy)
    plain = [group([0, 1], place, "p", weights=[0.4], seed=3) for place in range(40)]
    cutting = [group([2, 3], place, "c", weights=[0.4], seed=4, top_k=3) for place in range(40)]
    both = draw(logits, [one for pair in zip(plain, cutting, strict=True) for one in pair])
    assert cut == [(3,) * 40]
    assert both[::2].tolist() == draw(logits, plain).tolist()
    assert both[1::2].tolist() == draw(logits, cutting).tolist()


def plausible(logits: torch.Tensor, share: float) -> torch.Tensor:
    p = torch.softmax(logits[0].double(), 0)
    return p >= share * p.max()


@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"temperature": 1.7, "min_p": 0.1}], ids=str)
@pytest.mark.parametrize("weights", [[-0.9], [1.0, -2.0]], ids=str)
def test_implausible_tokens_are_left_out_before_anything_is_mixed(weights: list[float], cut: dict[str, Any]) -> None:
    """Contrastive decoding: the distribution over what the policy itself gives at least 0.2 of its top probability."""
    logits = policies(1 + len(weights), seed=11 if len(weights) == 1 else 14)
    kept = plausible(logits, 0.2)
    assert 2 <= kept.sum() < V / 2
    assert not kept[distribution(logits, weights).argmax()], (
        "the control: unmasked, an implausible token is the likeliest"
    )
    p = torch.where(kept, distribution(logits, weights, cut.get("temperature", 1.0)), 0)
    p = torch.where(p < cut.get("min_p", 0) * p.max(), 0, p)
    p[p.argsort(descending=True)[int(cut.get("top_k", V)) :]] = 0
    p /= p.sum()
    found = shares(logits, 3000, weights=weights, plausibility=0.2, seed=3, **cut)
    assert ((found > 0) <= (p > 0)).all()
    assert (found - p).abs().sum() / 2 < 0.04


def test_the_kernel_draws_the_same_masked_tokens() -> None:
    """In Triton's interpreter: what the kernel draws is the reference's token of the masked mixture."""
    logits = policies(2, seed=11)
    groups = [group([0, 1], i, str(i), weights=[-0.9], plausibility=0.2, seed=3) for i in range(16)]
    with on_path("triton"):
        tokens = draw(logits, groups)
    z = torch.where(plausible(logits, 0.2), logits[0].double() - 0.9 * logits[1].double(), -torch.inf)
    cdf = torch.softmax(z, 0).cumsum(0)
    for token, (head, _) in zip(tokens.tolist(), groups, strict=True):
        uniform = _uniform(head)
        assert (cdf[token - 1] if token else 0) - 1e-5 <= uniform <= cdf[token] + 1e-5
        assert z[token] > -torch.inf
    assert len(set(tokens.tolist())) > 1


def test_each_group_has_a_mask_of_its_own_or_none() -> None:
    logits = policies(2, seed=11)
    for place in range(50):
        masked, free = (
            group([0, 1], place, name, weights=[-0.9], plausibility=share, seed=3)
            for name, share in (("g", 0.2), ("h", 0.0))
        )
        assert draw(logits, [masked, free]).tolist() == [
            *draw(logits, [masked]).tolist(),
            *draw(logits, [free]).tolist(),
        ]
    tops = {int(draw(logits, [group([0, 1], i, weights=[-0.9], plausibility=1.0, seed=3)])[0]) for i in range(20)}
    assert tops == {int(logits[0].argmax())}


def test_a_masked_row_of_no_numbers_still_parts_the_rows() -> None:
    logits = policies(2)
    logits[0, 4] = torch.nan
    assert draw(logits, [group([0, 1], plausibility=0.1)]).tolist() == [-1]


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


def test_recipes_survive_the_way_to_the_engine() -> None:
    import msgspec

    recipe = Recipe("g", 0, 3, [1, 2], [0.5, -1.0], -7, 0.3, 4, 0.9, 0.1, 0.2)
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(recipe.extra_args()))
    assert Recipe.of(sent) == recipe
    assert Recipe.of(None) is Recipe.of({"other": 1}) is None
    assert np.isclose(Recipe.of(sent).temperature, 0.3)  # type: ignore[union-attr]

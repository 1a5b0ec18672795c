"""combine and select, on their own."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guiderail.guides.pipeline import Argmax, RewardTerm, Softmax, combine

scores = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=32)


def test_combine_is_the_weighted_sum() -> None:
    terms = [RewardTerm("a", "a", 2.0, None), RewardTerm("a", "other", -1.0, None)]
    assert combine(terms, {"a": 3.0, "other": 5.0}) == 1.0


@given(scores)
def test_argmax_takes_the_first_of_the_largest(values: list[float]) -> None:
    assert Argmax().pick(values, seed=None) == values.index(max(values))


@given(scores, st.integers(0, 2**31))
def test_softmax_is_reproducible_and_in_range(values: list[float], seed: int) -> None:
    rule = Softmax(beta=0.5)
    assert 0 <= rule.pick(values, seed) < len(values)
    assert rule.pick(values, seed) == rule.pick(values, seed)


def test_softmax_frequencies_are_its_probabilities() -> None:
    values, beta, draws = [0.0, 0.1, 0.3], 0.1, 20000
    weights = [math.exp(v / beta) for v in values]
    counts = [0, 0, 0]
    for seed in range(draws):
        counts[Softmax(beta=beta).pick(values, seed)] += 1
    for count, weight in zip(counts, weights, strict=True):
        p = weight / sum(weights)
        assert abs(count / draws - p) < 4 * math.sqrt(p * (1 - p) / draws)


def test_softmax_with_a_small_beta_is_argmax() -> None:
    assert {Softmax(beta=1e-9).pick([1.0, 3.0, 2.0], seed) for seed in range(100)} == {1}


@pytest.mark.parametrize("beta", [0, -1, float("nan"), float("inf")])
def test_softmax_refuses_a_bad_beta(beta: float) -> None:
    with pytest.raises(ValueError, match="beta"):
        Softmax(beta=beta)

"""Transforming and Combining Rewards (arXiv 2402.00742): a sum of log-sigmoids is log P(good in all)."""

import numpy as np
import pytest

from guiderail.guides.scoring.chain import parse_chain
from guiderail.guides.scoring.combine import And
from guiderail.guides.scoring.transforms import LogSigmoid

LABELS = ("a", "b", "c")


def test_the_sum_is_the_log_probability_of_being_good_in_all() -> None:
    """Good in a reward: preferred to the reference by a Bradley-Terry judge, r + logistic noise > reference."""
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(7, 3)) * 2
    samples = rng.normal(size=(3, 100)) * 2
    chain = And.default_chain
    assert chain is not None
    values = np.stack([chain.fit(samples[r], {})(raw[:, r]) for r in range(3)], axis=1)
    combined = And().combine(values, np.ones(3), LABELS)

    references = np.quantile(samples, 0.85, axis=1)
    exact = (1 / (1 + np.exp(-(raw - references)))).prod(axis=1)
    assert np.exp(combined) == pytest.approx(exact, rel=1e-12)

    good = raw + rng.logistic(size=(200_000, 7, 3)) > references
    frequency = good.all(axis=2).mean(axis=0)
    assert np.abs(frequency - np.exp(combined)).max() < 4.5 * np.sqrt(0.25 / 200_000)


def test_a_weight_counts_a_property_as_so_many() -> None:
    values = np.array([[-0.5, -1.0], [-0.2, -3.0]])
    doubled = And().combine(values, np.array([2.0, 1.0]), LABELS[:2])
    tripled = And().combine(values[:, [0, 0, 1]], np.ones(3), LABELS)
    assert doubled == pytest.approx(tripled)


def test_it_is_right_in_both_tails() -> None:
    apply = LogSigmoid(reference={"value": 0}).fit(np.zeros(0), {})
    x = np.array([-1e6, -800.0, -40.0, 0.0, 40.0, 800.0, 1e6])
    exact = [-1e6, -800.0, -40.0 - np.exp(-40), -np.log(2), -np.exp(-40), 0.0, 0.0]
    assert apply(x) == pytest.approx(exact, rel=1e-14, abs=0)


def test_a_served_property_saturates_and_cannot_make_up_for_another() -> None:
    values = LogSigmoid(reference={"value": 0}).fit(np.zeros(0), {})(np.array([[30.0, -2.0], [0.5, 0.0]]))
    raw, logical = np.array([28.0, 0.5]), And().combine(values, np.ones(2), LABELS[:2])
    assert raw.argmax() == 0
    assert logical.argmax() == 1


def test_the_reference_is_in_the_units_that_reach_the_step() -> None:
    sample = np.arange(101.0)
    for reference, raw in (({"quantile": 0.25}, 25.0), ({"answer": "no"}, 7.0)):
        spec = [{"name": "standardize", "mean": 10, "std": 5}, {"name": "log_sigmoid", "reference": reference}]
        apply = parse_chain(spec).fit(sample, {"no": 7.0})
        assert apply(np.array([raw]))[0] == pytest.approx(-np.log(2))
        assert apply(np.array([raw + 5]))[0] == pytest.approx(-np.log1p(np.exp(-1)))
    in_quantiles = parse_chain(["calibrated", {"name": "log_sigmoid", "reference": {"quantile": 0.5}}])
    assert in_quantiles.fit(sample, {})(np.array([50.0]))[0] == pytest.approx(-np.log(2))


def test_temperature_undoes_a_scale() -> None:
    sample = np.linspace(-1, 1, 30)
    plain = parse_chain("log_sigmoid").fit(sample, {})
    scaled = parse_chain({"name": "log_sigmoid", "temperature": 10}).fit(10 * sample, {})
    assert scaled(10 * sample) == pytest.approx(plain(sample))

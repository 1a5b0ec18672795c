"""Chains of transforms: what they mean, and the properties that hold for all of them."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guiderail.guides.scoring.chain import IDENTITY, TRANSFORMS, Chain, ChainError, parse_chain
from guiderail.guides.scoring.transforms import LIMIT

ANSWERS = {"I cannot help with that.": -0.25}
REWARD = st.one_of(
    st.floats(-5, 5), st.integers(-3, 3).map(float), st.sampled_from([1e6, -1e6, 0.0, 1e-300, LIMIT, -LIMIT])
)
REFERENCE = st.sampled_from(
    [{"quantile": 0.85}, {"quantile": 1e-9}, {"value": 1e6}, {"value": -0.5}, {"answer": next(iter(ANSWERS))}]
)
RAW = st.one_of(
    st.just("identity"),
    st.just("standardize"),
    st.builds(lambda s: {"name": "standardize", "mean": 0.5, "std": s}, st.sampled_from([1e-300, 0.1, 1e90])),
    st.builds(lambda a, b: {"name": "clip", "low": min(a, b), "high": max(a, b)}, REWARD, REWARD),
    st.builds(lambda a: {"name": "clip", "low": a}, REWARD),
    st.builds(
        lambda r, t: {"name": "log_sigmoid", "reference": r, "temperature": t},
        REFERENCE,
        st.sampled_from([1e-300, 0.1, 1.0, 1e300]),
    ),
)
ON_QUANTILE = st.one_of(
    st.builds(lambda n, t: {"name": n, "t": t}, st.sampled_from(["exp", "neg_exp"]), st.floats(1e-3, 80)),
    st.just("log"),
)


@st.composite
def chains(draw: Any) -> Chain:
    """Any chain: raw steps, then perhaps calibration and a step on quantiles, then raw steps."""
    steps = draw(st.lists(RAW, max_size=2))
    if draw(st.booleans()):
        steps.append("calibrated")
        steps += draw(st.lists(ON_QUANTILE, max_size=1))
    return parse_chain(steps + draw(st.lists(RAW, max_size=2)))


@given(chains(), st.lists(REWARD, min_size=1, max_size=12), st.lists(REWARD, min_size=1, max_size=12))
def test_a_chain_never_reverses_an_order_nor_leaves_the_finite(
    chain: Chain, values: list[float], sample: list[float]
) -> None:
    raw = np.array(values)
    out = chain.fit(np.array(sample), ANSWERS)(raw)
    assert np.isfinite(out).all()
    order = np.argsort(raw, kind="stable")
    assert (np.diff(out[order]) >= 0).all()
    assert out[raw.argmax()] == out.max(), "what had the largest raw reward has the largest still"
    if chain == IDENTITY:
        assert (out == raw).all()


@given(chains())
def test_a_chain_survives_json(chain: Chain) -> None:
    assert parse_chain(json.loads(json.dumps(chain.dump()))) == chain


@given(st.lists(st.floats(-5, 5).map(lambda x: round(x, 2)), min_size=2, max_size=9, unique=True))
def test_a_chain_of_strict_steps_makes_no_ties(values: list[float]) -> None:
    chain = parse_chain(["standardize", "log_sigmoid"])
    assert len(set(chain.fit(np.linspace(-3, 3, 20), {})(np.array(values)).tolist())) == len(values)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1.1e100])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    chain = parse_chain({"name": "log_sigmoid", "reference": {"answer": "no"}})
    for arguments in ((np.array([0.0, bad]), {"no": 0.0}), (None, {"no": bad})):
        with pytest.raises(ValueError, match="finite"):
            chain.fit(*arguments)
    with pytest.raises(ValueError, match="finite"):
        chain.fit(None, {"no": 0.0})(np.array([bad]))


def test_quantiles_count_ties_half_and_the_order_of_the_sample_does_not_matter() -> None:
    apply = parse_chain("calibrated").fit(np.array([2.0, 3.0, 1.0, 2.0]), {})
    assert apply(np.array([0.0, 1.0, 2.0, 2.5, 9.0])).tolist() == [0.0, 0.125, 0.5, 0.75, 1.0]
    assert apply(np.array([[2.0], [9.0]])).shape == (2, 1)


def test_the_quantile_of_a_fresh_base_answer_is_uniform() -> None:
    rng = np.random.default_rng(1)
    u = np.concatenate(
        [parse_chain("calibrated").fit(rng.normal(size=50), {})(rng.normal(size=1)) for _ in range(4000)]
    )
    assert u.mean() == pytest.approx(0.5, abs=4 * np.sqrt(1 / 12 / 4000))
    assert (u <= 0.2).mean() == pytest.approx(0.2, abs=0.04)


def test_log_is_floored_at_half_a_sample() -> None:
    apply = parse_chain("log").fit(np.arange(10.0), {})
    assert apply(np.array([-1.0, 9.5])) == pytest.approx([np.log(1 / 20), 0.0])


def test_a_sample_without_spread_is_only_centred() -> None:
    assert parse_chain("standardize").fit(np.full(5, 0.1), {})(np.array([0.1, 2.1])) == pytest.approx([0.0, 2.0])


def test_what_acts_on_a_quantile_gets_one() -> None:
    assert [step.name for step in parse_chain("exp").steps] == ["calibrated", "exp"]
    assert [step.name for step in parse_chain(["identity", "log"]).steps] == ["calibrated", "log"]
    clipped = parse_chain(["calibrated", {"name": "clip", "low": 0.1, "high": 0.9}, "log"])
    assert [step.name for step in clipped.steps] == ["calibrated", "clip", "log"]
    assert parse_chain(None) == parse_chain("identity") == parse_chain([]) == IDENTITY
    assert IDENTITY.dump() == []


def test_what_a_chain_needs_is_said_and_missed() -> None:
    assert not parse_chain([{"name": "clip", "low": 0}, {"name": "standardize", "mean": 0, "std": 1}]).needs_sample
    for spec in ("calibrated", "exp", "standardize", "log_sigmoid"):
        assert parse_chain(spec).needs_sample
        for sample in (None, np.zeros(0)):
            with pytest.raises(ValueError, match="calibration sample is needed"):
                parse_chain(spec).fit(sample, {})
    chain = parse_chain({"name": "log_sigmoid", "reference": {"answer": "no"}})
    assert not chain.needs_sample
    assert chain.reference_answers == ("no",)
    with pytest.raises(ValueError, match="'no' is needed"):
        chain.fit(None, {})
    with pytest.raises(ValueError, match="one dimension"):
        chain.fit(np.zeros((2, 2)), {"no": 0.0})


@pytest.mark.parametrize(
    ("spec", "path", "message"),
    [
        ("foo", "transform", "unknown transform 'foo'"),
        (["log", "foo"], "transform[1]", "unknown transform 'foo'"),
        (3, "transform", "not 3"),
        ([None], "transform[0]", "not None"),
        ({"t": 1}, "transform.name", "not None"),
        ([{"name": ["exp"]}], "transform[0].name", "must name a transform"),
        ({"name": "exp", "t": 81}, "transform.t", "less than or equal to 80"),
        (["calibrated", {"name": "exp", "t": 0}], "transform[1].t", "greater than 0"),
        ([{"name": "neg_exp", "t": "x"}], "transform[0].t", "valid number"),
        ({"name": "exp", "beta": 1}, "transform.beta", "not permitted"),
        ("clip", "transform", "needs low, high or both"),
        ({"name": "clip", "low": 2, "high": 1}, "transform", "must not exceed"),
        ({"name": "clip", "low": float("nan")}, "transform.low", "finite"),
        ({"name": "clip", "low": 1e300}, "transform.low", "less than or equal to"),
        ({"name": "standardize", "mean": 1}, "transform", "together, or neither"),
        ({"name": "standardize", "mean": 1, "std": 0}, "transform.std", "greater than 0"),
        ({"name": "log_sigmoid", "temperature": 0}, "transform.temperature", "greater than 0"),
        ({"name": "log_sigmoid", "reference": 3}, "transform.reference", "one of quantile, value and answer"),
        ({"name": "log_sigmoid", "reference": {}}, "transform.reference", "one of quantile, value and answer"),
        ({"name": "log_sigmoid", "reference": {"quantile": 0.5, "value": 1}}, "transform.reference", "one of"),
        ({"name": "log_sigmoid", "reference": {"quantile": 1}}, "transform.reference.quantile", "less than 1"),
        ({"name": "log_sigmoid", "reference": {"answer": ""}}, "transform.reference.answer", "at least 1 character"),
        (["log_sigmoid", "exp"], "transform[1]", "put calibrated before exp"),
        (["calibrated", "standardize", "log"], "transform[2]", "put calibrated before log"),
        (["calibrated", {"name": "clip", "low": 2}, "exp"], "transform[2]", "put calibrated before exp"),
        (["log", "log"], "transform[1]", "put calibrated before log"),
        (["identity"] * 9, "transform", "at most 8"),
    ],
    ids=str,
)
def test_errors_name_the_place(spec: Any, path: str, message: str) -> None:
    with pytest.raises(ChainError) as caught:
        parse_chain(spec)
    assert caught.value.path == path
    assert message in caught.value.message
    with pytest.raises(ChainError) as caught:
        parse_chain(spec, "rewards[2].transform")
    assert caught.value.path == "rewards[2]." + path


STEPS: dict[str, Any] = {
    "identity": "identity",
    "calibrated": "calibrated",
    "exp": {"name": "exp", "t": 7.5},
    "neg_exp": {"name": "neg_exp", "t": 7.5},
    "log": "log",
    "log_sigmoid": {"name": "log_sigmoid", "reference": {"value": 0.7}},
    "clip": {"name": "clip", "low": -0.5, "high": 1.0},
    "standardize": {"name": "standardize", "mean": 0.3, "std": 2.0},
}


def formula(name: str, value: float, samples: Any) -> float:
    """One value through one step of STEPS, as the papers write it (InfAlign's win rate counts ties half)."""
    u = (np.sum(samples < value) + 0.5 * np.sum(samples == value)) / len(samples)
    found = {
        "identity": value,
        "calibrated": u,
        "exp": math.exp(7.5 * u),
        "neg_exp": -math.exp(-7.5 * u),
        "log": math.log(max(u, 1 / (2 * len(samples)))),
        "log_sigmoid": -math.log1p(math.exp(-(value - 0.7))),
        "clip": min(max(value, -0.5), 1.0),
        "standardize": (value - 0.3) / 2.0,
    }
    return float(found[name])


@pytest.mark.parametrize("seed", range(3))
def test_chains_and_the_formulas_agree(seed: int) -> None:
    """Values in quarters make ties between candidates and samples."""
    assert set(TRANSFORMS) == set(STEPS) == {_name(spec) for spec in STEPS.values()}
    rng = np.random.default_rng(seed)
    raw, samples = np.round(rng.normal(size=(33, 8)) * 4) / 4, np.round(rng.normal(size=(8, 50)) * 4) / 4
    ours = np.stack([parse_chain(STEPS[n]).fit(samples[i], {})(raw[:, i]) for i, n in enumerate(STEPS)], axis=1)
    theirs = np.array([[formula(n, row[i], samples[i]) for i, n in enumerate(STEPS)] for row in raw])
    weights = rng.random(8)
    assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-12)
    assert ours @ weights == pytest.approx(theirs @ weights, rel=1e-12)
    assert (ours @ weights).argmax() == (theirs @ weights).argmax()


def _name(spec: Any) -> str:
    return spec if isinstance(spec, str) else spec["name"]

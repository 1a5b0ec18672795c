"""Arrival processes: their rates, their gaps, their seeds."""

import numpy as np
import pytest
from scipy import stats

from guiderail.loadtest.load.arrivals import Ramp, arrival_times


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(("burstiness", "shape"), [(0.25, 0.25), (1.0, 1.0), (4.0, 4.0)])
def test_gaps_are_gamma_with_the_asked_rate_and_shape(burstiness: float, shape: float) -> None:
    times = arrival_times(rng(), rate=20.0, burstiness=burstiness, count=20000)
    gaps = np.diff(times, prepend=0.0)
    assert gaps.mean() == pytest.approx(1 / 20, rel=1e-9)  # met exactly, as in vllm bench serve
    assert gaps.std() / gaps.mean() == pytest.approx(shape**-0.5, rel=0.03)
    assert stats.kstest(gaps, "gamma", args=(shape, 0, 1 / (20 * shape))).pvalue > 0.01
    assert stats.kstest(gaps, "gamma", args=(shape * 1.2, 0, 1 / (20 * shape * 1.2))).pvalue < 1e-6  # it can tell


def test_counts_of_poisson_arrivals_vary_as_much_as_their_mean() -> None:
    times = arrival_times(rng(1), rate=50.0, count=20000)
    per_slice = np.histogram(times, bins=np.arange(0, times[-1], 0.2))[0]
    assert per_slice.mean() == pytest.approx(10, rel=0.02)
    assert per_slice.var() / per_slice.mean() == pytest.approx(1, abs=0.1)


def test_infinite_burstiness_is_constant() -> None:
    assert np.diff(arrival_times(rng(), rate=8.0, burstiness=np.inf, count=9)) == pytest.approx([1 / 8] * 8)


def test_without_a_rate_all_arrive_at_once() -> None:
    assert arrival_times(rng(), rate=np.inf, count=3).tolist() == [0, 0, 0]


def test_the_seed_decides() -> None:
    same = [arrival_times(rng(7), rate=5.0, count=50) for _ in range(2)]
    assert (same[0] == same[1]).all()
    assert (same[0] != arrival_times(rng(8), rate=5.0, count=50)).any()


def test_a_duration_bounds_the_times_and_a_count_bounds_the_number() -> None:
    counts = [len(arrival_times(rng(seed), rate=40.0, duration_s=5.0)) for seed in range(400)]
    assert np.mean(counts) == pytest.approx(200, abs=3 * 200**0.5 / 20)
    assert np.var(counts) == pytest.approx(200, rel=0.25)  # Poisson: not scaled to a fixed number
    times = arrival_times(rng(), rate=40.0, duration_s=5.0, count=30)
    assert len(times) == 30
    assert times[-1] < 5.0


@pytest.mark.parametrize(
    ("ramp", "span", "first_half"),
    [
        (Ramp("linear", 10, 50), 2 * 9000 / 60, 0.5 * (10 + 30) / 2 / 30),
        (Ramp("linear", 50, 10), 2 * 9000 / 60, 0.5 * (50 + 30) / 2 / 30),
        (Ramp("exponential", 10, 40), 9000 * np.log(4) / 30, (2 - 1) / (4 - 1)),
        (Ramp("linear", 30, 30), 300.0, 0.5),
    ],
)
def test_a_ramp_sends_as_much_as_the_integral_of_its_rate(ramp: Ramp, span: float, first_half: float) -> None:
    times = arrival_times(rng(3), rate=ramp, count=9000)
    assert times[-1] == pytest.approx(span, rel=1e-6)
    assert (np.diff(times) >= 0).all()
    assert (times < span / 2).mean() == pytest.approx(first_half, abs=0.02)
    for moment, rate in ((0.02, ramp.start), (0.98, ramp.end)):
        near = np.abs(times / span - moment) < 0.02
        assert near.sum() / (0.04 * span) == pytest.approx(rate, rel=0.25)


def test_a_ramp_over_a_duration_ends_at_its_end_rate() -> None:
    times = arrival_times(rng(4), rate=Ramp("linear", 100, 300), duration_s=20.0)
    assert len(times) == pytest.approx(4000, abs=200)
    assert (times > 19).sum() == pytest.approx(295, abs=60)

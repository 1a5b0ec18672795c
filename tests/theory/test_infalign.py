"""InfAlign (arXiv 2412.19792): the policy that each transform is best for, by integration and by simulation."""

import numpy as np
import pytest
from distributions import U, best_of, beta_for, integral, kl, tilted, win_rate, worst_of
from scipy.optimize import minimize_scalar

from guiderail.guides.scoring.chain import Chain, parse_chain
from guiderail.guides.scoring.kl import selection_kl
from guiderail.guides.scoring.transforms import Exp, Identity, Log, NegExp, default_t

# transform of the quantile; then at KL 0.25 and at KL 1.0: beta, win rate, best-of-4 and worst-of-4 win rates
TABLE = [
    ("calibrated", (0.3767, 0.6989, 0.7304, 0.7847), (0.1361, 0.8646, 0.8770, 0.9744)),
    ("log", (0.8142, 0.6902, 0.6902, 0.8364), (0.1885, 0.8631, 0.8631, 0.9859)),
    ({"name": "exp", "t": 5}, (65.11, 0.6756, 0.7856, 0.6683), (34.20, 0.8390, 0.9192, 0.8572)),
    ({"name": "exp", "t": 10}, (9127, 0.6479, 0.7966, 0.6167), (5315, 0.8010, 0.9351, 0.7712)),
    ({"name": "neg_exp", "t": 5}, (0.1802, 0.6757, 0.6485, 0.8539), (0.01718, 0.8567, 0.8352, 0.9912)),
    ({"name": "neg_exp", "t": 10}, (0.06634, 0.6523, 0.6110, 0.8563), (9.585e-4, 0.8479, 0.8095, 0.9927)),
]
CELLS = [(spec, level, cells) for spec, *row in TABLE for level, cells in zip((0.25, 1.0), row, strict=True)]


def phi(spec: object) -> np.ndarray:
    """The chain's last step on the exact quantile, with a floor for log below every node."""
    step = parse_chain(spec).steps[-1]
    return U if step.name == "calibrated" else step.fit(np.zeros(10**8), {})(U)


@pytest.mark.parametrize(("spec", "level", "cells"), CELLS, ids=str)
def test_table_by_integration(spec: object, level: float, cells: tuple[float, ...]) -> None:
    beta = beta_for(phi(spec), level)
    f = tilted(phi(spec), beta)
    assert kl(f) == pytest.approx(level, abs=1e-9)
    assert beta == pytest.approx(cells[0], rel=4e-4)
    assert (win_rate(f), best_of(f, 4), worst_of(f, 4)) == pytest.approx(cells[1:], abs=6e-5)


@pytest.mark.parametrize(("spec", "level", "cells"), CELLS, ids=str)
def test_table_by_simulation(spec: object, level: float, cells: tuple[float, ...]) -> None:
    """Answers with a skewed raw reward; quantiles are estimated from a sample apart, as the server does it."""
    rng = np.random.default_rng(5)
    base = rng.lognormal(1.0, 2.0, 200_000)
    chain = parse_chain(spec).fit(rng.lognormal(1.0, 2.0, 100_000), {})
    exponent = chain(base) / cells[0]
    weights = np.exp(exponent - exponent.max())
    weights /= weights.sum()
    assert selection_kl(weights) == pytest.approx(level, abs=0.02)

    def drawn(n: int) -> np.ndarray:
        return base[np.searchsorted(np.cumsum(weights), rng.random((60_000, n))).clip(max=len(base) - 1)]

    def wins(ours: np.ndarray, theirs: np.ndarray) -> float:
        return float((ours > theirs).mean() + (ours == theirs).mean() / 2)

    ours, theirs = drawn(4), rng.lognormal(1.0, 2.0, (60_000, 4))
    rates = wins(ours[:, 0], theirs[:, 0]), wins(ours.max(1), theirs.max(1)), wins(ours.min(1), theirs.min(1))
    assert rates == pytest.approx(cells[1:], abs=0.012)


@pytest.mark.parametrize("level", [0.25, 1.0])
def test_the_transform_for_best_of_4_wins_there_and_the_one_for_worst_of_4_there(level: float) -> None:
    rows = {str(spec): cells for spec, at, cells in CELLS if at == level}
    assert max(rows, key=lambda r: rows[r][1]) == "calibrated"
    assert max(rows, key=lambda r: rows[r][2]) == str({"name": "exp", "t": 10})
    assert max(rows, key=lambda r: rows[r][3]) == str({"name": "neg_exp", "t": 10})


def test_for_two_candidates_a_t_of_5_beats_10_in_every_cell() -> None:
    cells = {}
    for level in (0.25, 1.0):
        for t in (5, 10):
            for make, measure in ((Exp, best_of), (NegExp, worst_of)):
                values = make(t=t).fit(np.zeros(1), {})(U)
                cells[make, level, t] = measure(tilted(values, beta_for(values, level)), 2)
    for make in (Exp, NegExp):
        for level in (0.25, 1.0):
            assert cells[make, level, 5] > cells[make, level, 10]
    assert (cells[Exp, 0.25, 5], cells[Exp, 0.25, 10]) == pytest.approx((0.7386, 0.7249), abs=6e-5)
    assert (cells[NegExp, 1.0, 5], cells[NegExp, 1.0, 10]) == pytest.approx((0.9482, 0.9475), abs=6e-5)


@pytest.mark.parametrize("n", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("level", [0.25, 1.0])
def test_default_t_is_nearly_the_best_t(n: int, level: float) -> None:
    def rate(t: float, make: type[Exp] | type[NegExp]) -> float:
        values = make(t=t).fit(np.zeros(1), {})(U)
        f = tilted(values, beta_for(values, level))
        return best_of(f, n) if make is Exp else worst_of(f, n)

    for make, slack in ((Exp, 0.01), (NegExp, 0.003)):
        best = minimize_scalar(
            lambda t, m=make: -rate(t, m), bounds=(0.5, 80), method="bounded", options={"xatol": 0.3}
        )
        assert rate(default_t(n), make) >= -best.fun - slack


def test_default_t_is_filled_in_where_none_is_given() -> None:
    chain = parse_chain(["calibrated", "exp", {"name": "neg_exp", "t": 3}][:2])
    assert chain.resolved(4).steps[1].t == 10
    assert chain.resolved(1000).steps[1].t == 80
    assert parse_chain({"name": "neg_exp", "t": 3}).resolved(4).steps[1].t == 3
    with pytest.raises(ValueError, match="no t yet"):
        chain.fit(np.zeros(3), {})
    assert Chain((Identity(),)).resolved(4) == Chain((Identity(),))


@pytest.mark.parametrize("n", [2, 4, 16])
def test_log_at_one_over_n_minus_one_is_best_of_n_itself(n: int) -> None:
    f = tilted(Log().fit(np.zeros(10**8), {})(U), 1 / (n - 1))
    assert f == pytest.approx(n * U ** (n - 1), rel=1e-6, abs=1e-12)
    assert kl(f) == pytest.approx(np.log(n) - 1 + 1 / n, abs=1e-8)
    assert integral(f) == pytest.approx(1)

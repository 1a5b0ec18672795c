"""InfAlign's table at the KL that a request asks for, over HTTP; `make bench-infalign` has all of it, larger."""

import math

import numpy as np
import pytest
from distributions import pool
from infalign import exact, table

from guiderail.guides.scoring import SELECTIONS
from guiderail.guides.scoring.kl import best_of_n_kl, best_of_poisson_kl, selection_kl

CELLS = [("log u", 0.25), ("e^{10u}", 0.25), ("e^{10u}", 1.0), ("-e^{-10u}", 1.0), ("u", 1.0)]


async def test_the_kl_asked_for_is_obtained_and_so_is_the_table() -> None:
    found = await table(CELLS, requests=5, candidates=192, calibration=192)
    for (name, kl), asked in found.items():
        assert asked.kl == pytest.approx(kl, abs=2e-6)
        rates, errors = asked.win_rates(), asked.standard_errors()
        assert np.abs(rates - exact(name, kl)).max() < 5 * errors.max() + 0.01, (name, kl, rates, errors)
    best = {cell: asked.win_rates() for cell, asked in found.items()}
    assert best["e^{10u}", 0.25][1] > best["log u", 0.25][1]  # what a transform is for
    assert best["-e^{-10u}", 1.0][2] > best["u", 1.0][2]


@pytest.mark.parametrize("divergence", [None, "reverse_kl", "forward_kl", "jensen_shannon", "total_variation"])
@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
async def test_a_target_is_met_on_each_pool(divergence: str | None, unit: float) -> None:
    rng = np.random.default_rng(0)
    for n, kl in ((8, 0.25), (8, 1.0), (64, 2.0)):
        scores = rng.normal(size=n) * unit
        fields = {"divergence": divergence} if divergence else {}
        rule = SELECTIONS["f_divergence" if divergence else "softmax"](kl=kl, **fields)
        choice = await rule.pick(pool(scores))
        obtained = selection_kl(choice.weights)
        assert choice.kl == choice.detail["kl_obtained"] == pytest.approx(obtained)
        assert choice.detail["kl_asked"] == kl
        assert choice.detail["beta"] > 0
        assert obtained <= kl * (1 + 1e-9)
        if divergence != "total_variation":  # whose weights move in jumps
            assert obtained == pytest.approx(kl, rel=1e-6)
            assert choice.warnings == ()


@pytest.mark.parametrize(
    ("scores", "most"),
    [
        ([2.0] * 5, 0.0),
        ([0.0], 0.0),
        ([1.0, 1.0, 0.0, 0.0], math.log(2)),
        ([0.0, 1e100, -1e100], math.log(3)),
        ([0.0, 1e-300], math.log(2)),
    ],
)
@pytest.mark.parametrize("divergence", [None, "forward_kl", "jensen_shannon", "total_variation"])
async def test_an_unattainable_target_gives_what_there_is_and_says_so(
    scores: list[float], most: float, divergence: str | None
) -> None:
    fields = {"divergence": divergence} if divergence else {}
    rule = SELECTIONS["f_divergence" if divergence else "softmax"](kl=5.0, **fields)
    choice = await rule.pick(pool(scores))
    assert choice.detail["kl_obtained"] == pytest.approx(most, abs=1e-6)
    assert any("could not be had" in warning for warning in choice.warnings)
    assert scores[choice.index] == max(scores)


@pytest.mark.parametrize(("kl", "n"), [(0.1, 16), (1.0, 16), (0.6, 4), (2.0, 4096)])
def test_best_of_poisson_finds_the_mu_of_a_kl(kl: float, n: int) -> None:
    rule = SELECTIONS["best_of_poisson"](kl=kl)
    assert best_of_poisson_kl(rule.mean(n), n) == pytest.approx(kl, rel=1e-6)
    assert SELECTIONS["best_of_poisson"](kl=50.0).mean(4) == 4096
    assert best_of_poisson_kl(4096.0, 4) == pytest.approx(best_of_n_kl(4), abs=1e-6)

"""The tabular model itself: its exact values against plain enumeration, and the engine's distribution against the table."""

from collections import Counter

import numpy as np
import pytest
from tabular import (
    aligned,
    answers_after,
    beam_search,
    best_q,
    expected,
    greedy,
    guided,
    kl,
    probability,
    q_values,
    random_policy,
    random_reward,
    total_variation,
)  # fmt: skip
from tabular_engine import PROMPT, TabularEngine

from guiderail.guides.core.types import SamplingSpec, TokenPrompt
from guiderail.guides.search.sequence import Piece

PI0 = random_policy(1)
R = random_reward(PI0, 2)


def test_answers_are_a_distribution() -> None:
    distribution = PI0.answers()
    assert sum(distribution.values()) == pytest.approx(1)
    assert len(distribution) == 1 + 3 + 9 + 27 + 81 + 243  # of 1 to 4 tokens, and of 5 with and without an end
    assert set(R) == set(distribution)


@pytest.mark.parametrize("prefix", [(), (2,), (1, 3), (3, 3, 1, 2)])
def test_q_is_the_mean_reward_of_what_follows(prefix: tuple[int, ...]) -> None:
    rho = random_policy(3)
    q, top = q_values(rho, R)[prefix], best_q(rho, R)[prefix]
    for z in range(4):
        after = answers_after(rho, (*prefix, z))
        assert q[z] == pytest.approx(sum(p * R[answer] for answer, p in after.items()))
        assert top[z] == max(R[answer] for answer in after)


def test_the_greedy_policy_of_q_star_finds_the_best_answer() -> None:
    distribution = greedy(best_q(PI0, R), PI0).answers()
    assert expected(distribution, R) == max(R.values())


def test_the_aligned_policy_is_the_tilted_distribution_of_answers() -> None:
    rho = aligned(PI0, R, 0.3)
    tilted = {answer: p * np.exp(R[answer] / 0.3) for answer, p in PI0.answers().items()}
    mass = sum(tilted.values())
    assert total_variation(rho.answers(), {a: p / mass for a, p in tilted.items()}) < 1e-12
    best = expected(rho.answers(), R) - 0.3 * kl(rho.answers(), PI0.answers())
    for other in (guided(PI0, q_values(PI0, R), 0.3), aligned(PI0, R, 0.25), aligned(PI0, R, 0.35)):
        assert expected(other.answers(), R) - 0.3 * kl(other.answers(), PI0.answers()) < best


def test_a_wide_beam_finds_the_mode_and_one_beam_is_greedy() -> None:
    _, score = beam_search(PI0, 10_000)
    assert np.exp(score) == pytest.approx(max(PI0.answers().values()))
    greedy_ids: tuple[int, ...] = ()
    while not greedy_ids or (greedy_ids[-1] and len(greedy_ids) < 5):
        greedy_ids = (*greedy_ids, int(PI0.distribution(greedy_ids).argmax()))
    assert beam_search(PI0, 1)[0] == greedy_ids


async def test_the_engine_draws_the_table() -> None:
    n = 6000
    engine = TabularEngine.of(PI0)
    counts: Counter[tuple[int, ...]] = Counter()
    async with engine.generate([TokenPrompt(PROMPT)] * n, SamplingSpec(5, stream=False), seeds=range(n)) as rollouts:
        async for delta in rollouts:
            assert delta.finish_reason == ("stop" if delta.token_ids[-1] == 0 else "length")
            counts[delta.token_ids] += 1
    assert engine.num_running() == 0
    for answer, p in PI0.answers().items():
        assert abs(counts[answer] / n - p) < 5 * np.sqrt(p * (1 - p) / n) + 1 / n, answer
    assert engine.num_running() == 0


async def test_the_engine_knows_temperature_log_probabilities_and_minimum() -> None:
    engine = TabularEngine.of(PI0)
    prompt = TokenPrompt(PROMPT)
    (top,) = await engine.next_token_logprobs([prompt.extended([2])], 2)
    order = np.argsort(-PI0.distribution((2,)))[:2]
    assert top == {int(z): pytest.approx(np.log(PI0.distribution((2,))[z])) for z in order}
    (logprobs,) = await engine.answer_logprobs([prompt], [(2, 1, 0)])
    assert np.exp(sum(logprobs)) == pytest.approx(probability(PI0, (2, 1, 0)))
    for temperature, least in ((0.0, 0), (0.0, 5), (2.0, 5)):
        piece = Piece()
        spec = SamplingSpec(5, temperature=temperature, min_tokens=least)
        async with engine.generate([prompt], spec, seeds=[7]) as rollouts:
            async for delta in rollouts:
                piece.token_ids += delta.token_ids
                piece.text += delta.text
        assert len(piece.token_ids) >= least
        assert piece.text == engine.renderer.decode(piece.token_ids)
        if temperature == 0 and not least:
            assert tuple(piece.token_ids) == beam_search(PI0, 1)[0]

"""DeAL against textbook beam search and against enumeration of all answers."""

from typing import Any

import numpy as np
import pytest
from contexts import final, run
from tabular import (
    Ids,
    Tabular,
    beam_search,
    best_q,
    greedy,
    probability,
    random_policy,
    random_reward,
)  # fmt: skip
from tabular_context import Scores, tabular_context
from tabular_engine import PROMPT, TabularEngine

from guiderail.guides.core.types import Candidate, SamplingSpec, Token
from guiderail.guides.deal import Deal
from guiderail.guides.scoring.selection.best import Softmax

HORIZON = 5
EVERY = 64  # beams, more than there are partial answers of a smaller model


def deal(**params: Any) -> Deal:
    return Deal(Deal.Params(**{"top_k": 4, **params}))


async def answer(
    guide: Deal, policy: Tabular, reward: dict[Ids, float], *, partial: Any = None, engine: Any = None, **more: Any
) -> tuple[Candidate, Any]:
    scores = Scores({"r": reward}, partial=partial or (lambda ids: 0.0))
    ctx = tabular_context(
        engine or TabularEngine.of(policy), scores, **{"sampling": SamplingSpec(policy.horizon, seed=1), **more}
    )
    events = await run(guide, ctx)
    end = final(events)
    assert "".join(e.text for e in events if isinstance(e, Token)) == end.candidates[0].text
    assert sum((e.token_ids for e in events if isinstance(e, Token)), ()) == end.candidates[0].token_ids
    return end.candidates[0], ctx


@pytest.mark.parametrize("length_penalty", [0.0, 0.7])
@pytest.mark.parametrize("beams", [1, 2, 3, 5, 20])
async def test_without_weight_it_is_beam_search(beams: int, length_penalty: float) -> None:
    found = []
    for seed in range(12):
        policy = random_policy(seed, horizon=HORIZON, spread=1.2)
        reward = random_reward(policy, seed)
        guide = deal(beams=beams, weight=0.0, lookahead=0, length_penalty=length_penalty)
        chosen, _ = await answer(guide, policy, reward)
        assert chosen.token_ids == beam_search(policy, beams, length_penalty)[0]
        found.append(chosen.token_ids)
    assert len(set(found)) > 4


@pytest.mark.parametrize("temperature", [0.5, 2.0])
async def test_the_temperature_is_that_of_the_softmax(temperature: float) -> None:
    """A step draws from softmax((log P + lambda h) / (beta * temperature)); the counts agree within 4 sigma."""
    policy = random_policy(4, horizon=1)

    def h(ids: Ids) -> float:
        return 0.3 * ids[0]

    reward = {(token,): h((token,)) for token in range(4)}
    score = np.log(policy.distribution(())) + 1.5 * np.array([reward[token,] for token in range(4)])
    p = np.exp((score - score.max()) / (0.8 * temperature))
    p /= p.sum()
    n, counts = 600, np.zeros(4)
    for seed in range(n):
        sampling = SamplingSpec(1, temperature, seed=seed)
        chosen, _ = await answer(
            deal(weight=1.5, lookahead=0), policy, reward, partial=h, selection=Softmax(beta=0.8), sampling=sampling
        )
        counts[chosen.token_ids[0]] += 1
    assert (np.abs(counts / n - p) < 4 * np.sqrt(p * (1 - p) / n)).all()


async def test_a_lookahead_changes_nothing_without_weight() -> None:
    policy = random_policy(4, horizon=HORIZON)
    reward = random_reward(policy, 1)
    chosen, _ = await answer(deal(beams=3, weight=0.0, lookahead=2, sampled=True), policy, reward)
    assert chosen.token_ids == beam_search(policy, 3)[0]


async def test_beams_change_the_answer_of_beam_search() -> None:
    """The control of the comparison above: greedy, beam 3 and the mode differ where they should."""
    policies = [random_policy(seed, horizon=HORIZON, spread=1.2) for seed in range(12)]
    assert sum(beam_search(p, 1)[0] != beam_search(p, 3)[0] for p in policies) >= 2
    assert sum(beam_search(p, 1)[0] != beam_search(p, 3, 0.7)[0] for p in policies) >= 2


@pytest.mark.parametrize("weight", [0.5, 3.0, 50.0])
async def test_with_all_beams_it_finds_the_optimum_of_log_p_plus_reward(weight: float) -> None:
    """Whatever the heuristic says on the way: it has to be right only of whole answers."""
    for seed in range(6):
        policy = random_policy(seed, vocabulary=3, horizon=4)
        reward = random_reward(policy, seed)
        best = max(reward, key=lambda a: np.log(probability(policy, a)) + weight * reward[a])
        for lookahead in (0, 1, None):
            chosen, _ = await answer(
                deal(beams=EVERY, top_k=3, weight=weight, lookahead=lookahead), policy, reward,
                partial=lambda ids: hash(ids) % 7 / 7,
            )  # fmt: skip
            assert chosen.token_ids == best
            assert chosen.rewards == {"r": reward[best]}


async def test_one_beam_with_a_lookahead_of_an_aligned_start_state_finds_the_best_answer() -> None:
    """Full lookahead by a policy that goes for the best, as its instruction asks: h is Q*, and nothing is missed."""
    missed = 0
    for seed in range(8):
        policy = random_policy(seed, horizon=HORIZON)
        reward = random_reward(policy, seed + 50)
        best = max(reward, key=reward.__getitem__)
        aligned = greedy(best_q(policy, reward), policy)
        soft = Tabular({s: 0.9 * p + 0.1 * policy.distribution(s) for s, p in aligned.table.items()}, HORIZON)
        engine = TabularEngine({PROMPT: policy, None: soft})  # another prompt, another distribution
        guide = deal(weight=1000.0, lookahead=None, instruction="be good")
        chosen, _ = await answer(guide, policy, reward, engine=engine)
        assert chosen.token_ids == best
        for less in (deal(weight=1000.0, lookahead=None), deal(weight=1000.0, lookahead=0, instruction="be good")):
            missed += (await answer(less, policy, reward, engine=engine))[0].token_ids != best
    assert missed >= 8


async def test_the_start_state_is_the_prompt_with_the_instruction() -> None:
    """log P is that of the instructed model: beam search is of its distribution, not of the distribution without instruction."""
    plain, instructed = random_policy(4, horizon=HORIZON), random_policy(5, horizon=HORIZON)
    engine = TabularEngine({PROMPT: plain, None: instructed})
    for instruction, policy in ((None, plain), ("be good", instructed)):
        guide = deal(beams=3, weight=0.0, lookahead=0, instruction=instruction)
        chosen, _ = await answer(guide, policy, random_reward(policy, 1), engine=engine)
        assert chosen.token_ids == beam_search(policy, 3)[0]
    assert beam_search(plain, 3)[0] != beam_search(instructed, 3)[0]


@pytest.mark.parametrize("lookahead", [1, 2, None])
async def test_reused_lookaheads_are_those_that_would_be_generated(lookahead: int | None) -> None:
    """Greedy decoding has no memory: a fresh lookahead after the chosen token is the rest of the old one."""
    for seed in range(6):
        policy = random_policy(seed, horizon=HORIZON)
        reward = random_reward(policy, seed + 9)
        held: list[tuple[Ids, float]] = [((), 0.0)]
        while not all(ids and (ids[-1] == 0 or len(ids) == HORIZON) for ids, _ in held):
            pool = []
            for ids, log_p in held:
                if ids and (ids[-1] == 0 or len(ids) == HORIZON):
                    pool.append((ids, log_p, reward[ids]))
                    continue
                for z in range(4):
                    ahead = (*ids, z)
                    while ahead[-1] and len(ahead) < HORIZON and len(ahead) - len(ids) - 1 < (lookahead or HORIZON):
                        ahead = (*ahead, int(policy.distribution(ahead).argmax()))
                    whole = ahead[-1] == 0 or len(ahead) == HORIZON
                    value = reward[ahead] if whole else sum(ahead) / 20
                    pool.append(((*ids, z), log_p + float(np.log(policy.distribution(ids)[z])), value))
            pool.sort(key=lambda each: -(each[1] + 4.0 * each[2]))
            held = [(ids, log_p) for ids, log_p, _ in pool[:3]]
        chosen, _ = await answer(
            deal(beams=3, weight=4.0, lookahead=lookahead), policy, reward, partial=lambda ids: sum(ids) / 20
        )
        assert chosen.token_ids == held[0][0]


async def test_a_hard_constraint_gives_the_likeliest_answer_that_keeps_it() -> None:
    for seed in range(6):
        policy = random_policy(seed, vocabulary=3, horizon=4)
        reward = random_reward(policy, seed)
        allowed = [a for a in reward if reward[a] >= 0.6]
        best = max(allowed, key=lambda a: probability(policy, a))
        guide = deal(beams=EVERY, top_k=3, weight=0.0, lookahead=0, threshold=0.6)
        chosen, ctx = await answer(guide, policy, reward, partial=lambda ids: 1.0)
        assert chosen.token_ids == best
        assert not any("threshold" in warning for warning in ctx.report.warnings)


@pytest.mark.parametrize("threshold", [2.0, 1e9, 1e15, 1e300])
@pytest.mark.parametrize("beams", [1, EVERY])
async def test_where_nothing_keeps_the_constraint_the_nearest_goes_on(threshold: float, beams: int) -> None:
    """However far off it is: a constraint that nothing keeps is no leave to ignore it."""
    for seed in range(4):
        policy = random_policy(seed, vocabulary=3, horizon=3)
        reward = random_reward(policy, seed)
        guide = deal(beams=beams, top_k=3, weight=0.0, lookahead=None, sampled=True, threshold=threshold)
        best = max(reward, key=reward.__getitem__)
        engine = TabularEngine.of(greedy(best_q(policy, reward), policy)) if beams == 1 else None
        chosen, ctx = await answer(guide, policy, reward, engine=engine)
        assert chosen.token_ids == best
        assert any("nearest" in warning for warning in ctx.report.warnings)


async def test_finished_beams_compete_with_unfinished_ones() -> None:
    """The short answer is found first; it wins only if nothing that comes later beats its score."""
    distribution = {(): [0.4, 0.6], (1,): [0.1, 0.9], (1, 1): [0.5, 0.5], (1, 1, 1): [0.5, 0.5]}
    policy = Tabular({s: np.array(p) for s, p in distribution.items()}, 4)
    reward = dict.fromkeys(policy.answers(), 0.0)
    short = (await answer(deal(beams=2, top_k=2, weight=0.0, lookahead=0), policy, reward))[0]
    assert short.token_ids == (0,)  # 0.4 against 0.27 of the longer ones
    reward |= {(1, 1, 0): 1.0}
    long = (await answer(deal(beams=2, top_k=2, weight=0.5, lookahead=None), policy, reward))[0]
    assert long.token_ids == (1, 1, 0)  # log 0.27 + 0.5 > log 0.4
    assert (await answer(deal(beams=2, top_k=2, weight=0.3, lookahead=None), policy, reward))[0].token_ids == (0,)

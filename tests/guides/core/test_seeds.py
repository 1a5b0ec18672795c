"""Seeds: streams that share nothing, no sentinels, and what that means for draws, picks, answers and requests."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
import pytest
from contexts import context, final, run
from every_guide import EVERY, REWARDS, Endless, random_scores
from fakes import ScriptedEngine, make_state
from scipy import stats
from tabular_context import tabular_context
from tabular_engine import TabularEngine

from guiderail.guides.best_of_n import BestOfN
from guiderail.guides.core.seeds import CALIBRATION, DRAW, PICK, POOL_SIZE, ROLLOUT, Seeds
from guiderail.guides.core.types import SamplingSpec
from guiderail.guides.sampling import Sampling
from guiderail.guides.scoring import SELECTIONS
from guiderail.server.api.app import create_app

EDGES = (-1, -2, 0, 1, 2**31, 2**32, 2**63 - 1, -(2**63), -(2**63) + 1)
STREAMS = (DRAW, ROLLOUT, PICK, POOL_SIZE, CALIBRATION)


def every_seed(request: int, *, n: int = 64) -> list[int]:
    """Of all streams of a request of three answers with four steps."""
    return [
        seed
        for answer, name, step in itertools.product(range(3), STREAMS, range(4))
        for seed in Seeds(request, answer).stream(n, name, step)
        if seed is not None
    ]


@pytest.mark.parametrize("request_seed", EDGES)
def test_the_seeds_of_a_request_are_distinct_int64_and_no_sentinels(request_seed: int) -> None:
    seeds = every_seed(request_seed)
    assert len(set(seeds)) == len(seeds) == 3 * len(STREAMS) * 4 * 64
    assert -1 not in seeds
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert seeds == every_seed(request_seed)


def test_neighbouring_seeds_share_nothing() -> None:
    found = Counter(seed for request in (*range(-4, 4), *EDGES[4:]) for seed in every_seed(request, n=16))
    assert max(found.values()) == 1


def test_the_first_sequence_of_the_first_answer_alone_has_the_requests_own_seed() -> None:
    assert [seed for seed in every_seed(7) if abs(seed) < 2**32] == [7]
    assert Seeds(7).stream(3)[0] == Seeds(7).stream(1, DRAW, 0)[0] == 7
    assert Seeds(-1).stream(1)[0] != -1, "vLLM would take it for no seed"
    assert Seeds(-2).stream(1) == [-2]


def test_sequences_of_a_step_differ_in_the_32_bits_that_a_cpu_generator_reads() -> None:
    for request in range(20):
        seeds = Seeds(request, 1).stream(4096)
        assert len({seed % 2**32 for seed in seeds if seed is not None}) == 4096


def test_without_a_seed_there_is_none_for_anything() -> None:
    assert all(
        Seeds(None, a).stream(3, name, step) == [None] * 3 for a in (0, 1) for name in STREAMS for step in (0, 1)
    )


def test_seeds_do_not_change_between_releases() -> None:
    """A seeded answer is reproducible tomorrow: these numbers are a promise."""
    assert Seeds(7).stream(3) == [7, 2443106744845952896, 6152568286951743185]
    assert Seeds(-(2**63), 2).stream(1, ROLLOUT, 5) == [8826791920877975466]


class Watched(TabularEngine):
    """Notes the seeds of what it draws, generation by generation."""

    def generate(self, prompts: Any, sampling: Any, *, seeds: Sequence[int | None] | None = None, **more: Any) -> Any:
        assert seeds is not None
        self.__dict__.setdefault("seen", []).append(list(seeds))
        return super().generate(prompts, sampling, seeds=seeds, **more)


async def seeds_of(name: str, **more: Any) -> list[list[int | None]]:
    engine = Watched({None: Endless(seed=1, end=0.02), "adapter": Endless(seed=2, end=0.02)})
    ctx = tabular_context(engine, random_scores(), weights=REWARDS, **more)
    final(await run(EVERY[name](), ctx))
    return engine.__dict__.get("seen", [])


@pytest.mark.parametrize("name", EVERY)
async def test_every_step_answer_and_request_of_every_guide_has_seeds_of_its_own(name: str) -> None:
    """Rollouts at each step of Transfer Q* included, where only the prompt differed before."""
    seen: list[int | None] = []
    for request, answer in itertools.product((-2, -1, 0, 1, 2**63 - 1), (0, 1)):
        for drawn in await seeds_of(name, sampling=SamplingSpec(9, seed=request), choice=answer):
            seen += drawn
    assert len(set(seen)) == len(seen)
    assert -1 not in seen
    assert bool(seen) == (name not in ("args", "deal-no-lookahead"))


@pytest.mark.parametrize("name", EVERY)
async def test_guides_without_a_seed_draw_without_one(name: str) -> None:
    assert {seed for drawn in await seeds_of(name, sampling=SamplingSpec(9)) for seed in drawn} <= {None}


async def test_answers_whose_pools_differ_in_size_share_no_candidates() -> None:
    """best_of_poisson with two answers: 44% of requests shared candidates as seeds were counted."""
    sizes = set()
    for request in range(200):
        drawn = []
        for answer in (0, 1):
            engine = Watched({None: Endless(seed=1)})
            ctx = tabular_context(
                engine, random_scores(), selection=SELECTIONS["best_of_poisson"](mu=3.0), choice=answer,
                sampling=SamplingSpec(2, seed=request), weights=REWARDS,
            )  # fmt: skip
            await run(BestOfN(BestOfN.Params(n=16)), ctx)
            drawn.append(engine.__dict__["seen"][0])
        sizes.add((len(drawn[0]), len(drawn[1])))
        assert not {*drawn[0]} & {*drawn[1]}
    assert len(sizes) > 20


async def tokens(request: int, n: int, answer: int = 0) -> list[tuple[int, ...]]:
    """Of n candidates of 12 letters, drawn from a distribution that is the same at each place."""
    ctx = context(
        TabularEngine({None: Flat()}), rewards=(), sampling=SamplingSpec(12, seed=request), choice=answer,
        renderer=TabularEngine({None: Flat()}).renderer,
    )  # fmt: skip
    end = final(await run(Sampling(Sampling.Params()), ctx)) if n == 1 else None
    if end is not None:
        return [end.candidates[0].token_ids]
    rows: list[list[int]] = [[] for _ in range(n)]
    async with ctx.generate([ctx.prompt] * n, ctx.sampling, ctx.seeds.stream(n)) as rollouts:
        async for delta in rollouts:
            rows[delta.row] += delta.token_ids
    return [tuple(row) for row in rows]


class Flat:
    """Four letters, all as likely, no end."""

    def distribution(self, prefix: Sequence[int]) -> np.ndarray:
        return np.array([0, 0.25, 0.25, 0.25, 0.25])


async def test_candidates_answers_and_requests_are_independent() -> None:
    """Letters of one place in two sequences: a contingency table by chi-squared, and no sequence comes twice."""
    requests = [[*await tokens(request, 4), *await tokens(request, 2, answer=1)] for request in range(300)]
    assert len({row for rows in requests for row in rows}) > 0.999 * 300 * 6  # of 4^12: chance repeats are rare
    for a, b in ((0, 1), (0, 4), (1, 2), (4, 5)):
        within = np.zeros((4, 4))
        across = np.zeros((4, 4))
        for i, rows in enumerate(requests):
            for x, y, z in zip(rows[a], rows[b], requests[i - 1][b], strict=True):
                within[x - 1, y - 1] += 1
                across[x - 1, z - 1] += 1
        assert stats.chi2_contingency(within).pvalue > 1e-4
        assert stats.chi2_contingency(across).pvalue > 1e-4


async def test_a_selection_by_chance_is_independent_of_the_draws() -> None:
    """The seed of the choice was the first candidate's: then the number drawn tells the candidate's first letter."""
    picked = np.zeros((4, 2))
    rule = SELECTIONS["softmax"](beta=1e9)
    for request in range(800):
        engine = TabularEngine({None: Flat()})
        ctx = tabular_context(
            engine, random_scores(), weights=REWARDS, selection=rule, sampling=SamplingSpec(1, seed=request)
        )
        end = final(await run(BestOfN(BestOfN.Params(n=2)), ctx))
        picked[end.candidates[0].token_ids[0] - 1, end.chosen] += 1
    assert stats.chi2_contingency(picked).pvalue > 1e-4


@pytest.mark.parametrize("request_seed", EDGES)
async def test_every_seed_is_reproducible_over_http(request_seed: int) -> None:
    drawn: list[int] = []
    engine = ScriptedEngine(lambda seed: drawn.append(seed) or [f"w{seed}"])  # type: ignore[func-returns-value]
    app = create_app(make_state(engine))
    alignment = {"guide": {"name": "best_of_n", "n": 3}, "rewards": ["last_digit"], "select": {"name": "softmax"}}
    answers = []
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        for _ in range(2):
            chat = {"messages": [{"role": "user", "content": "q"}], "n": 2, "seed": request_seed, "max_tokens": 5}
            answer = await client.post("/v1/chat/completions", json=chat | {"alignment": alignment})
            assert answer.status_code == 200, answer.text
            answers.append([choice["message"]["content"] for choice in answer.json()["choices"]])
    assert answers[0] == answers[1]
    assert -1 not in drawn
    assert sorted(drawn[:6]) == sorted(drawn[6:])
    assert len(set(drawn)) == 6


async def test_prompts_of_one_completion_request_share_no_seeds() -> None:
    drawn: list[int] = []
    engine = ScriptedEngine(lambda seed: drawn.append(seed) or [f"w{seed}"])  # type: ignore[func-returns-value]
    app = create_app(make_state(engine))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        body = {"prompt": ["same", "same", "other"], "n": 2, "seed": 10, "max_tokens": 5}
        answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200
    texts = [choice["text"] for choice in answer.json()["choices"]]
    assert texts[0] == "w10"
    assert len(set(texts)) == len(set(drawn)) == 6

"""The spend that is reported is what the guides' formulas say, token for token and score for score.

Answers have a fixed length L and do not end by themselves. k candidates, R rollouts of l tokens, blocks of M tokens,
B beams. A lookahead cannot reach beyond the answer: behind t tokens it has min(l, L - t), and that is counted.
"""

from contextlib import aclosing
from typing import Any

import pytest
from contexts import final, run
from every_guide import EVERY, REWARDS, Endless, Values, random_scores
from tabular_context import Scores, tabular_context
from tabular_engine import TabularEngine

from guiderail.guides.args import Args
from guiderail.guides.best_of_n import BestOfN
from guiderail.guides.controlled_decoding import ControlledDecoding
from guiderail.guides.core.context import Context
from guiderail.guides.core.guide import Guide
from guiderail.guides.core.types import SamplingSpec, Token
from guiderail.guides.deal import Deal
from guiderail.guides.sampling import Sampling
from guiderail.guides.speculative_rejection import SpeculativeRejection
from guiderail.guides.transfer_q import TransferQ

L = 24


class Costs:
    """Cost of a whole run."""

    def __init__(self, ctx: Context, engine: TabularEngine, scores: Scores) -> None:
        self.tokens = ctx.spend.tokens_generated
        self.rows = ctx.spend.rollouts
        self.scores = scores.answers
        assert ctx.spend.report()["tokens_generated"] == self.tokens == engine.tokens
        assert ctx.spend.reward_calls == scores.calls
        assert ctx.spend.reward_tokens == scores.answers


async def cost(guide: Guide, *, length: int = L, upto: int | None = None, seed: int = 1) -> Costs:
    """Of an answer of `length` tokens, or of its first `upto` tokens alone."""
    engine = TabularEngine({None: Endless(seed=3), "adapter": Endless(seed=4)})
    scores = Scores({"r": Values(1)}, partial=Values(2).__getitem__)
    ctx = tabular_context(engine, scores, sampling=SamplingSpec(length, seed=seed))
    if upto is None:
        end = final(await run(guide, ctx))
        assert len(end.candidates[end.chosen].token_ids) == length
    else:
        committed = 0
        async with aclosing(guide.run(ctx)) as events:
            async for event in events:
                committed += len(event.token_ids) if isinstance(event, Token) else 0
                if committed >= upto:
                    break
    return Costs(ctx, engine, scores)


def ahead(lookahead: int | None, after: int) -> int:
    """Tokens of a lookahead behind `after` tokens of the answer."""
    return L - after if lookahead is None else min(lookahead, L - after)


async def test_sampling_costs_l() -> None:
    found = await cost(Sampling(Sampling.Params()))
    assert (found.tokens, found.rows, found.scores) == (L, 1, 1)


@pytest.mark.parametrize("n", [1, 5, 16])
async def test_best_of_n_costs_n_answers_and_n_scores(n: int) -> None:
    found = await cost(BestOfN(BestOfN.Params(n=n)))
    assert (found.tokens, found.rows, found.scores) == (n * L, n, n)


@pytest.mark.parametrize(("k", "block"), [(4, 6), (4, 24), (4, 40), (7, 1), (3, 8), (3, 7)])
async def test_controlled_decoding_costs_k_l_and_k_scores_a_block(k: int, block: int) -> None:
    found = await cost(ControlledDecoding(ControlledDecoding.Params(k=k, block=block)))
    blocks = -(-L // block)
    assert (found.tokens, found.rows, found.scores) == (k * L, k * blocks, k * blocks)


@pytest.mark.parametrize(("block", "rollouts", "horizon"), [(6, 1, 4), (6, 3, None), (8, 2, 100), (1, 2, 3)])
async def test_controlled_decoding_with_rollouts_costs_their_tokens_more(
    block: int, rollouts: int, horizon: int | None
) -> None:
    k, ends = 4, range(block, L + 1, block)
    found = await cost(
        ControlledDecoding(ControlledDecoding.Params(k=k, block=block, rollouts=rollouts, horizon=horizon))
    )
    assert found.tokens == sum(k * (block + rollouts * ahead(horizon, end)) for end in ends)
    assert found.scores == sum(k * (rollouts if end < L else 1) for end in ends)
    if horizon is not None and horizon < L - 2 * block:  # far from the end: K (M + R h) a block
        start = await cost(
            ControlledDecoding(ControlledDecoding.Params(k=k, block=block, rollouts=rollouts, horizon=horizon)),
            upto=2 * block,
        )
        assert start.tokens == 2 * k * (block + rollouts * horizon)


@pytest.mark.parametrize("k", [1, 3])
async def test_args_costs_l_and_k_scores_a_token(k: int) -> None:
    found = await cost(Args(Args.Params(top_k=k)))
    assert (found.tokens, found.rows, found.scores) == (L, L, k * L)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("lookahead", [1, 5, 20, None])
@pytest.mark.parametrize("rollouts", [1, 3])
async def test_transfer_q_costs_one_and_k_lookaheads_a_token(k: int, lookahead: int | None, rollouts: int) -> None:
    def guide() -> TransferQ:
        return TransferQ(TransferQ.Params(top_k=k, lookahead=lookahead, rollouts=rollouts, reuse=False))

    found = await cost(guide())
    assert found.tokens == sum(1 + k * rollouts * ahead(lookahead, t) for t in range(1, L + 1))
    assert found.scores == k * rollouts * (L - 1) + k
    if lookahead == 5:  # the table's (1 + k l) L, where the end of the answer is far
        start = await cost(guide(), upto=10)
        assert (start.tokens, start.scores) == ((1 + k * rollouts * 5) * 10, k * rollouts * 10)


@pytest.mark.parametrize("rollouts", [1, 3])
@pytest.mark.parametrize("lookahead", [1, 5, None])
async def test_what_transfer_q_saves_by_reuse(lookahead: int | None, rollouts: int) -> None:
    """Each rollout of the chosen candidate is one of its next token's, which is a candidate as k is all tokens.

    So of R rollouts at each step but the first all but their last token is there already: l - 1, or, near the end
    or without horizon, all that is left.
    """
    k = 4
    found = await cost(TransferQ(TransferQ.Params(top_k=k, lookahead=lookahead, rollouts=rollouts)))
    full = sum(1 + k * rollouts * ahead(lookahead, t) for t in range(1, L + 1))
    saved = sum(rollouts * min(ahead(lookahead, t - 1) - 1, ahead(lookahead, t)) for t in range(2, L + 1))
    assert found.tokens == full - saved
    assert found.scores == k * rollouts * (L - 1) + k
    if lookahead == 5:
        start = await cost(TransferQ(TransferQ.Params(top_k=k, lookahead=5, rollouts=rollouts)), upto=10)
        assert start.tokens == (1 + k * rollouts * 5) * 10 - 9 * rollouts * 4


@pytest.mark.parametrize("block", [4, 6])
async def test_transfer_q_by_blocks_costs_what_controlled_decoding_does(block: int) -> None:
    found = await cost(TransferQ(TransferQ.Params(top_k=5, block=block, lookahead=3, rollouts=2)))
    same = await cost(ControlledDecoding(ControlledDecoding.Params(k=5, block=block, horizon=3, rollouts=2)))
    assert (found.tokens, found.scores, found.rows) == (same.tokens, same.scores, same.rows)
    assert found.tokens == sum(5 * (block + 2 * ahead(3, end)) for end in range(block, L + 1, block))


@pytest.mark.parametrize(("beams", "k"), [(1, 4), (2, 4), (3, 2)])
@pytest.mark.parametrize("lookahead", [0, 5, None])
async def test_deal_costs_one_and_k_lookaheads_a_token_and_beam(beams: int, k: int, lookahead: int | None) -> None:
    """Sampled lookaheads are not reused where another token follows; what is reused is taken off."""
    engine, scores = TabularEngine({None: Endless(seed=3)}), Scores({"r": Values(1)}, partial=Values(2).__getitem__)
    ctx = tabular_context(engine, scores, sampling=SamplingSpec(L, seed=1))
    await run(Deal(Deal.Params(beams=beams, top_k=k, lookahead=lookahead)), ctx)
    found = Costs(ctx, engine, scores)
    width = [min(beams, k**t) for t in range(L)]  # beams that are expanded at each token
    full = sum(b * (1 + k * ahead(lookahead, t + 1)) for t, b in enumerate(width))
    assert found.scores == sum(b * k for b in width)
    if lookahead == 0:
        assert found.tokens == sum(width)
        return
    # A beam's greedy lookahead goes on with its likeliest token, which is among its k: all but the last is there.
    saved = sum(b * min(ahead(lookahead, t) - 1, ahead(lookahead, t + 1)) for t, b in enumerate(width) if t > 0)
    assert found.tokens == full - saved
    if beams == 1 and lookahead == 5:
        assert full == (1 + 5 * k) * L - k * (1 + 2 + 3 + 4 + 5)  # (1 + k l) L, less what the end cuts off


@pytest.mark.parametrize(("n", "interval"), [(8, 6), (32, 6), (16, 12), (8, 24), (5, 6)])
async def test_speculative_rejection_costs_the_rows_that_are_left_in_each_segment(n: int, interval: int) -> None:
    """With alpha 1/2 and S = L / interval segments, N a power of two at least 2^(S - 1): 2 N L / S (1 - 2^-S)."""
    found = await cost(SpeculativeRejection(SpeculativeRejection.Params(n=n, alpha=0.5, interval=interval)))
    alive, tokens, scores = n, 0, 0
    for at in range(interval, L + 1, interval):
        tokens += alive * interval
        scores += alive if alive > 1 or at == L else 0  # partial answers where some go, whole ones at the end
        alive = max(1, round(alive / 2)) if at < L else alive
    assert (found.tokens, found.rows, found.scores) == (tokens, n, scores)
    segments = L // interval
    if n % 2 ** (segments - 1) == 0:
        assert found.tokens == 2 * n * L / segments * (1 - 0.5**segments)


@pytest.mark.parametrize("length", [1, 7, 24])
@pytest.mark.parametrize("n", [1, 5, 16])
async def test_speculative_rejection_takes_what_it_says_and_never_more(n: int, length: int) -> None:
    placed: list[dict[str, int]] = [
        {},
        *({"segments": s} for s in (1, 2, 5, 40)),
        *({"interval": i} for i in (1, 4, 16, 100)),
    ]
    for alpha in (0.0, 0.3, 0.5, 0.9):
        for keep in (1, 3):
            for places in placed:
                guide = SpeculativeRejection(SpeculativeRejection.Params(n=n, alpha=alpha, keep=keep, **places))
                assert (await cost(guide, length=length)).tokens == guide.cost(length) <= n * length
                engine = TabularEngine({None: Endless(seed=3, end=0.08)})
                ctx = tabular_context(engine, random_scores(), weights=REWARDS, sampling=SamplingSpec(length, seed=2))
                await run(guide, ctx)
                assert engine.tokens == ctx.spend.tokens_generated <= guide.cost(length)


@pytest.mark.parametrize(("n", "length"), [(32, 64), (32, 512), (32, 4096), (8, 500), (128, 1000)])
def test_a_rejection_schedule_is_as_long_as_the_answers(n: int, length: int) -> None:
    """With checkpoints every 16 tokens, one of 32 answers was left after token 80, 16% of 512."""
    guide = SpeculativeRejection(SpeculativeRejection.Params(n=n))
    places = guide.checkpoints(length)
    halvings = n.bit_length() - 1
    assert len(places) == halvings
    assert length - places[-1] == pytest.approx(length / (halvings + 1), abs=1)  # of plain sampling, the last segment
    assert guide.cost(length) == pytest.approx((2 * n - 1) * length / (halvings + 1), abs=2 * n)
    old = SpeculativeRejection(SpeculativeRejection.Params(n=32, interval=16))
    assert old.cost(512) == 16 * (32 + 16 + 8 + 4 + 2) + 432 == 1424


SIZES: list[Guide] = [
    *(BestOfN(BestOfN.Params(n=n)) for n in (1, 3)),
    *(
        ControlledDecoding(ControlledDecoding.Params(k=k, block=block, rollouts=rollouts, horizon=horizon))
        for k in (1, 3) for block in (1, 5, 100) for rollouts, horizon in ((0, None), (2, None), (2, 3), (1, 100))
    ),
    *(
        TransferQ(TransferQ.Params(top_k=k, block=block, rollouts=r, lookahead=lookahead, reuse=reuse))
        for k in (1, 4) for block in (1, 5, 100) for r, lookahead in ((1, 3), (2, None)) for reuse in (True, False)
    ),
    *(Args(Args.Params(top_k=k)) for k in (1, 4)),
    *(
        Deal(Deal.Params(beams=beams, top_k=k, lookahead=lookahead, sampled=sampled))
        for beams in (1, 3) for k in (1, 3) for lookahead in (0, 4, None) for sampled in (True, False)
    ),
]  # fmt: skip


@pytest.mark.parametrize("length", [1, 11])
@pytest.mark.parametrize("kind", [BestOfN, ControlledDecoding, TransferQ, Args, Deal])
async def test_what_a_guide_generates_stays_within_its_cost_and_rows(kind: type[Guide], length: int) -> None:
    for guide in (guide for guide in SIZES if type(guide) is kind):
        for end in (0.0, 0.15):
            engine = TabularEngine({None: Endless(seed=3, end=end)})
            ctx = tabular_context(engine, random_scores(), weights=REWARDS, sampling=SamplingSpec(length, seed=1))
            await run(guide, ctx)
            assert 0 < engine.tokens == ctx.spend.tokens_generated <= guide.cost(length), guide.params
            assert 0 < engine.peak <= guide.rows(), guide.params


@pytest.mark.parametrize("name", EVERY)
async def test_no_guide_costs_more_than_admission_reckons_with(name: str) -> None:
    for end in (0.0, 0.1):
        guide = EVERY[name]()
        engine = TabularEngine({None: Endless(seed=3, end=end), "adapter": Endless(seed=4, end=end)})
        ctx = tabular_context(engine, random_scores(), weights=REWARDS, sampling=SamplingSpec(L, seed=1))
        await run(guide, ctx)
        assert ctx.spend.tokens_generated <= guide.cost(L)
        assert engine.peak <= guide.rows()


async def test_discarded_tokens_are_what_was_generated_and_not_accepted() -> None:
    engine: Any = TabularEngine({None: Endless(seed=3)})
    ctx = tabular_context(engine, Scores({"r": Values(1)}, Values(2).__getitem__), sampling=SamplingSpec(L, seed=1))
    await run(Args(Args.Params(top_k=3)), ctx)
    ctx.spend.tokens_accepted = L  # as the server counts Token events
    assert ctx.spend.report()["tokens_discarded"] == 0

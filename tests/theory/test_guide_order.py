"""Where theory orders the guides by expected reward at equal budget: Transfer Q*, controlled decoding, ARGS.

Taking the best token by Q^rho is one step of policy improvement, so its value V is at least V^rho at every prefix.
Hence, with exact values and no pull towards the base policy (alpha -> 0):
  controlled decoding (rho = pi0)          V >= V^pi0
  Transfer Q* (rho aligned to the reward)  V >= V^rho, which exceeds controlled decoding's V if the baseline alone does
  ARGS, on a reward that reads whole answers only, sees nothing before the last token: it is greedy decoding of pi0
      up to answers that can end at once, and has no such bound
Conditions, then: a baseline that is better than controlled decoding; partial answers that tell nothing.
"""

from collections.abc import Callable

import numpy as np
import pytest
from contexts import final, run
from tabular import (
    Ids,
    Tabular,
    aligned,
    expected,
    greedy,
    q_values,
    random_policy,
)  # fmt: skip
from tabular_context import Scores, tabular_context
from tabular_engine import TabularEngine

from guiderail.guides.args import Args
from guiderail.guides.controlled_decoding import ControlledDecoding
from guiderail.guides.core.guide import Guide
from guiderail.guides.core.policy import PolicySpec
from guiderail.guides.core.types import SamplingSpec
from guiderail.guides.transfer_q import TransferQ

ALPHA, BETA = 0.02, 0.03
MODELS = range(8)
RUNS = 12


def model(seed: int) -> tuple[Tabular, dict[Ids, float]]:
    """Answers of exactly 5 tokens, so that budgets are equal whatever is chosen, with a reward of whole ones alone.

    It is mostly a matter of the first two tokens, which rollouts of pi0 can tell. But the best answers, which begin
    with pi0's least likely tokens, pi0 will not come upon: only a baseline that is aligned to the reward does.
    """
    pi0 = random_policy(seed, horizon=5)
    policy = Tabular({s: np.concatenate([[0.0], p[1:] / p[1:].sum()]) for s, p in pi0.table.items()}, 5)
    hidden: Ids = ()
    while len(hidden) < 4:
        hidden = (*hidden, int(policy.distribution(hidden)[1:].argmin()) + 1)
    rng = np.random.default_rng(seed)
    begin = rng.permutation(9) / 16
    reward = {
        a: begin[3 * a[0] + a[1] - 4] + 0.1 * rng.random() if len(a) == 5 and all(a) else 0.0 for a in pi0.answers()
    }
    return policy, reward | {(*hidden, z): 1.0 for z in (1, 2, 3)}


def transfer_q() -> Guide:
    spec = PolicySpec(model="adapter")
    return TransferQ(TransferQ.Params(top_k=3, lookahead=None, rollouts=8, alpha=ALPHA, baseline=spec, reuse=False))


def controlled_decoding() -> Guide:
    return ControlledDecoding(ControlledDecoding.Params(k=8, block=1, rollouts=4))


async def played(make: Callable[[], Guide], seed: int, rho: Tabular) -> tuple[float, float]:
    """(mean reward, mean tokens generated) over seeds."""
    pi0, reward = model(seed)
    engine = TabularEngine.of(pi0, adapters={"adapter": rho})
    rewards, tokens = [], []
    for i in range(RUNS):
        sampling = SamplingSpec(5, seed=seed * 10**9 + i * 10**4)
        ctx = tabular_context(engine, Scores({"r": reward}), sampling=sampling)
        answer = final(await run(make(), ctx)).candidates[0]
        rewards.append(answer.rewards["r"])
        tokens.append(ctx.spend.tokens_generated)
    return float(np.mean(rewards)), float(np.mean(tokens))


@pytest.mark.parametrize("seed", MODELS)
def test_policy_improvement_holds_exactly(seed: int) -> None:
    pi0, reward = model(seed)
    rho = aligned(pi0, reward, BETA)
    value = {name: expected(p.answers(), reward) for name, p in (("pi0", pi0), ("rho", rho))}
    decoding = expected(greedy(q_values(pi0, reward), pi0).answers(), reward)
    transfer = expected(greedy(q_values(rho, reward), pi0).answers(), reward)
    assert value["pi0"] < decoding < value["rho"] <= transfer <= max(reward.values())


async def test_transfer_q_is_over_controlled_decoding_is_over_args() -> None:
    means: dict[str, list[float]] = {"transfer_q": [], "controlled_decoding": [], "args": []}
    spent: dict[str, list[float]] = {name: [] for name in means}
    makers = (transfer_q, controlled_decoding, lambda: Args(Args.Params(top_k=3, w=1 / ALPHA)))
    for seed in MODELS:
        pi0, reward = model(seed)
        rho = aligned(pi0, reward, BETA)
        for name, make in zip(means, makers, strict=True):
            mean, tokens = await played(make, seed, rho)
            means[name].append(mean)
            spent[name].append(tokens)
        assert means["transfer_q"][-1] > expected(rho.answers(), reward) - 0.02
    assert np.mean(spent["transfer_q"]) <= np.mean(spent["controlled_decoding"])
    assert spent["args"] == [5.0] * len(MODELS)  # it has no use for more
    for better, worse in (("transfer_q", "controlled_decoding"), ("controlled_decoding", "args")):
        gain = np.array(means[better]) - np.array(means[worse])
        assert gain.mean() > 2.5 * gain.std(ddof=1) / np.sqrt(len(gain)), (better, worse, means)


async def test_a_baseline_that_is_aligned_to_the_opposite_loses_the_order() -> None:
    """The condition is needed: Transfer Q* sees only what its baseline comes upon."""
    for seed in MODELS:
        pi0, reward = model(seed)
        opposite = aligned(pi0, {a: -v for a, v in reward.items()}, BETA)
        assert (await played(transfer_q, seed, opposite))[0] < 0.7  # the hidden answers are never found

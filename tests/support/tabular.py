"""A tabular language model, small enough to enumerate: every answer with its probability, and exact values.

Token 0 is the end of the sequence, the others are letters. An answer is a tuple of at most `horizon` tokens; it ends
with token 0 or at the horizon. A policy is a distribution of the next token for each prefix; a reward is a number for each
answer. All of it is computed by recursion over prefixes, without sampling, apart from any code of the guides.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

EOS = 0
Ids = tuple[int, ...]
Distribution = dict[Ids, float]
Reward = Mapping[Ids, float]


@dataclass(frozen=True)
class Tabular:
    """A policy: `table[prefix]` [vocabulary] is the distribution of the next token. All prefixes below the horizon are there."""

    table: Mapping[Ids, np.ndarray]
    horizon: int

    @cached_property
    def vocabulary(self) -> int:
        return len(self.table[()])

    def distribution(self, prefix: Ids) -> np.ndarray:
        return self.table[prefix]

    def prefixes(self) -> Iterator[Ids]:
        """Unfinished prefixes below the horizon, longest first."""
        return iter(sorted(self.table, key=len, reverse=True))

    def answers(self) -> Distribution:
        """Every answer with its probability."""
        found: Distribution = {}
        for prefix in self.table:
            for z in range(self.vocabulary):
                answer = (*prefix, z)
                if ends(answer, self.horizon):
                    found[answer] = probability(self, answer)
        return found


def ends(answer: Ids, horizon: int) -> bool:
    return len(answer) == horizon or answer[-1:] == (EOS,)


def probability(policy: Tabular, answer: Ids) -> float:
    return float(np.prod([policy.distribution(answer[:t])[z] for t, z in enumerate(answer)]))


def answers_after(policy: Tabular, prefix: Ids) -> Distribution:
    """The distribution of the whole answers that begin with `prefix`, given that they do."""
    if ends(prefix, policy.horizon):
        return {prefix: 1.0}
    found: Distribution = {}
    for z, p in enumerate(policy.distribution(prefix)):
        found |= {answer: float(p) * q for answer, q in answers_after(policy, (*prefix, z)).items()}
    return found


def from_rule(rule: Callable[[Ids], np.ndarray], horizon: int) -> Tabular:
    """The policy with distribution rule(prefix) at each prefix."""
    table: dict[Ids, np.ndarray] = {}
    open_: list[Ids] = [()]
    for prefix in open_:
        table[prefix] = np.asarray(rule(prefix), dtype=np.float64)
        if len(prefix) + 1 < horizon:
            open_ += [(*prefix, z) for z in range(1, len(table[prefix]))]
    return Tabular(table, horizon)


def random_policy(seed: int, vocabulary: int = 4, horizon: int = 5, spread: float = 1.0) -> Tabular:
    """Softmax of normal logits of this standard deviation, drawn anew for each prefix."""
    rng = np.random.default_rng(seed)

    def rule(prefix: Ids) -> np.ndarray:
        p = np.exp(spread * rng.standard_normal(vocabulary))
        return p / p.sum()

    return from_rule(rule, horizon)


def random_reward(policy: Tabular, seed: int) -> dict[Ids, float]:
    """A reward in [0, 1] for each answer, drawn anew, so that nothing can be told from a part of it."""
    rng = np.random.default_rng(seed)
    return {answer: float(rng.random()) for answer in policy.answers()}


def q_values(rho: Tabular, reward: Reward) -> dict[Ids, np.ndarray]:
    """Q(s, z) = E[r] when z follows s and rho goes on: [vocabulary] for each prefix s."""
    q: dict[Ids, np.ndarray] = {}
    for s in rho.prefixes():
        nexts = [(*s, z) for z in range(rho.vocabulary)]
        q[s] = np.array([reward[n] if ends(n, rho.horizon) else float(rho.distribution(n) @ q[n]) for n in nexts])
    return q


def best_q(policy: Tabular, reward: Reward) -> dict[Ids, np.ndarray]:
    """Q*(s, z) = max over policies of Q(s, z): the largest reward that can follow (arXiv 2405.20495, eq. 6)."""
    q: dict[Ids, np.ndarray] = {}
    for s in policy.prefixes():
        nexts = [(*s, z) for z in range(policy.vocabulary)]
        q[s] = np.array([reward[n] if ends(n, policy.horizon) else float(q[n].max()) for n in nexts])
    return q


def greedy(q: Mapping[Ids, np.ndarray], policy: Tabular) -> Tabular:
    """The policy that always takes the token of the largest value."""
    return Tabular({s: np.eye(policy.vocabulary)[int(v.argmax())] for s, v in q.items()}, policy.horizon)


def guided(pi0: Tabular, q: Mapping[Ids, np.ndarray], alpha: float) -> Tabular:
    """pi(z | s) ~ pi0(z | s) exp(q(s, z) / alpha): the optimum of E[q] - alpha KL(pi || pi0) at each prefix."""
    table = {}
    for s, v in q.items():
        p = pi0.distribution(s) * np.exp((v - v.max()) / alpha)
        table[s] = p / p.sum()
    return Tabular(table, pi0.horizon)


def aligned(pi0: Tabular, reward: Reward, beta: float) -> Tabular:
    """The policy of E[r] - beta KL over whole answers: rho(y) ~ pi0(y) exp(r(y) / beta), as distributions of next tokens.

    What RLHF and DPO converge to. Its soft value is V(s) = log sum_z pi0(z | s) exp(V(s, z)).
    """
    table: dict[Ids, np.ndarray] = {}
    soft: dict[Ids, float] = {}
    for s in pi0.prefixes():
        nexts = [(*s, z) for z in range(pi0.vocabulary)]
        v = np.array([reward[n] / beta if ends(n, pi0.horizon) else soft[n] for n in nexts])
        p = pi0.distribution(s) * np.exp(v - v.max())
        soft[s] = float(np.log(p.sum()) + v.max())
        table[s] = p / p.sum()
    return Tabular(table, pi0.horizon)


def expected(distribution: Mapping[Ids, float], reward: Reward) -> float:
    return sum(p * reward[answer] for answer, p in distribution.items())


def kl(p: Mapping[Ids, float], q: Mapping[Ids, float]) -> float:
    return float(sum(a * np.log(a / q[answer]) for answer, a in p.items() if a > 0))


def total_variation(p: Mapping[Ids, float], q: Mapping[Ids, float]) -> float:
    return 0.5 * sum(abs(p.get(answer, 0.0) - q.get(answer, 0.0)) for answer in {*p, *q})


def beam_search(policy: Tabular, beams: int, length_penalty: float = 0.0) -> tuple[Ids, float]:
    """Textbook beam search for log P / tokens ** length_penalty, with finished beams among the rest: (answer, score)."""
    held: list[tuple[Ids, float]] = [((), 0.0)]
    while not all(ends(ids, policy.horizon) for ids, _ in held):
        pool = []
        for ids, log_p in held:
            if ids and ends(ids, policy.horizon):
                pool.append((ids, log_p))
            else:
                pool += [((*ids, z), log_p + float(np.log(p))) for z, p in enumerate(policy.distribution(ids)) if p > 0]
        pool.sort(key=lambda each: -each[1] / len(each[0]) ** length_penalty)
        held = pool[:beams]
    ids, log_p = held[0]
    return ids, log_p / len(ids) ** length_penalty

"""Mixing of policies in logits, shared by the processors of vLLM's two model runners: who is in step, and the draw.

Rows of logits are those of a group's sequences (lockstep.py). Those in the batch together, all at the same place of the
answer, get one token

    v ~ softmax[ (z_0 + sum_i w_i z_i) / T ],    z_i the logits of policy i,

which is (pi_0 * prod_i pi_i^{w_i})^{1/T} normalised: log pi_i is z_i minus a constant, and constants cancel
(GenARM, arXiv 2410.08193, eq. 7, with weights w_i = 1/beta_i). The weights are not normalised, so the temperature
divides the whole sum exactly once. min_p, top_k and top_p then cut the tempered mixture, in vLLM's order. Before all
that, tokens whose pi_0 is below `plausibility` times its maximum are left out (contrastive decoding).
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from guiderail.kernels.tilt_sample import tilt_sample
from guiderail.server.engines.vllm.mixture.recipe import Recipe

GREEDY = 1e-5  # vLLM's: a lower temperature is 0


@dataclass(frozen=True, slots=True)
class Row:
    """A row of this step's logits, whose sequence will emit the token at `position` (from 0) of its answer."""

    index: int
    recipe: Recipe
    position: int


def emit(logits: Any, rows: Iterable[Row], emitted: Callable[[Row], Collection[int]] = lambda row: ()) -> None:
    """Leave each row of logits [N, V] (float32, changed in place) only the token that it is to emit.

    emitted: returns tokens that partners of a row out of step have already emitted at its position; it emits another.
    """
    groups: list[list[Row]] = []
    alone: list[Row] = []
    forced: list[tuple[Row, int]] = []
    by_group: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.position < len(row.recipe.replay):
            forced.append((row, row.recipe.replay[row.position]))
        else:
            by_group[row.recipe.group].append(row)
    for members in by_group.values():
        if len(members) == members[0].recipe.size and len({row.position for row in members}) == 1:
            groups.append(sorted(members, key=lambda row: row.recipe.role))
        else:
            alone += members
    forced += [(row, _other_token(row.recipe, emitted(row))) for row in alone]
    together = [row for group in groups for row in group]
    at = _tensor([row.index for row in (*together, *(row for row, _ in forced))], torch.int64, logits)
    tokens = _tensor([token for _, token in forced], torch.int64, logits)
    if groups:
        drawn = draw(logits, groups)[_tensor([g for g, group in enumerate(groups) for _ in group], torch.int64, logits)]
        # NaN logits draw -1: the rows then emit different tokens, as if out of step.
        roles = _tensor([row.recipe.role for row in together], torch.int64, logits)
        tokens = torch.cat((torch.where(drawn < 0, roles, drawn), tokens))
    logits[at] = float("-inf")
    logits[at, tokens] = 0.0


def _other_token(recipe: Recipe, taken: Collection[int]) -> int:
    """Return a token for a row out of step: one that is not taken and that no other role would choose."""
    token = recipe.role
    while token in taken:
        token += recipe.size
    return token


def draw(logits: Any, groups: Sequence[Sequence[Row]]) -> Any:
    """Draw one token [G] int64 per group, whose rows are in the order of their roles; -1 for NaN logits.

    Groups that truncate their mixture are drawn apart from the others: the two ways round differently, and the token
    of a group must not depend on its neighbours.
    """
    drawn = torch.empty(len(groups), dtype=torch.int64, device=logits.device)
    for cut in (False, True):
        chosen = [i for i, group in enumerate(groups) if _is_cut(group[0].recipe) is cut]
        if chosen:
            drawn[_tensor(chosen, torch.int64, logits)] = _draw(logits, [groups[i] for i in chosen], cut)
    return drawn


def _is_cut(recipe: Recipe) -> bool:
    return recipe.temperature >= GREEDY and bool(recipe.top_k or recipe.top_p < 1 or recipe.min_p)


def _draw(logits: Any, groups: Sequence[Sequence[Row]], cut: bool) -> Any:
    heads = [group[0].recipe for group in groups]
    main = logits[_tensor([group[0].index for group in groups], torch.int64, logits)]
    if any(head.plausibility for head in heads):  # 0, whose log is -inf, leaves out nothing
        least = _tensor([head.plausibility for head in heads], torch.float32, logits).log()[:, None]
        main = main.masked_fill(main < main.amax(1, keepdim=True) + least, float("-inf"))
    other = torch.zeros_like(main)
    for i in range(max(len(head.weights) for head in heads)):
        weights = [head.weights[i] if i < len(head.weights) else 0.0 for head in heads]
        sources = [group[min(i + 1, len(group) - 1)].index for group in groups]
        weight = _tensor(weights, torch.float32, logits)[:, None]
        policy = logits[_tensor(sources, torch.int64, logits)]
        other += torch.where(weight == 0, 0.0, weight * policy)
    temperatures = [head.temperature if head.temperature >= GREEDY else 0.0 for head in heads]
    temperature = _tensor(temperatures, torch.float32, logits)
    dense = other
    if cut:
        main, dense = _cut(main + other, temperatures, heads), None
        temperature = torch.ones_like(temperature)
    uniform = _tensor([_uniform(group[0]) for group in groups], torch.float32, logits)
    return tilt_sample(main, dense, torch.ones_like(temperature), temperature, uniform, validate=False)[0]


def warm_up(vocabulary: int, device: Any) -> None:
    """Compile what `draw` launches on CUDA, so that the first mixed request does not compile within vLLM's step."""
    logits = torch.zeros((1, vocabulary), dtype=torch.float32, device=device)
    one = torch.ones(1, dtype=torch.float32, device=device)
    for dense in (logits, None):  # without cuts by top_k and the like, and with them
        tilt_sample(logits, dense, one, one, one / 2, validate=False)


def _cut(z: Any, temperatures: Sequence[float], heads: Sequence[Recipe]) -> Any:
    """Return z / temperature, with -inf at tokens that min_p, top_k and top_p forbid. Temperatures are positive."""
    z = z / _tensor(temperatures, torch.float32, z)[:, None]
    min_p = _tensor([head.min_p for head in heads], torch.float32, z)
    z = z.masked_fill(z < z.amax(1, keepdim=True) + min_p.log()[:, None], float("-inf"))
    size = z.shape[1]
    top_k = [min(head.top_k, size) if head.top_k else size for head in heads]
    top_p = [head.top_p for head in heads]
    return apply_top_k_top_p(
        z,
        None if min(top_k) == size else _tensor(top_k, torch.int32, z),
        None if min(top_p) == 1 else _tensor(top_p, torch.float32, z),
    )


def _uniform(row: Row) -> float:
    """Return the number in [0, 1) that draws the token at this place of the answer, the same at every attempt."""
    source = np.random.Philox(key=row.recipe.seed & (2**64 - 1), counter=row.position)
    return float(np.random.Generator(source).random(dtype=np.float32))


def _tensor(values: Sequence[float], dtype: Any, like: Any) -> Any:
    return async_tensor_h2d(list(values), device=like.device, dtype=dtype)

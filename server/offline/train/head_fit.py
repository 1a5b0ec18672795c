"""The Bradley-Terry head: a linear score w.h whose differences are log-odds of preference.

P(a is preferred to b) = sigmoid(score(a) - score(b)) (Bradley & Terry 1952; as a learnt reward:
Christiano et al. 2017). With the backbone frozen this is logistic regression without intercept on
feature differences, a convex problem; its one hyper-parameter, the L2 penalty, comes from
cross-validation inside the training part. Optionally the last layers are then fine-tuned.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus
from tqdm import tqdm

from guiderail.server.offline.train.checkpoint import Checkpoint
from guiderail.server.offline.train.features import features, last_states
from guiderail.server.offline.train.pairs import TrainingError

L2_GRID = tuple(10.0 ** (step / 2) for step in range(-6, 5))  # 0.001 .. 100, on standardised features


def hashed(key: str, seed: int, salt: str) -> float:
    """Number in [0, 1) that depends on key, seed and salt alone (SHA-256), the same on every machine."""
    digest = hashlib.sha256(f"{salt}\0{seed}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64


def held_out(keys: Sequence[str], seed: int, fraction: float) -> list[bool]:
    """True for the pairs kept apart. Equal keys are never separated. Raises TrainingError if a part is too small."""
    apart = [hashed(key, seed, "held out") < fraction for key in keys]
    if sum(apart) < 2 or len(apart) - sum(apart) < 2:
        raise TrainingError(f"{len(apart)} pairs leave a part of the split with fewer than 2: give more pairs")
    return apart


def folds(keys: Sequence[str], seed: int, count: int) -> list[int]:
    """Fold of each pair, 0 .. count - 1. Equal keys share one. Raises TrainingError if a fold is empty."""
    numbers = [int(hashed(key, seed, "fold") * count) for key in keys]
    if len(set(numbers)) < count:
        raise TrainingError(f"{len(set(keys))} prompts do not fill {count} folds: give more pairs or fewer --folds")
    return numbers


def spread(states: Tensor) -> Tensor:
    """Standard deviation [H] float64 of states [S, H], with 1 where a feature is constant.

    Means cancel in differences of scores, so that dividing by the deviation is the whole standardisation.
    """
    deviation = states.double().std(dim=0, correction=0)
    return torch.where(deviation > 1e-12, deviation, torch.ones_like(deviation))


def bt_loss(margins: Tensor) -> Tensor:
    """Mean negative log-likelihood, nats per pair, of margins [n] = score(chosen) - score(rejected); log 2 at 0."""
    return softplus(-margins).mean()


def fit(differences: Tensor, l2: float) -> Tensor:
    """Weights [H] float64 that minimise bt_loss(differences @ w) + l2/2 |w|^2, for differences [n, H].

    Solved by L-BFGS. Raises TrainingError if the gradient is not down to 1e-6.
    """
    differences = differences.double()
    weight = torch.zeros(differences.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight], max_iter=1000, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        loss = bt_loss(differences @ weight) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    objective()
    if not weight.grad.abs().max() < 1e-6:
        raise TrainingError(f"the head did not converge with l2 = {l2:g}")
    return weight.detach()


def fit_folded(chosen: Tensor, rejected: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Fit on features [n, H] standardised by their own statistics. Returns (w / deviation, deviation), both [H]
    float64: the first is for features as they are, so that nothing of the standardisation is needed later."""
    deviation = spread(torch.cat([chosen, rejected]))
    weight = fit((chosen.double() - rejected.double()) / deviation, l2)
    return weight / deviation, deviation


@dataclass(frozen=True, slots=True)
class Tried:
    """Cross-validated loss of one penalty, in nats per pair, with the standard error of the folds' means."""

    l2: float
    log_loss: float
    log_loss_se: float
    accuracy: float


def cross_validate(
    chosen: Tensor, rejected: Tensor, fold: Sequence[int], grid: Sequence[float] = L2_GRID
) -> tuple[float, list[Tried]]:
    """The penalty with the least cross-validated loss, and the scores of the whole grid. Features are [n, H].

    Each fold is scored by a head, and standardised by statistics, from the other folds.
    """
    numbers = torch.tensor(fold)
    tried = []
    for l2 in tqdm(grid, desc="cross-validation", disable=None):
        losses, hits = [], 0.0
        for number in sorted(set(fold)):
            inside, outside = numbers != number, numbers == number
            weight, _ = fit_folded(chosen[inside], rejected[inside], l2)
            margins = (chosen[outside].double() - rejected[outside].double()) @ weight
            losses.append(float(bt_loss(margins)))
            hits += float((margins > 0).sum()) + float((margins == 0).sum()) / 2
        spread_of_folds = float(torch.tensor(losses).std()) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
        tried.append(Tried(l2, sum(losses) / len(losses), spread_of_folds, hits / len(fold)))
    return min(tried, key=lambda t: t.log_loss).l2, tried


@dataclass(slots=True)
class Tuned:
    """Outcome of fine-tuning. `parameters` (the tuned layers' whole tensors, float32, by the causal model's names)
    and `weight` [H] float64 are of the best epoch; `best_epoch` 0 means that no epoch beat the frozen backbone."""

    best_epoch: int
    validation_loss: list[float]
    weight: Tensor
    parameters: dict[str, Tensor] = field(default_factory=dict)


def finetune(
    model: Any,
    sequences: Sequence[Sequence[int]],
    frozen: tuple[Tensor, Tensor],
    train: Sequence[int],
    validation: Sequence[int],
    *,
    layers: int,
    l2: float,
    lr: float,
    epochs: int,
    seed: int,
    batch_pairs: int = 8,
    patience: int = 2,
    checkpoint: Checkpoint | None = None,
) -> Tuned:
    """Fine-tune the last `layers` layers and the head with AdamW on the same loss; leave the best in `model`.

    `sequences` holds chosen and rejected of pair i at 2i and 2i + 1; `frozen` is fit_folded's result on
    the `train` pairs alone; the epoch with the least loss on the `validation` pairs counts, and training stops
    after `patience` epochs without a better one. With a checkpoint it resumes after the last complete epoch of the same
    run. Raises TrainingError for a model without a list `layers`.
    """
    blocks = getattr(model, "layers", None)
    if blocks is None or not 0 < layers <= len(blocks):
        known = "none that can be found" if blocks is None else len(blocks)
        raise TrainingError(f"--unfreeze {layers}: the base's layers: {known}")
    first = len(blocks) - layers
    names = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith("layers.") and int(name.split(".")[1]) >= first
    }
    base = {name: parameter.detach().clone() for name, parameter in names.items()}
    scale = frozen[1].float()
    weight = (frozen[0] * frozen[1]).float().requires_grad_()
    for parameter in names.values():
        parameter.requires_grad_(True)
    solver = torch.optim.AdamW(
        [
            {"params": list(names.values()), "lr": lr, "weight_decay": 0.01},
            {"params": [weight], "lr": 10 * lr, "weight_decay": 0.0},
        ]
    )

    def both(pairs: Sequence[int]) -> list[Sequence[int]]:
        return [sequences[2 * pair + side] for side in (0, 1) for pair in pairs]

    def validate() -> float:
        states = features(model, both(validation), "validation")
        chosen, rejected = states.chunk(2)
        return float(bt_loss((chosen - rejected) / scale @ weight.detach()))

    order = torch.Generator().manual_seed(seed)
    best, best_state, best_weight = 0, base, weight.detach().clone()
    if checkpoint is not None and (saved := checkpoint.load()) is not None:
        with torch.no_grad():
            weight.copy_(saved["weight"])
            for name, parameter in names.items():
                parameter.copy_(saved["parameters"][name])
        solver.load_state_dict(saved["solver"])
        order.set_state(saved["order"])
        losses, best, best_state, best_weight = (saved[key] for key in ("losses", "best", "best_state", "best_weight"))
    else:
        losses = [validate()]
    while (epoch := len(losses)) <= epochs and epoch - 1 - best < patience:
        shuffled = [train[index] for index in torch.randperm(len(train), generator=order).tolist()]
        with tqdm(total=len(train), unit="pair", desc=f"fine-tuning, epoch {epoch}", disable=None) as bar:
            for start in range(0, len(shuffled), batch_pairs):
                batch = shuffled[start : start + batch_pairs]
                chosen, rejected = last_states(model, both(batch)).chunk(2)
                loss = bt_loss((chosen - rejected) / scale @ weight) + l2 / 2 * weight.square().sum()
                solver.zero_grad()
                loss.backward()
                solver.step()
                bar.update(len(batch))
        losses.append(validate())
        if losses[-1] < losses[best]:
            best, best_weight = epoch, weight.detach().clone()
            best_state = {name: parameter.detach().clone() for name, parameter in names.items()}
        if checkpoint is not None:
            checkpoint.save({
                "weight": weight.detach(), "parameters": {name: p.detach() for name, p in names.items()},
                "solver": solver.state_dict(), "order": order.get_state(), "losses": losses,
                "best": best, "best_state": best_state, "best_weight": best_weight,
            })  # fmt: skip
    kept = {}
    for name, parameter in names.items():
        parameter.requires_grad_(False).copy_(best_state[name])
        if best:
            kept[f"{model.base_model_prefix}.{name}"] = best_state[name]
    return Tuned(best, losses, best_weight.double() / frozen[1], kept)

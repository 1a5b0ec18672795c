"""What each operation means, in the plainest torch: the oracles of the tests and the benchmarks.

Formulas and sources stand in the operations' own files. Everything is computed in the dtype of the inputs,
with no blocks, no online sums and no fused steps: pass float64 (tests do) for an answer to measure others by.
Arguments are those of the public operations and are not checked; sampling returns the distribution instead
of a draw, because a draw next to a step of the CDF rightly differs with the precision.
"""

import math
from typing import Any

import torch


def reward_head(
    hidden: Any, last: Any, norm_weight: Any, eps: float, head_weight: Any, head_bias: Any, gemma_style: bool = False
) -> Any:
    """[S, K]: RMSNorm of the chosen rows (none where norm_weight is None), then the linear head."""
    x = hidden[last]
    if norm_weight is not None:
        x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
        x = x * (1 + norm_weight if gemma_style else norm_weight)
    out = x @ head_weight.T
    return out if head_bias is None else out + head_bias


def token_logprobs(hidden: Any, weight: Any, tokens: Any, softcap: float | None = None) -> Any:
    """[T]: the full [T, V] logits, log-softmax, and the given tokens' entries."""
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits, -1)[torch.arange(len(tokens)), tokens]


def tilted_logits(logits: Any, tilt_ids: Any, tilt_values: Any, beta: Any, other_logprobs: Any, alpha: Any) -> Any:
    """[B, V]: the logits with the sparse and the dense tilt added, entry by entry."""
    z = logits.clone()
    for row in range(z.shape[0]):
        for token, value in zip(tilt_ids[row].tolist(), tilt_values[row], strict=True):
            if token >= 0:
                z[row, token] += beta[row] * value
        if other_logprobs is not None and alpha[row] != 0:
            z[row] += alpha[row] * other_logprobs[row]
    return z


def tilted_logprobs(z: Any, temperature: Any) -> Any:
    """[B, V]: log-softmax of the tilted logits over their temperature (1 in place of 0)."""
    return torch.log_softmax(z / torch.where(temperature > 0, temperature, 1.0)[:, None], -1)


def quantile(value: Any, samples: Any) -> Any:
    """Share of the samples below the value, ties counted half (a scalar; InfAlign's calibrated reward)."""
    return ((samples < value).sum() + 0.5 * (samples == value).sum()) / samples.numel()


def transform(code: int, params: Any, value: Any, samples: Any) -> Any:
    """One reward through the transform of this code; `samples` are the valid ones of its group and reward."""
    p0, p1 = params[0], params[1]
    if code == 0:
        return value
    if code in (1, 2, 3, 4):
        u = quantile(value, samples).to(value.dtype)
        if code == 1:
            return u
        if code == 2:
            return torch.exp(p0 * u)
        if code == 3:
            return -torch.exp(-p0.abs() * u)
        return torch.log(torch.clamp(u, min=1 / (2 * samples.numel())))
    if code == 5:
        return -torch.log1p(torch.exp(-(value - p0)))
    if code == 6:
        return torch.clamp(value, min=p0, max=p1)
    return (value - p0) / p1


def reward_pipeline(
    rewards: Any, counts: Any, calibration: Any, codes: Any, params: Any, weights: Any, cal_counts: Any = None
) -> tuple[Any, Any]:
    """(combined [G, C], transformed [G, C, R]): one candidate and one reward at a time."""
    G, C, R = rewards.shape
    combined = torch.full((G, C), -math.inf, dtype=rewards.dtype)
    transformed = torch.zeros_like(rewards)
    for g in range(G):
        for c in range(int(counts[g])):
            for r in range(R):
                samples = calibration[g, r]
                samples = samples[samples < math.inf] if cal_counts is None else samples[: int(cal_counts[g, r])]
                transformed[g, c, r] = transform(int(codes[r]), params[r], rewards[g, c, r], samples)
            combined[g, c] = (weights * transformed[g, c]).sum()
    return combined, transformed

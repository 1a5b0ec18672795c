"""Meaning of each kernel in the plainest torch: the oracles of the tests.

Formulas and sources stand in the operations' own files. Everything is computed in the dtype of the inputs,
with no blocks, no online sums and no fused steps: pass float64 (tests do) for an answer to measure others by.
Arguments are those of the public operations and are not checked; sampling returns the distribution instead
of a draw, because a draw next to a step of the CDF rightly differs with the precision.
"""

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


def tilted_logits(logits: Any, other_logprobs: Any, alpha: Any) -> Any:
    """[B, V]: the logits with the other model's tilt added, row by row."""
    z = logits.clone()
    for row in range(z.shape[0]):
        if other_logprobs is not None and alpha[row] != 0:
            z[row] += alpha[row] * other_logprobs[row]
    return z


def tilted_logprobs(z: Any, temperature: Any) -> Any:
    """[B, V]: log-softmax of the tilted logits over their temperature (1 in place of 0)."""
    return torch.log_softmax(z / torch.where(temperature > 0, temperature, 1.0)[:, None], -1)

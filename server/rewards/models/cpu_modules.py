"""Faster equivalents of a transformers model's modules for scoring, put in place after loading.

On CPU linear layers in bfloat16 get weights that oneDNN has packed once, where it can; gate and up projections then
become one product, and so do those of queries, keys and values; RMSNorm and rotary embedding are native operations
where vLLM has them. Everywhere the last layer's MLP computes only the rows that are scored. Results differ by
rounding only.
"""

from typing import Any

import torch
from torch import nn

from guiderail.server.engines.vllm.native_ops import MULTIPLE, native_ops
from guiderail.server.models.cpu_features import packs_bfloat16
from guiderail.server.rewards.models.cpu_rotary import speed_up_rotary

QKV = ("q_proj", "k_proj", "v_proj")
PACK_ROWS = 1024  # the row count that oneDNN packs weights for; others work, near the same speed


class PackedLinear(nn.Module):  # type: ignore[misc]
    """nn.Linear over weights packed by oneDNN. bfloat16 only, on CPUs where cpu_features.packs_bfloat16()."""

    def __init__(self, weight: Any, bias: Any) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS)
        self._bias = bias

    def forward(self, x: Any) -> Any:
        flat = x.reshape(-1, self.in_features)
        out = torch.ops.mkldnn._linear_pointwise(flat, self._weight, self._bias, "none", [], "")
        return out.view(*x.shape[:-1], self.out_features)


class FusedMlp(nn.Module):  # type: ignore[misc]
    """down(act(gate(x)) * up(x)) with gate and up in one product."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self._gate_up = PackedLinear(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), None)
        self._down = PackedLinear(mlp.down_proj.weight, None)
        self._act = mlp.act_fn
        self._width = mlp.gate_proj.out_features

    def forward(self, x: Any) -> Any:
        both = self._gate_up(x)
        gate, up = both[..., : self._width], both[..., self._width :]
        return self._down(self._act(gate).mul_(up))


class FusedQkv:
    """Queries, keys and values of one input in one product: three modules that stand for the three projections.

    An attention module calls them in this order with the same input; the first computes for all.
    """

    def __init__(self, attention: Any) -> None:
        parts = [getattr(attention, name) for name in QKV]
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts]).detach()
        self._product = PackedLinear(torch.cat([part.weight for part in parts]).detach(), bias)
        self._widths = [part.out_features for part in parts]
        self._input: Any = None
        self._outputs: list[Any] = []

    def project(self, x: Any, which: int) -> Any:
        """Return output `which` of 0 (queries), 1 (keys), 2 (values)."""
        if which == 0 or x is not self._input:
            self._input, self._outputs = x, list(self._product(x).split(self._widths, -1))
        out = self._outputs[which]
        if which == 2:
            self._input, self._outputs = None, []
        return out


class Projection(nn.Module):  # type: ignore[misc]
    """One of the three outputs of a FusedQkv."""

    def __init__(self, fused: FusedQkv, which: int) -> None:
        super().__init__()
        self._fused, self._which = fused, which

    def forward(self, x: Any) -> Any:
        return self._fused.project(x, self._which)


class OnlyRows(nn.Module):  # type: ignore[misc]
    """A module applied to the rows named in `rows` alone; the others, which nobody reads, get zeros."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self._inner = inner
        self.rows: Any = None

    def forward(self, x: Any) -> Any:
        out = torch.zeros_like(x)
        out[:, self.rows] = self._inner(x[:, self.rows])
        return out


class FastRMSNorm(nn.Module):  # type: ignore[misc]
    """x / sqrt(mean(x^2) + eps) * weight (or 1 + weight), the mean square in float32."""

    def __init__(self, weight: Any, eps: float, ops: Any | None) -> None:
        """ops: see native_ops.native_ops; None computes with torch, reading x once for the row scale."""
        super().__init__()
        self.weight = weight
        self.eps = eps
        self._ops = ops if weight.shape[0] % MULTIPLE == 0 else None

    def forward(self, x: Any) -> Any:
        if self._ops is not None and x.dtype == self.weight.dtype:
            x = x.contiguous()
            out = torch.empty_like(x)
            self._ops.rms_norm(out, x, self.weight, self.eps)
            return out
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).pow_(2)
        scale = square.div_(x.shape[-1]).add_(self.eps).rsqrt_()
        return torch.mul(x, scale, out=torch.empty_like(x)).mul_(self.weight)


def norm_parts(module: Any) -> tuple[Any, float, bool] | None:
    """Return (weight, eps, True if the weight is stored minus one) of an RMSNorm module, None for other modules."""
    name = type(module).__name__
    weight = getattr(module, "weight", None)
    if not name.endswith("RMSNorm") or weight is None or weight.dim() != 1:
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return None if eps is None else (weight, float(eps), name.startswith("Gemma"))


def speed_up(model: Any) -> None:
    """Replace modules by faster equivalents, in place. On CPU; float32 models keep their linear layers."""
    ops = native_ops()
    if ops is not None:
        speed_up_rotary(model, ops)
    packed = next(model.parameters()).dtype == torch.bfloat16 and packs_bfloat16()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            parts = norm_parts(child)
            if parts is not None:
                weight, eps, minus_one = parts
                setattr(parent, name, FastRMSNorm((weight + 1 if minus_one else weight).detach(), eps, ops))
            elif packed and _is_attention(child):
                fused = FusedQkv(child)
                for which, name_ in enumerate(QKV):
                    setattr(child, name_, Projection(fused, which))
            elif packed and _is_gated_mlp(child):
                setattr(parent, name, FusedMlp(child))
            elif packed and type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child.weight.detach(), child.bias))


def only_last_rows(model: Any) -> OnlyRows | None:
    """Make the last layer's MLP compute chosen rows alone and return it; None for a model that is built otherwise."""
    layers = getattr(model, "layers", None)
    if layers is None or getattr(layers[-1], "mlp", None) is None:
        return None
    layers[-1].mlp = OnlyRows(layers[-1].mlp)
    only: OnlyRows = layers[-1].mlp
    return only


def _is_attention(module: Any) -> bool:
    parts: list[Any] = [getattr(module, name, None) for name in QKV]
    return all(type(part) is nn.Linear for part in parts) and len({part.bias is None for part in parts}) == 1


def _is_gated_mlp(module: Any) -> bool:
    parts: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return (
        all(type(part) is nn.Linear and part.bias is None for part in parts)
        and callable(getattr(module, "act_fn", None))
        and len(list(module.children())) <= 4
    )

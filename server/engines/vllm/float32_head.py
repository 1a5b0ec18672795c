"""A head with float32 logits for a model that runs in 16 bits. Registered with vLLM when a worker imports it.

In bfloat16 logits between 16 and 32 come in steps of 0.125, 12% in probability, and neighbours tie. The products
behind them are summed in float32 anyway. On CUDA vLLM has a product with 16-bit factors and float32 sums, which
`hf_overrides {"head_dtype": "float32"}` turns on (engine_args.py); elsewhere that option casts the whole head at every
step. Here the head is cast once and kept, packed like any layer of a float32 model.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm import envs
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod


@LogitsProcessor.register_oot
class Float32Head(LogitsProcessor):  # type: ignore[misc]
    """vLLM's LogitsProcessor, casting a head once instead of at every step. A quantised head is left as it is."""

    def _apply_head(self, lm_head: Any, hidden_states: Any, embedding_bias: Any) -> Any:
        """Return logits [N, V] of hidden states [N, H] in `head_dtype`, or in theirs for a quantised head."""
        if self.head_dtype in (None, hidden_states.dtype):
            return super()._apply_head(lm_head, hidden_states, embedding_bias)
        plain = isinstance(lm_head.quant_method, (UnquantizedEmbeddingMethod, UnquantizedLinearMethod))
        if not plain or not lm_head.weight.numel():  # vLLM's CPU path drops weights that it has packed
            return lm_head.quant_method.apply(lm_head, hidden_states, bias=embedding_bias)
        if hidden_states.is_cuda and not envs.VLLM_BATCH_INVARIANT:  # its mixed product is not among the invariant ones
            return super()._apply_head(lm_head, hidden_states, embedding_bias)
        if (product := getattr(lm_head, "kept_product", None)) is None:
            product = lm_head.kept_product = kept_product(lm_head.weight, self.head_dtype)
            lm_head.cpu_linear = None  # frees what vLLM packed in 16 bits
        bias = None if embedding_bias is None else embedding_bias.to(self.head_dtype)
        return product(hidden_states.to(self.head_dtype), bias)


def kept_product(weight: Any, dtype: Any) -> Callable[[Any, Any], Any]:
    """Cast weight [V, H] once; return x [N, H], bias [V] or None -> x @ weight.T + bias [N, V], all in `dtype`."""
    layer: Any = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    layer.cpu_linear = torch.nn.functional.linear
    if layer.weight.device.type == "cpu":
        dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return lambda x, bias: layer.cpu_linear(x, layer.weight, bias)

"""The float32 head over 16-bit hidden states, and products that do not depend on the batch."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from guiderail.server.engines.vllm import batch_invariance
from guiderail.server.engines.vllm.float32_head import Float32Head, kept_product
from guiderail.server.state import system_fingerprint

V, H = 512, 64


@pytest.fixture
def head() -> Any:
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    with set_current_vllm_config(VllmConfig()):
        made = Float32Head(V)
    made.head_dtype = torch.float32
    return made


def lm_head(weight: torch.Tensor) -> Any:
    layer: Any = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.quant_method = UnquantizedEmbeddingMethod()
    layer.cpu_linear = torch.nn.functional.linear  # of which vLLM's apply gives (x, weight, bias)
    return layer


def states(rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, H, generator=torch.Generator().manual_seed(rows)).mul(2).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 16, 40])
def test_logits_are_those_of_a_float32_head_over_the_same_hidden_states(
    head: Any, dtype: torch.dtype, rows: int
) -> None:
    layer, x = lm_head(states(V, dtype)), states(rows, dtype)
    bias = states(1, dtype).mean() * torch.ones(V, dtype=dtype)
    wanted = (x.double() @ layer.weight.double().T).float()
    coarse = (x @ layer.weight.T).float()
    got = head._apply_head(layer, x, None)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)
    assert (coarse - wanted).abs().max() > 100 * (got - wanted).abs().max(), "the control: 16 bits are coarser"
    torch.testing.assert_close(head._apply_head(layer, x, bias), wanted + bias.float(), rtol=1e-5, atol=1e-4)


def test_the_head_is_cast_once_and_the_16_bit_product_is_let_go(head: Any) -> None:
    layer, x = lm_head(states(V, torch.bfloat16)), states(3, torch.bfloat16)
    first = head._apply_head(layer, x, None)
    layer.weight.data.zero_()
    assert torch.equal(head._apply_head(layer, x, None), first)
    assert layer.cpu_linear is None


def test_float32_models_and_quantised_heads_are_left_as_they_are(head: Any) -> None:
    layer = lm_head(states(V, torch.float32))
    x = states(3, torch.float32)
    assert torch.equal(head._apply_head(layer, x, None), x @ layer.weight.T)
    quantised: Any = SimpleNamespace(quant_method=SimpleNamespace(apply=lambda layer, x, bias: ("quantised", bias)))
    assert head._apply_head(quantised, states(3, torch.bfloat16), None) == ("quantised", None)
    assert not hasattr(layer, "kept_product")
    assert not hasattr(quantised, "kept_product")


def test_a_kept_product_is_the_same_in_all_steps() -> None:
    weight, row = states(V, torch.bfloat16), states(1, torch.float32)[0]
    product = kept_product(weight, torch.float32)
    assert batch_invariance.same_in_all_steps(lambda x, _, bias: product(x, bias), None, row)


def varying(x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
    """A product that is summed in another order where steps are larger than a row."""
    if len(x) == 1:
        return x @ weight.T
    return x[:, ::2] @ weight[:, ::2].T + x[:, 1::2] @ weight[:, 1::2].T


def growing(x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
    """A product that depends on a row's place: no block size fixes that."""
    return x @ weight.T + torch.arange(len(x))[:, None]


def layer_with(product: Any) -> Any:
    layer: Any = torch.nn.Linear(H, V, bias=False).requires_grad_(False)
    layer.input_size, layer.cpu_linear = H, product
    return layer


def test_products_that_depend_on_the_step_are_blocked_and_the_rest_are_not() -> None:
    steady = lambda x, weight, bias: (x[:, None, :] * weight).sum(-1)  # noqa: E731
    good, bad = layer_with(steady), layer_with(varying)
    assert not batch_invariance.same_in_all_steps(varying, bad.weight, states(1, torch.float32)[0])
    assert batch_invariance.make_products_invariant(torch.nn.ModuleList([good])) == []
    assert batch_invariance.make_products_invariant(torch.nn.ModuleList([bad])) == []
    assert good.cpu_linear is steady
    x = states(70, torch.float32)
    together = bad.cpu_linear(x, bad.weight, None)
    assert together.shape == (70, V)
    torch.testing.assert_close(together, x @ bad.weight.T)
    for size in (1, 2, 33, 69):
        assert torch.equal(bad.cpu_linear(x[:size], bad.weight, None), together[:size])


def test_a_product_that_no_block_size_mends_is_named() -> None:
    model = torch.nn.ModuleDict({"down": layer_with(growing)})
    assert batch_invariance.make_products_invariant(model) == ["down"]


def test_the_mode_is_in_the_environment_while_the_engine_starts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_ATTN_SPLIT_KV", "1")
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    with batch_invariance.invariant_environment(cpu=True):
        assert os.environ["VLLM_CPU_ATTN_SPLIT_KV"] == "0"
        assert "VLLM_BATCH_INVARIANT" not in os.environ
    with batch_invariance.invariant_environment(cpu=False):
        assert os.environ["VLLM_BATCH_INVARIANT"] == "1"
    assert os.environ["VLLM_CPU_ATTN_SPLIT_KV"] == "1"
    assert "VLLM_BATCH_INVARIANT" not in os.environ


def test_the_fingerprint_names_what_an_answer_depends_on() -> None:
    fast = system_fingerprint("smollm2", "bfloat16", batch_invariant=False)
    model, dtype, guiderail, vllm, torch_, mode = fast.split()
    assert (model, dtype, mode) == ("smollm2", "bfloat16", "fast")
    assert guiderail.startswith("guiderail-")
    assert vllm.startswith("vllm-0.32")
    assert torch_ == f"torch-{torch.__version__}"
    assert system_fingerprint("smollm2", "bfloat16", batch_invariant=True) == fast.replace("fast", "batch-invariant")

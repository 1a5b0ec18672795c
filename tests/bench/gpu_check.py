"""Ten minutes on one GPU with torch and Triton alone (no vLLM): correctness and speed of the GPU path.

    PYTHONPATH=.types:tests/support python tests/bench/gpu_check.py [--out gpu.json] [--steps limits,attention,...]

Steps in order of importance; JSON is written after each, so that an interrupted run keeps its results:
limits (copy, matrix product), correctness (production shapes against float64 on 256 rows), first_call (compilation and
first launch against the next), attention (against FlashAttention in a cascade and SDPA with the prefix copied), runner (a
random Llama of SmolLM2's and of 8B's shape, against transformers with whole sequences and with the prefix's keys
copied), small (tilt_sample, reward_head, token_logprobs against torch), beside (a decode of 8B's shape in a CUDA graph
beside scoring by another 8B).
The tests marked gpu are run beside it: python -m pytest -m gpu tests/kernels.
"""

import argparse
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH may be set
from gpu_common import limits, milliseconds, require_cuda
from gpu_peers import Decode, GraphedDecode, cascade, expanded, padded

from guiderail.kernels import _dispatch, reward_head, shared_prefix_attention, tilt_sample, token_logprobs
from guiderail.kernels.shared_prefix_attention import Context, Layout

SHAPES = [(32, 8, 128), (9, 3, 64), (28, 4, 128), (32, 32, 128), (8, 4, 256), (16, 1, 128)]
BATCHES = [(2048, 6, 512), (2048, 64, 128), (400, 16, 64)]  # prefix, candidates, tokens of each
POOL = 65_536


class Case:
    """A prefix at permuted places of a large pool, and candidates of one length, bfloat16."""

    def __init__(self, heads: tuple[int, int, int], batch: tuple[int, int, int]) -> None:
        (self.hq, self.hkv, self.dim), (self.prefix, self.count, self.length) = heads, batch
        rows = self.count * self.length

        def draw(*shape: int) -> Any:
            return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")

        self.q, self.k, self.v = (draw(rows, h, self.dim) for h in (self.hq, self.hkv, self.hkv))
        self.kp, self.vp = draw(POOL, self.hkv, self.dim), draw(POOL, self.hkv, self.dim)
        self.slots = torch.randperm(POOL)[: self.prefix]
        segments = tuple((i * self.length, (i + 1) * self.length) for i in range(self.count))
        positions = torch.arange(self.prefix, self.prefix + self.length).repeat(self.count)
        self.layout = Layout(segments, (Context(0, rows, self.slots, 0),), positions)
        self.pairs = rows * self.prefix + self.count * self.length * (self.length + 1) // 2

    def run(self, **options: Any) -> Any:
        return shared_prefix_attention(self.q, self.k, self.v, self.kp, self.vp, self.layout, **options)

    def cascade(self) -> Any:
        """The same by FlashAttention."""
        return cascade(self.q, self.k, self.v, self.kp, self.vp, self.layout)

    def error(self, window: int | None = None, softcap: float | None = None) -> float:
        """Largest difference from float64 on up to 256 rows."""
        got = self.run(window=window, softcap=softcap)
        slots, worst = self.slots.cuda(), 0.0
        for row in torch.randperm(len(self.q))[:256].tolist():
            start = row - row % self.length
            keys, values = (
                torch.cat([pool[slots], own[start : row + 1]]).double().repeat_interleave(self.hq // self.hkv, 1)
                for pool, own in ((self.kp, self.k), (self.vp, self.v))
            )
            scores = torch.einsum("hd,chd->hc", self.q[row].double(), keys) * self.dim**-0.5
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if window is not None:
                scores[:, : max(0, scores.shape[1] - window)] = -math.inf
            wanted = torch.einsum("hc,chd->hd", scores.softmax(-1), values)
            worst = max(worst, (got[row].double() - wanted).abs().max().item())
        return worst

    def sdpa(self) -> Callable[[], Any]:
        """torch's attention over copies of the prefix, one for each candidate."""
        from torch.nn.attention.bias import causal_lower_right

        def expand(pool: Any, own: Any) -> Any:
            copies = pool[self.slots.cuda()].expand(self.count, -1, -1, -1)
            return torch.cat([copies, own.unflatten(0, (self.count, self.length))], 1).transpose(1, 2)

        keys, values = expand(self.kp, self.k), expand(self.vp, self.v)
        queries = self.q.unflatten(0, (self.count, self.length)).transpose(1, 2)
        mask = causal_lower_right(self.length, self.prefix + self.length)
        attend = torch.nn.functional.scaled_dot_product_attention
        return lambda: attend(queries, keys, values, attn_mask=mask, enable_gqa=True)


def step_limits() -> Any:
    return vars(limits())


def step_correctness() -> Any:
    found = {}
    for heads in SHAPES:
        for batch in BATCHES[:2]:
            case = Case(heads, batch)
            found[f"{heads} {batch}"] = {
                "plain": case.error(), "window": case.error(window=512), "cap": case.error(softcap=50.0),
            }  # fmt: skip
    return found


def step_first_call() -> Any:
    """Seconds of the first call of a new head size, of the second, and of the first of another batch."""
    found = {}
    for name, case in (("first", Case((12, 4, 96), (300, 4, 20))), ("other batch", Case((12, 4, 96), (77, 3, 16)))):
        times = []
        for _ in range(2):
            torch.cuda.synchronize()
            started = time.perf_counter()
            case.run()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        found[name] = times
    return found


def step_attention() -> Any:
    bound, found = limits(), {}
    for heads in SHAPES:
        for batch in BATCHES:
            case = Case(heads, batch)
            ours, flash, sdpa = (milliseconds(call) for call in (case.run, case.cascade, case.sdpa()))
            rate = 4.0 * case.pairs * case.hq * case.dim / ours * 1e3
            found[f"{heads} {batch}"] = {
                "ms": ours, "flash_cascade_ms": flash, "sdpa_ms": sdpa, "of_gemm": rate / bound.flops_per_s,
                "from_flash_cascade": (case.run().float() - case.cascade().float()).abs().max().item(),
            }  # fmt: skip
    return found


def llama(name: str) -> Any:
    """A decoder with random weights, of SmolLM2-135M's shape or of Llama-8B's."""
    from transformers import AutoModel, LlamaConfig

    small = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    large = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    sizes, kv_heads = {"135M": (small, 3), "8B": (large, 8)}[name]
    with torch.device("cuda"):
        config = LlamaConfig(**sizes, num_key_value_heads=kv_heads, vocab_size=49152)
        return AutoModel.from_config(config, dtype=torch.bfloat16).eval()


def timed(call: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Milliseconds of a call that ends on the CPU, and its result."""
    started = time.perf_counter()
    returned = call(*args)
    return (time.perf_counter() - started) * 1e3, returned


def texts(batch: tuple[int, int, int]) -> tuple[list[int], list[list[int]]]:
    """A prompt, and its continuation in each candidate."""
    prefix, count, length = batch
    return torch.randint(49152, (prefix,)).tolist(), torch.randint(49152, (count, length)).tolist()


def step_runner() -> Any:
    """Milliseconds to score candidates under one prefix, new and with the prefix kept, by transformers and by us."""
    from guiderail.server.rewards.models.packed import PackedRunner

    found: dict[str, dict[str, Any]] = {}
    for name in ("135M", "8B"):
        model = llama(name)
        heads = torch.randn(1, model.config.hidden_size, device="cuda")
        cases = {batch: texts(batch) for batch in BATCHES}
        theirs = {}
        for batch, (prompt, ends) in cases.items():  # before the runner takes the model's attention
            after = expanded(model, heads, prompt, ends)
            whole = [prompt + end for end in ends]
            after(), padded(model, heads, whole[:1])
            (kept_ms, _), (padded_ms, scores) = timed(after), timed(padded, model, heads, whole)
            theirs[batch] = scores
            found[f"{name} {batch}"] = {"transformers_padded_ms": padded_ms, "transformers_prefix_kept_ms": kept_ms}
        runner = PackedRunner(model, heads, capacity=POOL)
        warm, _ = timed(runner.warm_up)
        for batch, (prompt, ends) in cases.items():
            whole = [prompt + end for end in ends]
            runner.score(whole)  # warms up, as theirs did
            runner.clear()
            new_ms, scores = timed(runner.score, whole)
            runner.clear()
            runner.score([prompt])
            kept_ms, _ = timed(runner.score, whole)
            found[f"{name} {batch}"] |= {
                "new_ms": new_ms, "prefix_kept_ms": kept_ms, "warm_up_s": warm / 1e3,
                "finite": bool(scores.isfinite().all()), "spread": scores.std().item(),
                "from_transformers": (scores - theirs[batch]).abs().max().item(),
            }  # fmt: skip
        del runner, model, after
        torch.cuda.empty_cache()
    return found


def step_beside() -> Any:
    """Milliseconds of a decoding step of 16 sequences of 2,048 tokens and of a scoring pass, alone and together."""
    from guiderail.server.rewards.models.packed import PackedRunner

    model = llama("8B")
    runner = PackedRunner(model, torch.randn(1, model.config.hidden_size), capacity=POOL)
    runner.warm_up()
    decode = GraphedDecode(Decode(16, 2048))
    found = {}
    for batch in BATCHES:
        prompt, ends = texts(batch)
        whole = [prompt + end for end in ends]

        def score(whole: list[list[int]] = whole) -> None:
            runner.clear()
            runner.score(whole)

        score()
        alone = statistics.median(decode.step() for _ in range(50))
        scoring, _ = timed(score)
        step, work = decode.beside(score)
        found[str(batch)] = {"step_ms": alone, "step_beside_ms": step, "score_ms": scoring, "score_beside_ms": work}
    return found


def step_small() -> Any:
    """Milliseconds of the other kernels by Triton and by torch."""
    hidden, weight = (torch.randn(n, 4096, dtype=torch.bfloat16, device="cuda") for n in (8192, 128_256))
    last, norm = torch.randint(8192, (64,), device="cuda"), torch.ones(4096, device="cuda")
    head = torch.randn(1, 4096, device="cuda")
    logits, other = torch.randn(64, 128_256, device="cuda"), torch.randn(64, 128_256, device="cuda")
    one = torch.ones(64, device="cuda")
    tokens = torch.randint(128_256, (1024,), device="cuda")
    calls: dict[str, Callable[[], Any]] = {
        "reward_head": lambda: reward_head(hidden, last, norm, 1e-5, head, validate=False),
        "tilt_sample": lambda: tilt_sample(logits, other, one, one, one / 2, validate=False),
        "token_logprobs": lambda: token_logprobs(hidden[:1024], weight, tokens, validate=False),
    }  # fmt: skip
    found: dict[str, dict[str, float]] = {}
    for name, call in calls.items():
        for path in ("triton", "torch"):
            with _dispatch.force("triton" if path == "triton" else "torch"):
                found.setdefault(name, {})[path] = milliseconds(call, 10)
    return found


STEPS: dict[str, Callable[[], Any]] = {
    "limits": step_limits, "correctness": step_correctness, "first_call": step_first_call,
    "attention": step_attention, "runner": step_runner, "small": step_small, "beside": step_beside,
}  # fmt: skip


def main() -> None:
    """Run the steps; a failed one is recorded with its error, and the others continue."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--steps", default=",".join(STEPS))
    args = parser.parse_args()
    require_cuda()
    import triton

    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    for name in args.steps.split(","):
        started = time.perf_counter()
        try:
            found[name] = STEPS[name]()
        except Exception:  # of many kinds: the other steps are worth running
            found[name] = {"failed": traceback.format_exc()}
        found[f"{name}_s"] = round(time.perf_counter() - started, 1)
        args.out.write_text(json.dumps(found, indent=2) + "\n")
        print(name, json.dumps(found[name]), flush=True)
    if any("failed" in found[name] for name in args.steps.split(",")):
        sys.exit(1)


if __name__ == "__main__":
    main()

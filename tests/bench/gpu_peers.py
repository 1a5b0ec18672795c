"""Peers for gpu_check.py: FlashAttention in a cascade, transformers' models, and a decode beside scoring."""

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from guiderail.kernels.shared_prefix_attention import Layout

ROWS = 16_384  # tokens of a forward pass of transformers, so that its layers' activations do not fill the card


def flash(q: Any, k: Any, v: Any, q_edges: list[int], k_edges: list[int], causal: bool) -> tuple[Any, Any]:
    """FlashAttention of sequences side by side, as torch has it: out [T, Hq, D] and log-sum-exp [Hq, T]."""
    longest = [max(b - a for a, b in itertools.pairwise(edges)) for edges in (q_edges, k_edges)]
    edges = [torch.tensor(each, dtype=torch.int32, device=q.device) for each in (q_edges, k_edges)]
    found = torch.ops.aten._flash_attention_forward(q, k, v, *edges, *longest, 0.0, causal, False)
    return found[0], found[1].reshape(q.shape[1], len(q))


def cascade(q: Any, k: Any, v: Any, kp: Any, vp: Any, layout: Layout, attend: Any = flash) -> Any:
    """shared_prefix_attention by one call of FlashAttention for all segments and one for each context, and merges.

    A context's keys are copied out of the pool, as this FlashAttention does not read single tokens by slots.
    """
    edges = [start for start, _ in layout.segments] + [len(q)]
    own, lse = attend(q, k, v, edges, edges, True)
    out, lse = own.float(), lse.t().contiguous()
    for context in layout.contexts:
        rows = slice(context.start, context.end)
        slots = context.slots.to(q.device)
        part, part_lse = attend(q[rows], kp[slots], vp[slots], [0, context.end - context.start], [0, len(slots)], False)
        weight = torch.sigmoid(part_lse.t() - lse[rows])
        out[rows] = torch.lerp(out[rows], part.float(), weight[..., None])
        lse[rows] = torch.logaddexp(lse[rows], part_lse.t())
    return out.to(q.dtype)


@torch.inference_mode()
def padded(model: Any, heads: Any, sequences: Sequence[Sequence[int]]) -> Any:
    """Scores [S, K] of a transformers decoder with torch's attention; every sequence is read whole."""
    longest = max(map(len, sequences))
    batch = max(1, ROWS // longest)
    made = []
    for start in range(0, len(sequences), batch):
        these = sequences[start : start + batch]
        ids = torch.tensor([[*each, *[0] * (longest - len(each))] for each in these], device=heads.device)
        ends = torch.tensor([len(each) for each in these], device=heads.device)
        seen = torch.arange(longest, device=heads.device) < ends[:, None]
        hidden = model(input_ids=ids, attention_mask=seen, use_cache=False).last_hidden_state
        made.append(hidden[torch.arange(len(these)), ends - 1].float() @ heads.float().t())
    return torch.cat(made).cpu()


@torch.inference_mode()
def expanded(model: Any, heads: Any, prompt: Sequence[int], ends: Sequence[Sequence[int]]) -> Callable[[], Any]:
    """Scores the ends (of one length) after a prompt whose keys and values are kept, and copied for each of them."""
    from transformers import DynamicCache

    batch = max(1, ROWS // len(ends[0]))
    first = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([prompt], device=heads.device), past_key_values=first, use_cache=True)
    kept = [(layer.keys.clone(), layer.values.clone()) for layer in first.layers]

    @torch.inference_mode()
    def score() -> Any:
        made = []
        for start in range(0, len(ends), batch):
            ids = torch.tensor(ends[start : start + batch], device=heads.device)
            cache = DynamicCache(config=model.config)
            for layer, pair in enumerate(kept):
                cache.update(*(each.repeat(len(ids), 1, 1, 1) for each in pair), layer)
            hidden = model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
            made.append(hidden[:, -1].float() @ heads.float().t())
        return torch.cat(made).cpu()

    return score


class Decode:
    """Decoding steps of a model of Llama-8B's shape with random weights, without its embeddings and its head."""

    def __init__(self, sequences: int, context: int, layers: int = 32, width: int = 4096, device: str = "cuda") -> None:
        def draw(*shape: int) -> Any:
            return torch.randn(*shape, dtype=torch.bfloat16, device=device) * 0.02

        self.heads, self.kv_heads = width // 128, width // 512
        both, inner = (self.heads + 2 * self.kv_heads) * 128, width * 7 // 2
        sizes = ((both, width), (width, width), (2 * inner, width), (width, inner))
        self.layers = [[draw(*size) for size in sizes] for _ in range(layers)]
        kept = (sequences, self.kv_heads, context, 128)
        self.kept = [(draw(*kept), draw(*kept)) for _ in range(layers)]
        self.x, self.norm = draw(sequences, width), torch.ones(width, dtype=torch.bfloat16, device=device)

    def step(self) -> Any:
        """Hidden states after one new token of each sequence, which takes the last place of its context."""
        functional, x = torch.nn.functional, self.x
        for (attention, out, up, down), (keys, values) in zip(self.layers, self.kept, strict=True):
            made = functional.linear(functional.rms_norm(x, x.shape[1:], self.norm), attention)
            q, k, v = made.unflatten(1, (-1, 128)).split([self.heads, self.kv_heads, self.kv_heads], 1)
            keys[:, :, -1], values[:, :, -1] = k, v
            seen = functional.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)
            x = x + functional.linear(seen.flatten(1), out)
            gate, inner = functional.linear(functional.rms_norm(x, x.shape[1:], self.norm), up).chunk(2, 1)
            x = x + functional.linear(functional.silu(gate) * inner, down)
        return x


class GraphedDecode:
    """A decoding step as a CUDA graph, replayed on a stream of its own."""

    def __init__(self, decode: Decode) -> None:
        self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode():
            with torch.cuda.stream(self._stream):
                for _ in range(3):
                    decode.step()
            self._stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                decode.step()

    def step(self) -> float:
        """Milliseconds of one step."""
        started = time.perf_counter()
        with torch.cuda.stream(self._stream):
            self._graph.replay()
        self._stream.synchronize()
        return (time.perf_counter() - started) * 1e3

    def beside(self, work: Callable[[], Any]) -> tuple[float, float]:
        """(median milliseconds of a step, milliseconds of `work`) where steps follow each other while work runs."""
        steps: list[float] = []
        ended = threading.Event()

        def decode() -> None:
            while not ended.is_set():
                steps.append(self.step())

        thread = threading.Thread(target=decode)
        thread.start()
        try:
            started = time.perf_counter()
            work()
            took = (time.perf_counter() - started) * 1e3
        finally:
            ended.set()
            thread.join()
        return statistics.median(steps), took

"""Forward passes of a decoder over packed token sequences, with every shared prefix computed once.

Sequences go into a prefix tree; what the tree lacks is computed in forward passes without padding, each
segment attending to the ones above it (guiderail.kernels.shared_prefix_attention). Keys and values stay in
a pool of bounded size, so that a longer answer costs its new tokens only. Works for any
transformers model that uses the shared attention interface. Not thread-safe: one thread owns a decoder.
What is read from the hidden states is up to its users: packed.py (a reward head), packed_logprobs.py (an LM head).

The host knows all but the weights and the results: a pass copies its numbers to the device once, from pinned memory,
and waits for the device when the results are read.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from guiderail.kernels.shared_prefix_attention import Context, Layout, prepare, shared_prefix_attention
from guiderail.server.engines.engine_stats import RunnerStats
from guiderail.server.rewards.models.cpu_modules import only_last_rows, speed_up
from guiderail.server.rewards.models.prefix_tree import Node, PrefixTree

IMPLEMENTATION = "guiderail_packed"


@dataclass(slots=True)
class Pass:
    """Inputs of one forward pass; all but the layout on the device.

    rows: of the hidden states that are read, [R] int64. beside: what goes with them.
    """

    layout: Layout
    ids: Any
    positions: Any
    self_slots: Any
    rows: Any
    beside: list[Any]


class PackedDecoder:
    """A decoder, its prefix tree, and the pool of the tree's keys and values."""

    def __init__(self, decoder: Any, *, capacity: int, max_pass_tokens: int = 8192) -> None:
        """decoder: the transformers base model (without head), on its device and in its dtype.

        capacity: tokens whose keys and values are kept. max_pass_tokens: new tokens of the largest forward pass.
        """
        register()
        self._decoder = decoder.eval()
        first = next(decoder.parameters())
        self._device, self._dtype = first.device, first.dtype
        if self._device.type == "cpu":
            speed_up(decoder)
        self._last_mlp = only_last_rows(decoder)
        decoder.set_attn_implementation(IMPLEMENTATION)
        layers, kv_heads, dim = _kv_shape(decoder)
        size = (layers, 2, capacity + 1, kv_heads, dim)  # what is not kept goes to the last slot: see PrefixTree
        self._pool = torch.zeros(size, dtype=self._dtype, device=self._device)
        self._query_heads = decoder.config.get_text_config().num_attention_heads
        self._tree = PrefixTree(capacity)
        self._max_pass_tokens = max_pass_tokens
        self.stats = RunnerStats()

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that it takes."""
        return self._tree.capacity

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are held now."""
        return self._tree.used_slots

    def clear(self) -> None:
        """Forget all keys and values."""
        self._tree = PrefixTree(self._tree.capacity)

    @contextmanager
    def _batch(self) -> Iterator[PrefixTree]:
        """Lend the tree to one pass: a failing pass leaves no node behind that was not computed."""
        try:
            yield self._tree
        except BaseException:
            self._tree.drop_unready()
            raise
        finally:
            self._tree.unpin()

    def _check(self, sequences: Sequence[Sequence[int]]) -> None:
        for tokens in sequences:
            if not 0 < len(tokens) <= self.longest:
                raise ValueError(f"a sequence has {len(tokens)} tokens; 1 to {self.longest} can be scored")

    @contextmanager
    def _counted(self, asked: int) -> Iterator[None]:
        """Count `asked` tokens, and as cached those of them that are not computed inside."""
        computed = self.stats.tokens_computed
        yield
        self.stats.tokens_asked += asked
        self.stats.tokens_cached += max(0, asked - (self.stats.tokens_computed - computed))

    def _plan(self) -> tuple[list[Node], Layout]:
        """Return the new nodes in depth-first order, and who attends to what."""
        order: list[Node] = []
        segments: list[tuple[int, int]] = []
        found: list[tuple[int, int, list[Any], int]] = []  # rows start, end; slot arrays; first position

        def visit(node: Node, row: int) -> int:
            """Lay out the pinned nodes of a subtree from `row` on; return the row after them."""
            if not node.ready:
                order.append(node)
                segments.append((row, row + len(node.tokens)))
                row += len(node.tokens)
            context = len(found)
            if node.tokens:
                found.append((row, row, [node.slots], node.start))
            end = row
            for child in node.children.values():
                if child.pinned:
                    end = visit(child, end)
            if node.tokens:
                found[context] = (row, end, [node.slots], node.start)
            return end

        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(100_000)  # a path has at most as many nodes as tokens
        try:
            visit(self._tree.root, 0)
        finally:
            sys.setrecursionlimit(limit)
        merged: list[tuple[int, int, list[Any], int]] = []
        for start, end, slots, position in found:
            if end == start:
                continue
            if merged and merged[-1][:2] == (start, end):  # a chain: the same rows see both
                merged[-1][2].extend(slots)
            else:
                merged.append((start, end, slots, position))
        contexts = tuple(
            Context(start, end, torch.from_numpy(np.concatenate(slots)), position)
            for start, end, slots, position in merged
        )
        positions = np.concatenate([np.arange(n.start, n.end) for n in order]) if order else np.empty(0, np.int64)
        return order, Layout(tuple(segments), contexts, torch.from_numpy(positions))

    def _prepared(
        self, order: Sequence[Node], layout: Layout, rows: Sequence[int], *beside: npt.NDArray[np.int64]
    ) -> Pass:
        """Put the inputs of a pass on the device. rows: those of the hidden states that are read."""
        arrays = (
            np.array([token for node in order for token in node.tokens], np.int64),
            layout.positions.numpy(),
            np.concatenate([node.slots for node in order]),
            np.array(rows, np.int64),
            *beside,
        )
        ids, positions, slots, read, *more = prepare(layout, self._query_heads, self._pool[0, 0], arrays)
        return Pass(layout, ids, positions, slots, read, more)

    def _forward(self, work: Pass) -> Any:
        """Return the hidden states [T, H] of the new tokens, right in the rows to be read; fill the pool."""
        if self._last_mlp is not None:
            self._last_mlp.rows = work.rows
        self.stats.passes += 1
        output = self._decoder(
            input_ids=work.ids[None],
            position_ids=work.positions[None],
            use_cache=False,
            guiderail_pass=work,
            guiderail_pool=self._pool,
        )
        return output.last_hidden_state[0]


def token_bytes(decoder: Any) -> int:
    """Return the bytes of one token's keys and values."""
    layers, kv_heads, dim = _kv_shape(decoder)
    return int(2 * layers * kv_heads * dim * next(decoder.parameters()).element_size())


def _kv_shape(decoder: Any) -> tuple[int, int, int]:
    """Return (layers, KV heads, head size) of a decoder."""
    config = decoder.config.get_text_config()
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, config.num_key_value_heads, dim


def register() -> None:
    """Make the packed attention known to transformers."""
    from transformers import AttentionInterface

    # Without a mask function transformers makes no mask; with one it reads the positions back from the device first.
    AttentionInterface.register(IMPLEMENTATION, _attention)


def _attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float | None = None, **kwargs: Any
) -> tuple[Any, None]:
    """transformers' attention function: query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D]."""
    work: Pass = kwargs["guiderail_pass"]
    keys, values = kwargs["guiderail_pool"][module.layer_idx]
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    keys.index_copy_(0, work.self_slots, k)
    values.index_copy_(0, work.self_slots, v)
    out = shared_prefix_attention(
        q.contiguous(), k, v, keys, values, work.layout,
        scale=scaling, window=kwargs.get("sliding_window"), softcap=kwargs.get("softcap"),
    )  # fmt: skip
    return out[None], None

"""The packed runner: scores token sequences with a reward model, computing every shared prefix once.

Sequences go into a prefix tree; what the tree lacks is computed in forward passes without padding, each
segment attending to the ones above it (guiderail.kernels.shared_prefix_attention). Keys and values stay in
a pool of bounded size, so that scoring a longer answer costs its new tokens only. Works for any
transformers model that uses the shared attention interface. Not thread-safe: one thread owns a runner.

The host knows all but the weights and the scores: a pass copies its numbers to the device once, from pinned memory,
and waits for the device when it reads the scores.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from guiderail.kernels import reward_head
from guiderail.kernels.shared_prefix_attention import Context, Layout, prepare, shared_prefix_attention
from guiderail.server.engines.engine_stats import RunnerStats
from guiderail.server.rewards.models.cpu_modules import norm_parts, only_last_rows, speed_up
from guiderail.server.rewards.models.prefix_tree import Node, NoRoom, PrefixTree

IMPLEMENTATION = "guiderail_packed"


@dataclass(slots=True)
class _Pass:
    """What one forward pass needs; all but the layout on the device."""

    layout: Layout
    ids: Any
    positions: Any
    self_slots: Any
    last: Any


class PackedRunner:
    """Scores sequences at their last token with `heads` [K, hidden] on top of a decoder model."""

    def __init__(self, decoder: Any, heads: Any, *, capacity: int, max_pass_tokens: int = 8192) -> None:
        """decoder: the transformers base model (without head), on its device and in its dtype.

        capacity: tokens whose keys and values are kept. max_pass_tokens: new tokens of the largest forward pass.
        """
        register()
        self._decoder = decoder.eval()
        parts = norm_parts(decoder.norm)
        if parts is None:
            raise ValueError(f"{type(decoder).__name__} does not end in an RMSNorm that is known")
        self._norm_weight, self._eps, self._norm_minus_one = parts[0].detach(), parts[1], parts[2]
        decoder.norm = torch.nn.Identity()  # reward_head norms the gathered rows instead of all
        first = next(decoder.parameters())
        self._device, self._dtype = first.device, first.dtype
        if self._device.type == "cpu":
            speed_up(decoder)
        self._last_mlp = only_last_rows(decoder)
        decoder.set_attn_implementation(IMPLEMENTATION)
        self._heads = heads.to(self._device, torch.float32)
        layers, kv_heads, dim = _kv_shape(decoder)
        size = (layers, 2, capacity + 1, kv_heads, dim)  # what is not kept goes to the last slot: see PrefixTree
        self._pool = torch.zeros(size, dtype=self._dtype, device=self._device)
        self._query_heads = decoder.config.get_text_config().num_attention_heads
        self._tree = PrefixTree(capacity)
        self._max_pass_tokens = max_pass_tokens
        self.stats = RunnerStats()

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that it scores."""
        return self._tree.capacity

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are held now."""
        return self._tree.used_slots

    def clear(self) -> None:
        """Forgets all keys and values."""
        self._tree = PrefixTree(self._tree.capacity)

    def warm_up(self) -> None:
        """Compiles and loads on CUDA all kernels that scoring can need, so that no request waits for that."""
        if self._device.type != "cuda":
            return
        self.score([[0, 0, 0], [0, 0, 1, 0]])  # a shared prefix and segments of their own: every kind of launch
        self.clear()
        self.stats.tokens_asked = self.stats.tokens_computed = self.stats.tokens_cached = self.stats.passes = 0

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def score(self, sequences: Sequence[Sequence[int]]) -> Any:
        """[S, K] float32 on the CPU: the heads' raw values after the last token of each (non-empty) sequence.

        Raises ValueError for a sequence that is empty or longer than the pool. One longer than a pass takes several.
        """
        for tokens in sequences:
            if not 0 < len(tokens) <= self.longest:
                raise ValueError(f"a sequence has {len(tokens)} tokens; 1 to {self.longest} can be scored")
        computed = self.stats.tokens_computed
        scores: list[Any] = []
        while len(scores) < len(sequences):
            first = sequences[len(scores)]
            while (missing := self._tree.missing(first)) > self._max_pass_tokens:  # its beginning, pass by pass
                self._score_pass([first[: len(first) - missing + self._max_pass_tokens]])
            scores += self._score_pass(sequences[len(scores) :])
        asked = sum(map(len, sequences))
        self.stats.tokens_asked += asked
        self.stats.tokens_cached += max(0, asked - (self.stats.tokens_computed - computed))
        return torch.stack(scores)

    def _score_pass(self, sequences: Sequence[Sequence[int]]) -> list[Any]:
        """The scores of the first sequences, as many as one pass takes."""
        tree = self._tree
        try:
            ends = self._insert(sequences)
            order, layout = self._plan()
            if order:
                wanted = [node for node in dict.fromkeys(ends) if not node.ready]
                rows = {id(node): end - 1 for node, (_, end) in zip(order, layout.segments, strict=True)}
                arrays = (
                    np.array([token for node in order for token in node.tokens], np.int64),
                    layout.positions.numpy(),
                    np.concatenate([node.slots for node in order]),
                    np.array([rows[id(node)] for node in wanted], np.int64),
                )
                work = _Pass(layout, *prepare(layout, self._query_heads, self._pool[0, 0], arrays))
                hidden = self._forward(work)
                values = reward_head(
                    hidden, work.last, self._norm_weight, self._eps, self._heads, None,
                    gemma_style=self._norm_minus_one, validate=False,
                ).cpu()  # fmt: skip
                self.stats.tokens_computed += len(arrays[0])
                for node, value in zip(wanted, values, strict=True):
                    node.score = value
                for node in order:
                    node.ready = True
            return [node.score for node in ends]
        except BaseException:
            tree.drop_unready()
            raise
        finally:
            tree.unpin()

    def _insert(self, sequences: Sequence[Sequence[int]]) -> list[Node]:
        """The nodes of the first sequences, at least one: as many as have max_pass_tokens new tokens together."""
        tree, room = self._tree, self._max_pass_tokens
        ends: list[Node] = []
        for tokens in sequences:
            new = max(1, tree.missing(tokens))  # one for a token that must be computed again for its score
            if ends and new > room:
                break
            try:
                node = tree.insert(tokens, may_pass=True)
            except NoRoom:
                if ends:
                    break
                raise
            if node.ready and node.score is None:
                tree.split_last(node)
            ends.append(node)
            room -= new
        return ends

    def _plan(self) -> tuple[list[Node], Layout]:
        """New nodes in depth-first order, and who attends to what."""
        order: list[Node] = []
        segments: list[tuple[int, int]] = []
        found: list[tuple[int, int, list[Any], int]] = []  # rows start, end; slot arrays; first position

        def visit(node: Node, row: int) -> int:
            """Lays out the pinned nodes of a subtree from `row` on; returns the row after them."""
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

    def _forward(self, work: _Pass) -> Any:
        """Hidden states [T, H] of the new tokens before the final norm, right in rows `last`; fills the pool."""
        if self._last_mlp is not None:
            self._last_mlp.rows = work.last
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
    """Bytes of one token's keys and values."""
    layers, kv_heads, dim = _kv_shape(decoder)
    return int(2 * layers * kv_heads * dim * next(decoder.parameters()).element_size())


def _kv_shape(decoder: Any) -> tuple[int, int, int]:
    """(layers, KV heads, head size) of a decoder."""
    config = decoder.config.get_text_config()
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, config.num_key_value_heads, dim


def register() -> None:
    """Makes the packed attention known to transformers."""
    from transformers import AttentionInterface

    # Without a mask function transformers makes no mask; with one it reads the positions back from the device first.
    AttentionInterface.register(IMPLEMENTATION, _attention)


def _attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float | None = None, **kwargs: Any
) -> tuple[Any, None]:
    """transformers' attention function: query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D]."""
    work: _Pass = kwargs["guiderail_pass"]
    keys, values = kwargs["guiderail_pool"][module.layer_idx]
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    keys.index_copy_(0, work.self_slots, k)
    values.index_copy_(0, work.self_slots, v)
    out = shared_prefix_attention(
        q.contiguous(), k, v, keys, values, work.layout,
        scale=scaling, window=kwargs.get("sliding_window"), softcap=kwargs.get("softcap"),
    )  # fmt: skip
    return out[None], None

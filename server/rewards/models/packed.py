"""The packed runner: scores token sequences with a reward model, over a decoder that computes shared prefixes once."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from guiderail.kernels import reward_head
from guiderail.server.engines.engine_stats import RunnerStats
from guiderail.server.rewards.models.backend import scoring_thread
from guiderail.server.rewards.models.cpu_modules import norm_parts
from guiderail.server.rewards.models.packed_decoder import PackedDecoder
from guiderail.server.rewards.models.prefix_tree import Node, NoRoom


class PackedRunner(PackedDecoder):
    """Scores sequences at their last token with `heads` [K, hidden] on top of a decoder model."""

    def __init__(self, decoder: Any, heads: Any, *, capacity: int, max_pass_tokens: int = 8192) -> None:
        """Take the arguments of PackedDecoder. Raises ValueError for a decoder that does not end in an RMSNorm."""
        parts = norm_parts(decoder.norm)
        if parts is None:
            raise ValueError(f"{type(decoder).__name__} does not end in an RMSNorm that is known")
        self._norm_weight, self._eps, self._norm_minus_one = parts[0].detach(), parts[1], parts[2]
        decoder.norm = torch.nn.Identity()  # reward_head norms the gathered rows instead of all
        super().__init__(decoder, capacity=capacity, max_pass_tokens=max_pass_tokens)
        self._heads = heads.to(self._device, torch.float32)

    def warm_up(self) -> None:
        """Compile and load on CUDA all kernels that scoring can need, so that no request waits for that."""
        if self._device.type != "cuda":
            return
        self.score([[0, 0, 0], [0, 0, 1, 0]])  # a shared prefix and segments of their own: every kind of launch
        self.clear()
        self.stats = RunnerStats()

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def score(self, sequences: Sequence[Sequence[int]]) -> Any:
        """Return [S, K] float32 on the CPU: the heads' raw values after the last token of each (non-empty) sequence.

        Raises ValueError for a sequence that is empty or longer than the pool. One longer than a pass takes several.
        """
        self._check(sequences)
        scores: list[npt.NDArray[np.float32]] = []
        with self._counted(sum(map(len, sequences))):
            while len(scores) < len(sequences):
                first = sequences[len(scores)]
                while (missing := self._tree.missing(first)) > self._max_pass_tokens:  # its beginning, pass by pass
                    self._score_pass([first[: len(first) - missing + self._max_pass_tokens]])
                scores += self._score_pass(sequences[len(scores) :])
        return torch.from_numpy(np.stack(scores))

    def _score_pass(self, sequences: Sequence[Sequence[int]]) -> list[npt.NDArray[np.float32]]:
        """Return the scores of the first sequences, as many as one pass takes."""
        with self._batch():
            ends = self._insert(sequences)
            order, layout = self._plan()
            if order:
                wanted = [node for node in dict.fromkeys(ends) if not node.ready]
                last = {id(node): end - 1 for node, (_, end) in zip(order, layout.segments, strict=True)}
                work = self._prepared(order, layout, [last[id(node)] for node in wanted])
                hidden = self._forward(work)
                values = reward_head(
                    hidden, work.rows, self._norm_weight, self._eps, self._heads, None,
                    gemma_style=self._norm_minus_one, validate=False,
                ).cpu().numpy()  # fmt: skip
                self.stats.tokens_computed += len(work.ids)
                for node, value in zip(wanted, values, strict=True):
                    node.score = value
                for node in order:
                    node.ready = True
            return [_score(node) for node in ends]

    def _insert(self, sequences: Sequence[Sequence[int]]) -> list[Node]:
        """Return the nodes of the first sequences, at least one: as many as have a pass of new tokens together."""
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


def _score(node: Node) -> npt.NDArray[np.float32]:
    assert node.score is not None
    return node.score


class PackedBackend:
    """Backend over a PackedRunner, which the scoring thread owns."""

    def __init__(self, runner: PackedRunner, heads: int) -> None:
        self._runner: PackedRunner | None = runner
        self.heads = heads
        self.stats = runner.stats

    @property
    def up(self) -> bool:
        """True until it is closed."""
        return self._runner is not None

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return [S][heads] raw values after the last token of each sequence."""
        runner = self._runner
        assert runner is not None
        loop = asyncio.get_running_loop()
        values: list[list[float]] = await loop.run_in_executor(
            scoring_thread(), lambda: runner.score(sequences).tolist()
        )
        return values

    async def close(self) -> None:
        """Free the model."""
        self._runner = None

"""Log-probabilities of answers under a causal language model, over a decoder that computes shared prefixes once.

The hidden states of the answers' positions alone meet the LM head (guiderail.kernels.token_logprobs), so that no
[tokens, vocabulary] matrix is ever made. What was computed stays with the tokens in the prefix tree: an answer that
goes on costs its new tokens and the one before them.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from guiderail.kernels import token_logprobs
from guiderail.server.engines.engine_stats import RunnerStats
from guiderail.server.rewards.models.backend import Text, scoring_thread
from guiderail.server.rewards.models.conversation_tokens import ConversationEncoder
from guiderail.server.rewards.models.packed_decoder import PackedDecoder
from guiderail.server.rewards.models.prefix_tree import Node, NoRoom

Logprobs = npt.NDArray[np.float32]
WARM_ROWS = (16, 32, 64, 128)  # token_logprobs has one variant for each of these tiles of rows


class LogprobRunner(PackedDecoder):
    """Scores the tokens of answers with an LM head [V, hidden] on top of a decoder model, which keeps its last norm."""

    def __init__(
        self, decoder: Any, lm_head: Any, softcap: float | None, *, capacity: int, max_pass_tokens: int = 8192
    ) -> None:
        """lm_head: the weight, on the decoder's device and in its dtype. softcap: of the logits (Gemma 2), or None."""
        super().__init__(decoder, capacity=capacity, max_pass_tokens=max_pass_tokens)
        self._lm_head, self._softcap = lm_head, softcap

    def warm_up(self) -> None:
        """Compile and load on CUDA all kernels that scoring can need, so that no request waits for that."""
        if self._device.type != "cuda":
            return
        self.logprobs([([0, 0, 0], 1), ([0, 0, 1, 0], 1)])  # a shared prefix, and segments of their own
        for rows in WARM_ROWS:
            self.clear()
            self.logprobs([([0] * (rows + 1), 1)])
        self.clear()
        self.stats = RunnerStats()

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def logprobs(self, texts: Sequence[Text]) -> list[Logprobs]:
        """Return the log-probability of each token of an answer after all before it, float32, for every text.

        A text is its tokens and the position, at least 1, at which its answer starts. Raises ValueError for a text that
        is empty or longer than the pool. One longer than a pass takes several.
        """
        self._check([tokens for tokens, _ in texts])
        if any(start < 1 for _, start in texts):
            raise ValueError("an answer must start behind at least one token, which predicts its first")
        found: list[Logprobs] = []
        with self._counted(sum(len(tokens) for tokens, _ in texts)):
            while len(found) < len(texts):
                tokens, start = texts[len(found)]
                while (new := self._new(tokens, start)) > self._max_pass_tokens:  # its beginning, pass by pass
                    self._logprobs_pass([(tokens[: len(tokens) - new + self._max_pass_tokens], start)])
                found += self._logprobs_pass(texts[len(found) :])
        return found

    def _new(self, tokens: Sequence[int], start: int) -> int:
        """Return the number of last tokens to compute: all from the one that predicts the first unknown one on."""
        known = self._tree.known(tokens, start)
        return max(self._tree.missing(tokens), len(tokens) - known + 1 if known < len(tokens) else 0)

    def _logprobs_pass(self, texts: Sequence[Text]) -> list[Logprobs]:
        """Return the log-probabilities of the first texts, as many as one pass takes."""
        with self._batch():
            ends = self._insert(texts)
            order, layout = self._plan()
            if order:
                wanted = self._wanted(ends)
                edges = dict(zip(order, layout.segments, strict=True))
                rows, targets = [0], [0]  # one of no use, for where nothing is wanted: layers need at least one row
                for node, first in wanted.items():
                    assert node.parent is not None
                    start, end = edges[node]
                    rows.append(start + first - 1 if first else edges[node.parent][1] - 1)
                    rows += range(start + first, end - 1)
                    targets += node.tokens[first:]
                work = self._prepared(order, layout, rows, np.array(targets, np.int64))
                hidden = self._forward(work)[work.rows]
                read = token_logprobs(hidden, self._lm_head, work.beside[0], softcap=self._softcap, validate=False)
                values = read.cpu().numpy()
                values[np.isnan(values)] = -np.inf  # NaN stands for what is unknown; neither gives a finite score
                self.stats.tokens_computed += len(work.ids)
                at = 1
                for node, first in wanted.items():
                    if node.logprobs is None:
                        node.logprobs = np.full(len(node.tokens), np.nan, np.float32)
                    count = len(node.tokens) - first
                    node.logprobs[first:] = values[at : at + count]
                    at += count
                for node in order:
                    node.ready = True
            return [_read(end, start) for end, start in ends]

    def _insert(self, texts: Sequence[Text]) -> list[tuple[Node, int]]:
        """Return end and answer's start of the first texts, at least one: as many as have a pass of new tokens."""
        tree, room = self._tree, self._max_pass_tokens
        ends: list[tuple[Node, int]] = []
        for tokens, start in texts:
            new = self._new(tokens, start)
            if ends and new > room:
                break
            try:
                end = tree.insert(tokens, may_pass=True)
            except NoRoom:
                if ends:
                    break
                raise
            known = tree.known(tokens, start)
            if known < len(tokens):
                tree.reopen(end, known - 1)
            ends.append((end, start))
            room -= new
        return ends

    @staticmethod
    def _wanted(ends: Sequence[tuple[Node, int]]) -> dict[Node, int]:
        """Return the nodes with tokens that have no log-probability and need one, and the first such token of each."""
        wanted: dict[Node, int] = {}
        for end, start in ends:
            node = end
            while node.parent is not None and node.end > start:
                first = max(0, start - node.start)
                if node.logprobs is not None:
                    unknown = np.flatnonzero(np.isnan(node.logprobs[first:]))
                    first = first + int(unknown[0]) if len(unknown) else len(node.tokens)
                if first < len(node.tokens):
                    wanted[node] = min(first, wanted.get(node, first))
                node = node.parent
        return wanted


def _read(end: Node, start: int) -> Logprobs:
    """Return the log-probabilities on the path to a node from a position on."""
    parts: list[Logprobs] = []
    node = end
    while node.parent is not None and node.end > start:
        assert node.logprobs is not None
        parts.append(node.logprobs[max(0, start - node.start) :])
        node = node.parent
    return np.concatenate(parts[::-1]) if parts else np.empty(0, np.float32)


class PackedPolicy:
    """LanguageModel over a LogprobRunner, which the scoring thread owns."""

    def __init__(self, runner: LogprobRunner, conversations: ConversationEncoder) -> None:
        self._runner: LogprobRunner | None = runner
        self.conversations = conversations

    async def logprobs(self, texts: Sequence[Text]) -> list[list[float]]:
        """Return the log-probability of each token of each text's answer."""
        runner = self._runner
        assert runner is not None
        loop = asyncio.get_running_loop()
        found: list[list[float]] = await loop.run_in_executor(
            scoring_thread(), lambda: [each.tolist() for each in runner.logprobs(texts)]
        )
        return found

    async def close(self) -> None:
        """Free the model."""
        self._runner = None

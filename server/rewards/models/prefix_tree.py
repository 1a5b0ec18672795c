"""A radix tree of token sequences whose keys and values are kept, with a bounded number of token slots.

Sequences that begin alike share nodes, whatever the reason: a common prompt, an answer that went on, a
rollout of a candidate. The tree knows tokens and slots only; the runner computes what is missing.

Where a batch has taken all slots, new leaves are passing: nothing continues them in this batch, so nothing reads
their keys and values from the pool. They all name one slot past the others, and leave the tree with the batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


class NoRoom(Exception):
    """The sequences of one batch need more slots than there are."""


@dataclass(eq=False)
class Node:
    """Consecutive tokens, the slots of their keys and values, and what was computed from their hidden states.

    `ready` is False until the runner has computed the node. score: a reward head's values after the last token, None
    until asked for. logprobs: of each token after the ones before it, float32, NaN until asked for; None: all of them.
    The slots of a `passing` node hold nothing afterwards.
    """

    tokens: tuple[int, ...]
    slots: npt.NDArray[np.int64]
    start: int
    parent: "Node | None"
    ready: bool = False
    score: npt.NDArray[np.float32] | None = None
    logprobs: npt.NDArray[np.float32] | None = None
    used: int = 0
    pinned: bool = False
    passing: bool = False
    children: dict[int, "Node"] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)


class PrefixTree:
    """The tree over `capacity` slots. Least recently used leaves make room for new nodes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.root = Node((), np.empty(0, np.int64), 0, None, ready=True)
        self._free = np.arange(capacity - 1, -1, -1, dtype=np.int64)
        self._n_free = capacity
        self._clock = 0

    @property
    def used_slots(self) -> int:
        """Slots that hold tokens now."""
        return self.capacity - self._n_free

    def insert(self, tokens: Sequence[int], *, may_pass: bool = False) -> Node:
        """Return the node that ends with `tokens` (not empty), made and split as needed, pinned with its ancestors.

        may_pass: where pinned nodes leave too few slots for the new tokens, they become a passing node.
        Raises NoRoom if they may not, or if a passing node would have to be kept as others go on from it; the tree is
        then as before, but for nodes that were split, and the sequence belongs into another batch.
        """
        self._clock += 1
        node, at = self.root, 0
        self._touch(node)
        while at < len(tokens):
            child = node.children.get(tokens[at])
            if child is None:
                child = self._append(node, tuple(tokens[at:]), may_pass)
            else:
                common = _common(child.tokens, tokens, at)
                if child.passing and (common < len(child.tokens) or at + common < len(tokens)):
                    self._keep(child)
                if common < len(child.tokens):
                    child = self._split(child, common)
            node, at = child, at + len(child.tokens)
            self._touch(node)
        return node

    def missing(self, tokens: Sequence[int]) -> int:
        """Return the number of `tokens` that lie in no node yet."""
        node, at = self.root, 0
        while at < len(tokens):
            child = node.children.get(tokens[at])
            if child is None:
                break
            common = _common(child.tokens, tokens, at)
            node, at = child, at + common
            if common < len(child.tokens):
                break
        return len(tokens) - at

    def known(self, tokens: Sequence[int], start: int) -> int:
        """Return the first position from `start` on whose token has no log-probability yet; len(tokens) if all do."""
        node, at = self.root, 0
        while at < len(tokens) and (child := node.children.get(tokens[at])) is not None:
            common = _common(child.tokens, tokens, at)
            first = max(0, start - at)
            if first < common:
                if child.logprobs is None:
                    return at + first
                unknown = np.flatnonzero(np.isnan(child.logprobs[first:common]))
                if len(unknown):
                    return at + first + int(unknown[0])
            node, at = child, at + common
            if common < len(child.tokens):
                break
        return min(max(at, start), len(tokens))

    def reopen(self, end: Node, position: int) -> None:
        """Let what is ready of the path to `end` be computed again from a position on, in the slots that it has."""
        node: Node | None = end
        while node is not None and node.end > position:
            if node.ready and node.start < position:
                self._split(node, position - node.start)
            node.ready = False
            node = node.parent

    def split_last(self, node: Node) -> Node:
        """Make the last token of a ready node without a score a node to be computed again, and return that."""
        if len(node.tokens) > 1:
            head = self._split(node, len(node.tokens) - 1)
            self._touch(head)
        node.ready = False
        return node

    def unpin(self) -> None:
        """End a batch: every node may be evicted again, and passing ones are gone."""
        for node in list(self.walk()):
            node.pinned = False
            if node.passing:
                self._unlink(node)

    def drop_unready(self) -> None:
        """Remove nodes that were never computed (their batch failed), with all beneath them."""
        for node in [n for n in self.walk() if not n.ready and n.parent is not None and n.parent.ready]:
            for each in list(_subtree(node)):
                if not each.passing:
                    self._release(each.slots)
            self._unlink(node)

    def walk(self) -> Iterator[Node]:
        """Iterate over all nodes, parents before children."""
        return _subtree(self.root)

    def _touch(self, node: Node) -> None:
        node.used, node.pinned = self._clock, True

    def _append(self, parent: Node, tokens: tuple[int, ...], may_pass: bool) -> Node:
        try:
            node = Node(tokens, self._take(len(tokens)), parent.end, parent)
        except NoRoom:
            if not may_pass:
                raise
            slots = np.full(len(tokens), self.capacity, np.int64)
            node = Node(tokens, slots, parent.end, parent, passing=True)
        parent.children[tokens[0]] = node
        return node

    def _keep(self, node: Node) -> None:
        """Give a passing node slots, as others will read it."""
        node.slots, node.passing = self._take(len(node.tokens)), False

    def _split(self, node: Node, length: int) -> Node:
        """Put the node's first `length` tokens into a new parent of it and return that."""
        assert node.parent is not None
        head = Node(node.tokens[:length], node.slots[:length], node.start, node.parent, node.ready, used=node.used)
        head.pinned = node.pinned
        if node.logprobs is not None:
            head.logprobs, node.logprobs = node.logprobs[:length], node.logprobs[length:]
        node.parent.children[head.tokens[0]] = head
        node.tokens, node.slots, node.start, node.parent = node.tokens[length:], node.slots[length:], head.end, head
        head.children[node.tokens[0]] = node
        return head

    def _take(self, count: int) -> npt.NDArray[np.int64]:
        if self._n_free < count:
            self._evict(count)
        self._n_free -= count
        return self._free[self._n_free : self._n_free + count][::-1].copy()

    def _release(self, slots: npt.NDArray[np.int64]) -> None:
        self._free[self._n_free : self._n_free + len(slots)] = slots[::-1]
        self._n_free += len(slots)

    def _evict(self, count: int) -> None:
        if self._n_free + sum(len(n.slots) for n in self.walk() if not n.pinned) < count:
            raise NoRoom(f"{count} tokens do not fit beside those that this batch needs, of {self.capacity}")
        leaves = sorted((n for n in self.walk() if not n.children and not n.pinned and n.parent), key=lambda n: n.used)
        while self._n_free < count:
            leaf = leaves.pop(0)
            parent = leaf.parent
            assert parent is not None
            self._release(leaf.slots)
            self._unlink(leaf)
            if not parent.children and not parent.pinned and parent.parent is not None:
                leaves.append(parent)
                leaves.sort(key=lambda n: n.used)

    @staticmethod
    def _unlink(node: Node) -> None:
        assert node.parent is not None
        del node.parent.children[node.tokens[0]]


def _subtree(node: Node) -> Iterator[Node]:
    stack = [node]
    while stack:
        each = stack.pop()
        yield each
        stack.extend(each.children.values())


def _common(tokens: tuple[int, ...], other: Sequence[int], at: int) -> int:
    """Return the number of leading `tokens` that equal those of other[at:]."""
    limit = min(len(tokens), len(other) - at)
    for i in range(limit):
        if tokens[i] != other[at + i]:
            return i
    return limit

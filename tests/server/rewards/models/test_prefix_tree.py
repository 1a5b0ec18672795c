"""The prefix tree: sharing, splitting, eviction by age, and that slots are never lost or doubled."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guiderail.server.rewards.models.prefix_tree import NoRoom, PrefixTree


def ready(tree: PrefixTree) -> None:
    for node in tree.walk():
        node.ready = True
    tree.unpin()


def slots_of(tree: PrefixTree, tokens: list[int]) -> list[int]:
    node, found = tree.insert(tokens), []
    while node.parent is not None:
        found = [*node.slots.tolist(), *found]
        node = node.parent
    return found


def test_sequences_that_begin_alike_share_slots() -> None:
    tree = PrefixTree(100)
    a, b = slots_of(tree, [1, 2, 3, 4]), slots_of(tree, [1, 2, 9])
    assert a[:2] == b[:2]
    assert len({*a, *b}) == 5 == tree.used_slots
    assert slots_of(tree, [1, 2, 3, 4, 5])[:4] == a
    assert slots_of(tree, [1]) == a[:1]


def test_the_oldest_leaves_make_room_and_pinned_ones_stay() -> None:
    tree = PrefixTree(6)
    for tokens in ([1, 2], [3, 4], [5, 6]):
        tree.insert(tokens)
        ready(tree)
    slots_of(tree, [1, 2])  # used again
    ready(tree)
    tree.insert([7, 8, 9])
    kept = {node.tokens for node in tree.walk() if node.tokens}
    assert kept == {(1, 2), (7, 8, 9)}
    with pytest.raises(NoRoom):
        tree.insert([10, 11, 12, 13])  # [7, 8, 9] is pinned


def test_nodes_of_a_failed_batch_are_dropped() -> None:
    tree = PrefixTree(20)
    tree.insert([1, 2])
    ready(tree)
    tree.insert([1, 2, 3])
    tree.insert([4, 5])
    tree.drop_unready()
    assert [node.tokens for node in tree.walk() if node.tokens] == [(1, 2)]
    assert tree.used_slots == 2


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=40))
def test_slots_are_conserved(sequences: list[list[int]]) -> None:
    tree = PrefixTree(12)
    for tokens in sequences:
        found = slots_of(tree, tokens)
        assert len(found) == len(set(found)) == len(tokens)
        ready(tree)
        held = [slot for node in tree.walk() for slot in node.slots.tolist()]
        assert len(held) == len(set(held)) == tree.used_slots <= 12
        for node in tree.walk():
            for first, child in node.children.items():
                assert child.tokens[0] == first
                assert child.start == node.end
                assert child.parent is node


def test_what_a_batch_has_no_slots_for_passes_through() -> None:
    """A leaf without slots is kept while its batch lasts; what goes on from it needs slots."""
    tree = PrefixTree(6)
    tree.insert([1, 2], may_pass=True)
    tree.insert([1, 2, 3, 4], may_pass=True)
    leaf = tree.insert([1, 2, 5, 6, 7], may_pass=True)
    assert leaf.passing
    assert leaf.slots.tolist() == [6, 6, 6]
    assert tree.insert([1, 2, 5, 6, 7], may_pass=True) is leaf
    assert tree.missing([1, 2, 5, 6, 7, 8]) == 1
    for longer in ([1, 2, 5, 6, 7, 8], [1, 2, 5, 9], [1, 2, 5]):
        with pytest.raises(NoRoom):
            tree.insert(longer, may_pass=True)
    assert tree.used_slots == 4
    ready(tree)
    assert {node.tokens for node in tree.walk() if node.tokens} == {(1, 2), (3, 4)}
    assert not tree.insert([1, 2, 5, 6, 7], may_pass=True).passing  # the oldest leaf made room


def test_nothing_is_evicted_in_vain() -> None:
    tree = PrefixTree(6)
    tree.insert([1, 2])
    ready(tree)
    tree.insert([3, 4])
    with pytest.raises(NoRoom):
        tree.insert([5, 6, 7, 8, 9])
    assert {node.tokens for node in tree.walk() if node.tokens} == {(1, 2), (3, 4)}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=6), max_size=12))
def test_slots_are_conserved_in_batches_that_pass(batches: list[list[list[int]]]) -> None:
    """No kept node names a slot of another or the spare one, and nothing goes on from a passing node."""
    tree = PrefixTree(12)
    for batch in batches:
        for tokens in batch:
            try:
                assert tree.insert(tokens, may_pass=True).end == len(tokens)
            except NoRoom:
                break
            kept = [slot for node in tree.walk() if not node.passing for slot in node.slots.tolist()]
            assert len(kept) == len(set(kept)) == tree.used_slots
            assert all(slot < 12 for slot in kept)
            assert not any(node.children for node in tree.walk() if node.passing)
        ready(tree)
        assert not any(node.passing for node in tree.walk())

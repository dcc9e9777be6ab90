"""Placement: shares, replicas, equality, and a typed error for every unsound input."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecoll import InvalidArgument, Placement

MASK = np.array([[True, False, True], [False, True, False]])


@given(num_chunks=st.integers(0, 60), world_size=st.integers(1, 20))
def test_even_shares_are_contiguous_and_differ_by_one_at_most(num_chunks: int, world_size: int) -> None:
    place = Placement.even(num_chunks, world_size)
    shares = [place.owned_by(rank) for rank in range(world_size)]
    np.testing.assert_array_equal(np.concatenate(shares), np.arange(num_chunks))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1 and lengths == sorted(lengths, reverse=True)
    assert (place.num_chunks, place.world_size) == (num_chunks, world_size)
    assert place.holders.sum() == num_chunks and len(place.replicated()) == 0
    for rank, share in enumerate(shares):
        np.testing.assert_array_equal(place.held_by(rank), share)


def test_uneven_shares_give_the_larger_ones_first() -> None:
    assert Placement.even(7, 3).owners.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert Placement.even(2, 4).owners.tolist() == [0, 1]


def test_types_and_shapes() -> None:
    place = Placement([2, 1], MASK.tolist())
    assert place.owners.dtype == np.int32 and place.owners.shape == (2,)
    assert place.holders.dtype == np.bool_ and place.holders.shape == (2, 3)
    assert Placement([], np.zeros((0, 4), bool)).world_size == 4
    assert Placement.of_owners(np.array([3, 0], np.uint8), 4).owners.tolist() == [3, 0]


def test_who_owns_and_who_holds() -> None:
    place = Placement.of_owners([2, 0, 2, 1], 3).replicate({3: [0, 2], 0: [0]})
    assert [place.owned_by(rank).tolist() for rank in range(3)] == [[1], [3], [0, 2]]
    assert [place.held_by(rank).tolist() for rank in range(3)] == [[0, 1, 3], [3], [0, 2, 3]]
    assert place.replicated().tolist() == [0, 3]


def test_replicate_adds_to_a_new_placement() -> None:
    before = Placement.even(4, 2)
    after = before.replicate({0: [1], 3: range(2)}).replicate({0: [0, 1, 1]})
    assert after.holders.tolist() == [[True, True], [True, False], [False, True], [True, True]]
    assert before == Placement.even(4, 2) and before != after
    assert after.owners.tolist() == before.owners.tolist()
    assert before.replicate({}) == before
    assert before.replicate({np.int64(0): np.array([1])}) == before.replicate({0: [1]})


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: Placement([3, 1], MASK), r"owners in 0\.\.2, got 3 for chunk 0"),
        (lambda: Placement([0, -1], MASK), r"owners in 0\.\.2, got -1 for chunk 1"),
        (lambda: Placement([1, 1], MASK), "include the owner, but chunk 0 leaves out rank 1"),
        (lambda: Placement([0, 2], MASK), "include the owner, but chunk 1 leaves out rank 2"),
        (lambda: Placement([0], MASK), r"holders of shape \[1, world_size\], got \[2, 3\]"),
        (lambda: Placement([0, 1, 1], MASK), r"holders of shape \[3, world_size\], got \[2, 3\]"),
        (lambda: Placement([0, 1], MASK[0]), r"holders of shape \[2, world_size\], got \[3\]"),
        (lambda: Placement([0, 1], MASK[None]), r"got \[1, 2, 3\]"),
        (lambda: Placement([], np.zeros((0, 0), bool)), r"got \[0, 0\]"),
        (lambda: Placement([0, 1], MASK.astype(int)), "holders to be a bool mask, got int64"),
        (lambda: Placement([0, 1], MASK.astype(float)), "holders to be a bool mask, got float64"),
        (lambda: Placement([0, 1], "text"), "holders to be a bool mask"),
        (lambda: Placement([0, 1], None), "holders to be a bool mask, got object"),
        (lambda: Placement([0.0, 1.0], MASK), "owners to be a list of integers, got float64"),
        (lambda: Placement([False, True], MASK), "owners to be a list of integers, got bool"),
        (lambda: Placement(["0", "1"], MASK), "owners to be a list of integers"),
        (lambda: Placement([[0], [1]], MASK), r"owners to be a list of integers, got int64 of shape \[2, 1\]"),
        (lambda: Placement(0, MASK), "owners to be a list of integers"),
        (lambda: Placement([2**70, 0], MASK), "owners to be a list of integers, got object"),
        (lambda: Placement.of_owners([0, 4], 4), r"owners in 0\.\.3, got 4 for chunk 1"),
        (lambda: Placement.of_owners([0.5], 4), "owners to be a list of integers"),
        (lambda: Placement.of_owners([], 0), "world_size"),
        (lambda: Placement.even(-1, 2), "num_chunks >= 0 and world_size >= 1, got -1 and 2"),
        (lambda: Placement.even(2, 0), "num_chunks >= 0 and world_size >= 1, got 2 and 0"),
        (lambda: Placement.even(4, 2).replicate({4: [0]}), r"chunks in 0\.\.3, got 4"),
        (lambda: Placement.even(4, 2).replicate({-1: [0]}), r"chunks in 0\.\.3, got -1"),
        (lambda: Placement.even(4, 2).replicate({1: [2]}), r"ranks in 0\.\.1, got 2 for chunk 1"),
        (lambda: Placement.even(4, 2).replicate({1: [-1]}), r"ranks in 0\.\.1, got -1 for chunk 1"),
        (lambda: Placement([[0], [0, 1]], MASK), "owners to be a list of integers"),
        (lambda: Placement([0, 1], [[True], [True, False]]), "holders"),
        (lambda: Placement.even(2.5, 2), "num_chunks"),  # type: ignore[arg-type]
        (lambda: Placement.even(4, 2).replicate({0.5: [1]}), "chunks"),  # type: ignore[dict-item]
        (lambda: Placement.even(4, 2).replicate({0: [0.5]}), "ranks"),  # type: ignore[list-item]
    ],
)
def test_unsound_input_is_refused_by_name(make: Callable[[], object], rule: str) -> None:
    with pytest.raises(InvalidArgument, match=rule) as caught:
        make()
    assert str(caught.value).startswith("Placement")


def test_content_cannot_change() -> None:
    owners, mask = np.array([0, 1]), MASK.copy()
    place = Placement(owners, mask)
    before = place.digest
    owners[0], mask[:] = 2, False
    assert place == Placement([0, 1], MASK) and place.digest == before
    for array in (place.owners, place.holders):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_content_cannot_change_after_pickling() -> None:
    place = Placement([0, 1], MASK)
    twin = pickle.loads(pickle.dumps(place))
    assert twin == place and hash(twin) == hash(place) and twin.digest == place.digest
    with pytest.raises(ValueError, match="read-only"):
        twin.owners[0] = 2


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    world_size, num_chunks = draw(st.integers(1, 6)), draw(st.integers(0, 8))
    owners = draw(st.lists(st.integers(0, world_size - 1), min_size=num_chunks, max_size=num_chunks))
    bits = draw(st.lists(st.booleans(), min_size=num_chunks * world_size, max_size=num_chunks * world_size))
    mask = np.array(bits, bool).reshape(num_chunks, world_size)
    mask[np.arange(num_chunks), owners] = True
    return Placement(owners, mask)


@given(a=placements(), b=placements())
def test_equal_exactly_if_content_is(a: Placement, b: Placement) -> None:
    same = np.array_equal(a.owners, b.owners) and np.array_equal(a.holders, b.holders)
    assert (a == b) is same and (a.digest == b.digest) is same
    twin = Placement(a.owners.tolist(), a.holders.copy())
    assert twin == a and hash(twin) == hash(a) and twin is not a


@given(place=placements(), data=st.data())
def test_digest_sees_every_owner_and_every_bit(place: Placement, data: Any) -> None:
    if place.num_chunks == 0 or place.world_size == 1:
        assert place != Placement.even(place.num_chunks, place.world_size + 1), "the shape counts as well"
        return
    chunk = data.draw(st.integers(0, place.num_chunks - 1))
    rank = data.draw(st.integers(0, place.world_size - 1))
    mask = place.holders.copy()
    mask[chunk, rank] ^= True
    if rank != place.owners[chunk]:
        assert Placement(place.owners, mask).digest != place.digest
    owners = place.owners.copy()
    owners[chunk] = rank
    if rank != place.owners[chunk] and place.holders[chunk, rank]:
        assert Placement(owners, place.holders).digest != place.digest


def test_other_types_are_never_equal() -> None:
    place = Placement.even(2, 2)
    assert place != "Placement" and place != place.owners.tolist()


def test_repr_tells_size_and_replicas() -> None:
    text = repr(Placement.even(4, 2).replicate({0: [1]}))
    assert "num_chunks=4" in text and "world_size=2" in text and "replicas=1" in text

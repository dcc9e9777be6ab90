"""The native balancers give what the readable ones give, integer for integer."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparsecoll import Placement, native
from sparsecoll.balance.divide import divide_readably
from sparsecoll.balance.relief import relieve_ranks
from sparsecoll.errors import InvalidArgument

seeds = st.integers(0, 2**32 - 1)


class Case(NamedTuple):
    loads: NDArray[np.int64]
    place: Placement
    node_of: NDArray[np.int32]


def case_of(seed: int) -> Case:
    """1 to 40 ranks on 1 to 5 nodes in any order, loads of all sizes, ties and zeros, no replicas or many."""
    random = np.random.default_rng(seed)
    world_size, num_experts = int(random.integers(1, random.choice([4, 9, 41]))), int(random.integers(0, 30))
    popularity = random.permutation(np.arange(1, num_experts + 1) ** -float(random.choice([0.0, 0.8, 1.5])))
    most = random.choice([2.0, 30.0, 5e3, 1e12])
    loads = (random.random((world_size, num_experts)) * popularity * most).astype(np.int64)
    owners = random.integers(0, world_size, num_experts) if random.random() < 0.7 else np.zeros(num_experts, int)
    mask = random.random((num_experts, world_size)) < random.choice([0.0, 0.0, 0.05, 0.3, 0.8])
    mask[np.arange(num_experts), owners] = True
    nodes = np.unique(random.integers(0, random.integers(1, 6), world_size), return_inverse=True)[1]
    return Case(loads, Placement(owners, mask), nodes.astype(np.int32))


@settings(deadline=None, max_examples=150)
@given(seed=seeds, most=st.sampled_from([0, 1, 2, 3, 5, 8]), min_tokens=st.sampled_from([1, 2, 32, 10_000]))
def test_reliefs_are_equal(seed: int, most: int, min_tokens: int) -> None:
    loads, place, _ = case_of(seed)
    readable = relieve_ranks(loads, place.owners, place.holders, most, min_tokens)
    found = native.relieve_ranks(loads, place.owners, place.holders, most, min_tokens)
    assert [each[:3] for each in found] == [each[:3] for each in readable]
    for (*_, moves), relief in zip(found, readable, strict=True):
        assert moves.dtype == np.int64 and moves.shape == relief.moves.shape
        np.testing.assert_array_equal(moves, relief.moves)


@settings(deadline=None, max_examples=150)
@given(seed=seeds)
def test_divisions_are_equal(seed: int) -> None:
    loads, place, node_of = case_of(seed)
    readable = divide_readably(loads, place.owners, place.holders, node_of)
    found = native.divide_loads(loads, place.owners, place.holders, node_of)
    assert found.dtype == np.int64 and found.shape == readable.shape
    np.testing.assert_array_equal(found, readable)


def test_random_cases_have_work_to_do() -> None:
    cases = [case_of(seed) for seed in range(60)]
    reliefs = [native.relieve_ranks(loads, place.owners, place.holders, 5, 1) for loads, place, _ in cases]
    assert sum(len(each) > 2 for each in reliefs) > 10
    divided = [native.divide_loads(loads, place.owners, place.holders, nodes) for loads, place, nodes in cases]
    assert (
        sum(
            (quotas > 0).sum() > (loads.sum(axis=0) > 0).sum()
            for quotas, (loads, *_) in zip(divided, cases, strict=True)
        )
        > 10
    )


def arguments(**changes: Any) -> dict[str, Any]:
    """Sound ones, but for the changes."""
    sound = {"loads": np.ones((2, 4), np.int64), "owners": np.zeros(4, np.int32), "holders": np.ones((4, 2), bool)}
    return {**sound, **changes}


class TestArguments:
    @pytest.mark.parametrize(
        "changes",
        [
            {"loads": np.ones((3, 4), np.int64)},
            {"loads": np.ones((2, 3), np.int64)},
            {"loads": np.ones((2, 4), np.int32)},
            {"loads": np.ones((4, 2), np.int64).T},
            {"loads": np.ones((0, 4), np.int64)},
            {"owners": np.full(4, 2, np.int32)},
            {"owners": np.full(4, -1, np.int32)},
            {"owners": np.zeros(3, np.int32)},
            {"holders": np.ones((4, 3), bool)},
            {"holders": np.ones((4, 2), np.uint8)},
        ],
    )
    def test_unsound_ones_are_refused(self, changes: dict[str, Any]) -> None:
        with pytest.raises(InvalidArgument, match=r"^relieve_ranks: "):
            native.relieve_ranks(**arguments(**changes), most=1, min_tokens=1)
        with pytest.raises(InvalidArgument, match=r"^divide_loads: "):
            native.divide_loads(**arguments(**changes), node_of=np.zeros(2, np.int32))

    def test_every_rank_has_a_node(self) -> None:
        with pytest.raises(InvalidArgument, match=r"^divide_loads: expected a node of every rank"):
            native.divide_loads(**arguments(), node_of=np.zeros(3, np.int32))

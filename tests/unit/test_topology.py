"""Ranks on nodes and their links."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest

from sparsecoll import InvalidArgument, Link, Topology

FAST, SLOW = Link(10e9, 1e-6), Link(1e9, 1e-5)


def test_flat_is_one_node() -> None:
    topology = Topology.flat(5)
    assert topology.node_of == (0,) * 5
    assert (topology.world_size, topology.num_nodes) == (5, 1)
    assert topology.link(0, 4) == topology.scale_up


def test_hosts_become_nodes_in_order_of_appearance() -> None:
    topology = Topology.from_hosts(["b", "a", "b", "c", "a"])
    assert topology.node_of == (0, 1, 0, 2, 1)
    assert topology.num_nodes == 3


def test_a_link_depends_on_whether_nodes_are_equal() -> None:
    topology = Topology((0, 1, 0), scale_up=FAST, scale_out=SLOW)
    assert [[topology.link(src, dst) for dst in range(3)] for src in range(3)] == [
        [FAST, SLOW, FAST],
        [SLOW, FAST, SLOW],
        [FAST, SLOW, FAST],
    ]


def test_ranks_and_nodes_may_have_links_of_their_own() -> None:
    topology = Topology((0, 0, 1), scale_up=(FAST, SLOW, FAST), scale_out=(SLOW, SLOW, FAST), node_link=(FAST, SLOW))
    assert [topology.scale_up_of(rank) for rank in range(3)] == [FAST, SLOW, FAST]
    assert [topology.scale_out_of(rank) for rank in range(3)] == [SLOW, SLOW, FAST]
    assert [topology.node_link_of(node) for node in range(2)] == [FAST, SLOW]
    assert topology.link(0, 1) == SLOW
    assert topology.link(0, 2) == topology.link(2, 0) == SLOW, "the slowest link on the way"
    assert Topology((0, 1), scale_out=(SLOW, SLOW)) == Topology((0, 1), scale_out=SLOW)
    assert Topology((0, 1)).node_link_of(0) is None


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: Topology(()), "at least one rank"),
        (lambda: Topology.from_hosts([]), "at least one rank"),
        (lambda: Topology((0, 2)), r"without gaps, got \[0, 2\]"),
        (lambda: Topology((1, 1)), r"from 0 without gaps, got \[1\]"),
        (lambda: Topology((-1, 0)), r"from 0 without gaps, got \[-1, 0\]"),
        (lambda: Topology.flat(0), "world_size >= 1, got 0"),
        (lambda: Topology.flat(-3), "world_size >= 1, got -3"),
        (lambda: Topology((0, 1), scale_up=(FAST,)), "scale_up to be a Link or 2 Links, got 1"),
        (lambda: Topology((0, 0), node_link=(FAST, FAST)), "node_link to be a Link or 1 Links, got 2"),
        (lambda: Topology((0, 0), scale_out=7), "scale_out to be a Link or 2 Links, got 7"),
        (lambda: Link(0.0, 0.0), "positive bandwidth"),
        (lambda: Link(-1.0, 0.0), "positive bandwidth"),
        (lambda: Link(math.nan, 0.0), "positive bandwidth"),
        (lambda: Link(1.0, -1e-9), "latency of at least 0"),
        (lambda: Link(1.0, math.nan), "latency of at least 0"),
    ],
)
def test_unsound_ones_are_refused(make: Callable[[], object], rule: str) -> None:
    with pytest.raises(InvalidArgument, match=rule):
        make()


def test_equal_by_content_and_frozen() -> None:
    assert Topology((0, 0, 1), FAST, SLOW) == Topology((0, 0, 1), FAST, SLOW)
    assert hash(Topology((0, 0, 1))) == hash(Topology((0, 0, 1)))
    assert len({Topology((0, 0)), Topology((0, 1)), Topology((0, 0), FAST), Topology((0, 0), FAST, SLOW)}) == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        Topology.flat(2).node_of = (0,)  # type: ignore[misc]


def test_a_list_of_nodes_is_as_good_as_a_tuple() -> None:
    """Planning keeps plans by topology, so it must be hashable however it was written."""
    written = Topology([0, 0, 1])  # type: ignore[arg-type]
    assert written == Topology((0, 0, 1))
    assert hash(written) == hash(Topology((0, 0, 1)))

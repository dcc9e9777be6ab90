"""The probe with threads as ranks, and the topologies that groups are given."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sparsecoll as sc
from sparsecoll.probe import probe
from sparsecoll.transport.base import Transport
from sparsecoll.transport.local import run_local as run_transports
from tests.emulation.world import run_emulated

Given = sc.Topology | str | os.PathLike[str] | None


def as_tuple(links: Any) -> tuple[sc.Link, ...]:
    return links if isinstance(links, tuple) else (links,)


# --- measuring


@pytest.mark.parametrize("node_of", [(0,), (0, 0), (0,) * 5, (0, 1), (0, 1, 0, 2, 1)], ids=str)
@pytest.mark.parametrize("checked", [True, False])
def test_all_ranks_get_the_same(node_of: tuple[int, ...], checked: bool) -> None:
    def main(group: sc.Group) -> sc.Topology:
        found = probe(group, duration_s=0.2)
        group.barrier()  # the group is as good as before
        return found

    topologies = sc.run_local(main, len(node_of), topology=sc.Topology(node_of), checked=checked)
    assert len(set(topologies)) == 1
    found = topologies[0]
    assert found.node_of == node_of
    default = sc.Topology(node_of)
    # What was measured is no default; what nobody could measure is.
    assert (found.scale_up != default.scale_up) == (len(set(node_of)) < len(node_of))
    assert (found.scale_out != default.scale_out) == (len(set(node_of)) > 1)
    for link in (*as_tuple(found.scale_up), *as_tuple(found.scale_out)):
        assert 1e6 < link.bandwidth_bytes_per_s < 1e12 and 1e-8 < link.latency_s < 1.0


def test_links_between_devices_are_measured_on_streams() -> None:
    def main(group: sc.Group) -> sc.Topology:
        found = probe(group, duration_s=0.2)
        held = sc.sparse_all_gather(np.ones((1, 4)), sc.Placement.even(2, 2).replicate({0: [1], 1: [0]}), group=group)
        assert held.sum() == 8  # the group is as good as before
        return found

    first, second = run_emulated(main, 2, topology=sc.Topology((0, 0)))
    assert first == second and first.in_rounds and first.scale_up != sc.Topology((0, 0)).scale_up
    for link in as_tuple(first.scale_up):
        assert 1e5 < link.bandwidth_bytes_per_s < 1e12 and 1e-8 < link.latency_s < 1.0


def test_the_default_group_may_take_the_result() -> None:
    def main(group: sc.Group) -> bool:
        group.topology = probe(duration_s=0.1)
        plan = sc.plan_all_gather(sc.Placement.even(2, 2).replicate({0: [1]}), 1000, group.topology)
        return plan.predicted_s > 0

    assert sc.run_local(main, 2) == [True, True]


def limited(transport: Transport, node_of: tuple[int, ...], locks: list[Any], bytes_per_s: float) -> Transport:
    """Messages between nodes leave at ``bytes_per_s``, one after the other where ranks have a lock in common."""
    post, rank = transport.post, transport.rank

    def limited_post(sends: Any, receives: Any, operation: Any) -> list[Any]:
        num_bytes = sum(view.nbytes for peer, view in sends if node_of[peer] != node_of[rank])
        if num_bytes > 1000:  # a short sleep would take longer than it says
            with locks[rank]:
                time.sleep(num_bytes / bytes_per_s)
        return post(sends, receives, operation)

    transport.post = limited_post  # type: ignore[method-assign]
    return transport


@pytest.mark.parametrize("shares", [True, False])
def test_finds_the_rate_of_a_link_and_who_shares_it(shares: bool) -> None:
    node_of, rate = (0, 1, 0, 1), 20e6
    locks = [threading.Lock() for _ in node_of]
    if shares:
        locks = [locks[node] for node in node_of]

    def main(transport: Transport) -> sc.Topology:
        slow = limited(transport, node_of, locks, rate)
        with sc.Group(slow, sc.Topology(node_of), timeout_s=30.0, checked=True) as group:
            return probe(group, duration_s=1.0)

    found = run_transports(main, len(node_of))[0]
    for link in as_tuple(found.scale_out):
        assert 0.5 * rate < link.bandwidth_bytes_per_s < 1.1 * rate
    assert all(link.bandwidth_bytes_per_s > 5 * rate for link in as_tuple(found.scale_up))
    if shares:
        assert found.node_link is not None
        for link in as_tuple(found.node_link):
            assert 0.5 * rate < link.bandwidth_bytes_per_s < 1.1 * rate
    elif found.node_link is not None:  # on a busy machine ranks may hinder each other after all, but not as much
        assert all(link.bandwidth_bytes_per_s > 1.1 * rate for link in as_tuple(found.node_link))


# --- failing


def test_ranks_must_want_the_same() -> None:
    def main(group: sc.Group) -> None:
        with pytest.raises(sc.CollectiveMismatch, match=r"expected equal duration_s on all ranks, got 0\.1 on rank 0"):
            probe(group, duration_s=0.1 + group.rank)
        kind = sc.InvalidArgument if group.rank == 1 else sc.CollectiveMismatch
        with pytest.raises(kind, match="expected duration_s > 0, got -1"):
            probe(group, duration_s=-1 if group.rank == 1 else 0.1)
        group.barrier()

    sc.run_local(main, 2)


def test_a_rank_that_does_not_come_is_no_reason_to_hang() -> None:
    ended = threading.Event()

    def main(group: sc.Group) -> None:
        if group.rank == 0:
            with pytest.raises(sc.CollectiveTimeout, match="probe"):
                probe(group, timeout_s=0.3)
            ended.set()
        assert ended.wait(20.0)

    sc.run_local(main, 2, checked=False)


def test_a_peer_that_fails_midway_ends_the_others() -> None:
    def main(transport: Transport) -> str:
        post = transport.post

        def failing_post(sends: Any, receives: Any, operation: Any) -> list[Any]:
            if any(view.nbytes > 1000 for _, view in sends):
                raise OSError("out of cable")
            return post(sends, receives, operation)

        with sc.Group(transport, timeout_s=20.0, checked=True) as group:
            if group.rank == 1:
                transport.post = failing_post  # type: ignore[method-assign]
            with pytest.raises((OSError, sc.PeerFailure)) as caught:
                probe(group)
            return type(caught.value).__name__

    assert run_transports(main, 3) == ["PeerFailure", "OSError", "PeerFailure"]


# --- given topologies


def start(given: list[Given]) -> list[Any]:
    """Starts a group with a topology of its own for each rank; returns what each got, or its error."""

    def main(transport: Transport) -> Any:
        try:
            return sc.Group(transport, given[transport.rank], timeout_s=5.0, checked=True).topology
        except sc.SparsecollError as error:
            return error

    return run_transports(main, len(given))


def test_a_topology_may_come_as_the_path_of_a_file(tmp_path: Path) -> None:
    topology = sc.Topology((0, 1), scale_out=sc.Link(5e7, 1e-4))
    topology.save(tmp_path / "t.json")
    assert start([tmp_path / "t.json", str(tmp_path / "t.json")]) == [topology] * 2
    assert start([topology, tmp_path / "t.json"]) == [topology] * 2, "it says the same"
    assert sc.run_local(lambda group: group.topology, 2, topology=tmp_path / "t.json") == [topology] * 2


@pytest.mark.parametrize(
    "given",
    [
        [sc.Topology((0, 0)), sc.Topology((0, 1))],
        [None, sc.Topology((0, 1))],
        [sc.Topology((0, 1), sc.Link(1.0, 0.0)), None],
    ],
    ids=["unlike", "only rank 1", "only rank 0"],
)
def test_ranks_with_different_topologies_all_hear_of_it(given: list[Given]) -> None:
    first, second = ("none" if each is None else each.digest for each in given)
    for error in start(given):
        assert isinstance(error, sc.CollectiveMismatch)
        assert f"expected equal topologies (by digest) on all ranks, got {first} on rank 0 and {second}" in str(error)


def test_a_rank_without_its_file_stops_the_others(tmp_path: Path) -> None:
    sc.Topology.flat(2).save(tmp_path / "two.json")
    sc.Topology.flat(3).save(tmp_path / "three.json")
    for bad in (tmp_path / "none.json", tmp_path / "three.json", sc.Topology.flat(1), 7):
        first, second = start([tmp_path / "two.json", bad])
        assert isinstance(second, sc.InvalidArgument)
        assert isinstance(first, sc.CollectiveMismatch)
        assert "expected a sound topology on all ranks, rank 1 has none" in str(first)

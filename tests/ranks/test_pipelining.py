"""Relayed plans on threads as ranks: pieces are forwarded as they arrive, nobody waits in a circle, faults end soon."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import sparsecoll as sc
from sparsecoll.arena import Arena
from sparsecoll.collectives.call import Call
from sparsecoll.collectives.pending import Pending
from sparsecoll.executor import all_gather_steps
from sparsecoll.plan import LEAD, program
from sparsecoll.transport import local
from sparsecoll.transport.base import HostTransport, Operation, View
from sparsecoll.transport.local import LocalTransport
from tests.conformance import in_pieces
from tests.plans import draw_case

SIZE = 20_000
LINK = sc.Link(1e9, 1e-6)
HOT = sc.Placement.of_owners([0] * 3, 4).replicate(dict.fromkeys(range(3), range(4)))
"""Rank 0 owns what all four want."""


def plan_of(gathers: bool, topology: sc.Topology, place: sc.Placement = HOT, pieces: int = 12) -> sc.Plan:
    make = sc.plan_all_gather if gathers else sc.plan_reduce_scatter
    algorithm = "hierarchical" if topology.num_nodes > 1 else "relay"
    return in_pieces(make(place, 4 * SIZE, topology, algorithm), pieces)


def content(chunk: int, rank: int) -> np.ndarray:
    return (np.arange(SIZE, dtype=np.float32) * (chunk + 2) + rank) % 251


def called(group: sc.Group, plan: sc.Plan, **more: Any) -> Any:
    """Issues the collective of ``plan``."""
    if plan.op == "all_gather":
        rows = [content(chunk, group.rank) for chunk in plan.place.owned_by(group.rank).tolist()]
        return sc.sparse_all_gather(
            np.array(rows, np.float32).reshape(-1, SIZE), plan.place, plan=plan, group=group, **more
        )
    rows = [content(chunk, group.rank) for chunk in plan.place.held_by(group.rank).tolist()]
    return sc.sparse_reduce_scatter(
        np.array(rows, np.float32).reshape(-1, SIZE), plan.place, plan=plan, group=group, **more
    )


def wanted(plan: sc.Plan, rank: int) -> np.ndarray:
    """What `called` gives; sums are of integers below 2^24."""
    place = plan.place
    if plan.op == "all_gather":
        rows = [content(chunk, int(place.owners[chunk])) for chunk in place.held_by(rank).tolist()]
    else:
        rows = [
            sum(content(chunk, holder) for holder in np.flatnonzero(place.holders[chunk]).tolist())
            for chunk in place.owned_by(rank).tolist()
        ]
    return np.array(rows, np.float32).reshape(-1, SIZE)


class Recording(LocalTransport):
    """Keeps what its rank posts and what ends, in order."""

    made: dict[int, Recording]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.events: list[str] = []
        type(self).made[self.rank] = self

    def post(self, sends: Any, receives: Any, operation: Operation) -> list[Any]:
        self.events += ["send"] * len(sends) + ["receive"] * len(receives)
        return super().post(sends, receives, operation)

    def ended(self, operation: Operation) -> list[Any]:
        keys = super().ended(operation)
        self.events += ["sent" if is_send else "received" for is_send, _ in keys]
        return keys


@pytest.mark.parametrize(
    "topology", [sc.Topology.flat(4, LINK), sc.Topology((0, 0, 1, 1), LINK, LINK)], ids=["flat", "nodes"]
)
@pytest.mark.parametrize("gathers", [True, False], ids=["gather", "reduce"])
def test_a_piece_is_forwarded_while_later_ones_are_on_their_way(
    gathers: bool, topology: sc.Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(gathers, topology)
    monkeypatch.setattr(local, "LocalTransport", Recording)
    monkeypatch.setattr(Recording, "made", {}, raising=False)
    results = sc.run_local(lambda group: called(group, plan), 4, checked=False, topology=topology)
    for rank, result in enumerate(results):
        np.testing.assert_array_equal(result, wanted(plan, rank))
    num_relays = 0
    for rank in range(1, 4):
        mine, events = program(plan, rank), Recording.made[rank].events
        first = next((number for number, move in enumerate(mine.sends) if move.needs), None)
        if first is None:
            continue
        num_relays += 1
        assert events.count("received") == len(mine.receives) and events.count("sent") == len(mine.sends)
        posted = [place for place, event in enumerate(events) if event == "send"][first]
        received = [place for place, event in enumerate(events) if event == "received"]
        # Receives are let in a few at a time, so it cannot be that all of them had come by then.
        assert posted < received[-1], "forwarded before the last piece has arrived"
    assert num_relays >= 2


def test_receives_are_let_in_when_they_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """At no time more than what lies within `LEAD` stages of the earliest that is missing."""
    plan = plan_of(True, sc.Topology.flat(4, LINK), pieces=64)
    monkeypatch.setattr(local, "LocalTransport", Recording)
    monkeypatch.setattr(Recording, "made", {}, raising=False)
    sc.run_local(lambda group: called(group, plan), 4, checked=False)
    for rank in range(1, 4):
        stages = [move.stage for move in program(plan, rank).receives]
        most = max(sum(stage <= each <= stage + LEAD for each in stages) for stage in stages)
        waiting = most_waiting = 0
        for event in Recording.made[rank].events:
            waiting += {"receive": 1, "received": -1}.get(event, 0)
            most_waiting = max(most_waiting, waiting)
        assert most_waiting <= most < len(stages), "and that is less than all"


class Late(LocalTransport):
    """A rank that now and then gets no processor for a while."""

    def ended(self, operation: Operation) -> list[Any]:
        if self.random.random() < 0.05:
            time.sleep(0.02 * self.random.random())
        return super().ended(operation)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.random = random.Random(self.rank)


@pytest.mark.parametrize("seed", range(6))
def test_ranks_that_are_late_never_wait_in_a_circle(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks run ahead of each other, and what they then have in flight is not let in before its time."""
    case = draw_case(
        np.random.default_rng(seed), world_size=10, num_chunks=14, sizes=[1 << 16, 1 << 18], num_nodes=1 + seed % 3
    )
    plans = [case.gather("relay"), case.reduce("hierarchical", width=1)]
    monkeypatch.setattr(local, "LocalTransport", Late)

    def main(group: sc.Group) -> None:
        for plan in map(in_pieces, plans):
            side = case.place.owned_by if plan.op == "all_gather" else case.place.held_by
            rows = [np.zeros(case.chunk_bytes[chunk] // 4, np.float32) for chunk in side(group.rank).tolist()]
            call = sc.sparse_all_gather if plan.op == "all_gather" else sc.sparse_reduce_scatter
            call(rows, case.place, plan=plan)

    sc.run_local(main, 10, timeout_s=20.0)


class Scripted(HostTransport):
    """One rank by itself: what it posts ends in the order of posting, one after the other."""

    backend = "local"

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(rank, world_size)
        self.log: list[tuple[bool, int]] = []
        self.log_at_end: list[list[tuple[bool, int]]] = []

    def _send(self, peer: int, view: View, operation: Operation) -> Any:
        return peer

    _receive = _send

    def track(self, request: Any, key: Any, operation: Operation) -> None:
        self.log.append(key)

    def ended(self, operation: Operation) -> list[Any]:
        self.log_at_end.append(list(self.log))
        return [self.log[len(self.log_at_end) - 1]]

    def wait(self, requests: Any, operation: Operation) -> None:
        raise AssertionError("a pipeline waits for single messages")

    exchange = abort = close = heard_abort = twin = wait


def test_what_comes_before_all_that_is_in_flight_is_sent_at_once() -> None:
    """Rank 1 has sent ahead as much as it may when something arrives that it is to forward much earlier."""
    place = sc.Placement.of_owners([0, 1], 4).replicate({0: [1, 2], 1: [3]})
    plan = sc.plan_all_gather(place, 8 * 64, sc.Topology.flat(4, LINK), "direct")
    table = np.zeros(3, plan.transfers.dtype)
    table[0] = (0, 1, 0, 1, 0, 1, 0, 512, False)
    table[1] = (1, 1, 1, 2, 0, 1, 0, 512, False)
    table[2] = (300, 800, 1, 3, 1, 8, 0, 512, False)
    plan = dataclasses.replace(plan, algorithm="relay", transfers=table)
    mine = program(plan, 1)
    assert [move.peer for move in mine.sends] == [2] + [3] * 8 and mine.sends[0].needs == (0,)
    transport = Scripted(1, 4)
    source, out = np.arange(512).astype(np.uint8), np.zeros(512, np.uint8)
    steps = all_gather_steps(
        plan, transport, {1: (source,)}, {0: (out,), 1: (source,)}, {}, Operation("gather", 1, 5.0), Arena()
    )
    assert next(steps) is False, "others wait for what it forwards"
    at_first = list(transport.log)
    assert at_first == [(False, 0), *((True, number) for number in range(1, len(at_first)))]
    assert 2 < len(at_first) < 9, "few sends are in flight"
    with contextlib.suppress(StopIteration):
        next(steps)
    assert transport.log_at_end[1] == [*at_first, (True, 0)], "posted before any of those has ended"
    assert transport.log == [*at_first, (True, 0), *((True, number) for number in range(len(at_first), 9))]


class Stopping(LocalTransport):
    """Rank 2 comes to a stop when it has heard of some messages."""

    stop: Callable[[Stopping], None]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._num_calls = 0

    def ended(self, operation: Operation) -> list[Any]:
        self._num_calls += 1
        if self.rank == 2 and self._num_calls == 4:
            type(self).stop(self)
        return super().ended(operation)


def stop_on_others(gathers: bool, timeout_s: float) -> tuple[list[BaseException | None], float]:
    """What all ranks raise when rank 2 stops midway, and how long that takes."""
    plan = plan_of(gathers, sc.Topology.flat(4, LINK))

    def main(group: sc.Group) -> BaseException | None:
        try:
            called(group, plan, timeout_s=timeout_s)
        except Exception as error:
            with pytest.raises(sc.TransportError, match="unusable"):
                called(group, plan)
            return error
        return None

    begin_s = time.monotonic()
    return sc.run_local(main, 4, checked=False), time.monotonic() - begin_s


@pytest.mark.parametrize("gathers", [True, False], ids=["gather", "reduce"])
def test_a_rank_that_fails_midway_ends_all_others(gathers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(transport: Stopping) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(local, "LocalTransport", Stopping)
    monkeypatch.setattr(Stopping, "stop", stop, raising=False)
    errors, took_s = stop_on_others(gathers, timeout_s=60.0)
    assert isinstance(errors[2], RuntimeError)
    for rank in (0, 1, 3):
        assert isinstance(errors[rank], sc.PeerFailure) and "rank 2 aborted" in str(errors[rank])
        assert "out of luck" in str(errors[rank]) and f"rank {rank}/4" in str(errors[rank])
    assert took_s < 20.0


@pytest.mark.parametrize("gathers", [True, False], ids=["gather", "reduce"])
def test_a_rank_that_leaves_midway_ends_all_others(gathers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "LocalTransport", Stopping)
    monkeypatch.setattr(Stopping, "stop", LocalTransport.close, raising=False)
    errors, took_s = stop_on_others(gathers, timeout_s=60.0)
    assert all(isinstance(error, sc.PeerFailure) for error in errors)
    assert any("rank 2 to take part" in str(error) for error in errors)
    assert took_s < 20.0


@pytest.mark.parametrize("gathers", [True, False], ids=["gather", "reduce"])
def test_a_rank_that_hangs_midway_is_a_timeout_for_all_others(gathers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "LocalTransport", Stopping)
    monkeypatch.setattr(Stopping, "stop", lambda transport: time.sleep(1.5), raising=False)
    errors, took_s = stop_on_others(gathers, timeout_s=0.5)
    assert all(isinstance(error, (sc.CollectiveTimeout, sc.PeerFailure)) for error in errors)
    timed_out = [error for error in errors if isinstance(error, sc.CollectiveTimeout)]
    assert timed_out, "who gives up first has nobody else to blame"
    for error in timed_out:
        assert "0.5 s" in str(error) and " bytes" in str(error) and "rank " in str(error)
    assert 0.5 <= took_s < 20.0


@pytest.mark.parametrize(
    "topology", [sc.Topology.flat(4, LINK), sc.Topology((0, 0, 1, 1), LINK, LINK)], ids=["flat", "nodes"]
)
def test_async_operations_go_on_while_their_callers_sleep(topology: sc.Topology) -> None:
    plan, back = plan_of(True, topology), plan_of(False, topology)

    def main(group: sc.Group) -> None:
        works = [called(group, each, async_op=True) for each in (plan, back, plan)]
        deadline_s = time.monotonic() + 30.0
        while not all(work.done() for work in works) and time.monotonic() < deadline_s:
            time.sleep(0.005)
        assert all(work.done() for work in works), "nobody has waited for them"
        for each, work in zip((plan, back, plan), works, strict=True):
            np.testing.assert_array_equal(work.result(), wanted(each, group.rank))

    sc.run_local(main, 4, topology=topology)


@pytest.mark.parametrize(
    "topology", [sc.Topology.flat(4, LINK), sc.Topology((0, 0, 1, 1), LINK, LINK)], ids=["flat", "nodes"]
)
@pytest.mark.parametrize("gathers", [True, False], ids=["gather", "reduce"])
def test_what_is_started_is_forwarded_while_callers_sleep(gathers: bool, topology: sc.Topology) -> None:
    """As FSSDP starts gathers and reductions: whoever relays does not need its caller for that."""
    plan = plan_of(gathers, topology)
    has_all = threading.Barrier(4)

    def main(group: sc.Group) -> None:
        place = plan.place
        name = "sparse_all_gather" if gathers else "sparse_reduce_scatter"
        given, side = (place.owned_by, place.held_by) if gathers else (place.held_by, place.owned_by)
        rows = [content(chunk, group.rank) for chunk in given(group.rank).tolist()]
        out = np.full((len(side(group.rank)), SIZE), -1, np.float32)
        call = Call(name, place, None, plan, "auto", mean=False, trusted=True)
        pending = Pending(call, np.array(rows, np.float32).reshape(-1, SIZE), out, group)
        expected = wanted(plan, group.rank)
        deadline_s = time.monotonic() + 30.0
        while not np.array_equal(out, expected) and time.monotonic() < deadline_s:
            time.sleep(0.005)
        np.testing.assert_array_equal(out, expected, "it is there before anybody asks for it")
        has_all.wait(30.0)
        assert pending.result() is out
        assert pending.moved.sent_bytes == plan.sent_bytes[group.rank]
        assert pending.moved.sent_messages == plan.sent_transfers[group.rank]

    sc.run_local(main, 4, topology=topology)


def test_several_may_be_started_and_end_in_order() -> None:
    """Two owners, so that who relays for one owns what the other relays."""
    topology = sc.Topology.flat(4, LINK)
    other = sc.Placement.of_owners([3] * 3, 4).replicate(dict.fromkeys(range(3), range(4)))
    plans = [plan_of(True, topology), plan_of(True, topology, other), plan_of(True, topology)]

    def main(group: sc.Group) -> None:
        pendings = []
        for plan in plans:
            rows = [content(chunk, group.rank) for chunk in plan.place.owned_by(group.rank).tolist()]
            call = Call("sparse_all_gather", plan.place, None, plan, "auto", mean=False, trusted=True)
            pendings.append(Pending(call, np.array(rows, np.float32).reshape(-1, SIZE), None, group))
        for plan, pending in zip(plans, pendings, strict=True):
            np.testing.assert_array_equal(pending.result(), wanted(plan, group.rank))

    sc.run_local(main, 4, topology=topology)

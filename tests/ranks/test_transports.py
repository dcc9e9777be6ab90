"""The local transport: the checks that every transport passes, and what only threads can show."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from sparsecoll.errors import CollectiveTimeout, InvalidArgument, PeerFailure, TransportError
from sparsecoll.transport.base import Message, Operation, Transport, split_message
from sparsecoll.transport.local import LocalTransport, LocalWorld, run_local
from tests.transport_checks import CHECKS, CLOSURE_CHECKS, SIZE_CHECKS, pattern, poisoned
from tests.worker import resolve


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("check", CHECKS + CLOSURE_CHECKS + SIZE_CHECKS)
def test_check(check: str, world_size: int) -> None:
    run_local(resolve(check), world_size)


def test_128_ranks() -> None:
    """All to all, twice, and an exchange; the limit is a multiple of what a busy machine of two cores needs."""

    def run(transport: Transport) -> None:
        peers = [peer for peer in range(transport.world_size) if peer != transport.rank]
        for sequence in range(2):
            op = Operation("all_to_all", sequence, 60.0)
            sends = [Message(peer, pattern(transport.rank, peer, sequence, 16)) for peer in peers]
            receives = [Message(peer, poisoned(16)) for peer in peers]
            transport.wait(transport.post(sends, receives, op), op)
            for peer, view in receives:
                assert view.tobytes() == pattern(peer, transport.rank, sequence, 16).tobytes()
        assert len(transport.exchange(b"x" * 64, Operation("end", 2, 60.0))) == 128

    started_s = time.monotonic()
    run_local(run, 128)
    assert time.monotonic() - started_s < 30.0


def test_first_exception_is_raised_with_its_rank_and_traceback() -> None:
    def fail_in_rank_2(transport: Transport) -> None:
        if transport.rank == 2:
            raise KeyError("the original")
        transport.exchange(b"", Operation("wait", 0, 60.0))

    with pytest.raises(KeyError, match="the original") as caught:
        run_local(fail_in_rank_2, 4)
    assert caught.value.__notes__ == ["raised by rank 2/4"]
    assert caught.traceback[-1].name == "fail_in_rank_2"


def test_stuck_rank_is_reported_with_stacks() -> None:
    release = threading.Event()

    def get_stuck_in_rank_1(transport: Transport) -> None:
        if transport.rank == 1:
            release.wait()

    try:
        with pytest.raises(CollectiveTimeout, match=r"ranks \[1\] run on") as caught:
            run_local(get_stuck_in_rank_1, 3, timeout_s=0.3)
    finally:
        release.set()
    assert "in get_stuck_in_rank_1" in str(caught.value)


def test_no_thread_is_left() -> None:
    before = set(threading.enumerate())
    run_local(lambda transport: transport.exchange(b"", Operation("x", 0, 60.0)), 16)
    assert set(threading.enumerate()) <= before


def test_results_are_in_rank_order() -> None:
    assert run_local(lambda transport: transport.rank * 10, 5) == [0, 10, 20, 30, 40]


def test_timed_out_receive_is_never_written() -> None:
    """Whoever has given up gets its memory back: a late sender finds nobody."""
    world = LocalWorld(2)
    receiver, sender = LocalTransport(world, 0), LocalTransport(world, 1)
    memory, op = poisoned(10), Operation("late", 0, 0.05)
    with pytest.raises(CollectiveTimeout):
        receiver.wait(receiver.post([], [Message(1, memory)], op), op)
    late = Operation("late", 0, 0.05)
    with pytest.raises(CollectiveTimeout, match="send to rank 0 of 10 bytes"):
        sender.wait(sender.post([Message(0, np.zeros(10, np.uint8))], [], late), late)
    assert (memory == poisoned(10)).all()


def test_late_rank_learns_that_an_exchange_was_given_up() -> None:
    world = LocalWorld(3)
    early = [LocalTransport(world, rank) for rank in (0, 1)]
    for transport in early:
        with pytest.raises((CollectiveTimeout, PeerFailure)) as caught:
            transport.exchange(b"", Operation("late", 0, 0.05))
    assert "rank 0" in str(caught.value)
    with pytest.raises(PeerFailure, match="rank 0 to wait"):
        LocalTransport(world, 2).exchange(b"", Operation("late", 0, 0.05))


def test_records_of_unequal_length() -> None:
    def exchange(transport: Transport) -> None:
        with pytest.raises(TransportError, match=r"equal length, got \[1, 2\]"):
            transport.exchange(b"x" * (1 + transport.rank % 2), Operation("unequal", 0, 60.0))

    run_local(exchange, 3)


def test_receive_into_read_only_memory_fails_on_both_sides() -> None:
    def send_or_receive(transport: Transport) -> None:
        op, view = Operation("fixed", 0, 60.0), poisoned(8)
        view.setflags(write=transport.rank == 0)
        sends, receives = ([Message(1, view)], []) if transport.rank == 0 else ([], [Message(0, view)])
        with pytest.raises(TransportError, match="read-only"):
            transport.wait(transport.post(sends, receives, op), op)

    run_local(send_or_receive, 2)


@pytest.mark.parametrize("world_size", [0, -1])
def test_world_needs_ranks(world_size: int) -> None:
    with pytest.raises(InvalidArgument, match="world_size"):
        LocalWorld(world_size)


@pytest.mark.parametrize("rank", [2, -1])
def test_rank_must_be_in_its_world(rank: int) -> None:
    with pytest.raises(InvalidArgument, match="rank below 2"):
        LocalTransport(LocalWorld(2), rank)


@pytest.mark.parametrize(("num_bytes", "expected"), [(0, []), (1, [1]), (10, [10]), (11, [10, 1]), (30, [10, 10, 10])])
def test_split_message(num_bytes: int, expected: list[int]) -> None:
    view = pattern(0, 0, 0, num_bytes)
    parts = list(split_message(view, 10))
    assert [part.nbytes for part in parts] == expected
    assert b"".join(part.tobytes() for part in parts) == view.tobytes()
    assert all(np.shares_memory(part, view) for part in parts)

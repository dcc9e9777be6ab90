"""What every transport must do, as functions of one rank's transport: run by threads, by Gloo and by MPI."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from sparsecoll.errors import CollectiveTimeout, PeerFailure, SparsecollError, TransportError
from sparsecoll.transport.base import Counters, HostTransport, Message, Operation, Transport, View

__all__ = ["CHECKS", "CLOSURE_CHECKS", "SIZE_CHECKS"]

# For what is to end well: long, as other work may hold the cores.
LIMIT_S = 30.0
POISON = 0xEE


def operation(name: str, sequence: int = 0, timeout_s: float = LIMIT_S) -> Operation:
    return Operation(name, sequence, timeout_s)


def peers_of(transport: Transport) -> list[int]:
    return [rank for rank in range(transport.world_size) if rank != transport.rank]


def pattern(src: int, dst: int, number: int, num_bytes: int) -> View:
    """Bytes that tell sender, receiver, message and position."""
    return ((np.arange(num_bytes) * 7 + src * 31 + dst * 17 + number * 5) % 251).astype(np.uint8)


def poisoned(num_bytes: int) -> View:
    return np.full(num_bytes, POISON, np.uint8)


def check_exchange(transport: Transport) -> None:
    before = transport.counters.snapshot()
    num_rounds, num_bytes = 10, 300
    for number in range(num_rounds):
        record = pattern(transport.rank, 0, number, num_bytes).tobytes()
        records = transport.exchange(record, operation("exchange", number))
        expected = [pattern(rank, 0, number, num_bytes).tobytes() for rank in range(transport.world_size)]
        assert records == expected
    num_messages = num_rounds * (transport.world_size - 1)
    spent = transport.counters.since(before)
    assert spent == Counters(control_bytes=num_messages * num_bytes, control_messages=num_messages)


def check_exchange_of_nothing(transport: Transport) -> None:
    assert transport.exchange(b"", operation("exchange")) == [b""] * transport.world_size


def check_exchange_meets_across_operations(transport: Transport) -> None:
    """Ranks that disagree about the operation still meet, so that the record can tell them."""
    own = operation("gather" if transport.rank == 0 else "scatter", sequence=transport.rank)
    records = transport.exchange(str(own.sequence).encode(), own)
    assert records == [str(rank).encode() for rank in range(transport.world_size)]


def check_order_within_tag(transport: Transport) -> None:
    num_messages, op = 12, operation("order")
    received = {peer: [poisoned(50) for _ in range(num_messages)] for peer in peers_of(transport)}
    sends = [
        Message(peer, pattern(transport.rank, peer, number, 50))
        for number in range(num_messages)
        for peer in peers_of(transport)
    ]
    receives = [Message(peer, received[peer][number]) for number in range(num_messages) for peer in received]
    transport.wait(transport.post(sends, receives, op), op)
    for peer, views in received.items():
        for number, view in enumerate(views):
            np.testing.assert_array_equal(view, pattern(peer, transport.rank, number, 50))


def check_tags_out_of_order(transport: Transport) -> None:
    ops = [operation("tags", sequence) for sequence in (5, 6, 40_000)]
    assert len({op.tag for op in ops}) == len(ops)
    # Kept until the end: a request does not promise to keep what it sends.
    requests = []
    for op in ops:
        sends = [Message(peer, pattern(transport.rank, peer, op.sequence, 1000)) for peer in peers_of(transport)]
        requests.append((op, transport.post(sends, [], op)))
    for op in reversed(ops):
        receives = [Message(peer, poisoned(1000)) for peer in peers_of(transport)]
        transport.wait(transport.post([], receives, op), op)
        for peer, view in receives:
            np.testing.assert_array_equal(view, pattern(peer, transport.rank, op.sequence, 1000))
    for op, sent in requests:
        transport.wait(sent, op)


def check_uneven_sizes_and_counters(transport: Transport) -> None:
    """Sizes from nothing to a megabyte, different for each pair and direction; both sides skip empty views."""
    sizes = itertools.cycle((0, 1, 12_345, 0, 300, 1 << 20, 4096, 65_537))
    table = {(src, dst): next(sizes) for src in range(transport.world_size) for dst in range(transport.world_size)}
    before, op, rank = transport.counters.snapshot(), operation("sizes"), transport.rank
    sends = [Message(peer, pattern(rank, peer, 0, table[rank, peer])) for peer in peers_of(transport)]
    receives = [Message(peer, poisoned(table[peer, rank])) for peer in peers_of(transport)]
    requests = transport.post(sends, receives, op)
    transport.wait(requests, op)
    for peer, view in receives:
        np.testing.assert_array_equal(view, pattern(peer, rank, 0, table[peer, rank]))
    sent = [view.nbytes for _, view in sends if view.nbytes]
    received = [view.nbytes for _, view in receives if view.nbytes]
    assert len(requests) == len(sent) + len(received)
    assert transport.counters.since(before) == Counters(sum(sent), len(sent), sum(received), len(received))


def check_split(transport: Transport) -> None:
    transport.max_message_bytes = 1000
    op, num_peers, before = operation("split"), transport.world_size - 1, transport.counters.snapshot()
    sends = [Message(peer, pattern(transport.rank, peer, 3, 2500)) for peer in peers_of(transport)]
    receives = [Message(peer, poisoned(2500)) for peer in peers_of(transport)]
    transport.wait(transport.post(sends, receives, op), op)
    for peer, view in receives:
        np.testing.assert_array_equal(view, pattern(peer, transport.rank, 3, 2500))
    spent = transport.counters.since(before)
    assert spent == Counters(2500 * num_peers, 3 * num_peers, 2500 * num_peers, 3 * num_peers)


def check_views_into_larger_memory(transport: Transport) -> None:
    """A send reads memory that is marked read-only; a receive writes its own bytes and none beside them."""
    op, memory = operation("views"), poisoned(300)
    content = pattern(transport.rank, 0, 0, 100)
    content.setflags(write=False)
    right, left = (transport.rank + 1) % transport.world_size, (transport.rank - 1) % transport.world_size
    if right == transport.rank:
        return
    transport.wait(transport.post([Message(right, content)], [Message(left, memory[100:200])], op), op)
    np.testing.assert_array_equal(memory[100:200], pattern(left, 0, 0, 100))
    assert set(memory[:100]) | set(memory[200:]) == {POISON}


def check_large_ring(transport: Transport) -> None:
    op, num_bytes = operation("ring"), 2_000_001
    right, left = (transport.rank + 1) % transport.world_size, (transport.rank - 1) % transport.world_size
    if right == transport.rank:
        return
    content, memory = pattern(transport.rank, 0, 0, num_bytes), poisoned(num_bytes)
    transport.wait(transport.post([Message(right, content)], [Message(left, memory)], op), op)
    np.testing.assert_array_equal(memory, pattern(left, 0, 0, num_bytes))


def check_many_operations(transport: Transport) -> None:
    """Random sizes, equal on all ranks, with three operations in flight at a time."""
    random = np.random.default_rng(20_240)
    in_flight: list[tuple[Operation, list[Any], list[Message], list[Message]]] = []

    def finish() -> None:
        op, requests, receives, _ = in_flight.pop(0)
        transport.wait(requests, op)
        for peer, view in receives:
            np.testing.assert_array_equal(view, pattern(peer, transport.rank, op.sequence, view.nbytes))

    for sequence in range(40):
        sizes = random.integers(0, 5000, (transport.world_size, transport.world_size))
        op = operation("many", sequence)
        sends = [
            Message(peer, pattern(transport.rank, peer, sequence, sizes[transport.rank, peer]))
            for peer in peers_of(transport)
        ]
        receives = [Message(peer, poisoned(sizes[peer, transport.rank])) for peer in peers_of(transport)]
        in_flight.append((op, transport.post(sends, receives, op), receives, sends))
        if len(in_flight) == 3:
            finish()
    while in_flight:
        finish()


def check_second_thread(transport: Transport) -> None:
    """Another thread than the one that made the transport uses it, as a progress thread does."""
    assert getattr(transport, "supports_threads", True)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            check_order_within_tag(transport)
            check_exchange(transport)
        except BaseException as exc:
            failures.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def check_twin(transport: HostTransport) -> None:
    """Messages under equal tags do not meet, and a twin's thread waits for rank 0 while all others go on."""
    first, second = transport.twin(), transport.twin()
    op, may_send = operation("twins"), threading.Event()
    if transport.rank != 0:
        may_send.set()
    failures: list[BaseException] = []

    def send_and_receive(each: HostTransport, turn: int) -> None:
        sends = [Message(peer, pattern(transport.rank, peer, turn, 999)) for peer in peers_of(transport)]
        receives = [Message(peer, poisoned(999)) for peer in peers_of(transport)]
        each.wait(each.post(sends, receives, op), op)
        for peer, view in receives:
            np.testing.assert_array_equal(view, pattern(peer, transport.rank, turn, 999))

    def late() -> None:
        try:
            may_send.wait(LIMIT_S)
            send_and_receive(first, 0)
        except BaseException as exc:
            failures.append(exc)

    thread = threading.Thread(target=late)
    thread.start()
    send_and_receive(second, 1)
    send_and_receive(transport, 2)
    assert len(transport.exchange(b"go on", op)) == transport.world_size
    may_send.set()
    thread.join()
    if failures:
        raise failures[0]
    for each in (first, second, transport):
        assert each.counters.sent_bytes == 999 * len(peers_of(transport))
    assert len(first.exchange(b"end", op)) == transport.world_size
    first.close()
    second.close()
    assert len(transport.exchange(b"end", op)) == transport.world_size


def check_timeout(transport: Transport) -> None:
    """Rank 0 waits in vain for the last rank: on schedule, with all that is known in the message."""
    last = transport.world_size - 1
    if last == 0:
        return
    if transport.rank == 0:
        op = operation("late", sequence=77, timeout_s=0.25)
        requests = transport.post([], [Message(last, poisoned(4321))], op)
        with pytest.raises(CollectiveTimeout) as caught:
            transport.wait(requests, op)
        assert 0.25 <= time.monotonic() - op.started_s < 2.0
        for part in ("late #77", f"receive from rank {last}", "4321 bytes", "0.25 s", f"rank 0/{transport.world_size}"):
            assert part in str(caught.value)
    _end_together(transport)


def check_timeout_of_a_send(transport: Transport) -> None:
    """A send that nobody receives and that is too long to be stored somewhere."""
    last = transport.world_size - 1
    if last == 0:
        return
    if transport.rank == 0:
        op = operation("late", timeout_s=0.25)
        content = np.zeros(64 << 20, np.uint8)
        requests = transport.post([Message(last, content)], [], op)
        with pytest.raises(CollectiveTimeout, match=f"send to rank {last} of {content.nbytes} bytes"):
            transport.wait(requests, op)
    _end_together(transport)


def check_timeout_of_an_exchange(transport: Transport) -> None:
    last = transport.world_size - 1
    if last == 0:
        return
    if transport.rank == 0:
        op = operation("late", sequence=78, timeout_s=0.25)
        with pytest.raises(CollectiveTimeout) as caught:
            transport.exchange(b"record", op)
        assert 0.25 <= time.monotonic() - op.started_s < 2.0
        for part in ("late #78", str(last), "6 bytes", "0.25 s"):
            assert part in str(caught.value)
    elif transport.rank != last:
        # Longer, so that rank 0 is the first to give up; what it then does to the others depends on the back end.
        with pytest.raises((CollectiveTimeout, PeerFailure)):
            transport.exchange(b"record", operation("late", timeout_s=LIMIT_S))
        return
    _end_together(transport)


def _end_together(transport: Transport) -> None:
    """Rank 0 aborts; the others find that out while they wait for it."""
    if transport.rank == 0:
        transport.abort("rank 0 is through")
        return
    op = operation("end", sequence=1)
    with _Soon(), pytest.raises(PeerFailure, match="rank 0"):
        transport.wait(transport.post([], [Message(0, poisoned(1))], op), op)


def check_abort(transport: Transport) -> None:
    """Whoever waits for a rank that aborts, in a message or an exchange, learns its reason; later calls raise too."""
    last = transport.world_size - 1
    if transport.rank == last:
        transport.abort("ValueError: boom")
        with pytest.raises(PeerFailure, match=f"rank {last} aborted: ValueError: boom"):
            transport.exchange(b"later", operation("later"))
        return
    op = operation("doomed", sequence=9)
    text = f"doomed #9: .*rank {last} aborted: ValueError: boom.*rank {transport.rank}/"
    with _Soon(), pytest.raises(PeerFailure, match=text):
        if transport.rank % 2:
            transport.exchange(b"record", op)
        else:
            transport.wait(transport.post([], [Message(last, poisoned(8))], op), op)
    with _Soon(), pytest.raises(SparsecollError):
        transport.wait(transport.post([], [Message(last, poisoned(8))], op), op)


def check_use_after_close(transport: Transport) -> None:
    transport.close()
    transport.close()
    with pytest.raises(PeerFailure, match="closed"):
        transport.exchange(b"", operation("after"))
    for peer in peers_of(transport):
        with pytest.raises(PeerFailure, match="closed"):
            op = operation("after")
            transport.wait(transport.post([Message(peer, poisoned(1))], [], op), op)


def check_closed_peer(transport: Transport) -> None:
    """Whoever waits for a rank that closes fails; those that do not need it go on."""
    last = transport.world_size - 1
    if transport.rank == last:
        transport.close()
        return
    partner = transport.rank ^ 1
    if partner < last:
        op = operation("unharmed")
        view = poisoned(10)
        requests = transport.post([Message(partner, pattern(transport.rank, 0, 0, 10))], [Message(partner, view)], op)
        transport.wait(requests, op)
        np.testing.assert_array_equal(view, pattern(partner, 0, 0, 10))
    op = operation("deserted")
    with _Soon(), pytest.raises(PeerFailure, match=f"rank {last}.*rank {transport.rank}/"):
        transport.wait(transport.post([], [Message(last, poisoned(8))], op), op)


def check_ends_are_told(transport: Transport) -> None:
    """Every tracked request once, by its key, with its bytes in place; and nothing that is not tracked."""
    op, num_messages = operation("tracked"), 6
    sent, received = {}, {}
    for peer in peers_of(transport):
        for number in range(num_messages):
            view = received[peer, number] = poisoned(700 * number + 1)
            (request,) = transport.post([], [Message(peer, view)], op)
            transport.track(request, ("from", peer, number), op)
        for number in range(num_messages):
            view = sent[peer, number] = pattern(transport.rank, peer, number, 700 * number + 1)
            (request,) = transport.post([Message(peer, view)], [], op)
            transport.track(request, ("to", peer, number), op)
    missing = {(side, peer, number) for side in ("from", "to") for peer, number in received}
    while missing:
        keys = transport.ended(op)
        assert keys and len(set(keys)) == len(keys) and missing >= set(keys)
        missing -= set(keys)
        for side, peer, number in keys:
            if side == "from":
                expected = pattern(peer, transport.rank, number, 700 * number + 1)
                np.testing.assert_array_equal(received[peer, number], expected)


def check_ends_of_different_peers_are_told_out_of_order(transport: Transport) -> None:
    """What a late rank has not sent yet holds up nothing of the others, and is told when it has come."""
    last, op = transport.world_size - 1, operation("out of order")
    if last < 2:
        return
    if transport.rank == last:
        # Rank 0 is the last to send; it does when it has heard from all others.
        requests = {0: transport.post([], [Message(0, poisoned(10))], op)[0]}
        for peer in range(1, last):
            (requests[peer],) = transport.post([], [Message(peer, poisoned(10))], op)
        for peer, request in requests.items():
            transport.track(request, peer, op)
        early: set[int] = set()
        while len(early) < last - 1:
            early |= set(transport.ended(op))
        assert early == set(range(1, last))
        transport.wait(transport.post([Message(0, pattern(last, 0, 0, 10))], [], op), op)
        assert transport.ended(op) == [0]
        return
    if transport.rank == 0:
        transport.wait(transport.post([], [Message(last, poisoned(10))], op), op)
    transport.wait(transport.post([Message(last, pattern(transport.rank, last, 0, 10))], [], op), op)


def check_several_ends_at_once(transport: Transport) -> None:
    """Whoever asks late hears of all that has ended meanwhile, in few calls."""
    op, num_messages = operation("several"), 20
    views = [poisoned(64) for _ in range(num_messages)]
    right, left = (transport.rank + 1) % transport.world_size, (transport.rank - 1) % transport.world_size
    if right == transport.rank:
        return
    for number, view in enumerate(views):
        (request,) = transport.post([], [Message(left, view)], op)
        transport.track(request, number, op)
    content = [Message(right, pattern(transport.rank, right, number, 64)) for number in range(num_messages)]
    transport.wait(transport.post(content, [], op), op)
    transport.exchange(b"sent", operation("sent", 1))
    time.sleep(0.05)
    told: list[Any] = []
    num_calls = 0
    while len(told) < num_messages:
        told += transport.ended(op)
        num_calls += 1
    assert told == list(range(num_messages)), "messages of a pair end in order"
    assert num_calls < num_messages
    for number, view in enumerate(views):
        np.testing.assert_array_equal(view, pattern(left, transport.rank, number, 64))


def check_tracked_and_waited_for_side_by_side(transport: Transport) -> None:
    """Two operations: one that is tracked and one that is waited for, of the same peers."""
    tracked, waited = operation("tracked", 7), operation("waited for", 8)
    views = {peer: (poisoned(300), poisoned(300)) for peer in peers_of(transport)}
    if not views:
        return
    for peer, (view, _) in views.items():
        for sends, receives in (
            ([], [Message(peer, view)]),
            ([Message(peer, pattern(transport.rank, peer, 7, 300))], []),
        ):
            (request,) = transport.post(sends, receives, tracked)
            transport.track(request, (peer, not sends), tracked)
    sends = [Message(peer, pattern(transport.rank, peer, 8, 300)) for peer in views]
    receives = [Message(peer, view) for peer, (_, view) in views.items()]
    transport.wait(transport.post(sends, receives, waited), waited)
    told: set[Any] = set()
    while len(told) < 2 * len(views):
        told |= set(transport.ended(tracked))
    for peer, (first, second) in views.items():
        np.testing.assert_array_equal(first, pattern(peer, transport.rank, 7, 300))
        np.testing.assert_array_equal(second, pattern(peer, transport.rank, 8, 300))


def check_tracked_views_stay_alive(transport: Transport) -> None:
    """Nobody but the transport holds what is in flight, sent or received."""
    op = operation("alive")
    right, left = (transport.rank + 1) % transport.world_size, (transport.rank - 1) % transport.world_size
    if right == transport.rank:
        return
    memory = poisoned(400_000)
    kept = weakref.ref(memory)
    for number in range(4):
        (request,) = transport.post([], [Message(left, memory[100_000 * number : 100_000 * (number + 1)])], op)
        transport.track(request, ("from", number), op)
    del memory, request
    gc.collect()
    assert kept() is not None
    for number in range(4):
        (request,) = transport.post([Message(right, pattern(transport.rank, right, number, 100_000))], [], op)
        transport.track(request, ("to", number), op)
    del request
    gc.collect()
    num_ended, whole = 0, kept()
    while num_ended < 8:
        num_ended += len(transport.ended(op))
    for number in range(4):
        part = whole[100_000 * number : 100_000 * (number + 1)]
        np.testing.assert_array_equal(part, pattern(left, transport.rank, number, 100_000))
    transport.exchange(b"received", operation("end", 1))


def check_timeout_of_what_is_tracked(transport: Transport) -> None:
    """Rank 0 waits in vain for the last rank, also when others have been heard; afterwards nothing is tracked."""
    last = transport.world_size - 1
    if last == 0:
        return
    op = operation("late", sequence=79, timeout_s=0.4)
    if transport.rank == 0:
        for peer in range(1, transport.world_size):
            (request,) = transport.post([], [Message(peer, poisoned(4321))], op)
            transport.track(request, peer, op)
        heard: list[Any] = []
        with pytest.raises(CollectiveTimeout) as caught:
            while True:
                heard += transport.ended(op)
        assert sorted(heard) == list(range(1, last))
        assert 0.4 <= time.monotonic() - op.started_s < 3.0
        for part in ("late #79", f"receive from rank {last}", "4321 bytes", "0.4 s", f"rank 0/{transport.world_size}"):
            assert part in str(caught.value)
        _check_nothing_is_tracked(transport)
    elif transport.rank != last:
        view = pattern(transport.rank, 0, 0, 4321)
        transport.wait(transport.post([Message(0, view)], [], op), op)
    _end_together(transport)


def _check_nothing_is_tracked(transport: Transport) -> None:
    """A later operation hears of its own messages only; here of one that is in vain again, if it may be posted."""
    op = operation("later", sequence=80, timeout_s=0.2)
    last = transport.world_size - 1
    with pytest.raises(SparsecollError) as caught:
        (request,) = transport.post([], [Message(last, poisoned(99))], op)
        transport.track(request, "later", op)
        while True:
            assert transport.ended(op) == [], "of an operation that has failed"
    assert "later #80" in str(caught.value) and "99 bytes" in str(caught.value)


def check_abort_reaches_who_tracks(transport: Transport) -> None:
    """Whoever tracks messages of a rank that aborts learns its reason long before the deadline."""
    last = transport.world_size - 1
    if transport.rank == last:
        transport.abort("ValueError: boom")
        return
    op = operation("doomed", sequence=10)
    text = f"doomed #10: .*rank {last} aborted: ValueError: boom"
    with _Soon(), pytest.raises(PeerFailure, match=text) as caught:
        for peer in peers_of(transport):
            (request,) = transport.post([], [Message(peer, poisoned(8))], op)
            transport.track(request, peer, op)
        while True:
            transport.ended(op)
    transport.abort(str(caught.value))  # as everybody does after an error


def check_sizes_that_disagree(transport: Transport) -> None:
    """The receiver is told, whichever of the two is longer."""
    if transport.world_size < 2 or transport.rank > 1:
        return
    for sequence, sizes in enumerate([(100, 90), (90, 100), (200_000, 100_000), (100_000, 200_000)]):
        op = operation("unequal", sequence)
        if transport.rank == 0:
            requests = transport.post([Message(1, poisoned(sizes[0]))], [], op)
            try:
                transport.wait(requests, op)
            except TransportError:
                assert transport.backend == "local"
        else:
            with pytest.raises(TransportError, match=f"{sizes[1]} bytes"):
                transport.wait(transport.post([], [Message(0, poisoned(sizes[1]))], op), op)


def check_sizes_of_what_is_tracked(transport: Transport) -> None:
    """The receiver is told which of its peers sends too much or too little."""
    if transport.world_size < 3 or transport.rank > 2:
        return
    for sequence, (sent, wanted) in enumerate([(100, 90), (90, 100), (200_000, 100_000), (100_000, 200_000)]):
        op = operation("unequal", sequence)
        if transport.rank == 0:
            for peer in (1, 2):
                (request,) = transport.post([], [Message(peer, poisoned(wanted))], op)
                transport.track(request, peer, op)
            with pytest.raises(TransportError, match=f"rank 2 .*{wanted}|{wanted} bytes from rank 2"):
                while True:
                    transport.ended(op)
        elif transport.rank == 2:
            try:
                transport.wait(transport.post([Message(0, poisoned(sent))], [], op), op)
            except TransportError:
                assert transport.backend == "local"
    # Rank 1 sends nothing, and stays for it.
    op = operation("through", 4)
    if transport.rank == 0:
        transport.wait(transport.post([Message(1, poisoned(1))], [], op), op)
    elif transport.rank == 1:
        transport.wait(transport.post([], [Message(0, poisoned(1))], op), op)


class _Soon:
    """Its body ends long before any time limit."""

    def __enter__(self) -> None:
        self._started_s = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        assert time.monotonic() - self._started_s < LIMIT_S / 3


def _names(checks: tuple[Callable[[Any], None], ...]) -> Iterator[str]:
    return (f"{__name__}:{check.__name__}" for check in checks)


CHECKS = tuple(
    _names(
        (
            check_exchange,
            check_exchange_of_nothing,
            check_exchange_meets_across_operations,
            check_order_within_tag,
            check_tags_out_of_order,
            check_uneven_sizes_and_counters,
            check_split,
            check_views_into_larger_memory,
            check_large_ring,
            check_many_operations,
            check_second_thread,
            check_twin,
            check_ends_are_told,
            check_ends_of_different_peers_are_told_out_of_order,
            check_several_ends_at_once,
            check_tracked_and_waited_for_side_by_side,
            check_tracked_views_stay_alive,
            check_timeout_of_what_is_tracked,
            check_abort_reaches_who_tracks,
            check_timeout,
            check_timeout_of_a_send,
            check_timeout_of_an_exchange,
            check_abort,
            check_use_after_close,
        )
    )
)
# MPI gives no sign of a rank that closes and lives on, and Gloo none of a message that is too short.
CLOSURE_CHECKS = tuple(_names((check_closed_peer,)))
SIZE_CHECKS = tuple(_names((check_sizes_that_disagree, check_sizes_of_what_is_tracked)))

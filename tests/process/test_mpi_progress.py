"""What moves over MPI while nobody waits: the thread that polls, alone and in ranks."""

from __future__ import annotations

import gc
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from sparsecoll.errors import CollectiveTimeout, PeerFailure, TransportError
from sparsecoll.transport.base import Message, Operation, View
from sparsecoll.transport.mpi import MpiTransport
from sparsecoll.transport.progress import Progress
from tests.harness import spawn, spawn_checks
from tests.transport_checks import pattern, peers_of, poisoned
from tests.worker import CheckResults

LIMIT_S = 20.0
NUM_BYTES = 32 << 20


class FakeRequest:
    """Ends when it is told to; remembers who has asked."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.has_ended = self.is_told = False
        self.may_answer: threading.Event | None = None
        self.problem: RuntimeError | None = None

    def Get_status(self) -> bool:
        self.num_asked += 1
        if self.may_answer is not None:
            assert self.may_answer.wait(LIMIT_S)
        if self.problem is not None:
            raise self.problem
        return self.has_ended

    def __bool__(self) -> bool:
        return not self.is_told


@pytest.fixture
def progress() -> Iterator[Progress]:
    found = Progress("under-test")
    yield found
    found.close()


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(1e-3)


def threads_named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def test_what_is_not_left_is_not_polled(progress: Progress) -> None:
    request = FakeRequest()
    progress.posted([request])
    progress.pause()
    request.has_ended = request.is_told = True
    progress.go_on()
    progress.leave()
    assert request.num_asked == progress.num_polls == 0
    assert not threads_named("under-test")


def test_what_is_left_is_polled_until_it_has_ended(progress: Progress) -> None:
    requests = [FakeRequest() for _ in range(3)]
    progress.posted(requests)
    progress.leave()
    until(lambda: requests[0].num_asked > 2)
    for request in requests:
        request.has_ended = True
    until(lambda: all(request.num_asked for request in requests))
    time.sleep(0.01)
    num_polls = progress.num_polls
    assert num_polls == sum(request.num_asked for request in requests)
    time.sleep(0.05)
    assert progress.num_polls == num_polls


def test_more_may_be_left_at_any_time(progress: Progress) -> None:
    first, second, third = FakeRequest(), FakeRequest(), FakeRequest()
    progress.posted([first])
    progress.leave()
    until(lambda: first.num_asked > 0)
    progress.posted([second])
    progress.leave()
    first.has_ended = True
    until(lambda: second.num_asked > 0)
    second.has_ended = True
    time.sleep(0.01)  # long enough to fall asleep
    progress.posted([third])
    progress.leave()
    until(lambda: third.num_asked > 0)
    assert len(threads_named("under-test")) == 1


def test_no_poll_while_the_owner_waits(progress: Progress) -> None:
    """The owner gets its requests when the poll that runs has returned, and has them to itself until it goes on."""
    request = FakeRequest()
    request.may_answer = threading.Event()
    progress.posted([request])
    progress.leave()
    until(lambda: request.num_asked == 1)
    threading.Timer(0.05, request.may_answer.set).start()
    progress.pause()
    assert request.may_answer.is_set()
    time.sleep(0.05)
    assert request.num_asked == 1
    progress.go_on()
    until(lambda: request.num_asked > 1)


def test_no_poll_while_the_owner_of_another_one_waits(progress: Progress) -> None:
    """Whoever polls for some messages moves all of them."""
    request, second = FakeRequest(), Progress("second", beside=progress)
    try:
        progress.pause()
        second.posted([request])
        second.leave()
        time.sleep(0.05)
        assert request.num_asked == 0
        progress.go_on()
        until(lambda: request.num_asked > 0)
    finally:
        second.close()


def test_what_its_owner_has_ended_is_not_polled(progress: Progress) -> None:
    ended, running = FakeRequest(), FakeRequest()
    progress.posted([ended, running])
    progress.leave()
    until(lambda: ended.num_asked > 0)
    progress.pause()
    num_asked, ended.is_told = ended.num_asked, True
    progress.go_on()
    until(lambda: running.num_asked > 0)
    assert ended.num_asked == num_asked


def test_what_fails_is_left_to_its_owner(progress: Progress) -> None:
    failing, running = FakeRequest(), FakeRequest()
    failing.problem = RuntimeError("truncated")
    progress.posted([failing, running])
    progress.leave()
    until(lambda: running.num_asked > 0)
    assert failing.num_asked == 1


def test_polls_are_seldom_when_nothing_moves(progress: Progress) -> None:
    request = FakeRequest()
    progress.posted([request])
    progress.leave()
    time.sleep(0.3)
    assert 0 < progress.num_polls < 10_000


def test_closing_ends_the_thread(progress: Progress) -> None:
    request = FakeRequest()
    progress.posted([request])
    progress.leave()
    until(lambda: request.num_asked > 0)
    progress.close()
    progress.close()
    assert not threads_named("under-test")
    num_asked = request.num_asked
    progress.posted([request])
    progress.leave()
    assert request.num_asked == num_asked and not threads_named("under-test")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_closes_its_copy(progress: Progress) -> None:
    """Where the thread does not exist, and a poll may have been running for ever."""
    request = FakeRequest()
    request.may_answer = threading.Event()
    progress.posted([request])
    progress.leave()
    until(lambda: request.num_asked == 1)
    child = os.fork()
    if child == 0:
        signal.alarm(int(LIMIT_S))
        progress.close()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    request.may_answer.set()
    assert status == 0


def content(src: int, number: int, num_bytes: int) -> View:
    """As `pattern`, for megabytes."""
    return np.resize(np.arange(7 * src + number, 7 * src + number + 101, dtype=np.uint8), num_bytes)


def post_and_leave(transport: MpiTransport, op: Operation, num_bytes: int = NUM_BYTES) -> tuple[list[object], View]:
    """To the right and from the left; the requests and where the bytes go."""
    right, left = (transport.rank + 1) % transport.world_size, (transport.rank - 1) % transport.world_size
    sent, received = content(transport.rank, op.sequence, num_bytes), poisoned(num_bytes)
    requests = transport.post([Message(right, sent)], [Message(left, received)], op)
    transport.keep_going()
    return requests, received


def check_bytes_move_under_compute(transport: MpiTransport) -> None:
    """What was left has arrived before anybody waits for it, and so the wait is short."""
    left = (transport.rank - 1) % transport.world_size
    matrix = np.ones((200, 200), np.float32)
    for attempt in range(5):
        alone_s, waits_s = [], []
        for sequence in range(5):
            op = Operation("left", 5 * attempt + sequence, LIMIT_S)
            expected = content(left, op.sequence, NUM_BYTES)
            transport.exchange(b"alone", op)
            begin_s = time.monotonic()
            transport.wait(post_and_leave(transport, op)[0], op)
            alone_s.append(time.monotonic() - begin_s)
            requests, received = post_and_leave(transport, op)
            while not (received[-1] == expected[-1] and np.array_equal(received, expected)):
                matrix = np.minimum(matrix @ matrix, 1)
                assert op.remaining_s > 0.0, "nothing has moved"
            transport.exchange(b"ready", op)  # so that what this rank sends has arrived as well
            begin_s = time.monotonic()
            transport.wait(requests, op)
            waits_s.append(time.monotonic() - begin_s)
        is_short = statistics.median(waits_s) < statistics.median(alone_s) / 3
        if all(each == b"\1" for each in transport.exchange(bytes([is_short]), op)):
            return
    raise AssertionError(f"expected waits shorter than a third of {alone_s} s, got {waits_s} s")


def check_nothing_is_polled_that_is_waited_for_at_once(transport: MpiTransport) -> None:
    for sequence in range(50):
        op = Operation("at once", sequence, LIMIT_S)
        received = {peer: poisoned(100_000) for peer in peers_of(transport)}
        sends = [Message(peer, pattern(transport.rank, peer, sequence, 100_000)) for peer in received]
        transport.wait(transport.post(sends, [Message(*item) for item in received.items()], op), op)
        transport.exchange(b"and records", op)
    assert transport._progress.num_polls == 0
    assert not threads_of(transport)


def check_the_thread_sleeps_when_all_has_ended(transport: MpiTransport) -> None:
    op = Operation("left", 1, LIMIT_S)
    transport.wait(post_and_leave(transport, op, 1 << 20)[0], op)
    time.sleep(0.01)
    num_polls = transport._progress.num_polls
    time.sleep(0.1)
    assert transport._progress.num_polls == num_polls


def check_several_operations_and_records(transport: MpiTransport) -> None:
    """Left ones travel on while others are posted, waited for and exchanged; they end in any order."""
    in_flight = []
    for sequence in range(12):
        op = Operation("left", sequence, LIMIT_S)
        in_flight.append((op, *post_and_leave(transport, op, 30_000 * sequence + 7)))
        at_once = Operation("at once", 100 + sequence, LIMIT_S)
        received = {peer: poisoned(5000) for peer in peers_of(transport)}
        sends = [Message(peer, pattern(transport.rank, peer, sequence, 5000)) for peer in received]
        transport.wait(transport.post(sends, [Message(*item) for item in received.items()], at_once), at_once)
        for peer, view in received.items():
            np.testing.assert_array_equal(view, pattern(peer, transport.rank, sequence, 5000))
        assert len(set(transport.exchange(b"record", at_once))) == 1
        time.sleep(1e-3)
    for op, requests, view in in_flight[::-2] + in_flight[::2]:
        transport.wait(requests, op)
        left = (transport.rank - 1) % transport.world_size
        np.testing.assert_array_equal(view, content(left, op.sequence, view.nbytes))


def check_messages_of_a_twin(transport: MpiTransport) -> None:
    """Left on the twin, they arrive while the other one exchanges records and waits for messages."""
    twin, left = transport.twin(), (transport.rank - 1) % transport.world_size
    op = Operation("left", 2, LIMIT_S)
    requests, received = post_and_leave(twin, op)
    expected = content(left, op.sequence, NUM_BYTES)
    transport.exchange(b"record", op)
    while not np.array_equal(received, expected):
        assert op.remaining_s > 0.0, "nothing has moved"
    transport.exchange(b"arrived", op)
    twin.wait(requests, op)
    twin.close()
    assert not threads_of(twin)


def check_left_and_then_tracked(transport: MpiTransport) -> None:
    op = Operation("left", 3, LIMIT_S)
    requests, received = post_and_leave(transport, op, 1 << 20)
    time.sleep(0.02)
    for key, request in enumerate(requests):
        transport.track(request, key, op)
    told: set[object] = set()
    while len(told) < 2:
        told |= set(transport.ended(op))
    left = (transport.rank - 1) % transport.world_size
    np.testing.assert_array_equal(received, content(left, op.sequence, received.nbytes))


def check_a_wait_in_vain_ends_in_time(transport: MpiTransport) -> None:
    op = Operation("in vain", 1, 0.3)
    requests = transport.post([], [Message(peer, poisoned(4321)) for peer in peers_of(transport)], op)
    transport.keep_going()
    until(lambda: transport._progress.num_polls > 0)
    with pytest.raises(CollectiveTimeout, match=r"receive from rank \d of 4321 bytes"):
        transport.wait(requests, op)
    assert 0.3 <= time.monotonic() - op.started_s < LIMIT_S / 2
    transport.abort("in vain")
    assert not threads_of(transport)


def check_sizes_that_disagree(transport: MpiTransport) -> None:
    """The thread sees the end, and who waits is told that it is a bad one."""
    for sequence, num_bytes in enumerate((90, 200_000)):
        op = Operation("unequal", sequence, LIMIT_S)
        if transport.rank == 0:
            requests = transport.post([], [Message(1, poisoned(num_bytes))], op)
            transport.keep_going()
            time.sleep(0.05)
            with pytest.raises(TransportError, match=f"{num_bytes} bytes"):
                transport.wait(requests, op)
        elif transport.rank == 1:
            transport.wait(transport.post([Message(0, poisoned(2 * num_bytes))], [], op), op)


def check_an_abort_is_heard(transport: MpiTransport) -> None:
    op = Operation("doomed", 1, LIMIT_S)
    requests = transport.post([], [Message(peer, poisoned(NUM_BYTES)) for peer in peers_of(transport)], op)
    transport.keep_going()
    time.sleep(0.02)
    if transport.rank == 0:
        transport.abort("boom")
        return
    with pytest.raises(PeerFailure, match="rank 0 aborted: boom"):
        transport.wait(requests, op)
    transport.close()
    assert not threads_of(transport)


def check_closing_with_messages_in_flight(transport: MpiTransport) -> None:
    op = Operation("unmatched", 1, LIMIT_S)
    requests = transport.post([], [Message(peer, poisoned(8)) for peer in peers_of(transport)], op)
    transport.keep_going()
    assert len(threads_of(transport)) == 1
    transport.close()
    assert not threads_of(transport)
    del requests


def check_a_forgotten_transport_stops(transport: MpiTransport) -> None:
    op = Operation("unmatched", 1, LIMIT_S)
    forgotten = MpiTransport(timeout_s=LIMIT_S)
    requests = forgotten.post([], [Message(peer, poisoned(8)) for peer in peers_of(forgotten)], op)
    forgotten.keep_going()
    assert len(threads_of(forgotten)) == 1
    del forgotten
    gc.collect()
    assert not threads_of(transport)
    del requests


def threads_of(transport: MpiTransport) -> list[threading.Thread]:
    return threads_named(f"sparsecoll-{transport.rank}-progress")


CHECKS = tuple(f"{__name__}:{name}" for name in list(globals()) if name.startswith("check_"))


@pytest.fixture(scope="module")
def results() -> CheckResults:
    return spawn_checks(CHECKS, (2,), "mpi")


@pytest.mark.parametrize("check", CHECKS)
def test_check(check: str, results: CheckResults) -> None:
    failure = results[check, 2]
    assert failure is None, failure


def end_without_closing(transport: MpiTransport, ending: str) -> None:
    """One transport that nobody closes still polls when Python ends."""
    forgotten = MpiTransport(timeout_s=LIMIT_S)
    op = Operation("unmatched", 1, LIMIT_S)
    requests = forgotten.post([], [Message(peer, poisoned(NUM_BYTES)) for peer in peers_of(forgotten)], op)
    forgotten.keep_going()
    assert len(threads_of(forgotten)) == 1
    if ending == "abort" and forgotten.rank == 0:
        forgotten.abort("through")
    KEPT.append((forgotten, requests))


KEPT: list[object] = []


@pytest.mark.parametrize("ending", ["silent", "abort"])
def test_python_ends_cleanly(ending: str) -> None:
    spawn(f"{__name__}:end_without_closing", 2, "mpi", ending, timeout_s=30.0)

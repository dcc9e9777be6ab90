"""Group: order, life and death of operations, and what every rank is told when one of them fails."""

from __future__ import annotations

import gc
import re
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import sparsecoll as sc
from sparsecoll.collectives.agreement import agree, digest_of
from sparsecoll.group import default_group, resolve_group

PLACE = sc.Placement.even(6, 3).replicate({0: [1, 2], 4: [0]})


def gather(group: sc.Group, **more: Any) -> Any:
    """A collective in which every pair of ranks has something to say to each other or to the control exchange."""
    return sc.sparse_all_gather(np.full((2, 4), float(group.rank)), PLACE, group=group, **more)


def caught(attempt: Any) -> BaseException:
    try:
        attempt()
    except BaseException as error:
        return error
    raise AssertionError("expected an error")


@pytest.fixture
def clean_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No launcher's variables, and no default group left behind."""
    for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name in ("SPARSECOLL_TIMEOUT_S", "SPARSECOLL_CHECKED"):
        monkeypatch.delenv(name, raising=False)
    yield
    try:
        default_group().close()
    except sc.InvalidArgument:
        return


# --- life


def test_close_is_idempotent_and_ends_everything() -> None:
    def main(group: sc.Group) -> None:
        gather(group)
        group.barrier()
        group.close()
        group.close()
        for use in (lambda: gather(group), lambda: gather(group, async_op=True), group.barrier, lambda: group.mean(1)):
            with pytest.raises(sc.InvalidArgument, match=rf"expected an open group, .* \(rank {group.rank}/3\)"):
                use()
        assert group.stats().received_messages > 0, "counters outlive the group"

    sc.run_local(main, 3)


def test_is_a_context_manager() -> None:
    def main(group: sc.Group) -> None:
        with group as same:
            assert same is group
            group.barrier()
        with pytest.raises(sc.InvalidArgument, match="closed"):
            group.barrier()

    sc.run_local(main, 2)


def test_close_lets_pending_work_end() -> None:
    def main(group: sc.Group) -> None:
        works = [gather(group, async_op=True) for _ in range(5)]
        group.close()
        assert all(work.done() and work.exception() is None for work in works)
        assert works[-1].result().shape == (len(PLACE.held_by(group.rank)), 4)

    sc.run_local(main, 3)


def test_close_gives_the_thread_back() -> None:
    def workers(rank: int) -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == f"sparsecoll-{rank}"]

    def main(group: sc.Group) -> None:
        gather(group)
        assert not workers(group.rank), "blocking operations need none"
        gather(group, async_op=True).wait()
        gather(group, async_op=True).wait()
        (worker,) = workers(group.rank)
        assert worker.daemon, "a group that nobody closes does not keep the process alive"
        group.close()
        assert not worker.is_alive()

    sc.run_local(main, 3)


def test_a_peer_that_closes_is_named() -> None:
    gone = threading.Event()

    def main(group: sc.Group) -> BaseException | None:
        if group.rank == 1:
            group.close()
            gone.set()
            return None
        gone.wait(10)
        return caught(lambda: gather(group, timeout_s=5.0))

    first, _, last = sc.run_local(main, 3)
    for error in (first, last):
        assert isinstance(error, sc.PeerFailure) and "rank 1" in str(error)


def test_properties_and_repr() -> None:
    def main(group: sc.Group) -> tuple[int, int]:
        assert group.backend == "local" and group.checked and group.timeout_s == 7.0
        assert repr(group) == f"Group(rank={group.rank}, world_size=3, backend='local')"
        assert group.topology == sc.Topology((0, 0, 0), shared_memory=True), "threads share a host"
        return group.rank, group.world_size

    assert sc.run_local(main, 3, timeout_s=7.0) == [(0, 3), (1, 3), (2, 3)]


def test_a_topology_of_another_size_is_refused() -> None:
    with pytest.raises(sc.InvalidArgument, match="topology of 2 ranks"):
        sc.run_local(lambda group: None, 2, topology=sc.Topology.flat(3))


def test_every_bad_timeout_is_refused_before_anything_is_sent() -> None:
    def main(group: sc.Group) -> None:
        for timeout_s in (0, -1.0, float("nan")):
            with pytest.raises(sc.InvalidArgument, match=f"timeout_s > 0, got {timeout_s}"):
                gather(group, timeout_s=timeout_s)
            with pytest.raises(sc.InvalidArgument, match="timeout_s > 0"):
                group.barrier(timeout_s)
        gather(group, timeout_s=float("inf"))

    sc.run_local(main, 3)


# --- small collectives


def test_mean_is_summed_in_rank_order() -> None:
    values = [1e16, 1.0, -1e16, 3.5]
    expected = (((0.0 + values[0]) + values[1]) + values[2] + values[3]) / 4
    assert sc.run_local(lambda group: group.mean(values[group.rank]), 4) == [expected] * 4


def test_exchange_gives_all_records_in_rank_order() -> None:
    def main(group: sc.Group) -> list[bytes]:
        return group.exchange(bytes([group.rank, 255]))

    assert sc.run_local(main, 3) == [[b"\0\xff", b"\1\xff", b"\2\xff"]] * 3


def test_barrier_returns_when_all_have_called() -> None:
    arrived: list[int] = []

    def main(group: sc.Group) -> int:
        arrived.append(group.rank)
        group.barrier()
        return len(arrived)

    assert sc.run_local(main, 7) == [7] * 7


def test_stats_count_payload_and_control_apart() -> None:
    def main(group: sc.Group) -> None:
        start = group.stats()
        group.barrier()
        barrier = group.stats().since(start)
        assert (barrier.control_messages, barrier.control_bytes) == (2, 2)
        assert barrier.sent_bytes == barrier.received_bytes == barrier.sent_messages == 0
        before = group.stats()
        gather(group, algorithm="direct")
        moved = group.stats().since(before)
        plan = sc.plan_all_gather(PLACE, 32, group.topology, "direct")
        assert moved.sent_bytes == plan.sent_bytes[group.rank]
        assert moved.received_messages == plan.received_bytes[group.rank] // 32
        assert start == start.snapshot() and group.stats().since(group.stats()).control_bytes == 0

    sc.run_local(main, 3)


def test_stats_are_a_snapshot() -> None:
    def main(group: sc.Group) -> None:
        before = group.stats()
        bytes_before = before.sent_bytes
        gather(group)
        assert before.sent_bytes == bytes_before

    sc.run_local(main, 3)


def test_records_larger_than_reserved_travel_in_a_second_exchange() -> None:
    def main(group: sc.Group) -> None:
        for num_bytes in (0, 10, group.record_bytes - 29, group.record_bytes - 28, 5000):
            operation = group.operation("counts")
            payload = bytes([group.rank]) * num_bytes
            before = group.stats()
            found = agree(group, operation, digest_of(num_bytes), dict, payload=payload)
            assert found == [bytes([rank]) * num_bytes for rank in range(3)]
            rounds = group.stats().since(before).control_messages // 2
            assert rounds == (1 if 29 + num_bytes <= group.record_bytes else 2)
        group.reserve_record(5100)
        group.reserve_record(10)
        assert group.record_bytes == 5100

    sc.run_local(main, 3)


# --- order


def test_operations_run_in_the_order_of_issue() -> None:
    """Ten in flight with a blocking one at the end: all are done when it returns."""

    def main(group: sc.Group) -> None:
        order: list[int] = []
        works = []
        for number in range(10):
            operation = group.operation("note")

            def note(number: int = number) -> int:
                order.append(number)
                return number

            works.append(group.start(operation, note))
        operation = group.operation("last")
        assert group.run(operation, lambda: order.append(10)) is None
        assert order == list(range(11)) and [work.result() for work in works] == list(range(10))

    sc.run_local(main, 2)


def test_blocking_operations_stay_on_the_callers_thread() -> None:
    def main(group: sc.Group) -> None:
        operation = group.operation("where")
        assert group.run(operation, threading.current_thread) is threading.current_thread()
        operation = group.operation("where")
        assert group.start(operation, threading.current_thread).result().name == f"sparsecoll-{group.rank}"
        operation = group.operation("where")
        assert group.run(operation, threading.current_thread) is threading.current_thread()

    sc.run_local(main, 2)


@pytest.mark.parametrize("async_op", [False, True])
def test_an_ended_operation_keeps_neither_input_nor_result(async_op: bool) -> None:
    def main(group: sc.Group) -> None:
        x = np.ones((6, 1000))
        work = sc.sparse_all_gather(x, sc.Placement.even(6, 1), async_op=async_op)
        result = work.result() if async_op else work
        watches = [weakref.ref(x), weakref.ref(result), weakref.ref(work)]
        del x, work, result
        # The group's thread lets go of an operation just after it has told its end.
        deadline_s = time.monotonic() + 5.0
        while any(watch() is not None for watch in watches) and time.monotonic() < deadline_s:
            gc.collect()
        assert [watch() is None for watch in watches] == [True, True, True]

    sc.run_local(main, 1)


# --- failure


@pytest.mark.parametrize("checked", [True, False])
def test_a_silent_rank_times_the_others_out_on_schedule(checked: bool) -> None:
    """The first who gives up says whom it waited for; everybody else, the silent one too, learns of it at once."""
    limit_s = 0.3
    over = threading.Event()
    still_waiting = [0, 1]

    def main(group: sc.Group) -> BaseException:
        if group.rank == 2:
            assert over.wait(20), "the others never ended"
            return caught(lambda: gather(group, timeout_s=5.0))
        begin_s = time.monotonic()
        error = caught(lambda: gather(group, timeout_s=limit_s, algorithm="dense"))
        elapsed_s = time.monotonic() - begin_s
        assert limit_s * 0.9 <= elapsed_s < limit_s + 10.0, f"{elapsed_s} s"
        again = caught(lambda: gather(group, timeout_s=5.0))
        assert isinstance(again, sc.TransportError) and "unusable since sparse_all_gather #2" in str(again)
        still_waiting.remove(group.rank)
        if not still_waiting:
            over.set()
        return error

    errors = sc.run_local(main, 3, checked=checked, timeout_s=30.0)
    assert all(isinstance(error, (sc.CollectiveTimeout, sc.PeerFailure)) for error in errors)
    timeouts = [error for error in errors[:2] if isinstance(error, sc.CollectiveTimeout)]
    assert timeouts, "somebody waited for the whole time"
    for error in timeouts:
        assert re.match(r"sparse_all_gather #2: expected .* bytes .*within 0\.3 s", str(error))
        assert re.search(r"\(rank [01]/3\)$", str(error))
        if checked:
            assert "got none from ranks" in str(error) and "2" in str(error).split("ranks ")[1]
    assert isinstance(errors[2], sc.PeerFailure) and "aborted" in str(errors[2])


def test_a_timeout_of_async_work_comes_through_its_handle() -> None:
    over = threading.Event()

    def main(group: sc.Group) -> None:
        if group.rank == 1:
            over.wait(20)
            return
        work = gather_two(group, timeout_s=0.2, async_op=True)
        behind = gather_two(group, timeout_s=20.0, async_op=True)
        assert isinstance(work.exception(), sc.CollectiveTimeout)
        with pytest.raises(sc.CollectiveTimeout, match="sparse_all_gather #2"):
            work.result()
        assert isinstance(behind.exception(), sc.TransportError), "what is queued behind a failure ends with it"
        assert isinstance(caught(group.barrier), sc.TransportError)
        over.set()

    def gather_two(group: sc.Group, **more: Any) -> Any:
        return sc.sparse_all_gather(np.ones((1, 2)), sc.Placement.even(2, 2), group=group, **more)

    sc.run_local(main, 2)


def test_a_wait_may_be_shorter_than_the_operation() -> None:
    over = threading.Event()

    def main(group: sc.Group) -> None:
        if group.rank == 1:
            assert over.wait(20)
            group.barrier()
            return
        operation = group.operation("barrier")
        work = group.start(operation, lambda: group.transport.exchange(b"\0", operation))
        with pytest.raises(sc.CollectiveTimeout, match=r"barrier #2: expected an end within 0\.05 s"):
            work.wait(timeout_s=0.05)
        over.set()
        assert work.result() == [b"\0", b"\0"], "the group goes on"

    sc.run_local(main, 2)


def test_an_exception_inside_one_ranks_operation_ends_all() -> None:
    def main(group: sc.Group) -> BaseException | None:
        operation = group.operation("custom")

        def body() -> None:
            if group.rank == 1:
                raise RuntimeError("disk full")
            group.transport.exchange(b"\0", operation)

        work = group.start(operation, body)
        error = work.exception()
        later = caught(lambda: gather(group))
        assert isinstance(later, sc.TransportError) and "unusable since custom #2" in str(later)
        return error

    first, second, third = sc.run_local(main, 3)
    assert isinstance(second, RuntimeError) and str(second) == "disk full"
    for error in (first, third):
        assert isinstance(error, sc.PeerFailure)
        assert "rank 1 aborted: custom #2: RuntimeError: disk full" in str(error)


def test_agreed_errors_leave_the_group_usable() -> None:
    def main(group: sc.Group) -> None:
        for _ in range(3):
            bad = np.ones((5, 4)) if group.rank == 2 else np.ones((2, 4))
            with pytest.raises(sc.InvalidArgument if group.rank == 2 else sc.CollectiveMismatch):
                sc.sparse_all_gather(bad, PLACE)
            work = sc.sparse_all_gather(bad, PLACE, async_op=True)
            assert isinstance(work.exception(), sc.SparsecollError)
            assert len(gather(group)) == len(PLACE.held_by(group.rank))

    sc.run_local(main, 3)


def test_ranks_that_have_lost_count_of_operations_are_told() -> None:
    def main(group: sc.Group) -> None:
        if group.rank == 1:
            group.operation("skipped")
        with pytest.raises(sc.CollectiveMismatch, match=r"equal number on all ranks, got 2 on rank 0 and 3 on rank 1"):
            gather(group)

    sc.run_local(main, 3)


def test_unchecked_misuse_on_one_rank_ends_the_others_soon() -> None:
    def main(group: sc.Group) -> BaseException:
        bad = np.ones((5, 4)) if group.rank == 2 else np.ones((2, 4))
        return caught(lambda: sc.sparse_all_gather(bad, PLACE, algorithm="dense"))

    begin_s = time.monotonic()
    errors = sc.run_local(main, 3, checked=False, timeout_s=30.0)
    assert time.monotonic() - begin_s < 10
    assert [type(error) for error in errors] == [sc.PeerFailure, sc.PeerFailure, sc.InvalidArgument]


# --- run_local


def test_run_local_raises_the_first_failure_and_names_its_rank() -> None:
    def main(group: sc.Group) -> None:
        if group.rank == 2:
            raise KeyError("missing")
        group.barrier(timeout_s=20.0)

    with pytest.raises(KeyError, match="missing") as raised:
        sc.run_local(main, 4)
    assert raised.value.__notes__ == ["raised by rank 2/4"]


def test_run_local_carries_exits_too() -> None:
    def main(group: sc.Group) -> None:
        if group.rank == 0:
            raise SystemExit(3)
        group.barrier(timeout_s=20.0)

    with pytest.raises(SystemExit):
        sc.run_local(main, 2)


def test_run_local_gives_up_on_a_rank_that_runs_on() -> None:
    release = threading.Event()
    seen: list[BaseException] = []

    def main(group: sc.Group) -> None:
        if group.rank == 1:
            release.wait(20)
            seen.append(caught(group.barrier))

    try:
        with pytest.raises(sc.CollectiveTimeout, match=r"within 0\.2 s, ranks \[1\] run on") as raised:
            sc.run_local(main, 2, timeout_s=0.2)
        assert "release.wait" in str(raised.value), "the stack says where"
    finally:
        release.set()
    for thread in threading.enumerate():
        if thread.name == "rank 1":
            thread.join(10)
    assert [type(error) for error in seen] == [sc.PeerFailure], "its next message raises"


@pytest.mark.parametrize("world_size", [0, -1])
def test_run_local_needs_a_rank(world_size: int) -> None:
    with pytest.raises(sc.InvalidArgument, match="positive world_size"):
        sc.run_local(lambda group: None, world_size)


# --- default groups


def test_each_thread_as_rank_has_its_own_default() -> None:
    def main(group: sc.Group) -> bool:
        assert default_group() is group
        held = sc.sparse_all_gather(np.full((2, 4), float(group.rank)), PLACE)
        np.testing.assert_array_equal(held, gather(group))
        group.close()
        return isinstance(caught(default_group), sc.InvalidArgument)

    assert sc.run_local(main, 3) == [True] * 3


def test_without_a_default_the_error_says_what_to_call() -> None:
    with pytest.raises(sc.InvalidArgument, match=r"call sparsecoll\.init_group\(\) first"):
        sc.sparse_all_gather(np.ones((4, 1)), sc.Placement.even(4, 1))


@pytest.mark.usefixtures("clean_launcher")
def test_init_group_alone_is_a_world_of_one() -> None:
    group = sc.init_group(timeout_s=9.0, checked=False)
    assert (group.backend, group.rank, group.world_size) == ("local", 0, 1)
    assert (group.timeout_s, group.checked) == (9.0, False)
    assert default_group() is group
    held = sc.sparse_all_gather(np.ones((4, 1)), sc.Placement.even(4, 1))
    assert held.shape == (4, 1)
    group.close()
    assert isinstance(caught(default_group), sc.InvalidArgument)


@pytest.mark.usefixtures("clean_launcher")
def test_init_group_again_replaces_the_default() -> None:
    first = sc.init_group("local")
    second = sc.init_group("local")
    assert default_group() is second
    first.close()
    assert default_group() is second, "closing an older one leaves the newer"
    second.close()


@pytest.mark.usefixtures("clean_launcher")
def test_settings_come_from_argument_then_environment_then_default(monkeypatch: pytest.MonkeyPatch) -> None:
    with sc.init_group("local") as group:
        assert (group.timeout_s, group.checked) == (300.0, True)
    monkeypatch.setenv("SPARSECOLL_TIMEOUT_S", "11")
    monkeypatch.setenv("SPARSECOLL_CHECKED", "0")
    with sc.init_group("local") as group:
        assert (group.timeout_s, group.checked) == (11.0, False)
    with sc.init_group("local", timeout_s=5, checked=True) as group:
        assert (group.timeout_s, group.checked) == (5, True)


@pytest.mark.usefixtures("clean_launcher")
def test_init_group_refuses_what_it_cannot_do() -> None:
    with pytest.raises(sc.InvalidArgument, match="backend auto, local, torch, mpi or nccl, got 'smoke'"):
        sc.init_group("smoke")
    with pytest.raises(sc.BackendUnavailable, match="nccl"):
        sc.init_group("nccl")
    with pytest.raises(sc.InvalidArgument, match="topology of 1 ranks"):
        sc.init_group("local", topology=sc.Topology.flat(2))
    with pytest.raises(sc.InvalidArgument, match="timeout_s > 0"):
        sc.init_group("local", timeout_s=-1)
    assert isinstance(caught(default_group), sc.InvalidArgument), "no failed start leaves a default"


# --- groups of others


@pytest.mark.parametrize(
    "rubbish", ["world", 3, object(), torch, torch.ones(1), torch.float32, torch.nn.Linear(1, 1), [], sc], ids=repr
)
def test_rubbish_is_no_group(rubbish: Any) -> None:
    with pytest.raises(sc.InvalidArgument, match="expected a Group, None, a ProcessGroup"):
        resolve_group(rubbish)


def test_a_group_resolves_to_itself() -> None:
    def main(group: sc.Group) -> bool:
        return resolve_group(group) is group and resolve_group(None) is group

    assert sc.run_local(main, 2) == [True, True]


def test_a_twin_has_an_order_of_its_own() -> None:
    """An operation on the twin's thread waits for rank 0, and operations of the group itself do not wait for it."""
    place = sc.Placement.even(3, 3).replicate(dict.fromkeys(range(3), range(3)))

    def main(group: sc.Group) -> None:
        twin = group.twin()
        shard = np.full((1, 5), group.rank)
        started = [] if group.rank == 0 else [sc.sparse_all_gather(shard, place, group=twin, async_op=True)]
        before = group.stats()
        for _ in range(3):
            assert sc.sparse_all_gather(shard, place, group=group)[2, 0] == 2
        if group.rank == 0:
            started.append(sc.sparse_all_gather(shard, place, group=twin, async_op=True))
        assert started[0].result()[1, 0] == 1
        assert group.stats().since(before).sent_bytes == 4 * 2 * shard.nbytes, "with what the twin has sent"
        group.close()
        with pytest.raises(sc.InvalidArgument, match="closed"):
            twin.barrier()

    sc.run_local(main, 3, timeout_s=10.0)

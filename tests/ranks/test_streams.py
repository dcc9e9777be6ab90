"""Collectives in the order of streams: NCCL and CUDA emulated on threads, kernels emulated from their own text."""

from __future__ import annotations

import inspect
import random
import threading
import time
from typing import Any

import pytest
import torch

import sparsecoll as sc
from sparsecoll.collectives.agreement import digest_of
from sparsecoll.collectives.buffers import buffer_of
from sparsecoll.collectives.counts import CountExchange
from sparsecoll.cuda.device import Event
from sparsecoll.executor import Spot, gather_recipe, run_recipe
from sparsecoll.transport.local import LocalTransport, LocalWorld
from sparsecoll.transport.nccl import CupyLibrary, NcclTransport
from tests.conformance import CHECKS
from tests.emulation.fake_cupy import HOST
from tests.emulation.world import device_of, run_emulated

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CHECKS)
def test_conformance(name: str, world_size: int) -> None:
    run_emulated(CHECKS[name], world_size, timeout_s=60.0, seed=world_size)


@pytest.mark.parametrize("node_of", [(0, 0, 1, 1), (0, 1, 0, 1, 1)], ids=str)
@pytest.mark.parametrize("name", ["all_gather", "reduce_scatter", "pieces", "pieces_of_segments"])
def test_conformance_unchecked_on_two_nodes(name: str, node_of: tuple[int, ...]) -> None:
    run_emulated(CHECKS[name], len(node_of), checked=False, topology=sc.Topology(node_of))


def place_of(world_size: int) -> sc.Placement:
    everyone = range(world_size)
    return sc.Placement.even(3 * world_size, world_size).replicate({0: everyone, 4: everyone, 5: [0]})


def held_rows(place: sc.Placement, rank: int, values: torch.Tensor) -> torch.Tensor:
    return values[torch.from_numpy(place.held_by(rank))]


@pytest.mark.parametrize("algorithm", ["direct", "relay"])
@pytest.mark.parametrize("seed", range(8))
def test_operations_come_after_the_callers_stream_and_before_what_it_does_next(algorithm: str, seed: int) -> None:
    """Inputs are written late, on the caller's stream; results are read there, and inputs overwritten at once."""

    def main(group: sc.Group) -> None:
        device = device_of(group)
        place = place_of(group.world_size)
        stream = device.new_stream(0).ptr
        device.fake.current = stream
        values = torch.arange(place.num_chunks * 40, dtype=torch.float32).view(-1, 40)
        shard = torch.full((len(place.owned_by(group.rank)), 40), -1.0)
        mine = values[torch.from_numpy(place.owned_by(group.rank))]
        seen: list[torch.Tensor] = []
        for step in range(3):
            device.fake.run_on(stream, lambda: time.sleep(0.002))
            device.fake.run_on(stream, lambda step=step: shard.copy_(mine + step))
            held = sc.sparse_all_gather(shard, place, algorithm=algorithm, group=group)
            device.fake.run_on(stream, lambda: shard.fill_(-2.0))
            owned = sc.sparse_reduce_scatter(held, place, algorithm=algorithm, group=group)
            device.fake.run_on(stream, lambda held=held, owned=owned: seen.append((held.clone(), owned.clone())))
            device.fake.run_on(stream, lambda held=held, owned=owned: (held.fill_(-3.0), owned.fill_(-3.0)))
        device.fake.drain()
        num_holders = torch.from_numpy(place.holders.sum(axis=1))[torch.from_numpy(place.owned_by(group.rank))]
        for step, (held, owned) in enumerate(seen):
            assert torch.equal(held, held_rows(place, group.rank, values) + step)
            assert torch.equal(owned, (mine + step) * num_holders[:, None])

    run_emulated(main, 3, checked=False, seed=10 * seed)


def test_the_host_waits_for_nothing() -> None:
    """Calls return while the caller's stream is stopped; Work tells the truth meanwhile."""

    def main(group: sc.Group) -> None:
        device, place = device_of(group), place_of(group.world_size)
        shard = torch.ones(len(place.owned_by(group.rank)), 8)
        sc.sparse_all_gather(shard, place, group=group)
        gate = threading.Event()
        stream = device.new_stream(0).ptr
        device.fake.current = stream
        device.fake.run_on(stream, lambda: gate.wait(20.0))
        started_s = time.monotonic()
        held = sc.sparse_all_gather(shard, place, group=group)
        work = sc.sparse_reduce_scatter(held, place, group=group, async_op=True)
        rows = sc.all_to_all(held[: group.world_size], [1] * group.world_size, [1] * group.world_size, group=group)
        assert not work.done()
        with pytest.raises(sc.CollectiveTimeout):
            work.wait(timeout_s=0.05)
        assert time.monotonic() - started_s < 5.0
        gate.set()
        owned = work.result()
        assert work.exception() is None and work.done()
        device.fake.drain()
        assert torch.equal(held, torch.ones_like(held)) and torch.equal(rows, torch.ones_like(rows))
        num_holders = place.holders.sum(axis=1)[place.owned_by(group.rank)]
        assert owned[:, 0].tolist() == num_holders.tolist()

    run_emulated(main, 2, checked=False)


def test_tensors_that_nobody_waits_for_stay_until_the_device_is_through() -> None:
    """A caller that drops its input and the Work at once gets neither a crash nor another's numbers."""

    def main(group: sc.Group) -> list[float]:
        device, place = device_of(group), place_of(group.world_size)
        out = torch.zeros(len(place.held_by(group.rank)), 4096)
        stream = device.new_stream(0).ptr
        device.fake.current = stream
        device.fake.run_on(stream, lambda: time.sleep(0.05))
        shard = torch.full((len(place.owned_by(group.rank)), 4096), 7.0)
        sc.sparse_all_gather(shard, place, out=out, group=group, async_op=True)
        del shard
        torch.full((len(place.owned_by(group.rank)), 4096), 9.0)
        group.barrier()
        device.fake.drain()
        return out.unique().tolist()

    assert run_emulated(main, 2, checked=False) == [[7.0], [7.0]]


class TwoGroups:
    """Two groups over the same ranks, with communicators of their own on the same device."""

    def __init__(self, world_size: int) -> None:
        self._world = LocalWorld(world_size)

    def second(self, group: sc.Group, timeout_s: float = 20.0) -> sc.Group:
        device = device_of(group)
        control = LocalTransport(self._world, group.rank)
        library = CupyLibrary(device.fake.cuda.nccl)
        transport = NcclTransport(control, device, library, timeout_s=timeout_s)
        return sc.Group(transport, timeout_s=timeout_s, checked=False)


def run_program(groups: list[sc.Group], seed: int, num_steps: int) -> None:
    """The same random operations on every rank, from several streams, and their results."""
    draw, rank, world_size = random.Random(seed), groups[0].rank, groups[0].world_size
    device, place = device_of(groups[0]), place_of(world_size)
    streams = [device.new_stream(0).ptr for _ in range(3)]
    pending: list[tuple[Any, float, torch.Tensor]] = []
    for step in range(num_steps):
        group, kind, number = draw.choice(groups), draw.choice(["gather", "reduce", "all_to_all"]), float(step)
        is_async = draw.random() < 0.5
        device.fake.current = draw.choice(streams)
        if random.Random(1000 * seed + 10 * step + rank).random() < 0.3:  # not the same on all ranks
            device.fake.run_on(device.fake.current, lambda: time.sleep(0.001))
        result: Any
        if kind == "gather":
            given = torch.full((len(place.owned_by(rank)), 3), number)
            result = sc.sparse_all_gather(given, place, group=group, async_op=is_async)
        elif kind == "reduce":
            given = torch.full((len(place.held_by(rank)), 3), number)
            result = sc.sparse_reduce_scatter(given, place, op="mean", group=group, async_op=is_async)
        else:
            given, counts = torch.full((world_size, 2), number), [1] * world_size
            result = sc.all_to_all(given, counts, counts, group=group, async_op=is_async)
        # Memory of these tensors is not given back in the order of streams, as a GPU's is.
        pending.append((result, number, given))
    for result, expected, _ in pending:
        device.fake.current = draw.choice(streams)
        tensor = result.result() if isinstance(result, sc.Work) else result
        device.fake.drain()
        assert tensor.unique().tolist() == [expected]
    device.fake.current = HOST


@pytest.mark.parametrize("seed", range(6))
def test_random_programs_over_two_groups_end(seed: int) -> None:
    """On these devices ranks that start NCCL kernels in different orders would wait for ever."""
    worlds = TwoGroups(3)

    def main(group: sc.Group) -> None:
        with worlds.second(group) as other:
            run_program([group, other], seed, 30)

    run_emulated(main, 3, checked=False, timeout_s=20.0, seed=100 * seed)


def test_different_orders_on_two_ranks_are_a_timeout_and_not_a_hang() -> None:
    """The test above can fail: here ranks issue two groups' operations in different orders."""
    worlds = TwoGroups(2)

    def main(group: sc.Group) -> list[str]:
        with worlds.second(group) as other:
            device, counts = device_of(group), [1, 1]
            device.fake.current = device.new_stream(0).ptr
            order = [group, other] if group.rank == 0 else [other, group]
            rows = torch.ones(2, 2)
            works = [sc.all_to_all(rows, counts, counts, group=g, async_op=True, timeout_s=1.0) for g in order]
            found = [type(work.exception()).__name__ for work in works]
            device.fake.drain()  # the streams are released
            return found

    # Whose time is up first ends it for the other, and once a rank has given up one, the other may find its match.
    found = [name for names in run_emulated(main, 2, checked=False) for name in names]
    assert "CollectiveTimeout" in found and set(found) <= {"CollectiveTimeout", "PeerFailure", "NoneType"}


def test_a_rank_that_does_not_come_is_a_timeout_and_the_group_is_unusable() -> None:
    def main(group: sc.Group) -> None:
        device, place = device_of(group), place_of(group.world_size)
        device.fake.current = device.new_stream(0).ptr
        if group.rank == 0:
            time.sleep(2.0)
            return
        started_s = time.monotonic()
        shard = torch.ones(len(place.owned_by(group.rank)), 4)
        work = sc.sparse_all_gather(shard, place, group=group, async_op=True, timeout_s=0.5)
        error = work.exception()
        assert isinstance(error, sc.CollectiveTimeout) and "sparse_all_gather" in str(error), error
        assert time.monotonic() - started_s < 1.5
        with pytest.raises((sc.CollectiveTimeout, sc.TransportError)):
            sc.sparse_all_gather(shard, place, group=group)
        with pytest.raises(sc.TransportError, match="unusable"):
            sc.sparse_all_gather(shard, place, group=group)
        device.fake.drain()  # the stream goes on

    run_emulated(main, 2, checked=False)


@pytest.mark.parametrize("seed", range(5))
def test_lanes_of_different_priority_keep_one_order(seed: int) -> None:
    """Each has a stream and a communicator of its own. Rank 1 sends on, on one, what comes to it on the other."""

    def main(group: sc.Group) -> None:
        transport = group.transport
        assert isinstance(transport, NcclTransport)
        device, rank = device_of(group), group.rank
        operation = group.operation("open_lane")
        group.run(operation, lambda: transport.open_lane(-1, operation))
        row, spot = torch.zeros(1000), {0: (Spot(0, 0, 4000),)}
        device.fake.current = device.new_stream(0).ptr
        for step in range(1, 6):
            if rank == 0:
                row.fill_(step)
            for src, priority in ((0, 0), (1, -1)):
                place = sc.Placement.of_owners([src], 3).replicate({0: [src + 1]})
                plan = sc.plan_all_gather(place, 4000, group.topology, "direct")
                source = spot if rank == src else {}
                recipe = gather_recipe(plan, rank, source, spot if rank == src + 1 else {}, {0: (4000,)}, 1)
                operation = group.operation("hop")
                run_recipe(recipe, transport, [buffer_of(row)], operation, "torch", priority=priority)
            device.fake.drain()
            group.barrier()
            assert row.unique().tolist() == [float(step)]

    run_emulated(main, 3, checked=False, seed=7 * seed)


def test_who_waits_for_a_rank_that_gave_up_hears_of_it_at_once() -> None:
    def main(group: sc.Group) -> str:
        device, rows = device_of(group), torch.ones(2, 2)
        device.fake.current = device.new_stream(0).ptr
        if group.rank == 0:
            with pytest.raises(ZeroDivisionError):
                group.run(group.operation("mine"), lambda: 1 / 0)
            return ""
        started_s = time.monotonic()
        error = sc.all_to_all(rows, [1, 1], [1, 1], group=group, async_op=True).exception()
        assert isinstance(error, sc.PeerFailure) and time.monotonic() - started_s < 5.0, error
        device.fake.drain()
        return str(error)

    assert "rank 0 aborted: mine" in run_emulated(main, 2, checked=False)[1]


def test_an_error_of_nccl_is_a_typed_error() -> None:
    def main(group: sc.Group) -> str:
        device = device_of(group)
        device.fake.current = device.new_stream(0).ptr
        gate = threading.Event()
        device.fake.run_on(device.fake.current, lambda: gate.wait(20.0))
        work = sc.all_to_all(torch.ones(2, 2), [1, 1], [1, 1], group=group, async_op=True)
        channel: Any = group.transport._channels[0]  # type: ignore[attr-defined]
        channel.comm.error = "NCCL_ERROR_REMOTE_ERROR: remote process exited"
        error = work.exception()
        gate.set()
        assert isinstance(error, sc.PeerFailure)
        return str(error)

    for text in run_emulated(main, 2, checked=False):
        assert "remote process exited" in text and "/2" in text


def test_a_captured_operation_replays_with_new_values() -> None:
    def main(group: sc.Group) -> None:
        device, place = device_of(group), place_of(group.world_size)
        counts = [1] * group.world_size
        values = torch.arange(place.num_chunks, dtype=torch.float32)[:, None].expand(-1, 16)
        owned = torch.from_numpy(place.owned_by(group.rank))
        shard, rows = torch.zeros(len(owned), 16), torch.zeros(group.world_size, 4)
        held = torch.zeros(len(place.held_by(group.rank)), 16)
        back = torch.zeros(len(owned), 16)
        received: list[torch.Tensor] = []

        def step() -> None:
            sc.sparse_all_gather(shard, place, out=held, group=group)
            sc.sparse_reduce_scatter(held, place, op="mean", out=back, group=group)
            received[:] = [sc.all_to_all(rows, counts, counts, group=group)]

        stream = device.new_stream(0).ptr
        device.fake.current = stream
        with device.fake.capture(stream), pytest.raises(sc.InvalidArgument, match="run once before"):
            step()
        step()
        device.fake.drain()
        time.sleep(0.1)  # the watcher is through with what ran before
        group.barrier()
        with device.fake.capture(stream) as graph:
            step()
        assert graph
        with device.lane(device.new_stream(0).ptr, priority=-1):  # another lane is none the wiser
            pass
        for number in (1.0, 2.0):
            shard.copy_(values[owned] + number)
            rows.fill_(number + group.rank)
            group.barrier()
            device.fake.replay(graph)
            device.fake.drain()
            assert torch.equal(held, held_rows(place, group.rank, values) + number)
            assert torch.equal(back, values[owned] + number)
            assert received[0][:, 0].tolist() == [number + rank for rank in range(group.world_size)]
            group.barrier()

    run_emulated(main, 2, checked=False)


def test_counts_come_back_while_the_host_does_something_else() -> None:
    def main(group: sc.Group) -> None:
        device = device_of(group)
        stream = device.new_stream(0).ptr
        device.fake.current = stream
        for step in range(4):
            counts = torch.zeros(5, dtype=torch.int64)
            gate = threading.Event()
            device.fake.run_on(stream, lambda gate=gate: gate.wait(20.0))
            device.fake.run_on(stream, lambda counts=counts, step=step: counts.fill_(10 * step + group.rank))
            exchange = CountExchange(group, "counts", digest_of(step), dict, counts, [group.rank == step, -step])
            gate.set()
            loads, numbers = exchange.result()
            assert loads.tolist() == [[10 * step + rank] * 5 for rank in range(group.world_size)]
            assert numbers.tolist() == [[rank == step, -step] for rank in range(group.world_size)]
        wrong = CountExchange(group, "counts", digest_of(group.rank), lambda: {"layer": group.rank}, counts, [])
        with pytest.raises(sc.CollectiveMismatch, match="equal layer"):
            wrong.result()
        assert group.stats().control_bytes > 0

    run_emulated(main, 3)


def test_ranks_in_different_layers_meet_in_their_counts() -> None:
    """Of another number of experts, too: the records have one length."""

    def main(group: sc.Group) -> None:
        group.reserve_record(64 + 8 * (9 + 1))
        counts = torch.ones(5 if group.rank == 0 else 9, dtype=torch.int64)
        layer = {"layer": f"layer {group.rank}"}
        exchange = CountExchange(group, "counts", digest_of(layer), lambda: layer, counts, [0])
        with pytest.raises(sc.CollectiveMismatch, match="equal layer"):
            exchange.result()
        loads, _ = CountExchange(group, "counts", digest_of(0), dict, torch.arange(5), [0]).result()
        assert loads.tolist() == [[0, 1, 2, 3, 4]] * 3

    run_emulated(main, 3)


def test_a_device_that_has_failed_is_a_typed_error_and_closing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA reports the fault of any kernel at the next question; the watcher asks, and so does who waits."""

    def main(group: sc.Group) -> str:
        device, rows, gate = device_of(group), torch.ones(2, 2), threading.Event()
        device.fake.current = device.new_stream(0).ptr
        device.fake.run_on(device.fake.current, lambda: gate.wait(20.0))
        work = sc.all_to_all(rows, [1, 1], [1, 1], group=group, async_op=True)

        def fail(event: Event) -> bool:
            raise RuntimeError("cudaErrorIllegalAddress")

        monkeypatch.setattr(Event, "is_done", fail)
        error = work.exception()
        gate.set()
        assert isinstance(error, (sc.TransportError, sc.PeerFailure)), error
        group.close()
        return str(error)

    assert any("cudaErrorIllegalAddress" in text for text in run_emulated(main, 2, checked=False))


def test_the_emulated_calls_are_calls_of_cupy() -> None:
    """Each name and number of arguments that the library uses is there in CuPy itself."""
    cupy = pytest.importorskip("cupy")
    from cupy.cuda import driver, runtime

    signatures = {
        runtime.eventRecord: 2,
        runtime.streamWaitEvent: 2,
        runtime.streamIsCapturing: 1,
        runtime.memcpyAsync: 5,
        runtime.memsetAsync: 4,
        runtime.getDeviceCount: 0,
        runtime.getDevice: 0,
        driver.launchKernel: 11,
    }
    for function, num_arguments in signatures.items():
        first = function.__doc__.splitlines()[0]
        given = [each for each in first.partition("(")[2].partition(")")[0].split(",") if each.strip()]
        needed = [each for each in given if "=" not in each]
        assert len(needed) <= num_arguments <= len(given), first
    for name in ("alloc", "alloc_pinned_memory", "get_current_stream", "Device"):
        assert hasattr(cupy.cuda, name)
    for name in ("non_blocking", "priority"):
        assert name in cupy.cuda.Stream.__init__.__doc__
    assert "disable_timing" in inspect.getdoc(cupy.cuda.Event)
    assert hasattr(cupy.cuda.Event, "done")
    from cupy.cuda import nccl

    if not nccl.available:  # CuPy without NCCL's own library has none of them
        return
    for name in ("groupStart", "groupEnd", "get_unique_id", "NcclCommunicator"):
        assert hasattr(nccl, name)
    for name in ("send", "recv", "allGather", "check_async_error", "abort", "destroy"):
        assert hasattr(nccl.NcclCommunicator, name)
    assert nccl.NCCL_UINT8 == 1

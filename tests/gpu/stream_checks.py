"""Collectives among the streams of a GPU: what comes before them, what may come after, and what nobody waits for."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import sparsecoll as sc
from tests.gpu.ranks import another_group

__all__ = [
    "CHECKS",
    "check_cupy_arrays",
    "check_deadline",
    "check_dropped_work",
    "check_host_waits_for_nothing",
    "check_narrow_floats",
    "check_order",
    "check_several_groups",
]

_LONG_CYCLES = 400_000_000
"""Some 0.2 s on a GPU: far longer than the host takes to issue what comes behind it."""


def place_of(world_size: int) -> sc.Placement:
    """Chunks with replicas everywhere, somewhere, and nowhere."""
    everyone = range(world_size)
    return sc.Placement.even(3 * world_size, world_size).replicate({0: everyone, 4: everyone, 5: [0]})


def all_held_by_all(world_size: int) -> sc.Placement:
    """One chunk for each rank, which all others wait for."""
    return sc.Placement.even(world_size, world_size).replicate(dict.fromkeys(range(world_size), range(world_size)))


def rows_of(values: Tensor, chunks: Any) -> Tensor:
    return values[torch.as_tensor(chunks, device=values.device)]


def holders_of_owned(place: sc.Placement, group: sc.Group) -> Tensor:
    """``[num_owned, 1]``: how many contributions a sum has."""
    return torch.as_tensor(place.holders.sum(axis=1)[place.owned_by(group.rank)], device=group.device)[:, None]


@contextmanager
def unchecked(group: sc.Group) -> Iterator[None]:
    """Ranks of checked groups would meet on the host at every call."""
    group.checked = False
    yield
    group.checked = True


def is_busy(stream: torch.cuda.Stream) -> bool:
    """Whether the device has not come to the end of ``stream`` yet."""
    return not stream.query()


def check_order(group: sc.Group) -> None:
    """Inputs are written late on a side stream, results read there, and both overwritten at once."""
    place = place_of(group.world_size)
    values = torch.arange(place.num_chunks * 1000, dtype=torch.float32, device=group.device).view(-1, 1000)
    mine, held_rows = rows_of(values, place.owned_by(group.rank)), rows_of(values, place.held_by(group.rank))
    num_holders = holders_of_owned(place, group)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with unchecked(group), torch.cuda.stream(stream):
        for algorithm, is_async in itertools.product(("direct", "relay"), (False, True)):
            shard = torch.full_like(mine, -1.0)
            for is_warm in (False, True):  # the first makes plans, loads kernels and takes memory
                if is_warm:
                    torch.cuda._sleep(_LONG_CYCLES)
                seen = [_order_once(group, place, shard, mine, algorithm, is_async, step) for step in range(3)]
                assert not is_warm or is_busy(stream), "the host has waited"
                stream.synchronize()
                for step, (held, owned) in enumerate(seen):
                    assert torch.equal(held, held_rows + step), (algorithm, is_async, step)
                    assert torch.equal(owned, (mine + step) * num_holders), (algorithm, is_async, step)


def _order_once(
    group: sc.Group, place: sc.Placement, shard: Tensor, mine: Tensor, algorithm: str, is_async: bool, step: int
) -> tuple[Tensor, Tensor]:
    more: dict[str, Any] = {"algorithm": algorithm, "group": group, "async_op": is_async}
    shard.copy_(mine + step)
    held = sc.sparse_all_gather(shard, place, **more)
    held = held.result() if is_async else held
    shard.fill_(-2.0)
    owned = sc.sparse_reduce_scatter(held, place, **more)
    owned = owned.result() if is_async else owned
    seen = held.clone(), owned.clone()
    held.fill_(-3.0)
    owned.fill_(-3.0)
    return seen


def check_host_waits_for_nothing(group: sc.Group) -> None:
    """Warm calls return while the device is still busy with what came before them; a Work tells the truth meanwhile."""
    place, counts = place_of(group.world_size), [2] * group.world_size
    shard = torch.ones((len(place.owned_by(group.rank)), 64), device=group.device)
    rows = torch.ones((sum(counts), 64), device=group.device)
    for is_warm in (False, True):
        if is_warm:
            torch.cuda._sleep(_LONG_CYCLES)
            torch.cuda.set_sync_debug_mode("error")
        try:
            with unchecked(group):
                held = sc.sparse_all_gather(shard, place, group=group)
                owned = sc.sparse_reduce_scatter(held, place, group=group)
                moved = sc.all_to_all(rows, counts, counts, group=group)
                work = sc.sparse_all_gather(shard, place, group=group, async_op=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if is_warm:
            assert is_busy(torch.cuda.current_stream()) and not work.done(), "the host has waited"
            with pytest.raises(sc.CollectiveTimeout):
                work.wait(timeout_s=0.01)
        assert torch.equal(work.result(), held)
    assert work.exception() is None and work.done()
    assert torch.equal(held, torch.ones_like(held)) and torch.equal(moved, torch.ones_like(moved))
    assert torch.equal(owned, torch.ones_like(owned) * holders_of_owned(place, group))


def check_dropped_work(group: sc.Group) -> None:
    """Who drops an input and its Work at once, and takes memory for something else, spoils neither."""
    everyone, place = range(group.world_size), all_held_by_all(group.world_size)
    size = 1 << 20
    for step in range(20):
        out = torch.zeros((group.world_size, size), device=group.device)
        shard = torch.full((1, size), float(100 * step + group.rank), device=group.device)
        with unchecked(group):
            sc.sparse_all_gather(shard, place, out=out, group=group, async_op=True)
        reduced = torch.zeros((1, size), device=group.device)
        held = torch.full((group.world_size, size), float(step), device=group.device)
        with unchecked(group):
            sc.sparse_reduce_scatter(held, place, out=reduced, group=group, async_op=True)
        del shard, held
        others = [torch.full((1, size), -1.0, device=group.device) for _ in range(group.world_size + 1)]
        torch.cuda.synchronize()
        assert out[:, ::4097].unique(dim=1).flatten().tolist() == [100.0 * step + rank for rank in everyone]
        assert reduced.unique().tolist() == [float(step * group.world_size)]
        assert all(bool((other == -1).all()) for other in others)


def check_several_groups(group: sc.Group) -> None:
    """Equal random programs over two groups of ours and one of torch's, from several streams, leave right results."""
    native = dist.new_group(backend="nccl")
    with another_group() as second:
        for seed in range(5):
            _run_program([group, second], native, seed)
    dist.destroy_process_group(native)


def _run_program(groups: list[sc.Group], native: Any, seed: int) -> None:
    draw, delays = random.Random(seed), random.Random(f"{seed} on rank {groups[0].rank}")
    group, world_size = groups[0], groups[0].world_size
    place, device = place_of(world_size), group.device
    num_owned, num_holders = len(place.owned_by(group.rank)), holders_of_owned(place, group)
    streams = [torch.cuda.Stream() for _ in range(3)]
    pending: list[tuple[torch.cuda.Stream, Any, Callable[[Any], bool]]] = []
    for step in range(40):
        stream, kind, number = (
            draw.choice(streams),
            draw.choice(["gather", "reduce", "all_to_all", "torch"]),
            step + 1.0,
        )
        size, is_async, one = draw.choice([1, 100, 40_000]), draw.random() < 0.5, draw.choice(groups)
        more = {"group": one, "async_op": is_async}
        with torch.cuda.stream(stream):
            if delays.random() < 0.2:
                torch.cuda._sleep(2_000_000)
            if kind == "torch":
                result: Any = torch.full((size,), number, device=device)
                dist.all_reduce(result, group=native)
                is_right = lambda x, n=number: bool((x == n * world_size).all())  # noqa: E731
            elif kind == "gather":
                result = sc.sparse_all_gather(torch.full((num_owned, size), number, device=device), place, **more)
                is_right = lambda x, n=number: bool((x == n).all())  # noqa: E731
            elif kind == "reduce":
                held = torch.full((len(place.held_by(group.rank)), size), number, device=device)
                result = sc.sparse_reduce_scatter(held, place, **more)
                is_right = lambda x, n=number: torch.equal(x, (n * num_holders).expand_as(x).float())  # noqa: E731
            else:
                counts = [1] * world_size
                result = sc.all_to_all(torch.full((world_size, size), number, device=device), counts, counts, **more)
                is_right = lambda x, n=number: bool((x == n).all())  # noqa: E731
        pending.append((stream, result, is_right))
        if draw.random() < 0.3:
            _finish(pending)
    _finish(pending)


def _finish(pending: list[tuple[torch.cuda.Stream, Any, Callable[[Any], bool]]]) -> None:
    while pending:
        stream, result, is_right = pending.pop()
        with torch.cuda.stream(stream):
            assert is_right(result if isinstance(result, Tensor) else result.result())


def check_deadline(group: sc.Group) -> None:
    """A rank does not come: the others hear of it in time, and their streams go on."""
    limit_s = 3.0
    other = another_group()
    place = all_held_by_all(group.world_size)
    shard = torch.ones((1, 100), device=group.device)
    sc.sparse_all_gather(shard, place, group=other)
    torch.cuda.synchronize()
    other.checked = False
    started_s = time.monotonic()
    if group.rank == group.world_size - 1:
        time.sleep(limit_s + 2.0)
        other.transport.abort("never came")
    else:
        work = sc.sparse_all_gather(shard, place, group=other, async_op=True, timeout_s=limit_s)
        failure = work.exception()
        # One rank is the first to give up, and the others may hear of it before their own time has passed.
        assert isinstance(failure, (sc.CollectiveTimeout, sc.PeerFailure, sc.TransportError)), failure
        torch.cuda.synchronize()  # would wait for ever if the device did
        assert time.monotonic() - started_s < limit_s + 15.0
        with pytest.raises(sc.SparsecollError):
            sc.sparse_all_gather(shard, place, group=other)
    other.close()
    group.barrier()
    assert torch.equal(torch.ones(3, device=group.device).cpu(), torch.ones(3)), "the device still works"


def check_cupy_arrays(group: sc.Group) -> None:
    """CuPy arrays come and go on CuPy's current stream, blocking or not."""
    import cupy

    place, counts = place_of(group.world_size), [1] * group.world_size
    owned, held = place.owned_by(group.rank), place.held_by(group.rank)
    values = np.arange(place.num_chunks * 500, dtype=np.float32).reshape(-1, 500)
    for step in range(3):
        with unchecked(group), cupy.cuda.Stream(non_blocking=True) as stream:
            shard = cupy.asarray(values[owned]) + step
            gathered = sc.sparse_all_gather(shard, place, group=group)
            shard.fill(-1)
            work = sc.sparse_reduce_scatter(gathered, place, group=group, async_op=True)
            summed = work.result()
            moved = sc.all_to_all(cupy.full((group.world_size, 7), group.rank, np.int16), counts, group=group)
            assert all(isinstance(each, cupy.ndarray) for each in (gathered, summed, moved))
            stream.synchronize()
            np.testing.assert_array_equal(gathered.get(), values[held] + step)
            num_holders = place.holders.sum(axis=1)[owned, None]
            np.testing.assert_array_equal(summed.get(), (values[owned] + step) * num_holders)
            assert moved[:, 0].tolist() == list(range(group.world_size))


def check_narrow_floats(group: sc.Group) -> None:
    """Every bit pattern of eight and sixteen bits arrives as it was, NaN payloads included; sums are float32's."""
    place = all_held_by_all(group.world_size)
    for name, bits in (("float8_e4m3fn", 8), ("float8_e5m2", 8), ("bfloat16", 16), ("float16", 16)):
        dtype, integer = getattr(torch, name), torch.uint8 if bits == 8 else torch.int16
        patterns = torch.arange(1 << bits).to(integer).to(group.device)
        held = sc.sparse_all_gather(patterns.view(dtype)[None], place, group=group)
        assert all(torch.equal(each.view(integer), patterns) for each in held), name
        rows = patterns.view(dtype).expand(group.world_size, -1).contiguous()
        moved = sc.all_to_all(rows, [1] * group.world_size, group=group)
        assert all(torch.equal(each.view(integer), patterns) for each in moved), name
    for dtype in (torch.bfloat16, torch.float16):
        # In 16 bits the small one would be lost beside the large one, for each rank anew.
        contribution = torch.full((group.world_size, 8), 256.0 if group.rank == 0 else 0.75, dtype=dtype)
        total = sc.sparse_reduce_scatter(contribution.to(group.device), place, group=group)
        expected = torch.tensor(256.0 + 0.75 * (group.world_size - 1)).to(dtype)
        assert bool((total.cpu() == expected).all()), (total, expected)


CHECKS = [f"{__name__}:{name}" for name in list(globals()) if name.startswith("check_")]

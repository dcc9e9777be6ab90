"""One table of checks that every collective must pass on every transport and world size.

Each check is ``check(group)``, called on all ranks. Values encode rank, chunk and element; sums are of small integers,
so that they are exact in every dtype; expected results come from `sparsecoll.reference`.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

import sparsecoll as sc
from sparsecoll import reference
from sparsecoll.plan.transfer import GRANULE_BYTES
from sparsecoll.transport.base import Counters

Check = Callable[[sc.Group], None]

ALGORITHMS = ["direct", "relay", "hierarchical", "dense"]
FLOATS = ["float32", "float64", "bfloat16", "float16"]
INTEGERS = ["int8", "int16", "int32", "int64", "uint8"]


def placements(world_size: int) -> dict[str, sc.Placement]:
    """Named cases: counts that are zero, one, uneven and larger than the world."""
    # With very many ranks only some hold replicas, or messages would number in the ten thousands.
    everyone = range(0, world_size, max(1, world_size // 16))
    random = np.random.default_rng(world_size)
    owners = random.integers(0, world_size, 11)
    mask = random.random((11, world_size)) < min(0.4, 6 / world_size)
    mask[np.arange(11), owners] = True
    return {
        "none at all": sc.Placement.even(0, world_size),
        "fewer chunks than ranks": sc.Placement.even(max(1, world_size - 1), world_size).replicate({0: everyone}),
        "no replicas": sc.Placement.even(2 * world_size + 1, world_size),
        "all held by all": sc.Placement.even(world_size + 2, world_size).replicate(
            dict.fromkeys(range(world_size + 2), everyone)
        ),
        "one owner of everything": sc.Placement.of_owners([world_size - 1] * 5, world_size).replicate(
            {1: everyone, 3: [0]}
        ),
        "random": sc.Placement(owners, mask),
    }


def in_pieces(plan: sc.Plan, most: int = 6) -> sc.Plan:
    """The same plan with more and smaller pieces than it is worth, for chunks that may be cut."""
    table = plan.transfers.copy()
    possible = (table["end"] - table["begin"]) // GRANULE_BYTES
    table["pieces"] = np.maximum(table["pieces"], np.clip(possible, 1, most))
    return dataclasses.replace(plan, transfers=table)


def row(chunk: int, rank: int, size: int, dtype: str) -> torch.Tensor:
    """Small integers that tell chunk, rank and element apart."""
    values = (torch.arange(size) * 3 + chunk * 5 + rank * 7) % 13
    return values.to(getattr(torch, dtype))


def rows(chunks: Any, rank: int, size: int, dtype: str) -> torch.Tensor:
    made = [row(chunk, rank, size, dtype) for chunk in chunks]
    return torch.stack(made) if made else torch.empty((0, size), dtype=getattr(torch, dtype))


def exact(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(torch.float64).numpy()


_oracle_lock = threading.Lock()


@cache
def _gathered(place: sc.Placement, size: int, dtype: str) -> list[np.ndarray]:
    ranks = range(place.world_size)
    shards = [[exact(row(c, r, size, dtype)) for c in place.owned_by(r)] for r in ranks]
    return [np.array(each).reshape(-1, size) for each in reference.all_gather(shards, place)]


@cache
def _reduced(place: sc.Placement, size: int, dtype: str, op: str) -> list[np.ndarray]:
    ranks = range(place.world_size)
    held = [[exact(row(c, r, size, dtype)) for c in place.held_by(r)] for r in ranks]
    return [np.array(each).reshape(-1, size) for each in reference.reduce_scatter(held, place, op=op)]


def gather_expectation(place: sc.Placement, size: int, dtype: str, rank: int) -> np.ndarray:
    with _oracle_lock:  # Threads as ranks share the answer instead of each computing it.
        return _gathered(place, size, dtype)[rank]


def reduce_expectation(place: sc.Placement, size: int, dtype: str, rank: int, op: str) -> np.ndarray:
    with _oracle_lock:
        return _reduced(place, size, dtype, op)[rank]


def variants(world_size: int, dtypes: list[str]) -> list[tuple[str, str]]:
    """Algorithms and dtypes to combine; with many threads as ranks, not all of them."""
    if world_size > 16:
        return [("direct", "bfloat16"), ("direct", "int64"), ("relay", "float16"), ("auto", "float32")]
    # Each dtype with each way of moving, and the others with those dtypes that take the most different paths.
    few = [dtype for dtype in dtypes if dtype in ("bfloat16", "int64")]
    return [(algorithm, dtype) for algorithm in ("direct", "relay") for dtype in dtypes] + [
        (algorithm, dtype) for algorithm in ("hierarchical", "dense", "auto") for dtype in few
    ]


def topologies(world_size: int) -> list[sc.Topology]:
    """All ranks on one node, and a few on each of several."""
    per_node = 2 if world_size <= 16 else 8
    link = sc.Link(1e9, 1e-6)
    nodes = tuple(rank // per_node for rank in range(world_size))
    return [sc.Topology.flat(world_size, link), sc.Topology(nodes, sc.Link(1e10, 1e-6), link)]


def check_all_gather(group: sc.Group) -> None:
    for name, place in placements(group.world_size).items():
        for algorithm, dtype in variants(group.world_size, [*FLOATS, "int8", "int64"]):
            shard = rows(place.owned_by(group.rank), group.rank, 17, dtype)
            held = sc.sparse_all_gather(shard, place, group=group, algorithm=algorithm)
            assert held.dtype == shard.dtype, name
            np.testing.assert_array_equal(exact(held), gather_expectation(place, 17, dtype, group.rank), name)


def check_reduce_scatter(group: sc.Group) -> None:
    for name, place in placements(group.world_size).items():
        for algorithm, dtype in variants(group.world_size, [*FLOATS, *INTEGERS]):
            held = rows(place.held_by(group.rank), group.rank, 17, dtype)
            if dtype in ("int8", "uint8"):
                held = held % 2
            out = torch.full((len(place.owned_by(group.rank)), 17), 99, dtype=held.dtype)
            owned = sc.sparse_reduce_scatter(held, place, group=group, algorithm=algorithm, out=out)
            assert owned is out
            if dtype not in ("int8", "uint8"):
                expected = reduce_expectation(place, 17, dtype, group.rank, "sum")
                if dtype in ("bfloat16", "float16") and group.world_size > 16:
                    expected = exact(torch.from_numpy(expected).to(held.dtype))
                np.testing.assert_array_equal(exact(owned), expected, f"{name} {algorithm} {dtype}")


def check_mean(group: sc.Group) -> None:
    place = placements(group.world_size)["random"]
    held = rows(place.held_by(group.rank), group.rank, 100, "float64")
    expected = reduce_expectation(place, 100, "float64", group.rank, "mean")
    for algorithm in ("auto", "relay", "hierarchical"):
        owned = sc.sparse_reduce_scatter(held, place, op="mean", group=group, algorithm=algorithm)
        np.testing.assert_allclose(exact(owned), expected, rtol=1e-15)


def check_chunks(group: sc.Group) -> None:
    """A subset, given as all rows or as just its own; rows outside it are neither moved nor touched."""
    place = placements(group.world_size)["random"]
    subset = [1, 2, 5, 9]
    owned, held = place.owned_by(group.rank), place.held_by(group.rank)
    inside_owned, inside_held = [c for c in subset if c in owned], [c for c in subset if c in held]
    expected = rows(inside_held, 0, 6, "float32")
    for position, chunk in enumerate(inside_held):
        expected[position] = row(chunk, int(place.owners[chunk]), 6, "float32")
    for given in (owned, inside_owned):
        before = group.stats()
        shard = rows(given, group.rank, 6, "float32")
        result = sc.sparse_all_gather(shard, place, chunks=subset, group=group, algorithm="direct")
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
        sent = sum(int(place.holders[chunk].sum()) - 1 for chunk in inside_owned)
        moved = group.stats().since(before)
        assert (moved.sent_messages, moved.sent_bytes) == (sent, sent * 24)
        assert moved.received_bytes == (len(inside_held) - len(inside_owned)) * 24
    gradients = rows(inside_held, group.rank, 6, "float32")
    out = torch.full((len(owned), 6), -1.0)
    sc.sparse_reduce_scatter(gradients, place, chunks=subset, group=group, out=out)
    for position, chunk in enumerate(owned):
        if chunk in subset:
            total = sum(exact(row(chunk, r, 6, "float32")) for r in np.flatnonzero(place.holders[chunk]))
            np.testing.assert_array_equal(exact(out[position]), total)
        else:
            assert (out[position] == -1).all()


def check_bytes_sent(group: sc.Group) -> None:
    """What the transport counted is what the Plan said, to the byte and the message."""
    for place in placements(group.world_size).values():
        for algorithm in ALGORITHMS if group.world_size <= 16 else ["direct", "relay"]:
            shard = rows(place.owned_by(group.rank), group.rank, 100, "float16")
            plan = sc.plan_all_gather(place, 200, group.topology, algorithm)
            before = group.stats()
            held = sc.sparse_all_gather(shard, place, group=group, plan=plan)
            gathered = group.stats().since(before)
            assert gathered.sent_bytes == plan.sent_bytes[group.rank]
            assert gathered.received_bytes == plan.received_bytes[group.rank]
            assert gathered.sent_messages == plan.sent_transfers[group.rank]
            back = sc.plan_reduce_scatter(place, 200, group.topology, algorithm, partial_bytes=400)
            before = group.stats()
            sc.sparse_reduce_scatter(held, place, group=group, plan=back)
            reduced = group.stats().since(before)
            assert reduced.sent_bytes == back.sent_bytes[group.rank]
            assert reduced.received_bytes == back.received_bytes[group.rank]
            assert reduced.sent_messages == back.sent_transfers[group.rank]
    if group.world_size > 1:
        for algorithm in ("direct", "relay", "hierarchical"):
            plan = sc.plan_all_gather(place, 200, group.topology, algorithm)
            assert plan.sent_bytes.sum() == 200 * (place.holders.sum() - place.num_chunks)


def check_pieces(group: sc.Group) -> None:
    """Chunks that relays forward piece by piece, on one level and between nodes, with sums wider than what they sum:
    contents, bytes and messages."""
    size = 3_000
    is_small = group.world_size <= 16
    for name in ("one owner of everything", "all held by all", "random") if is_small else ("random",):
        place = placements(group.world_size)[name]
        for topology in topologies(group.world_size):
            kinds = [("relay", "bfloat16"), ("hierarchical", "bfloat16"), ("relay", "float32")]
            for algorithm, dtype in kinds if is_small else kinds[1:2]:
                width = getattr(torch, dtype).itemsize
                plan = in_pieces(sc.plan_all_gather(place, width * size, topology, algorithm))
                before = group.stats()
                shard = rows(place.owned_by(group.rank), group.rank, size, dtype)
                held = sc.sparse_all_gather(shard, place, group=group, plan=plan)
                _check_moved(group, before, plan)
                np.testing.assert_array_equal(exact(held), gather_expectation(place, size, dtype, group.rank))
                plan = sc.plan_reduce_scatter(place, width * size, topology, algorithm, partial_bytes=4 * size)
                plan = in_pieces(plan)
                before = group.stats()
                gradients = rows(place.held_by(group.rank), group.rank, size, dtype)
                owned = sc.sparse_reduce_scatter(gradients, place, group=group, plan=plan)
                _check_moved(group, before, plan)
                expected = reduce_expectation(place, size, dtype, group.rank, "sum")
                np.testing.assert_array_equal(exact(owned), expected)


def _check_moved(group: sc.Group, before: Counters, plan: sc.Plan) -> None:
    moved, rank = group.stats().since(before), group.rank
    assert moved.sent_bytes == plan.sent_bytes[rank] and moved.received_bytes == plan.received_bytes[rank]
    if group.is_stream_ordered:  # pieces of one transfer in one round are one message
        assert moved.sent_messages <= plan.sent_transfers[rank]
    else:
        assert moved.sent_messages == plan.sent_transfers[rank]


def check_pieces_of_segments(group: sc.Group) -> None:
    """A piece may have bytes of several tensors of a chunk, whose dtypes decide whether it may be cut at all."""
    place = placements(group.world_size)["random"]
    cases = {
        ("float32", "bfloat16"): False,  # sums of the one are as wide as it is, of the other twice
        ("float16", "bfloat16"): True,
        ("float32", "float64"): True,
        ("int16", "float64"): False,  # the second begins between its own elements
    }
    for topology in topologies(group.world_size):
        for dtypes, divisible in cases.items():
            sizes = (3001, 2000) if dtypes[0] == "int16" else (3000, 2000)
            for algorithm in ("relay", "hierarchical"):
                if group.world_size <= 16 or (algorithm == "hierarchical" and dtypes[0] == "float16"):
                    _check_segments(group, place, topology, algorithm, dtypes, sizes, divisible)
    if group.world_size <= 16:
        for algorithm in ("relay", "hierarchical"):
            _check_ragged(group, place, topologies(group.world_size)[1], algorithm)


def _check_segments(
    group: sc.Group,
    place: sc.Placement,
    topology: sc.Topology,
    algorithm: str,
    dtypes: tuple[str, str],
    sizes: tuple[int, int],
    divisible: bool,
) -> None:
    kinds = [getattr(torch, dtype) for dtype in dtypes]
    chunk_bytes = sum(size * kind.itemsize for size, kind in zip(sizes, kinds, strict=True))
    partial_bytes = sum(
        size * max(kind.itemsize, 4 * kind.is_floating_point) for size, kind in zip(sizes, kinds, strict=True)
    )
    plan = in_pieces(sc.plan_all_gather(place, chunk_bytes, topology, algorithm))
    shard = tuple(
        rows(place.owned_by(group.rank), group.rank, size, dtype) for size, dtype in zip(sizes, dtypes, strict=True)
    )
    before = group.stats()
    held = sc.sparse_all_gather(shard, place, group=group, plan=plan)
    assert group.stats().since(before).sent_bytes == plan.sent_bytes[group.rank]
    for part, size, dtype in zip(held, sizes, dtypes, strict=True):
        np.testing.assert_array_equal(exact(part), gather_expectation(place, size, dtype, group.rank))
    plan = sc.plan_reduce_scatter(
        place, chunk_bytes, topology, algorithm, partial_bytes=partial_bytes, divisible=divisible
    )
    gradients = tuple(
        rows(place.held_by(group.rank), group.rank, size, dtype) for size, dtype in zip(sizes, dtypes, strict=True)
    )
    if divisible:
        plan = in_pieces(plan)
    for one in (plan, None):  # the call's own plan is just as careful
        before = group.stats()
        more = {"plan": one} if one else {"algorithm": algorithm}
        owned = sc.sparse_reduce_scatter(gradients, place, group=group, **more)
        for part, size, dtype in zip(owned, sizes, dtypes, strict=True):
            np.testing.assert_array_equal(exact(part), reduce_expectation(place, size, dtype, group.rank, "sum"))
        if one:
            assert group.stats().since(before).sent_bytes == plan.sent_bytes[group.rank]


def _check_ragged(group: sc.Group, place: sc.Placement, topology: sc.Topology, algorithm: str) -> None:
    """Lists: chunks of nothing, of less than can be cut, and of many pieces."""
    sizes = [(0, 5, 4_000, 30_001)[chunk % 4] for chunk in range(place.num_chunks)]

    def made(chunks: Any) -> list[torch.Tensor]:
        return [row(int(chunk), group.rank, sizes[chunk], "bfloat16") for chunk in chunks]

    plan = in_pieces(sc.plan_all_gather(place, [2 * size for size in sizes], topology, algorithm))
    before = group.stats()
    held = sc.sparse_all_gather(made(place.owned_by(group.rank)), place, group=group, plan=plan)
    _check_moved(group, before, plan)
    for chunk, each in zip(place.held_by(group.rank), held, strict=True):
        expected = row(int(chunk), int(place.owners[chunk]), sizes[chunk], "bfloat16")
        np.testing.assert_array_equal(exact(each), exact(expected))
    plan = sc.plan_reduce_scatter(
        place, [2 * size for size in sizes], topology, algorithm, partial_bytes=[4 * size for size in sizes]
    )
    plan = in_pieces(plan)
    before = group.stats()
    owned = sc.sparse_reduce_scatter(made(place.held_by(group.rank)), place, group=group, plan=plan)
    _check_moved(group, before, plan)
    for chunk, total in zip(place.owned_by(group.rank), owned, strict=True):
        holders = np.flatnonzero(place.holders[chunk])
        expected = sum(exact(row(int(chunk), r, sizes[chunk], "bfloat16")) for r in holders)
        np.testing.assert_array_equal(exact(total), expected)


def check_tuple_and_list(group: sc.Group) -> None:
    """Rows of several tensors travel together; lists may be ragged, empty chunks included."""
    place = placements(group.world_size)["random"]
    owned, held = place.owned_by(group.rank), place.held_by(group.rank)
    pair = (rows(owned, group.rank, 4, "float32").view(-1, 2, 2), rows(owned, group.rank, 3, "bfloat16"))
    wide, narrow = sc.sparse_all_gather(pair, place, group=group)
    assert wide.shape[1:] == (2, 2) and narrow.dtype == torch.bfloat16
    np.testing.assert_array_equal(exact(wide).reshape(-1, 4), gather_expectation(place, 4, "float32", group.rank))
    np.testing.assert_array_equal(exact(narrow), gather_expectation(place, 3, "bfloat16", group.rank))
    ragged = [row(chunk, group.rank, int(chunk) % 4, "float32") for chunk in owned]
    for as_numpy in (False, True):
        shard = [each.numpy() for each in ragged] if as_numpy else ragged
        result = sc.sparse_all_gather(shard, place, group=group)
        assert [each.shape for each in result] == [(int(chunk) % 4,) for chunk in held]
        for chunk, each in zip(held, result, strict=True):
            expected = row(chunk, int(place.owners[chunk]), int(chunk) % 4, "float32")
            np.testing.assert_array_equal(np.asarray(each), expected.numpy())
    gradients = [row(chunk, group.rank, int(chunk) % 4, "float32") for chunk in held]
    for chunk, total in zip(owned, sc.sparse_reduce_scatter(gradients, place, group=group), strict=True):
        holders = np.flatnonzero(place.holders[chunk])
        expected = sum(exact(row(chunk, r, int(chunk) % 4, "float32")) for r in holders)
        np.testing.assert_array_equal(exact(total), expected)
    rows_of_two = [(row(c, group.rank, 2, "float32"), row(c, group.rank, int(c) % 3, "float64")) for c in owned]
    for chunk, (a, b) in zip(held, sc.sparse_all_gather(rows_of_two, place, group=group), strict=True):
        np.testing.assert_array_equal(exact(a), exact(row(chunk, int(place.owners[chunk]), 2, "float32")))
        assert b.shape == (int(chunk) % 3,)


def check_numpy_and_out(group: sc.Group) -> None:
    num_chunks = group.world_size + 2
    place = sc.Placement.even(num_chunks, group.world_size).replicate(
        dict.fromkeys(range(num_chunks), range(group.world_size))
    )
    shard = exact(rows(place.owned_by(group.rank), group.rank, 9, "float32")).astype(np.float32)
    out = np.full((place.num_chunks, 9), np.nan, np.float32)
    result = sc.sparse_all_gather(shard, place, group=group, out=out)
    assert result is out
    np.testing.assert_array_equal(out, gather_expectation(place, 9, "float32", group.rank))
    # The owned rows of the input may be the output as well.
    owned = place.owned_by(group.rank)
    first, last = (owned[0], owned[-1] + 1) if len(owned) else (0, 0)
    sc.sparse_reduce_scatter(out, place, group=group, out=out[first:last])
    np.testing.assert_array_equal(
        out[first:last], shard * group.world_size, "every holder had the owner's values, so sums are multiples"
    )


def check_transparent_bits(group: sc.Group) -> None:
    """NaN payloads, infinities and signed zeros arrive bit for bit; so do dtypes that cannot be reduced."""
    place = sc.Placement.even(group.world_size, group.world_size).replicate({0: range(group.world_size)})
    bits = np.array([0x7FC12345, 0xFFC00001, 0x7F800000, 0xFF800000, 0x80000000, 1], np.uint32)
    shard = np.repeat(bits.view(np.float32)[None], len(place.owned_by(group.rank)), axis=0)
    held = sc.sparse_all_gather(shard, place, group=group)
    np.testing.assert_array_equal(held[0].view(np.uint32), bits)
    narrow = torch.tensor([[1.5, -2.0]]).to(torch.float8_e4m3fn).expand(len(shard), 2).contiguous()
    assert sc.sparse_all_gather(narrow, place, group=group)[0].float().tolist() == [1.5, -2.0]


def check_async(group: sc.Group) -> None:
    """Several in flight, of changing sizes, waited for in another order; a blocking one queues behind them."""
    place = placements(group.world_size)["random"]
    works = []
    for size, algorithm in ((1, "auto"), (300, "relay"), (100_000, "relay"), (7, "auto"), (9_999, "hierarchical")):
        shard = rows(place.owned_by(group.rank), group.rank, size, "float32")
        works.append((size, sc.sparse_all_gather(shard, place, group=group, async_op=True, algorithm=algorithm)))
    counts = [2] * group.world_size
    x = torch.full((2 * group.world_size, 3), float(group.rank))
    moved = sc.all_to_all(x, counts, group=group)
    assert moved[:, 0].tolist() == [float(r) for r in range(group.world_size) for _ in range(2)]
    for size, work in reversed(works):
        expected = gather_expectation(place, size, "float32", group.rank)
        np.testing.assert_array_equal(exact(work.result(timeout_s=30)), expected)
        assert work.done() and work.exception() is None


def check_all_to_all(group: sc.Group) -> None:
    world_size = group.world_size
    random = np.random.default_rng(7)
    matrices = {
        "uneven with zeros": random.integers(0, 4, (world_size, world_size)),
        "nothing": np.zeros((world_size, world_size), np.int64),
        "all to one": np.where(np.arange(world_size)[None, :] == 0, 5, 0).repeat(world_size, 0),
        "large": np.full((world_size, world_size), 4000 // world_size),
    }
    if world_size > 16:
        matrices = {
            "sparse": random.integers(0, 4, (world_size, world_size)) * (random.random((world_size,) * 2) < 0.1)
        }
    for name, counts in matrices.items():
        xs = [
            (np.arange(counts[src].sum() * 3).reshape(-1, 3) + 1000 * src).astype(np.float64)
            for src in range(world_size)
        ]
        expected = reference.all_to_all(xs, counts.tolist())[group.rank]
        mine, column = counts[group.rank].tolist(), counts[:, group.rank].tolist()
        before = group.stats()
        result = sc.all_to_all(xs[group.rank], mine, group=group)
        np.testing.assert_array_equal(result, expected, name)
        moved = group.stats().since(before)
        assert moved.sent_bytes == 24 * (sum(mine) - mine[group.rank]), "no padding"
        half = torch.from_numpy(xs[group.rank]).to(torch.float32).to(torch.bfloat16)
        given = sc.all_to_all(half, torch.tensor(mine), column, group=group)
        torch.testing.assert_close(given, torch.from_numpy(expected).to(torch.float32).to(torch.bfloat16))
        work = sc.all_to_all(xs[group.rank], np.array(mine), async_op=True, group=group)
        np.testing.assert_array_equal(work.result(), expected)


def check_gradients(group: sc.Group) -> None:
    """d/dx of <collective(x), g> is the mirror collective of g."""
    place = placements(group.world_size)["random"]
    shard = rows(place.owned_by(group.rank), group.rank, 5, "float64").requires_grad_()
    held = sc.sparse_all_gather(shard, place, group=group)
    upstream = rows(place.held_by(group.rank), group.rank, 5, "float64")
    held.backward(upstream)
    np.testing.assert_array_equal(exact(shard.grad), reduce_expectation(place, 5, "float64", group.rank, "sum"))
    for op in ("sum", "mean"):
        parts = rows(place.held_by(group.rank), group.rank, 5, "float64").requires_grad_()
        upstream = rows(place.owned_by(group.rank), group.rank, 5, "float64")
        sc.sparse_reduce_scatter(parts, place, op=op, group=group).backward(upstream)
        expected = gather_expectation(place, 5, "float64", group.rank)
        if op == "mean":
            expected = expected / place.holders.sum(axis=1)[place.held_by(group.rank), None]
        np.testing.assert_allclose(exact(parts.grad), expected, rtol=1e-15)
    subset = [1, 2, 5, 9]
    shard = rows(place.owned_by(group.rank), group.rank, 5, "float64").requires_grad_()
    sc.sparse_all_gather(shard, place, chunks=subset, group=group).sum().backward()
    for position, chunk in enumerate(place.owned_by(group.rank)):
        expected_count = int(place.holders[chunk].sum()) if chunk in subset else 0
        assert (shard.grad[position] == expected_count).all()
    counts = [(group.rank + peer) % 3 for peer in range(group.world_size)]
    x = torch.ones((sum(counts), 2), dtype=torch.float64, requires_grad=True)
    y = sc.all_to_all(x, counts, group=group)
    (y * (group.rank + 1)).sum().backward()
    expected_rows = np.repeat(np.arange(group.world_size) + 1.0, counts)
    np.testing.assert_array_equal(exact(x.grad), np.stack([expected_rows] * 2, axis=1))


def awkward(chunks: Any, rank: int, size: int, dtype: str) -> torch.Tensor:
    """Values of many magnitudes, whose sum depends on the order."""
    made = []
    for chunk in chunks:
        seeded = torch.Generator().manual_seed(1000 * int(chunk) + rank)
        values = torch.randn(size, generator=seeded, dtype=torch.float64)
        made.append((values * 10 ** (values * 3)).to(getattr(torch, dtype)))
    return torch.stack(made) if made else torch.empty((0, size), dtype=getattr(torch, dtype))


def check_bitwise_repeatable(group: sc.Group) -> None:
    """For one Plan, sums of awkward numbers are the same bits every time."""
    place = placements(group.world_size)["all held by all"]
    for dtype in FLOATS:
        for algorithm in ALGORITHMS if group.world_size <= 16 else ["direct"]:
            held = awkward(place.held_by(group.rank), group.rank, 1025, dtype)
            first, *others = (
                sc.sparse_reduce_scatter(held, place, group=group, algorithm=algorithm).view(torch.uint8).numpy()
                for _ in range(3)
            )
            for other in others:
                np.testing.assert_array_equal(first, other)


def check_sums_are_those_of_threads(group: sc.Group) -> None:
    """For one Plan, sums of awkward numbers are the same bits on every transport: here as on threads as ranks."""
    if group.world_size > 16:
        return
    place = placements(group.world_size)["all held by all"]
    dtypes = ("bfloat16", "float32")
    plans = [
        (dtype, in_pieces(sc.plan_reduce_scatter(place, itemsize * 999, topology, algorithm, partial_bytes=4 * 999)))
        for topology in topologies(group.world_size)
        for algorithm in ALGORITHMS
        for dtype, itemsize in zip(dtypes, (2, 4), strict=True)
    ]

    def sums(any_group: sc.Group) -> list[bytes]:
        held = {dtype: awkward(place.held_by(any_group.rank), any_group.rank, 999, dtype) for dtype in dtypes}
        results = [sc.sparse_reduce_scatter(held[dtype], place, group=any_group, plan=plan) for dtype, plan in plans]
        return [result.view(torch.uint8).numpy().tobytes() for result in results]

    mine = sums(group)
    for (_, plan), here, there in zip(plans, mine, sc.run_local(sums, group.world_size)[group.rank], strict=True):
        assert here == there, plan
    if group.world_size > 2:
        assert len(set(mine[1::2])) > 1, "in float32 the order of summation shows"


def check_errors(group: sc.Group) -> None:
    """Unsound or unequal arguments raise on every rank, nothing moves, and the group works afterwards."""
    last = group.world_size - 1
    place = sc.Placement.even(group.world_size, group.world_size).replicate({0: range(group.world_size)})
    good = torch.zeros((1, 4))
    other_place = sc.Placement.even(group.world_size, group.world_size)
    other_topology_size = sc.Placement.even(3, group.world_size + 1)
    on_last = group.rank == last

    def gather(shard: Any = good, where: sc.Placement = place, **more: Any) -> Any:
        return sc.sparse_all_gather(shard, where, group=group, **more)

    unsound = {
        "expected 1 rows": lambda: gather(torch.zeros((3, 4)) if on_last else good),
        "torch tensors, NumPy or CuPy arrays": lambda: gather("text" if on_last else good),
        "0-dimensional": lambda: gather(torch.zeros(()) if on_last else good),
        "algorithm": lambda: gather(algorithm="magic" if on_last else "direct"),
        "placement of": lambda: gather(where=other_topology_size if on_last else place),
        "ascending": lambda: gather(chunks=[1, 0] if on_last else None),
        "out: expected rows of shapes": lambda: gather(out=torch.zeros((2, 5)) if on_last else None),
        "op sum or mean": lambda: sc.sparse_reduce_scatter(
            torch.zeros((len(place.held_by(group.rank)), 4)), place, op="max" if on_last else "sum", group=group
        ),
        "expected dtypes": lambda: sc.sparse_reduce_scatter(
            torch.zeros((len(place.held_by(group.rank)), 4), dtype=torch.complex64 if on_last else torch.float32),
            place,
            group=group,
        ),
        "send_counts": lambda: sc.all_to_all(
            good, [-1] * group.world_size if on_last else [0] * last + [1], group=group
        ),
        "rows, got": lambda: sc.all_to_all(good, [2] * group.world_size if on_last else [0] * last + [1], group=group),
    }
    for text, attempt in unsound.items():
        before = group.stats()
        raised = _raised(attempt)
        assert isinstance(raised, sc.InvalidArgument if on_last else sc.CollectiveMismatch), (text, raised)
        assert text in str(raised) and f"rank {last}" in str(raised), raised
        assert group.stats().since(before).sent_bytes == 0
    if group.world_size > 1:
        unequal = {
            "holders[0]": lambda: gather(where=other_place if on_last else place),
            "dtype": lambda: gather(good.double() if on_last else good),
            "chunk_shape": lambda: gather(torch.zeros((1, 5)) if on_last else good),
            "chunks": lambda: gather(chunks=[0] if on_last else [0, 1]),
            "operation": lambda: gather() if on_last else sc.all_to_all(good, [0] * last + [1], group=group),
            "recv_counts": lambda: sc.all_to_all(good, [0] * last + [1], [0] * group.world_size, group=group),
        }
        for text, attempt in unequal.items():
            before = group.stats()
            raised = _raised(attempt)
            assert isinstance(raised, sc.CollectiveMismatch) and text in str(raised), (text, raised)
            assert group.stats().since(before).sent_bytes == 0
        work = gather(good.double() if on_last else good, async_op=True)
        assert isinstance(work.exception(), sc.CollectiveMismatch)
        ragged = [torch.zeros(4 + (group.rank if on_last else 0), dtype=torch.float64 if on_last else torch.float32)]
        raised = _raised(lambda: gather(ragged))
        assert isinstance(raised, sc.CollectiveMismatch) and "dtypes" in str(raised)
    check_chunks(group)


def _raised(attempt: Callable[[], Any]) -> BaseException:
    try:
        attempt()
    except sc.SparsecollError as error:
        return error
    raise AssertionError("expected an error")


def check_awkward_tensors(group: sc.Group) -> None:
    """Non-contiguous and gradient-requiring inputs are fine; non-contiguous outputs are refused by name."""
    place = sc.Placement.even(group.world_size * 2, group.world_size).replicate({0: range(group.world_size)})
    plain = rows(place.owned_by(group.rank), group.rank, 6, "float32")
    strided = plain.t().contiguous().t()
    assert not strided.is_contiguous()
    expected = sc.sparse_all_gather(plain, place, group=group)
    torch.testing.assert_close(sc.sparse_all_gather(strided, place, group=group), expected, rtol=0, atol=0)
    leaf = plain.clone().requires_grad_()
    out = torch.empty_like(expected)
    torch.testing.assert_close(sc.sparse_all_gather(leaf, place, group=group, out=out), expected, rtol=0, atol=0)
    assert not out.requires_grad
    turned = torch.empty((6, len(expected))).t()
    raised = _raised(lambda: sc.sparse_all_gather(plain, place, group=group, out=turned))
    assert "contiguous" in str(raised) or group.world_size == 1


CHECKS: dict[str, Check] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}

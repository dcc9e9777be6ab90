"""Ten thousand random placements through both planners and the local transport, against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest

import sparsecoll as sc
from sparsecoll import reference
from sparsecoll.arena import Arena
from sparsecoll.executor import all_gather_steps, reduce_scatter_steps
from sparsecoll.native import accumulation_itemsize
from sparsecoll.transport.base import Operation, Transport
from sparsecoll.transport.local import run_local
from tests.conformance import in_pieces
from tests.plans import ALGORITHMS, Case, draw_case

# World size → how many placements: large worlds take longest, small ones have less to get wrong.
NUM_PLACEMENTS = {2: 1000, 3: 2200, 4: 2800, 5: 1800, 6: 1100, 7: 600, 8: 500}
DTYPES = ["float16", "float32", "int64"]

# Small integers, so that sums are exact in every dtype; a chunk's content begins anywhere in here.
VALUES = np.random.default_rng(1).integers(0, 13, 6000)


class Trial(NamedTuple):
    """A placement with its plans, contents and what must come of them.

    Attributes:
        gather, reduce: plans.
        contents: chunk → rank → what the rank contributes.
        held, owned: rank → what it must get of either collective.
    """

    number: int
    dtype: str
    gather: sc.Plan
    reduce: sc.Plan
    contents: list[list[np.ndarray]]
    held: list[list[np.ndarray]]
    owned: list[list[np.ndarray]]


def trial(number: int, world_size: int) -> Trial:
    random = np.random.default_rng([number, world_size])
    dtype = DTYPES[number % 3]
    itemsize = np.dtype(dtype).itemsize
    lengths = random.choice([0, 1, 33, 160, 700, 5000], int(random.integers(1, 7)))
    case = draw_case(
        random,
        world_size=world_size,
        num_chunks=len(lengths),
        sizes=[0],
        num_nodes=int(random.integers(1, 4)),
        alike=random.random() < 0.5,
        has_node_links=random.random() < 0.3,
    )
    case = case._replace(
        chunk_bytes=(lengths * itemsize).tolist(),
        chunks=np.flatnonzero(random.random(len(lengths)) < 0.8).tolist() if random.random() < 0.2 else None,
        divisible=random.random() < 0.9,
    )
    algorithm = ["auto", *ALGORITHMS, "relay", "hierarchical"][number % 7]
    width = accumulation_itemsize(dtype) // itemsize
    plans = [both(case, algorithm, 0), both(case, algorithm, width)]
    if case.divisible and random.random() < 0.3:
        plans = [in_pieces(plan, int(random.integers(2, 7))) for plan in plans]
    offsets = random.integers(0, 900, (len(lengths), world_size))
    contents = [
        [VALUES[begin : begin + length].astype(dtype) for begin in row]
        for row, length in zip(offsets.tolist(), lengths.tolist(), strict=True)
    ]
    place, subset = case.place, case.subset
    shards = [[contents[chunk][rank] for chunk in subset if place.owners[chunk] == rank] for rank in range(world_size)]
    holds = [[contents[chunk][rank] for chunk in subset if place.holders[chunk, rank]] for rank in range(world_size)]
    held = reference.all_gather(shards, place, subset)
    owned = reference.reduce_scatter(holds, place, subset)
    return Trial(number, dtype, *plans, contents, held, owned)


def both(case: Case, algorithm: str, width: int) -> sc.Plan:
    """The native planner's plan, the same as the readable one's; an all-gather's where ``width`` is 0."""
    plan = case.reduce(algorithm, width=width) if width else case.gather(algorithm)
    readable = plan.redrafted(algorithm, divisible=case.divisible)
    assert plan.algorithm == readable.algorithm
    assert plan.transfers.tobytes() == readable.transfers.tobytes()
    return plan


def run(each: Trial, transport: Transport, arena: Arena) -> None:
    """One rank's part of both collectives."""
    rank, place = transport.rank, each.gather.place
    itemsize = np.dtype(each.dtype).itemsize
    sizes = {chunk: (each.gather.chunk_bytes[chunk],) for chunk in each.gather.chunks}
    owned = [chunk for chunk in each.gather.chunks if place.owners[chunk] == rank]
    held = [chunk for chunk in each.gather.chunks if place.holders[chunk, rank]]
    mine = {chunk: (each.contents[chunk][rank].view(np.uint8),) for chunk in held}
    before = transport.counters.snapshot()
    out = {chunk: (np.full(sizes[chunk][0], 0xEE, np.uint8),) for chunk in held}
    operation = Operation("gather", 2 * each.number, 30.0)
    source = {chunk: mine[chunk] for chunk in owned}
    finish(all_gather_steps(each.gather, transport, source, out, sizes, operation, arena))
    gathered = transport.counters.snapshot()
    for chunk, expected in zip(held, each.held[rank], strict=True):
        assert out[chunk][0].tobytes() == expected.tobytes(), f"trial {each.number}: {each.gather}, chunk {chunk}"
    out = {chunk: (np.full(sizes[chunk][0], 0xEE, np.uint8),) for chunk in owned}
    operation = Operation("reduce", 2 * each.number + 1, 30.0)
    finish(reduce_scatter_steps(each.reduce, transport, mine, out, sizes, [each.dtype], False, operation, arena))
    for chunk, expected in zip(owned, each.owned[rank], strict=True):
        assert out[chunk][0].size == expected.size * itemsize
        np.testing.assert_array_equal(out[chunk][0].view(each.dtype), expected, f"trial {each.number}: {each.reduce}")
    moved = gathered.since(before), transport.counters.since(gathered)
    for plan, spent in zip((each.gather, each.reduce), moved, strict=True):
        assert spent.sent_bytes == plan.sent_bytes[rank] and spent.received_bytes == plan.received_bytes[rank]
        assert spent.sent_messages == plan.sent_transfers[rank]


def finish(steps: Iterator[bool]) -> None:
    for _ in steps:
        pass


def test_there_are_ten_thousand() -> None:
    assert sum(NUM_PLACEMENTS.values()) == 10_000


@pytest.mark.timeout(120)
@pytest.mark.parametrize("world_size", NUM_PLACEMENTS)
def test_random_placements(world_size: int) -> None:
    trials = [trial(number, world_size) for number in range(NUM_PLACEMENTS[world_size])]

    def main(transport: Transport) -> None:
        arena = Arena()
        for each in trials:
            run(each, transport, arena)

    run_local(main, world_size, timeout_s=100.0)
    relayed = sum(any(plan.transfers["stage"].any() for plan in (each.gather, each.reduce)) for each in trials)
    in_parts = sum((plan.transfers["pieces"] > 1).any() for each in trials for plan in (each.gather, each.reduce))
    assert (relayed > len(trials) / 10 or world_size == 2) and in_parts > len(trials) / 10, "all that there is to try"

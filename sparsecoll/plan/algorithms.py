"""The algorithms: Placement → transfers. Pure, the same on every rank.

``direct``: the owner sends each holder its copy (Hecate, section 5.1, does the same with a broadcast per chunk);
contributions go straight back to the owner. ``dense``: every chunk visits every rank around a ring, wanted or not, as
the dense collective would move it; the base line, and no worse than ``direct`` when everything is held. ``relay`` and
``hierarchical``: holders forward to each other (`trees`), as if all ranks were alike, or with regard to nodes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsecoll.placement import Placement
from sparsecoll.plan.costs import Costs, costs_of
from sparsecoll.plan.transfer import Table, transfer_table
from sparsecoll.plan.trees import Schedule, trees
from sparsecoll.topology import Topology

__all__ = ["ALGORITHMS", "Case", "Draft", "draft"]

ALGORITHMS = ("direct", "relay", "hierarchical", "dense")


class Case(NamedTuple):
    """What is to be planned; lists have an entry for each chunk of the Placement.

    Attributes:
        gathers: an all-gather, not a reduce-scatter.
        chunks: those that move: they take part and have bytes.
        sizes, partial_sizes: bytes in the input's dtype, and of a partial sum.
        divisible: whether chunks may be cut.
        shared_memory: whether relays inside a node spare nobody anything.
    """

    gathers: bool
    place: Placement
    chunks: NDArray[np.int64]
    sizes: NDArray[np.int64]
    partial_sizes: NDArray[np.int64]
    node_of: tuple[int, ...]
    costs: Costs
    divisible: bool
    shared_memory: bool

    @classmethod
    def of(
        cls,
        op: str,
        place: Placement,
        chunks: NDArray[np.int64],
        sizes: NDArray[np.int64],
        partial_sizes: NDArray[np.int64],
        topology: Topology,
        divisible: bool,
    ) -> Case:
        """From the arguments of a plan; ``chunks`` are all that take part."""
        return cls(
            gathers=op == "all_gather",
            place=place,
            # A chunk without bytes has nothing to send; sums over nothing are complete from the start.
            chunks=chunks[sizes[chunks] > 0],
            sizes=sizes,
            partial_sizes=partial_sizes,
            node_of=topology.node_of,
            costs=costs_of(topology),
            divisible=divisible,
            shared_memory=topology.shared_memory,
        )


class Draft(NamedTuple):
    """Attributes:
    algorithm: which one made it.
    expected: ticks that it is expected to take.
    table: its transfers.
    """

    algorithm: str
    expected: int
    table: Table


def draft(case: Case, algorithm: str) -> Draft:
    """Plans by one algorithm, or by the best of all with ``auto``."""
    if algorithm == "direct":
        return _direct(case)
    if algorithm == "dense":
        return _dense(case)
    if algorithm in ("relay", "hierarchical"):
        return _trees(case, algorithm)
    num_nodes = len(case.costs.node)
    has_levels = 1 < num_nodes < case.place.world_size
    drafts = [_direct(case)]
    has_forwards = (case.place.holders[case.chunks].sum(axis=1) > 2).any()
    if has_forwards and not (num_nodes == 1 and case.shared_memory):
        drafts.append(_trees(case, "hierarchical" if has_levels else "relay"))
    drafts.append(_dense(case))
    return min(drafts, key=lambda each: each.expected)


def _direct(case: Case) -> Draft:
    """Owner to every other holder, all in one stage; or back."""
    place, chunks = case.place, case.chunks
    position, holder = np.nonzero(place.holders[chunks])
    chunk = chunks[position]
    owner = place.owners[chunk]
    other = holder != owner
    chunk, owner, holder = chunk[other], owner[other], holder[other]
    # Nearest rank number upwards first: ranks then begin with different receivers instead of all with rank 0. Owners
    # sum in this order: own contribution first, then ranks upwards from themselves.
    order = np.lexsort((chunk, (holder - owner) % place.world_size))
    src, dst = (owner, holder) if case.gathers else (holder, owner)
    table = transfer_table(0, src[order], dst[order], chunk[order], case.sizes[chunk[order]], False)
    busiest = _busiest(case, table["src"], table["dst"], case.sizes[table["chunk"]])
    return Draft("direct", busiest + _latency(case, table), table)


def _dense(case: Case) -> Draft:
    """A ring: in stage k a rank passes on the whole shard of the rank k places before it, or a sum on its way there."""
    place, world_size = case.place, case.place.world_size
    hop, position = (axis.ravel() for axis in np.indices((world_size - 1, len(case.chunks))))
    chunk = case.chunks[position]
    src = (place.owners[chunk] + hop + (not case.gathers)) % world_size
    partial = (hop > 0) & (not case.gathers)
    table = transfer_table(hop, src, (src + 1) % world_size, chunk, case.sizes[chunk], partial)
    sizes = np.where(partial, case.partial_sizes[chunk], case.sizes[chunk])
    expected = 0
    for stage in range(world_size - 1):
        rows = table["stage"] == stage
        expected += _busiest(case, table["src"][rows], table["dst"][rows], sizes[rows])
        expected += _latency(case, table[rows])
    return Draft("dense", expected, table)


def _trees(case: Case, algorithm: str) -> Draft:
    chunks = [int(chunk) for chunk in case.chunks if case.place.holders[chunk].sum() > 1]
    world_size, costs, node_of = case.place.world_size, case.costs, case.node_of
    if algorithm == "relay" and 1 < len(costs.node) < world_size:  # forgets nodes: all ranks are on one
        slow = tuple(map(max, costs.up, costs.out))
        costs, node_of = costs._replace(up=slow, node=(0,)), (0,) * world_size
    schedule = Schedule(
        chunks=chunks,
        sizes=case.sizes[chunks].tolist(),
        first_bytes=(case.sizes if case.gathers else case.partial_sizes)[chunks].tolist(),
        owners=case.place.owners[chunks].tolist(),
        holders=[np.flatnonzero(case.place.holders[chunk]).tolist() for chunk in chunks],
        node_of=node_of,
        costs=costs,
        divisible=case.divisible,
    )
    found = trees(schedule, mirrored=not case.gathers)
    return Draft(algorithm, found.expected, found.table)


def _busiest(case: Case, src: NDArray[np.int32], dst: NDArray[np.int32], sizes: NDArray[np.int64]) -> int:
    """Ticks that the busiest link needs for its messages."""
    nodes, costs = np.asarray(case.node_of), case.costs
    crosses = nodes[src] != nodes[dst]
    times = [0]
    for ends in (src, dst):
        for which, index, ticks in (
            (~crosses, ends, costs.up),
            (crosses, ends, costs.out),
            (crosses, nodes[ends], costs.node),
        ):
            loads = np.zeros(len(ticks), np.int64)
            np.add.at(loads, index[which], sizes[which])
            # As Python's integers: bytes fit 63 bits, ticks may not.
            times += [load * cost for load, cost in zip(loads.tolist(), ticks, strict=True)]
    return max(times)


def _latency(case: Case, table: Table) -> int:
    """Ticks until a message arrives: the longest of those that some message needs."""
    if not len(table):
        return 0
    nodes = np.asarray(case.node_of)
    crosses = nodes[table["src"]] != nodes[table["dst"]]
    inside = case.costs.up_latency if not crosses.all() else 0
    return max(inside, case.costs.out_latency if crosses.any() else 0)

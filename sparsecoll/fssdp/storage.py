"""Where the rows of experts are stored, and how copies of them travel: pure, and remembered.

[Note: owners and slices] With owners a chunk is an expert, stored with its optimizer state at the expert's owner, who
computes from where it is stored. With slices every expert is cut evenly over all ranks, as LAER-MoE's fully sharded
expert parallelism does (FSEP): chunk ``e * W + s`` is slice s of expert e and stored at rank s. Nobody then has a whole
expert before a gather, and all ranks send equally much for every copy, whichever experts are hot.

Legend: ``W`` ranks, ``E`` experts, ``S`` slices of an expert: 1 with owners, ``W`` with slices.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from sparsecoll.placement import Placement
from sparsecoll.plan import Plan, plan_all_gather, plan_reduce_scatter
from sparsecoll.topology import Topology

__all__ = ["Travel", "experts_to_gather", "rows_stored", "storage", "travel_of"]

_OWN, _GATHERED = 0, 1

Where = tuple[tuple[int, int, int], ...]


class Travel(NamedTuple):
    """How the experts of one all-gather travel, and their gradients back; for one rank.

    Attributes:
        gathered: the experts that travel, ascending; equal on all ranks.
        experts: of those, the ones that the rank computes from gathered rows.
        gather, reduce: the Plans.
        source, destination: of the all-gather, as `sparsecoll.collectives.stacks.Rows` has it; the stacks are the
            parameters, and the gathered rows.
        contributions, home: source and destination of the reduce-scatter; the stacks are gradients of the parameters
            and, for contributions, of the gathered rows.
    """

    gathered: tuple[int, ...]
    experts: tuple[int, ...]
    gather: Plan
    reduce: Plan
    source: Where
    destination: Where
    contributions: Where
    home: Where


def rows_stored(base: Placement, slices: int, rank: int) -> list[int]:
    """The experts of which ``rank`` stores a row, ascending."""
    return base.owned_by(rank).tolist() if slices == 1 else list(range(base.num_chunks))


def storage(place: Placement, slices: int) -> Placement:
    """The Placement of the chunks that experts at ``place`` consist of."""
    if slices == 1:
        return place
    ranks = np.arange(place.world_size)
    owners = np.tile(ranks, place.num_chunks)
    return Placement(owners, np.repeat(place.holders, slices, axis=0) | (owners[:, None] == ranks))


def experts_to_gather(place: Placement, slices: int) -> tuple[int, ...]:
    """Experts that have to travel before all holders can compute them, ascending."""
    return tuple(place.replicated().tolist()) if slices == 1 else tuple(range(place.num_chunks))


@lru_cache(maxsize=1024)
def travel_of(
    place: Placement,
    experts: tuple[int, ...],
    slices: int,
    chunk_bytes: int,
    partial_bytes: int,
    topology: Topology,
    rank: int,
) -> Travel:
    """Plans one all-gather of ``experts`` to their holders, and the reduce-scatter of their gradients.

    Args:
        chunk_bytes, partial_bytes: of a slice: its rows, and sums of its gradients on their way.
    """
    stored = storage(place, slices)
    chunks = tuple(expert * slices + part for expert in experts for part in range(slices))
    gather = plan_all_gather(stored, chunk_bytes, topology, chunks=chunks)
    reduce = plan_reduce_scatter(stored, chunk_bytes, topology, chunks=chunks, partial_bytes=partial_bytes)
    computes_own = slices == 1
    mine = tuple(e for e in experts if place.holders[e, rank] and not (computes_own and place.owners[e] == rank))
    row_of = {expert: row for row, expert in enumerate(rows_stored(place, slices, rank))}
    own = tuple((chunk, _OWN, row_of[chunk // slices]) for chunk in chunks if stored.owners[chunk] == rank)
    gathered = tuple((e * slices + s, 0, n * slices + s) for n, e in enumerate(mine) for s in range(slices))
    returned = tuple((chunk, _GATHERED, row) for chunk, _, row in gathered)
    return Travel(
        gathered=experts,
        experts=mine,
        gather=gather,
        reduce=reduce,
        source=own,
        destination=gathered,
        contributions=tuple(sorted((*own, *returned))) if computes_own else returned,
        home=own,
    )

"""The algorithms: Placement → transfers. Pure, vectorized, the same on every rank.

``direct``: the owner sends each holder its copy (Hecate, section 5.1, does the same with a broadcast per chunk);
contributions go straight back to the owner. ``dense``: every chunk visits every rank around a ring, wanted or not,
as the dense collective would move it; the better choice when nearly everything is held, and the base line else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecoll.placement import Placement
from sparsecoll.plan.plan import transfer_table

__all__ = ["ALGORITHMS", "dense_all_gather", "dense_reduce_scatter", "direct_all_gather", "direct_reduce_scatter"]

Table = NDArray[Any]


def direct_all_gather(place: Placement, chunks: NDArray[np.int64]) -> Table:
    """Owner to every other holder, all in one stage."""
    position, holder = np.nonzero(place.holders[chunks])
    chunk = chunks[position]
    owner = place.owners[chunk]
    other = holder != owner
    chunk, owner, holder = chunk[other], owner[other], holder[other]
    # Nearest rank number upwards first: ranks then begin with different receivers instead of all with rank 0.
    order = np.lexsort((chunk, (holder - owner) % place.world_size))
    return transfer_table(0, owner[order], holder[order], chunk[order], False)


def direct_reduce_scatter(place: Placement, chunks: NDArray[np.int64]) -> Table:
    """Every other holder to the owner, all in one stage."""
    gather = direct_all_gather(place, chunks)
    # The owner sums in table order: own contribution first, then ranks upwards from itself.
    return transfer_table(0, gather["dst"], gather["src"], gather["chunk"], False)


def dense_all_gather(place: Placement, chunks: NDArray[np.int64]) -> Table:
    """A ring: in stage k a rank passes on the whole shard of the rank k places before it."""
    hop, position = (axis.ravel() for axis in np.indices((place.world_size - 1, len(chunks))))
    chunk = chunks[position]
    src = (place.owners[chunk] + hop) % place.world_size
    return transfer_table(hop, src, (src + 1) % place.world_size, chunk, False)


def dense_reduce_scatter(place: Placement, chunks: NDArray[np.int64]) -> Table:
    """The ring that ends at the owner; every rank adds its contribution, zeros where it holds none."""
    hop, position = (axis.ravel() for axis in np.indices((place.world_size - 1, len(chunks))))
    chunk = chunks[position]
    src = (place.owners[chunk] + 1 + hop) % place.world_size
    return transfer_table(hop, src, (src + 1) % place.world_size, chunk, hop > 0)


ALGORITHMS = {
    "all_gather": {"direct": direct_all_gather, "dense": dense_all_gather},
    "reduce_scatter": {"direct": direct_reduce_scatter, "dense": dense_reduce_scatter},
}

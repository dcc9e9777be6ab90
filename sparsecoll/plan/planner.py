"""Placement + sizes + Topology → Plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from sparsecoll.errors import InvalidArgument
from sparsecoll.placement import Placement
from sparsecoll.plan.algorithms import ALGORITHMS
from sparsecoll.plan.plan import Plan
from sparsecoll.topology import Topology

__all__ = ["chunk_subset", "plan_all_gather", "plan_reduce_scatter"]

Sizes = int | Sequence[int]


def plan_all_gather(
    place: Placement,
    chunk_bytes: Sizes,
    topology: Topology,
    algorithm: str = "auto",
    *,
    chunks: Iterable[int] | None = None,
) -> Plan:
    """Plans how every holder gets its chunks.

    Args:
        place: owners and holders.
        chunk_bytes: size of every chunk, or ``[num_chunks]`` sizes.
        topology: links, for the prediction by which ``auto`` chooses.
        algorithm: ``auto``, ``direct`` or ``dense``.
        chunks: take part; all by default.

    Raises:
        InvalidArgument: sizes, topology, algorithm or chunks do not fit.
    """
    sizes = _sizes("chunk_bytes", chunk_bytes, place)
    return _plan("all_gather", place, sizes, sizes, topology, algorithm, chunk_subset(place, chunks))


def plan_reduce_scatter(
    place: Placement,
    chunk_bytes: Sizes,
    topology: Topology,
    algorithm: str = "auto",
    *,
    chunks: Iterable[int] | None = None,
    partial_bytes: Sizes | None = None,
) -> Plan:
    """Plans how the owner gets the sum over all holders; arguments as in `plan_all_gather`.

    Args:
        partial_bytes: size of a partial sum of a chunk, where it differs from ``chunk_bytes`` because 16-bit floats
            are accumulated in float32.
    """
    sizes = _sizes("chunk_bytes", chunk_bytes, place)
    partial = sizes if partial_bytes is None else _sizes("partial_bytes", partial_bytes, place)
    return _plan("reduce_scatter", place, sizes, partial, topology, algorithm, chunk_subset(place, chunks))


def chunk_subset(place: Placement, chunks: Iterable[int] | None) -> tuple[int, ...]:
    """Ascending chunk numbers without duplicates; None is all of them."""
    if chunks is None:
        return tuple(range(place.num_chunks))
    subset = tuple(int(chunk) for chunk in chunks)
    if len(set(subset)) != len(subset) or list(subset) != sorted(subset):
        raise InvalidArgument(f"chunks: expected ascending chunk numbers without duplicates, got {list(subset)}")
    if subset and not 0 <= subset[0] <= subset[-1] < place.num_chunks:
        raise InvalidArgument(f"chunks: expected numbers in 0..{place.num_chunks - 1}, got {list(subset)}")
    return subset


@lru_cache(maxsize=512)
def _plan(
    op: str,
    place: Placement,
    chunk_bytes: tuple[int, ...],
    partial_bytes: tuple[int, ...],
    topology: Topology,
    algorithm: str,
    chunks: tuple[int, ...],
) -> Plan:
    if topology.world_size != place.world_size:
        raise InvalidArgument(
            f"plan: expected a topology of {place.world_size} ranks (as the placement), got {topology.world_size}"
        )
    if algorithm not in ("auto", *ALGORITHMS[op]):
        raise InvalidArgument(f"plan: expected algorithm auto, {' or '.join(ALGORITHMS[op])}, got {algorithm!r}")
    # A chunk without bytes has nothing to send; sums over nothing are complete from the start.
    moving = np.array([chunk for chunk in chunks if chunk_bytes[chunk]], np.int64)
    names = list(ALGORITHMS[op]) if algorithm == "auto" else [algorithm]
    plans = [
        Plan(op, name, place, chunks, chunk_bytes, partial_bytes, topology, ALGORITHMS[op][name](place, moving))
        for name in names
    ]
    return min(plans, key=lambda plan: plan.predicted_s)


def _sizes(name: str, sizes: Sizes, place: Placement) -> tuple[int, ...]:
    listed = (int(sizes),) * place.num_chunks if isinstance(sizes, (int, np.integer)) else tuple(map(int, sizes))
    if len(listed) != place.num_chunks or any(size < 0 for size in listed):
        raise InvalidArgument(
            f"plan: expected {name} to be a size or {place.num_chunks} sizes, none negative, got {sizes}"
        )
    return listed

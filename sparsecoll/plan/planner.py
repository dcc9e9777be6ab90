"""Placement + sizes + Topology → Plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index

import numpy as np
from numpy.typing import NDArray

from sparsecoll.errors import InvalidArgument
from sparsecoll.placement import Placement
from sparsecoll.plan.algorithms import ALGORITHMS, Case
from sparsecoll.plan.cache import PlanCache
from sparsecoll.plan.compiled import draft
from sparsecoll.plan.plan import Plan
from sparsecoll.plan.rounds import rounds_of
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
    divisible: bool = True,
) -> Plan:
    """Plans how every holder gets its chunks.

    Args:
        place: owners and holders.
        chunk_bytes: size of every chunk, or ``[num_chunks]`` sizes.
        topology: links, for the prediction by which ``auto`` chooses.
        algorithm: ``auto``, ``direct``, ``relay``, ``hierarchical`` or ``dense``; see `sparsecoll.plan.algorithms`.
        chunks: take part; all by default.
        divisible: whether chunks may be cut, at multiples of 64 bytes; else relays forward whole chunks.

    Raises:
        InvalidArgument: sizes, topology, algorithm or chunks do not fit.
    """
    _check(place, topology, algorithm)
    sizes = _sizes("chunk_bytes", chunk_bytes, place)
    return _plan("all_gather", place, sizes, sizes, topology, algorithm, chunks, divisible)


def plan_reduce_scatter(
    place: Placement,
    chunk_bytes: Sizes,
    topology: Topology,
    algorithm: str = "auto",
    *,
    chunks: Iterable[int] | None = None,
    partial_bytes: Sizes | None = None,
    divisible: bool = True,
) -> Plan:
    """Plans how the owner gets the sum over all holders; arguments as in `plan_all_gather`.

    Args:
        partial_bytes: size of a partial sum of a chunk, where it differs from ``chunk_bytes`` because 16-bit floats
            are accumulated in float32.
    """
    _check(place, topology, algorithm)
    sizes = _sizes("chunk_bytes", chunk_bytes, place)
    partial = sizes if partial_bytes is None else _sizes("partial_bytes", partial_bytes, place)
    return _plan("reduce_scatter", place, sizes, partial, topology, algorithm, chunks, divisible)


def chunk_subset(place: Placement, chunks: Iterable[int] | None) -> tuple[int, ...]:
    """Ascending chunk numbers without duplicates; None is all of them."""
    if chunks is None:
        return tuple(range(place.num_chunks))
    try:
        subset = tuple(index(chunk) for chunk in chunks)
    except TypeError:
        raise InvalidArgument(f"chunks: expected chunk numbers, got {chunks}") from None
    if len(set(subset)) != len(subset) or list(subset) != sorted(subset):
        raise InvalidArgument(f"chunks: expected ascending chunk numbers without duplicates, got {list(subset)}")
    if subset and not 0 <= subset[0] <= subset[-1] < place.num_chunks:
        raise InvalidArgument(f"chunks: expected numbers in 0..{place.num_chunks - 1}, got {list(subset)}")
    return subset


# What is worth looking at where messages travel in rounds: one round, or relays.
_IN_ROUNDS = ("direct", "relay", "hierarchical")

_PLANS = PlanCache(max_plans=512, max_bytes=64 << 20)


def _plan(
    op: str,
    place: Placement,
    sizes: NDArray[np.int64],
    partial_sizes: NDArray[np.int64],
    topology: Topology,
    algorithm: str,
    chunks: Iterable[int] | None,
    divisible: bool,
) -> Plan:
    subset = np.arange(place.num_chunks) if chunks is None else np.array(chunk_subset(place, chunks), np.int64)

    def make() -> Plan:
        case = Case.of(op, place, subset, sizes, partial_sizes, topology, divisible)
        made = draft(case, algorithm)
        chunk_bytes = tuple(sizes.tolist())
        partial_bytes = chunk_bytes if partial_sizes is sizes else tuple(partial_sizes.tolist())
        return Plan(op, made.algorithm, place, tuple(subset.tolist()), chunk_bytes, partial_bytes, topology, made.table)

    numbers = subset.tobytes(), sizes.tobytes(), partial_sizes.tobytes()
    if algorithm == "auto" and topology.in_rounds:
        choices = [_plan(op, place, sizes, partial_sizes, topology, each, chunks, divisible) for each in _IN_ROUNDS]
        return min(choices, key=lambda plan: rounds_of(plan).time_s)
    return _PLANS.get((op, place, topology, algorithm, divisible, *numbers), make)


def _check(place: Placement, topology: Topology, algorithm: str) -> None:
    if not isinstance(place, Placement) or not isinstance(topology, Topology):
        raise InvalidArgument(f"plan: expected a Placement and a Topology, got {place!r} and {topology!r}")
    if topology.world_size != place.world_size:
        raise InvalidArgument(
            f"plan: expected a topology of {place.world_size} ranks (as the placement), got {topology.world_size}"
        )
    if not isinstance(algorithm, str) or algorithm not in ("auto", *ALGORITHMS):
        raise InvalidArgument(f"plan: expected algorithm auto or {' or '.join(ALGORITHMS)}, got {algorithm!r}")


def _sizes(name: str, sizes: Sizes, place: Placement) -> NDArray[np.int64]:
    """``[num_chunks]``, from one size for all or a list of them."""
    try:
        listed = list(map(index, sizes)) if isinstance(sizes, Iterable) else [index(sizes)]
    except TypeError:
        raise InvalidArgument(f"plan: expected {name} to be integers, got {sizes}") from None
    repeats = 1 if isinstance(sizes, Iterable) else place.num_chunks
    if len(listed) * repeats != place.num_chunks or min(listed, default=0) < 0:
        raise InvalidArgument(
            f"plan: expected {name} to be a size or {place.num_chunks} sizes, none negative, got {sizes}"
        )
    if sum(listed) * max(repeats, 1) * place.world_size**2 >= 2**63:
        raise InvalidArgument(f"plan: expected {name} whose totals over all ranks fit 63 bits, got {sizes}")
    return np.full(repeats, listed[0], np.int64) if repeats != 1 else np.array(listed, np.int64)

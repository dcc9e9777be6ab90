"""Which chunks a rank passes and gets: a pure function of the Placement, remembered from call to call."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from sparsecoll.placement import Placement
from sparsecoll.plan import chunk_subset

__all__ = ["Side", "Sides", "sides"]


class Side(NamedTuple):
    """Chunks that a rank owns, or holds.

    Attributes:
        chunks: all of them, ascending.
        subset: those that take part, ascending.
        rows: position in ``chunks`` of each of ``subset``.
    """

    chunks: tuple[int, ...]
    subset: tuple[int, ...]
    rows: tuple[int, ...]


class Sides(NamedTuple):
    """Both sides of a sparse collective at one rank, and the chunks that take part over all ranks."""

    subset: tuple[int, ...]
    owned: Side
    held: Side


@lru_cache(maxsize=512)
def sides(place: Placement, chunks: tuple[int, ...] | None, rank: int) -> Sides:
    """Raises `InvalidArgument` where ``chunks`` are not chunks of ``place``."""
    subset = chunk_subset(place, chunks)
    return Sides(
        subset,
        _side(tuple(place.owned_by(rank).tolist()), set(subset)),
        _side(tuple(place.held_by(rank).tolist()), set(subset)),
    )


def _side(chunks: tuple[int, ...], taking_part: set[int]) -> Side:
    rows = tuple(row for row, chunk in enumerate(chunks) if chunk in taking_part)
    return Side(chunks, tuple(chunks[row] for row in rows), rows)

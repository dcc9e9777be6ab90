"""Tables of many sums or copies for one launch, made once on the host and kept in device memory.

A *place* is a base number and an offset from that base: base addresses come with each launch, so a table serves as long
as sizes stay. Work is cut into *tiles* of like size, one for a block. All words are int64; `csrc/tiles.cuh` reads them.

Both kinds begin with the tiles. A tile of `pack_table` is ``destination base, offset, source base, offset, elements``;
where both dtypes are one, its elements are bytes. A tile of `sum_table` is ``word at which its sum begins, first
element, elements``; a sum is ``destination base, offset, is_partial, divisor, number of sources`` and ``base, offset,
is_partial`` of each source.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsecoll.errors import InvalidArgument
from sparsecoll.native import accumulation_itemsize, itemsize

__all__ = ["CASTS", "MOST_BASES", "Place", "Span", "Sum", "Table", "check_cast", "pack_table", "sum_table"]

MOST_BASES = 64
"""Base addresses that a launch can take."""

CASTS = frozenset(
    {("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32"), ("float16", "float32")}
)  # fmt: skip
"""Pairs of different dtypes, source and destination, between which `pack_table` can cast."""

_FLOATS = frozenset({"float32", "float64", "bfloat16", "float16"})
# A tile of the larger size costs far more than the start of a block; the smaller is one load of each thread of a warp.
_LEAST_TILE_BYTES, _MOST_TILE_BYTES = 1 << 9, 1 << 15
_TILES_PER_MULTIPROCESSOR = 4


class Place(NamedTuple):
    """Memory at ``offset`` bytes behind the base of a number; any alignment."""

    base: int
    offset: int


class Span(NamedTuple):
    """``num_elements`` to copy, and to cast where dtypes differ."""

    destination: Place
    source: Place
    num_elements: int


class Sum(NamedTuple):
    """``destination = (sources[0] + sources[1] + ...) / divisor``, in that order, as `native.sum_rows` has it.

    Attributes:
        destination: may be one of ``sources`` if both have elements of one size.
        destination_is_partial: whether to store in the accumulation dtype.
        sources: at least one.
        sources_are_partial: for each source, whether it is in the accumulation dtype.
        divisor: 1 for integers.
    """

    destination: Place
    destination_is_partial: bool
    sources: tuple[Place, ...]
    sources_are_partial: tuple[bool, ...]
    num_elements: int
    divisor: int


class Table(NamedTuple):
    """A table to be copied to the device.

    Attributes:
        words: int64 ``[num_words]``.
        num_tiles: what the launch has to know of it.
    """

    words: NDArray[np.int64]
    num_tiles: int


def sum_table(sums: Sequence[Sum], dtype: str, num_multiprocessors: int = 132) -> Table:
    """The table for `Kernels.sum_replicas`. No destination may overlap anything else than an equal source of its sum.

    Raises:
        InvalidArgument: an unknown dtype, or a sum that breaks a rule above.
    """
    itemsize(dtype)
    entries: list[int] = []
    starts = []
    for each in sums:
        if not each.sources or len(each.sources) != len(each.sources_are_partial):
            raise InvalidArgument(
                "sum_table: expected at least one source and as many sources_are_partial, "
                f"got {len(each.sources)} and {len(each.sources_are_partial)}"
            )
        _check_divisor("sum_table", dtype, each.divisor)
        _check("sum_table", each.num_elements, each.destination, *each.sources)
        starts.append(len(entries))
        entries += (*each.destination, each.destination_is_partial, each.divisor, len(each.sources))
        for place, is_partial in zip(each.sources, each.sources_are_partial, strict=True):
            entries += (*place, is_partial)
    numbers = [each.num_elements for each in sums]
    which, first, size = _tiles(numbers, accumulation_itemsize(dtype), num_multiprocessors)
    tiles = np.stack([np.array(starts, np.int64)[which] + 3 * len(which), first, size], axis=1)
    return Table(np.concatenate([tiles.ravel(), np.array(entries, np.int64)]), len(which))


def pack_table(
    spans: Sequence[Span], source_dtype: str, destination_dtype: str, num_multiprocessors: int = 132
) -> Table:
    """The table for `Kernels.pack`. No destination may overlap anything else.

    Raises:
        InvalidArgument: dtypes that are neither one nor in `CASTS`, or a span that breaks a rule above.
    """
    check_cast("pack_table", source_dtype, destination_dtype)
    source_bytes, destination_bytes = itemsize(source_dtype), itemsize(destination_dtype)
    if source_dtype == destination_dtype:
        spans = [each._replace(num_elements=each.num_elements * source_bytes) for each in spans]
        source_bytes = destination_bytes = 1
    for each in spans:
        _check("pack_table", each.num_elements, each.destination, each.source)
    numbers = [each.num_elements for each in spans]
    which, first, size = _tiles(numbers, max(source_bytes, destination_bytes), num_multiprocessors)
    places = np.array([[*each.destination, *each.source] for each in spans], np.int64).reshape(-1, 4)[which]
    places[:, 1] += first * destination_bytes
    places[:, 3] += first * source_bytes
    return Table(np.concatenate([places, size[:, None]], axis=1).ravel(), len(which))


def check_cast(operation: str, source_dtype: str, destination_dtype: str) -> None:
    """Raises `InvalidArgument` unless `pack_table` can make one dtype of the other."""
    itemsize(source_dtype)
    itemsize(destination_dtype)
    if source_dtype != destination_dtype and (source_dtype, destination_dtype) not in CASTS:
        casts = ", ".join(" to ".join(pair) for pair in sorted(CASTS))
        raise InvalidArgument(
            f"{operation}: expected one dtype, or a cast among {casts}, got {source_dtype} to {destination_dtype}"
        )


def _check_divisor(operation: str, dtype: str, divisor: int) -> None:
    """Raises `InvalidArgument` unless sums of ``dtype`` can be divided by ``divisor``."""
    if divisor < 1 or (divisor != 1 and dtype not in _FLOATS):
        raise InvalidArgument(f"{operation}: expected divisor >= 1, and 1 for integers, got {divisor} for {dtype}")


def _check(operation: str, num_elements: int, *places: Place) -> None:
    if num_elements < 0:
        raise InvalidArgument(f"{operation}: expected num_elements >= 0, got {num_elements}")
    for place in places:
        if not 0 <= place.base < MOST_BASES:
            raise InvalidArgument(f"{operation}: expected base numbers in 0..{MOST_BASES - 1}, got {place.base}")
        if place.offset < 0:
            raise InvalidArgument(f"{operation}: expected offset >= 0, got {place.offset}")


def _tiles(
    numbers: Sequence[int], element_bytes: int, num_multiprocessors: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Number of the piece of work, first element and size of every tile, for pieces of so many elements each.

    A tile is a power of two, so that all tiles of a piece have the alignment of its first.
    """
    num_elements = np.array(numbers, np.int64)
    share = int(num_elements.sum()) * element_bytes // (num_multiprocessors * _TILES_PER_MULTIPROCESSOR)
    tile_bytes = min(max(1 << share.bit_length(), _LEAST_TILE_BYTES), _MOST_TILE_BYTES)
    tile = tile_bytes // element_bytes
    num_tiles = -(-num_elements // tile)
    which = np.repeat(np.arange(len(num_elements)), num_tiles)
    first = (np.arange(len(which)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)) * tile
    return which, first, np.minimum(num_elements[which] - first, tile)

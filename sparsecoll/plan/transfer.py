"""One row of a Plan: a range of a chunk on its way from one rank to another."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "GRANULE_BYTES",
    "LEAD",
    "SLOTS",
    "TRANSFER",
    "Table",
    "freeze",
    "in_rounds",
    "piece_bounds",
    "transfer_table",
]

Table = NDArray[Any]

SLOTS = 1024
"""Into how many slots a relayed schedule divides the time that its busiest link needs."""

LEAD = SLOTS // 8
"""How many stages ahead of the earliest that it lacks a rank accepts messages.

Otherwise those who are not busy run ahead and fill the links of those that others wait for. Both longer and shorter
leads gave schedules of random placements a longer tail.
"""

GRANULE_BYTES = 64
"""Chunks are cut at multiples of this, a multiple of the size of any element."""

_ROUNDS = 16

TRANSFER = np.dtype(
    [
        ("stage", "<i4"),
        ("span", "<i4"),
        ("src", "<i4"),
        ("dst", "<i4"),
        ("chunk", "<i4"),
        ("pieces", "<i4"),
        ("begin", "<i8"),
        ("end", "<i8"),
        ("partial", "?"),
    ],
    align=True,
)
"""One row of `Plan.transfers`: bytes ``begin`` to ``end`` of ``chunk`` go from ``src`` to ``dst``.

``pieces``: the range travels in so many pieces of nearly equal size (`piece_bounds`); piece k is due in stage
``stage + k * span // pieces``. Stages order the messages between a pair of ranks, and say which of the pieces at hand a
rank sends first. Whoever forwards a range has all that it forwards (or sums) in earlier stages, cut alike. ``begin``
and ``end`` count bytes in the input's dtype. ``partial``: the payload is a sum that a relay made of several
contributions, in the accumulation dtype, rather than a contribution in the input's.
"""


def transfer_table(stage: Any, src: Any, dst: Any, chunk: Any, end: Any, partial: Any) -> Table:
    """Transfers of whole chunks in one piece each, from equally long columns (or scalars)."""
    columns = np.broadcast_arrays(stage, 1, src, dst, chunk, 1, 0, end, partial)
    table = np.zeros(columns[0].shape, TRANSFER)
    for name, column in zip(TRANSFER.names or (), columns, strict=True):
        table[name] = column
    return freeze(table)


def in_rounds(table: Table) -> Table:
    """Messages that are posted together share their links, which comes to the same as if they went piece by piece."""
    if not len(table) or table["stage"].any() or (table["pieces"] != 1).any():
        return table
    rounds = table.copy()
    rounds["pieces"] = _ROUNDS
    rounds["span"] = LEAD  # all of them may come at any time
    return freeze(rounds)


def piece_bounds(begin: int, end: int, pieces: int) -> list[int]:
    """Where the pieces of a range begin, and where the last one ends."""
    length = end - begin
    cuts = [begin + length * piece // pieces // GRANULE_BYTES * GRANULE_BYTES for piece in range(pieces)]
    return [*cuts, end]


def freeze(array: NDArray[Any]) -> NDArray[Any]:
    """Plans are shared by all callers with equal arguments, so none may change what another sees."""
    array.flags.writeable = False
    return array

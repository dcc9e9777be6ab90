"""What ranks tell each other about the rows of lists, whose shapes a receiver cannot know."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

from sparsecoll.collectives.agreement import agreed_error
from sparsecoll.collectives.buffers import DeviceRows
from sparsecoll.collectives.rows import Layout, Rows, Shape, row_shapes
from sparsecoll.errors import CollectiveMismatch
from sparsecoll.group import Group
from sparsecoll.transport.base import Operation

__all__ = ["ToldRows", "describe_rows", "exchange_rows"]

_LENGTH = struct.Struct("<I")


class ToldRows(NamedTuple):
    """What all ranks together know of a list's rows.

    Attributes:
        framework: of the first rank that has any.
        dtypes, in_tuples: as in `Layout`.
        shapes: of each segment, by chunk.
    """

    framework: str
    dtypes: tuple[str, ...]
    in_tuples: bool
    shapes: Mapping[int, list[Shape]]


def describe_rows(
    layout: Layout, source: Rows | DeviceRows, destination: Rows | DeviceRows | None, value: list[Any]
) -> bytes:
    """What a rank tells the others; with the sizes of its ``out``, which decide whether the call is sound."""
    shapes = row_shapes(value)
    out = destination and {chunk: [view.nbytes for view in row] for chunk, row in destination.segments.items()}
    record = {
        "dtypes": layout.dtypes,
        "in_tuples": layout.in_tuples if value else None,
        "framework": layout.framework,
        "shapes": {chunk: shapes[row] for chunk, row in zip(source.segments, source.rows, strict=True)},
        "out": out,
    }
    return json.dumps(record).encode()


def exchange_rows(group: Group, operation: Operation, mine: bytes) -> ToldRows:
    """Puts together what all ranks tell.

    Raises:
        CollectiveMismatch: they contradict each other; on all ranks.
    """
    lengths = [_LENGTH.unpack(each)[0] for each in group.transport.exchange(_LENGTH.pack(len(mine)), operation)]
    texts = group.transport.exchange(mine.ljust(max(lengths), b"\0"), operation)
    reported = [(rank, json.loads(each[: lengths[rank]])) for rank, each in enumerate(texts)]
    speakers = [(rank, each) for rank, each in reported if each["in_tuples"] is not None]
    if not speakers:
        return ToldRows(json.loads(mine)["framework"], (), False, {})
    first_rank, first = speakers[0]
    merged: dict[int, list[Shape]] = {}
    for rank, each in speakers:
        for key in ("dtypes", "in_tuples"):
            if each[key] != first[key]:
                raise agreed_error(
                    CollectiveMismatch(
                        f"{operation}: expected rows with equal {key} on all ranks, got {first[key]} on rank "
                        f"{first_rank} and {each[key]} on rank {rank} {group.place_of_error}"
                    )
                )
        for chunk, found in each["shapes"].items():
            row = [tuple(shape) for shape in found]
            if merged.setdefault(int(chunk), row) != row:
                raise agreed_error(
                    CollectiveMismatch(
                        f"{operation}: expected one shape of chunk {chunk} on all ranks, got {merged[int(chunk)]} "
                        f"and {row} on rank {rank} {group.place_of_error}"
                    )
                )
    return ToldRows(first["framework"], tuple(first["dtypes"]), first["in_tuples"], merged)

"""The caller's device tensors as numbered buffers, and where in them each chunk lies.

What `sparsecoll.collectives.rows` does with views, without touching a row: places are integers, remembered from call to
call, and only addresses are read anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sparsecoll.collectives.rows import Layout, contiguous, num_rows
from sparsecoll.collectives.sides import Side
from sparsecoll.errors import InvalidArgument
from sparsecoll.executor import Spot, Spots
from sparsecoll.transport.stream import Buffer

__all__ = ["DeviceRows", "buffer_of", "read_buffers", "spots_of"]


class DeviceRows(NamedTuple):
    """A value on a device.

    Attributes:
        rows: position in the value of each chunk that takes part.
        takes_all: whether the value has all rows of its side, and not only those that take part.
        tensors: those that take part, contiguous.
        buffers: their memory.
        segments: of a list, the buffers of each chunk.
    """

    rows: Sequence[int]
    takes_all: bool
    tensors: list[Any]
    buffers: list[Buffer]
    segments: dict[int, tuple[Buffer, ...]]


def read_buffers(name: str, value: Any, side: Side, *, writable: bool) -> DeviceRows:
    """Finds the memory of ``value``, whose layout has been read.

    Args:
        side: the rows are all its chunks, or only its subset.
        writable: the rows are an output: they must be contiguous, where an input is copied if it is not.

    Raises:
        InvalidArgument: another number of rows, or an output that is not contiguous.
    """
    count = num_rows(value)
    if count not in (len(side.chunks), len(side.subset)):
        lengths = dict.fromkeys((len(side.chunks), len(side.subset)))
        raise InvalidArgument(f"{name}: expected {' or '.join(map(str, lengths))} rows, got {count}")
    takes_all = count == len(side.chunks)
    rows = side.rows if takes_all else range(count)
    if not isinstance(value, list):
        tensors = [contiguous(name, each, writable) for each in (value if isinstance(value, tuple) else (value,))]
        return DeviceRows(rows, takes_all, tensors, [buffer_of(each) for each in tensors], {})
    tensors, segments = [], {}
    for chunk, row in zip(side.subset, rows, strict=True):
        parts = value[row] if isinstance(value[row], tuple) else (value[row],)
        parts = [contiguous(name, each, writable) for each in parts]
        segments[chunk] = tuple(buffer_of(each) for each in parts)
        tensors += parts
    return DeviceRows(rows, takes_all, tensors, [each for parts in segments.values() for each in parts], segments)


def spots_of(layout: Layout, side: Side, rows: DeviceRows, sizes: Mapping[int, Sequence[int]], first: int) -> Spots:
    """Where each chunk of ``side.subset`` lies, in buffers that are numbered from ``first``.

    Args:
        sizes: bytes of each chunk's segments.
    """
    if layout.form != "list":
        return {
            chunk: tuple(Spot(first + j, row * size, size) for j, size in enumerate(sizes[chunk]))
            for chunk, row in zip(side.subset, rows.rows, strict=True)
        }
    spots = {}
    for chunk in side.subset:
        spots[chunk] = tuple(Spot(first + j, 0, size) for j, size in enumerate(sizes[chunk]))
        first += len(rows.segments[chunk])
    return spots


def buffer_of(tensor: Any) -> Buffer:
    """The memory of a contiguous tensor."""
    if hasattr(tensor, "data_ptr"):
        return Buffer(tensor.data_ptr(), tensor.nbytes)
    if hasattr(tensor.data, "ptr"):
        return Buffer(tensor.data.ptr, tensor.nbytes)
    return Buffer(tensor.ctypes.data, tensor.nbytes)

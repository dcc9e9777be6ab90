"""The caller's tensors as chunks: which bytes belong to which chunk, without copying.

Three forms, for shards and for held chunks alike: a tensor ``[num_rows, *chunk_shape]``; a tuple of such tensors
whose rows belong together; a list with one tensor (or tuple of tensors) for each row, whose sizes may differ. Torch
tensors, NumPy arrays and CuPy arrays.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from sparsecoll.collectives.sides import Side
from sparsecoll.errors import InvalidArgument
from sparsecoll.executor import Segments

__all__ = [
    "Layout",
    "Rows",
    "Shape",
    "allocate",
    "contiguous",
    "flatten",
    "layout_of",
    "num_rows",
    "read_rows",
    "unflatten",
    "view_of",
]

Shape = tuple[int, ...]

_DEVICE_NAMES = {"cpu": "the CPU"}


class Layout(NamedTuple):
    """What the rows of a value have in common.

    Attributes:
        form: ``tensor``, ``tuple`` or ``list``; in a list, rows may have several segments too.
        framework: ``torch``, ``numpy`` or ``cupy``.
        dtypes: name of each segment's element type.
        shapes: shape of each segment of a row, or None in a list.
        in_tuples: whether the rows of a list are tuples.
    """

    form: str
    framework: str
    dtypes: tuple[str, ...]
    shapes: tuple[Shape, ...] | None
    in_tuples: bool = False

    @property
    def itemsizes(self) -> tuple[int, ...]:
        return tuple(itemsize_of(dtype) for dtype in self.dtypes)

    @property
    def agreed(self) -> tuple[Any, ...]:
        """What must be equal on all ranks; frameworks may differ."""
        return (self.form, self.shapes) if self.form == "list" else (self.form, self.dtypes, self.shapes)


class Rows(NamedTuple):
    """Segments by chunk, over the caller's memory.

    Attributes:
        rows: position in the value of each chunk that takes part.
        segments: of those chunks, in the same order.
    """

    rows: Sequence[int]
    segments: dict[int, Segments]


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_cupy(value: Any) -> bool:
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(value, cupy.ndarray)


def _framework_of(tensor: Any) -> str:
    return "torch" if _is_tensor(tensor) else "cupy" if _is_cupy(tensor) else "numpy"


@cache
def dtype_name(dtype: Any) -> str:
    """``float32`` and so on, the same for torch and NumPy."""
    return str(dtype).removeprefix("torch.")


def layout_of(name: str, value: Any, device: str) -> Layout:
    """Reads the form; an empty list has no element types yet.

    Raises:
        InvalidArgument: anything but tensors in one of the three forms, on ``device``.
    """
    is_plain = type(value) is np.ndarray and value.ndim and not value.dtype.hasobject
    if is_plain and device == "cpu":  # the shortest way for the usual case
        return Layout("tensor", "numpy", (dtype_name(value.dtype),), (value.shape[1:],))
    if isinstance(value, list):
        rows = [row if isinstance(row, tuple) else (row,) for row in value]
        for row in rows:
            for tensor in row:
                _check_tensor(name, tensor, device, least_dims=0)
        kinds = {
            (isinstance(one, tuple), tuple(dtype_name(tensor.dtype) for tensor in row))
            for one, row in zip(value, rows, strict=True)
        }
        if len(kinds) > 1:
            raise InvalidArgument(f"{name}: expected rows of equal dtypes, got {sorted(map(str, kinds))}")
        in_tuples, dtypes = kinds.pop() if kinds else (False, ())
        framework = _framework_of(rows[0][0] if rows and rows[0] else None)
        return Layout("list", framework, dtypes, None, in_tuples)
    tensors = value if isinstance(value, tuple) else (value,)
    if not tensors:
        raise InvalidArgument(f"{name}: expected at least one tensor, got an empty tuple")
    for tensor in tensors:
        _check_tensor(name, tensor, device, least_dims=1)
    counts = [tensor.shape[0] for tensor in tensors]
    if len(set(counts)) > 1:
        raise InvalidArgument(f"{name}: expected tensors of equally many rows, got {counts}")
    form = "tuple" if isinstance(value, tuple) else "tensor"
    return Layout(
        form,
        _framework_of(tensors[0]),
        tuple(dtype_name(tensor.dtype) for tensor in tensors),
        tuple(tuple(map(int, tensor.shape[1:])) for tensor in tensors),
    )


def wants_gradient(value: Any) -> bool:
    """Whether autograd would record an operation on any of the tensors."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.is_grad_enabled():
        return False
    return any(_is_tensor(tensor) and tensor.requires_grad for tensor in flatten(value))


def flatten(value: Any) -> list[Any]:
    """All tensors of a value in any of the three forms (or of anything else, for `layout_of` to refuse)."""
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in flatten(part)]
    return [value]


def unflatten(value: Any, tensors: Iterator[Any]) -> Any:
    """The structure of ``value`` with other tensors in it."""
    if isinstance(value, (list, tuple)):
        return type(value)(unflatten(part, tensors) for part in value)
    return next(tensors)


def num_rows(value: Any) -> int:
    """Rows of a value that `layout_of` has accepted."""
    if isinstance(value, list):
        return len(value)
    return int((value[0] if isinstance(value, tuple) else value).shape[0])


def row_shapes(value: list[Any]) -> list[list[list[int]]]:
    """Shape of each segment of each row of a list."""
    return [[list(map(int, t.shape)) for t in (row if isinstance(row, tuple) else (row,))] for row in value]


def read_rows(name: str, value: Any, side: Side, *, writable: bool) -> Rows:
    """Maps chunks to rows.

    Args:
        side: the rows are all its chunks, or only its subset.
        writable: the rows are an output: they must be contiguous, where an input is copied if it is not.
    """
    count = num_rows(value)
    if count not in (len(side.chunks), len(side.subset)):
        lengths = dict.fromkeys((len(side.chunks), len(side.subset)))
        raise InvalidArgument(f"{name}: expected {' or '.join(map(str, lengths))} rows, got {count}")
    rows = side.rows if count == len(side.chunks) else range(count)
    if isinstance(value, list):
        chosen = [value[row] for row in rows]
        views = [tuple(view_of(name, t, writable) for t in (r if isinstance(r, tuple) else (r,))) for r in chosen]
        return Rows(rows, dict(zip(side.subset, views, strict=True)))
    flat = [view_of(name, tensor, writable) for tensor in (value if isinstance(value, tuple) else (value,))]
    tables = [view.reshape(count, view.nbytes // max(1, count)) for view in flat]
    parts = [[table[row] for row in rows] for table in tables]
    return Rows(rows, dict(zip(side.subset, zip(*parts, strict=True), strict=True)))


def contiguous(name: str, tensor: Any, writable: bool) -> Any:
    """The tensor itself, or a contiguous copy where it is only read; without autograd's record.

    Raises:
        InvalidArgument: an output that is not contiguous, or cannot be written.
    """
    if _is_tensor(tensor):
        tensor = tensor.detach()
        if writable and not tensor.is_contiguous():
            raise InvalidArgument(f"{name}: expected a contiguous output, got strides {tuple(tensor.stride())}")
        return tensor.contiguous()
    is_open = tensor.flags.c_contiguous and (not isinstance(tensor, np.ndarray) or tensor.flags.writeable)
    if writable and not is_open:
        raise InvalidArgument(f"{name}: expected a contiguous, writable output, got strides {tensor.strides}")
    library = sys.modules["cupy"] if _is_cupy(tensor) else np
    return library.ascontiguousarray(tensor)


def view_of(name: str, tensor: Any, writable: bool = False) -> Any:
    """All bytes of a CPU tensor as a one-dimensional uint8 array over its memory."""
    tensor = contiguous(name, tensor, writable)
    if _is_tensor(tensor):
        torch = sys.modules["torch"]
        return tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
    return tensor.reshape(-1).view(np.uint8)


def allocate(layout: Layout, count: int, shapes: Callable[[int], Sequence[Shape]], device: str) -> Any:
    """New rows of the same form and framework; ``shapes`` gives the segments of row i of a list."""
    if layout.form == "list":
        rows = [
            tuple(
                _empty(layout.framework, shape, dtype, device)
                for shape, dtype in zip(shapes(i), layout.dtypes, strict=True)
            )
            for i in range(count)
        ]
        return [row if layout.in_tuples else row[0] for row in rows]
    assert layout.shapes is not None
    tensors = tuple(
        _empty(layout.framework, (count, *shape), dtype, device)
        for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True)
    )
    return tensors if layout.form == "tuple" else tensors[0]


def segment_bytes(shapes: Sequence[Shape], itemsizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape) * size for shape, size in zip(shapes, itemsizes, strict=True))


@cache
def itemsize_of(dtype: str) -> int:
    """Bytes per element of any dtype that travels, fp8 and bool included."""
    try:
        return np.dtype(dtype).itemsize
    except TypeError:
        torch = sys.modules.get("torch")
        found = getattr(torch, dtype, None)
        if found is None:
            raise InvalidArgument(f"dtype: expected a NumPy or torch element type, got {dtype}") from None
        return int(found.itemsize)


def _empty(framework: str, shape: Shape, dtype: str, device: str) -> Any:
    if framework == "torch":
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=device)
    if framework == "cupy":
        return sys.modules["cupy"].empty(shape, dtype)
    return np.empty(shape, dtype)


def _check_tensor(name: str, tensor: Any, device: str, least_dims: int) -> None:
    if _is_tensor(tensor):
        if tensor.layout is not sys.modules["torch"].strided:
            raise InvalidArgument(f"{name}: expected strided tensors, got {type(tensor).__name__}")
        found = str(tensor.device)
    elif isinstance(tensor, np.ndarray):
        if tensor.dtype.hasobject:
            raise InvalidArgument(f"{name}: expected plain element types, got {tensor.dtype}")
        found = "cpu"
    elif _is_cupy(tensor):
        found = f"cuda:{tensor.device.id}"
    else:
        raise InvalidArgument(f"{name}: expected torch tensors, NumPy or CuPy arrays, got {type(tensor).__name__}")
    if found != device:
        raise InvalidArgument(f"{name}: expected tensors on {_DEVICE_NAMES.get(device, device)}, got {found}")
    if tensor.ndim < least_dims:
        raise InvalidArgument(f"{name}: expected [num_rows, *chunk_shape], got a 0-dimensional tensor")

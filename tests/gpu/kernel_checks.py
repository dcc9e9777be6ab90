"""Checks of the CUDA kernels on the memory they are launched for, against the native kernels on the CPU.

A `Rig` says where: a GPU, or the emulation on a CPU. Inputs are those of ``tests/unit/test_cuda_kernels.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsecoll import native
from sparsecoll.cuda.kernels import Kernels
from sparsecoll.cuda.tables import CASTS, Place, Span, Sum, Table, pack_table, sum_table
from tests.unit.test_cuda_kernels import FLOATS, HALVES, INTEGERS, accumulation, draw, routed, routings

__all__ = [
    "CASTS",
    "FLOATS",
    "INTEGERS",
    "Rig",
    "check_combine",
    "check_combine_backward",
    "check_pack",
    "check_permute_rows",
    "check_sort",
    "check_sum_replicas",
    "remainders",
]

_GARBAGE = 0xA5
_RED_BYTES = 256


class Memory:
    """Bytes between red zones, at an address that leaves a given remainder modulo 16; garbage or ``values``."""

    def __init__(self, device: str, num_bytes: int, remainder: int = 0, values: Tensor | None = None) -> None:
        self._whole = torch.full((num_bytes + 2 * _RED_BYTES + 16,), _GARBAGE, dtype=torch.uint8, device=device)
        begin = _RED_BYTES + (remainder - self._whole.data_ptr()) % 16
        self.bytes = self._whole[begin : begin + num_bytes]
        self._around = [self._whole[:begin], self._whole[begin + num_bytes :]]
        if values is not None:
            self.bytes.copy_(values.reshape(-1).view(torch.uint8))

    @property
    def address(self) -> int:
        return self.bytes.data_ptr()

    def read(self, dtype: torch.dtype) -> Tensor:
        """A copy on the CPU; nothing may have been written outside."""
        assert all(bool((zone == _GARBAGE).all()) for zone in self._around), "wrote outside of its memory"
        return self.bytes.cpu().clone().view(dtype)


@dataclass
class Rig:
    """Where kernels run.

    Attributes:
        stream: handle that launches go to.
    """

    kernels: Kernels
    device: str
    stream: int
    _kept: list[object] = field(default_factory=list)

    def memory(self, like: Tensor, remainder: int = 0) -> Memory:
        """A copy of ``like``."""
        return Memory(self.device, like.nbytes, remainder, like)

    def blank(self, num_bytes: int, remainder: int = 0) -> Memory:
        return Memory(self.device, num_bytes, remainder)

    def integers(self, values: Tensor) -> int:
        """Address of a copy, alive as long as the rig."""
        there = values.to(self.device, copy=True)
        self._kept.append(there)
        return there.data_ptr()

    @contextmanager
    def table(self, table: Table) -> Iterator[tuple[int, int]]:
        """Address and number of tiles of a table for the time of a check."""
        words = torch.from_numpy(table.words).to(self.device)
        yield words.data_ptr(), table.num_tiles


def check_permute_rows(rig: Rig, row_bytes: int, remainder: int) -> None:
    generator = torch.Generator().manual_seed(row_bytes)
    source = torch.randint(256, (37, row_bytes), generator=generator, dtype=torch.uint8)
    for num_rows in (0, 1, 5, 3000):
        index = torch.randint(-1, len(source), (num_rows,), generator=generator)
        there, destination = rig.memory(source, remainder), rig.blank(num_rows * row_bytes, remainder)
        rig.kernels.permute_rows(
            destination.address, there.address, rig.integers(index), num_rows, row_bytes, rig.stream
        )
        expected = torch.where(index[:, None] < 0, 0, source[index])
        assert torch.equal(destination.read(torch.uint8).view(num_rows, row_bytes), expected)


def check_combine(rig: Rig, dtype: str, remainder: int) -> None:
    for num_tokens, top_k, dim in routings():
        values, position, weights = routed(dtype, num_tokens, top_k, dim)
        source = rig.memory(values, remainder)
        for weight in (None, rig.memory(weights, remainder)):
            destination = rig.blank(num_tokens * dim * values.itemsize, remainder)
            sizes = (num_tokens, top_k, dim, dtype)
            rig.kernels.combine(
                destination.address,
                source.address,
                rig.integers(position),
                0 if weight is None else weight.address,
                *sizes,
                rig.stream,
            )
            expected = torch.empty(num_tokens, dim, dtype=values.dtype)
            given = 0 if weight is None else weights.data_ptr()
            native.combine(expected.data_ptr(), values.data_ptr(), position.data_ptr(), given, *sizes)
            found = destination.read(values.dtype).view(num_tokens, dim)
            assert torch.equal(_bits(found), _bits(expected)), (dtype, num_tokens, top_k, dim)


def check_combine_backward(rig: Rig, dtype: str, remainder: int) -> None:
    for num_tokens, top_k, dim in routings():
        values, position, weights = routed(dtype, num_tokens, top_k, dim)
        gradients = draw(dtype, num_tokens, dim, seed=3) / 64  # dot products stay below a half's largest
        source, weight = rig.memory(values, remainder), rig.memory(weights, remainder)
        d_destination = rig.memory(gradients, remainder)
        sizes = (num_tokens, top_k, dim, dtype)
        expected = torch.full_like(values.reshape(-1).view(torch.uint8), _GARBAGE).view(values.dtype)
        native.combine_backward(
            expected.data_ptr(), 0, gradients.data_ptr(), 0, position.data_ptr(), weights.data_ptr(), *sizes
        )
        for wants_weights in (False, True):
            d_source, d_weight = rig.blank(values.nbytes, remainder), rig.blank(weights.nbytes, remainder)
            rig.kernels.combine_backward(
                d_source.address,
                d_weight.address if wants_weights else 0,
                d_destination.address,
                source.address if wants_weights else 0,
                rig.integers(position),
                weight.address,
                *sizes,
                rig.stream,
            )
            assert torch.equal(_bits(d_source.read(values.dtype)), _bits(expected)), (dtype, num_tokens, top_k, dim)
            if wants_weights:
                found = d_weight.read(values.dtype).view(num_tokens, top_k)
                _check_dots(found, gradients, values, position, dtype)
            else:
                assert bool((d_weight.bytes == _GARBAGE).all())


def _check_dots(found: Tensor, gradients: Tensor, values: Tensor, position: Tensor, dtype: str) -> None:
    rows = torch.where(position[..., None] < 0, 0, values[position].double())
    products = gradients.double()[:, None] * rows
    # Half a unit in the last place of the result, and what summing D products in the wide dtype may lose.
    rounding = torch.finfo(values.dtype).eps / 2 * products.sum(2).abs()
    summing = gradients.shape[1] * torch.finfo(accumulation(dtype)).eps * products.abs().sum(2)
    assert bool(((found.double() - products.sum(2)).abs() <= rounding + summing).all())
    assert bool((found[position < 0] == 0).all())


def check_sum_replicas(rig: Rig, dtype: str, remainder: int) -> None:
    """Sums of one to eight sources and several sizes in one launch; the last is written over its first source."""
    sizes = [1, 7, 4096, 0, 33_333, 100_003]
    is_float = dtype in FLOATS
    sums, memories, expected = [], [], []
    for number, size in enumerate(sizes):
        count = (1, 2, 3, 8, 4, 5)[number]
        are_partial = [is_float and (number + k) % 3 == 0 for k in range(count)]
        in_place = number == len(sizes) - 1
        is_partial = are_partial[0] if in_place else is_float and number % 2 == 1
        divisor = 3 if is_float and number % 2 else 1
        values = [
            draw(str(accumulation(dtype) if partial else dtype).removeprefix("torch."), size, seed=10 * number + k)
            for k, partial in enumerate(are_partial)
        ]
        result = torch.empty(size, dtype=accumulation(dtype) if is_partial else getattr(torch, dtype))
        native.sum_rows(
            result.data_ptr(), is_partial, [each.data_ptr() for each in values], are_partial, size, dtype, divisor
        )
        sources = [rig.memory(each, remainder) for each in values]
        destination = sources[0] if in_place else rig.blank(result.nbytes, remainder)
        first = len(memories)
        memories += [destination, *sources]
        places = tuple(Place(first + 1 + k, 0) for k in range(count))
        to = places[0] if in_place else Place(first, 0)
        sums.append(Sum(to, is_partial, places, tuple(are_partial), size, divisor))
        expected.append((destination, result))
    with rig.table(sum_table(sums, dtype)) as (table, num_tiles):
        bases = [each.address for each in memories]
        rig.kernels.sum_replicas(table, num_tiles, bases, dtype, rig.stream)
        for destination, result in expected:
            assert torch.equal(_bits(destination.read(result.dtype)), _bits(result)), (dtype, len(result))


def check_pack(rig: Rig, source_dtype: str, destination_dtype: str, remainder: int) -> None:
    """Many spans between two bases, at odd offsets, each apart from its neighbours."""
    sizes = [1, 5, 0, 1024, 4099, 70_001]
    source = draw(source_dtype, sum(sizes) + 3)
    to = torch.empty(0, dtype=getattr(torch, destination_dtype)).itemsize
    there = rig.memory(source, remainder)
    destination = rig.blank((sum(sizes) + len(sizes)) * to, remainder)
    expected = torch.full(((sum(sizes) + len(sizes)) * to,), _GARBAGE, dtype=torch.uint8)
    spans, begin, end = [], 3, 0
    for size in sizes:
        spans.append(Span(Place(1, end * to), Place(0, begin * source.itemsize), size))
        cast = source[begin : begin + size].to(getattr(torch, destination_dtype))
        expected[end * to : (end + size) * to] = _bits(cast)
        begin, end = begin + size, end + size + 1
    with rig.table(pack_table(spans, source_dtype, destination_dtype)) as (table, num_tiles):
        rig.kernels.pack(
            table, num_tiles, [there.address, destination.address], source_dtype, destination_dtype, rig.stream
        )
        assert torch.equal(destination.read(torch.uint8), expected)


def check_sort(rig: Rig, num_assignments: int, num_experts: int) -> None:
    generator = torch.Generator().manual_seed(num_assignments + num_experts)
    ids = torch.randint(num_experts, (num_assignments,), generator=generator)
    ids[: num_assignments // 3] = num_experts // 2  # a popular expert fills warps and tiles
    order, counts, ends = (rig.blank(8 * num_assignments), rig.blank(8 * num_experts), rig.blank(4 * num_experts))
    scratch = rig.blank(rig.kernels.sort_scratch_bytes(num_assignments, num_experts))
    rig.kernels.sort_by_expert(
        rig.integers(ids),
        num_assignments,
        num_experts,
        *(each.address for each in (order, counts, ends, scratch)),
        rig.stream,
    )
    expected = torch.bincount(ids, minlength=num_experts)
    assert torch.equal(order.read(torch.int64), torch.argsort(ids, stable=True))
    assert torch.equal(counts.read(torch.int64), expected)
    assert torch.equal(ends.read(torch.int32), expected.cumsum(0).to(torch.int32))
    scratch.read(torch.uint8)


def remainders(dtype: str) -> Sequence[int]:
    """Addresses for the widest path, for a narrower one, and for one that no element's size divides."""
    return (0, 5) if dtype in ("int8", "uint8") else (0, 2 if dtype in HALVES else 4, 5)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)

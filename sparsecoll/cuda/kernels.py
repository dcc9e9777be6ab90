"""The CUDA kernels, typed and checked: what `sparsecoll.native` does on the CPU, and sums and copies by table.

Memory comes in by device address, which needs no alignment except where a function says so; the caller keeps it alive
until the stream has passed the launch, and contiguous. Nothing allocates or waits, so all can be captured into a CUDA
graph once their files are loaded (`CudaLauncher`). Results are the same bits on every device and from run to run, and
those of `sparsecoll.native` except for dot products, whose order of summation differs, and the payloads of NaNs.

`stream` is the handle of the stream that a launch goes to. ``T`` tokens, ``K`` top-k, ``A`` assignments, ``E`` experts,
``D`` dim of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sparsecoll.cuda.launcher import Launcher
from sparsecoll.cuda.tables import MOST_BASES, check_cast
from sparsecoll.errors import InvalidArgument
from sparsecoll.native import itemsize

__all__ = ["Kernels"]

_FLOATS = ("bfloat16", "float16", "float32", "float64")
_SUMS = {
    **{dtype: dtype for dtype in _FLOATS},
    **{"int8": "bits8", "uint8": "bits8", "int16": "bits16", "int32": "bits32", "int64": "bits64"},
}
_MOST_THREADS = 256
# Blocks in a launch: many for each place on the device, so that none waits long for the last; further work by turns.
_BLOCKS_PER_MULTIPROCESSOR = 64
# Threads on a multiprocessor that keep its share of the memory busy with one load each.
_BUSY_THREADS = 1024
# Shared memory that every device gives a block without being asked.
_SHARED_BYTES = 48 << 10
# Sorting: assignments in a step of a warp, and in a tile of the one block that sorts few of them; in the table of many,
# tiles and counts.
_SORT_STEP, _MOST_IN_SMALL_TILE = 128, 512
_TILES_PER_MULTIPROCESSOR, _MOST_COUNTS = 4, 1 << 22


class Kernels:
    """All kernels, through one launcher. May be used from any thread.

    Args:
        launcher: decides where they run.
    """

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._num_multiprocessors = launcher.num_multiprocessors

    def permute_rows(
        self, destination: int, source: int, index: int, num_rows: int, row_bytes: int, stream: int
    ) -> None:
        """Gathers rows: ``destination[i] = source[index[i]]``, zeros where ``index[i]`` is negative.

        Args:
            destination: address of ``num_rows`` rows, apart from ``source``.
            source: address of rows of ``row_bytes``.
            index: address of int64 ``[num_rows]``, a multiple of 8; trusted to name rows of ``source``.

        Raises:
            InvalidArgument: a negative size, or no such address.
        """
        _check_sizes("permute_rows", num_rows=num_rows, row_bytes=row_bytes)
        if not num_rows or not row_bytes:
            return
        _check_addresses("permute_rows", destination=destination, source=source)
        _check_integers("permute_rows", index=index)
        word_bytes = _alignment(destination, source, row_bytes)
        split = self._split(num_rows, row_bytes // word_bytes, 4)
        arguments = (destination, source, index, num_rows, row_bytes // word_bytes, *split.arguments)
        self._launch("permute_rows", f"permute_rows_{word_bytes}", split.grid, split.block, arguments, stream)

    def combine(
        self,
        destination: int,
        source: int,
        position: int,
        weight: int,
        num_tokens: int,
        top_k: int,
        dim: int,
        dtype: str,
        stream: int,
    ) -> None:
        """Brings rows back to tokens: ``destination[t] = sum over k of weight[t, k] * source[position[t, k]]``.

        Sums are kept in the accumulation dtype, in the order of k, and rounded once.

        Args:
            destination: address of ``[T, D]``, apart from ``source``.
            source: address of ``[rows, D]``.
            position: address of int64 ``[T, K]``, a multiple of 8; trusted to name rows of ``source``; a negative one
                contributes nothing.
            weight: address of ``[T, K]`` in ``dtype``, or 0 for weights of one.
            dtype: a float dtype.

        Raises:
            InvalidArgument: a negative size, no such address or another dtype.
        """
        _check_routing("combine", num_tokens, top_k, dim, dtype)
        if not num_tokens or not dim:
            return
        _check_addresses("combine", destination=destination)
        if top_k:
            _check_addresses("combine", source=source)
            _check_integers("combine", position=position)
        kernel, row_units = _by_units("combine", dtype, dim, destination, source)
        split = self._split(num_tokens, row_units, 2)
        arguments = (destination, source, position, weight, num_tokens, top_k, row_units, *split.arguments)
        self._launch("combine", kernel, split.grid, split.block, arguments, stream)

    def combine_backward(
        self,
        d_source: int,
        d_weight: int,
        d_destination: int,
        source: int,
        position: int,
        weight: int,
        num_tokens: int,
        top_k: int,
        dim: int,
        dtype: str,
        stream: int,
    ) -> None:
        """Gradients of `combine`, whose arguments keep their names.

        ``d_source[position[t, k]] = weight[t, k] * d_destination[t]``, and ``d_weight[t, k]`` is the dot product of
        ``d_destination[t]`` and ``source[position[t, k]]``, zero where there is no position. Its order of summation
        depends on ``dim``, ``dtype`` and alignment only. Rows of ``d_source`` that no position names stay untouched.

        Args:
            d_weight: address of ``[T, K]``, or 0 if not wanted; ``source`` may be 0 then.
            position: names each row at most once.

        Raises:
            InvalidArgument: a negative size, no such address or another dtype.
        """
        _check_routing("combine_backward", num_tokens, top_k, dim, dtype)
        if not num_tokens or not top_k or not (dim or d_weight):
            return
        _check_integers("combine_backward", position=position)
        if dim:
            _check_addresses("combine_backward", d_source=d_source, d_destination=d_destination)
            if d_weight:
                _check_addresses("combine_backward", source=source)
        kernel, row_units = _by_units("combine_backward", dtype, dim, d_source, d_destination, source)
        num_assignments = num_tokens * top_k
        group = min(_MOST_THREADS, _power_of_two(-(-row_units // 4)))
        block = _MOST_THREADS
        while block > max(32, group) and num_assignments * group < block * self._num_multiprocessors:
            block //= 2
        grid = self._grid(-(-num_assignments * group // block))
        arguments = (
            *(d_source, d_weight, d_destination, source, position, weight),
            *(num_assignments, top_k, row_units, group.bit_length() - 1),
        )
        shared_bytes = block // 32 * 8 if group > 32 else 0
        self._launch("combine", kernel, grid, block, arguments, stream, shared_bytes)

    def sort_by_expert(
        self,
        expert_ids: int,
        num_assignments: int,
        num_experts: int,
        order: int,
        counts: int,
        ends: int,
        scratch: int,
        stream: int,
    ) -> None:
        """Sorts assignments by expert, stably.

        Args:
            expert_ids: address of int64 ``[A]``, trusted to be in 0..E-1. Others are in no count, and nowhere in
                ``order``, whose last places then keep what they held.
            num_assignments: less than 2^31.
            order: address of int64 ``[A]`` to fill: ``order[j]`` is the j-th assignment in expert order.
            counts: address of int64 ``[E]`` to fill: assignments of each expert.
            ends: address of int32 ``[E]`` to fill: assignments of each expert and those before it.
            scratch: address of `sort_scratch_bytes` of memory that nothing else uses until the stream has passed this;
                0 where none is needed. All addresses are multiples of 8.

        Raises:
            InvalidArgument: a size out of range, or no such address.
        """
        scratch_bytes = self.sort_scratch_bytes(num_assignments, num_experts)
        if not num_experts:
            return
        _check_integers("sort_by_expert", counts=counts, ends=ends)
        if num_assignments:
            _check_integers("sort_by_expert", expert_ids=expert_ids, order=order)
        if scratch_bytes:
            _check_integers("sort_by_expert", scratch=scratch)
        sort = self._sort(num_assignments, num_experts)
        begins = scratch + 4 * num_experts * sort.num_tiles
        arguments = (
            *(expert_ids, num_assignments, num_experts, order, counts, ends),
            *(sort.tile_size, sort.num_tiles, scratch, begins, sort.has_shared_rows),
        )

        def launch(kernel: str, grid: int, num_warps: int, shared_words: int) -> None:
            self._launch("sort_by_expert", kernel, grid, 32 * num_warps, arguments, stream, 4 * shared_words)

        if sort.is_small:
            launch("sort_small", 1, sort.num_warps, 32 + num_experts * (1 + sort.num_warps))
            return
        walks = self._grid(-(-sort.num_tiles // sort.num_warps))
        row_words = num_experts * sort.num_warps if sort.has_shared_rows else 0
        sums = min(32, sort.num_tiles)
        launch("sort_count", walks, sort.num_warps, row_words)
        launch("sort_tiles", self._grid(-(-num_experts // 32)), sums, 32 * sums)
        launch("sort_experts", 1, 32, 32)
        launch("sort_place", walks, sort.num_warps, row_words)

    def sort_scratch_bytes(self, num_assignments: int, num_experts: int) -> int:
        """Bytes of memory that `sort_by_expert` needs for these sizes on this device; 0 if few are sorted.

        Raises:
            InvalidArgument: a negative size, or 2^31 assignments or more.
        """
        _check_sizes("sort_by_expert", num_assignments=num_assignments, num_experts=num_experts)
        if num_assignments >= 1 << 31:
            raise InvalidArgument(f"sort_by_expert: expected num_assignments < 2^31, got {num_assignments}")
        if not num_experts:
            return 0
        sort = self._sort(num_assignments, num_experts)
        return 0 if sort.is_small else 4 * num_experts * (sort.num_tiles + 1)

    def sum_replicas(self, table: int, num_tiles: int, bases: Sequence[int], dtype: str, stream: int) -> None:
        """Runs all sums of a table.

        Args:
            table: address of the words of a `sum_table` for ``dtype``, a multiple of 8.
            num_tiles: of that table.
            bases: address of each base that the table names.

        Raises:
            InvalidArgument: an unknown dtype, a negative size, no such address, or more than `MOST_BASES` bases.
        """
        itemsize(dtype)
        self._run_table("sum_replicas", f"sum_replicas_{_SUMS[dtype]}", table, num_tiles, bases, stream)

    def pack(
        self, table: int, num_tiles: int, bases: Sequence[int], source_dtype: str, destination_dtype: str, stream: int
    ) -> None:
        """Runs all copies of a table, which cast where the dtypes differ: rounding to nearest even, a NaN stays one.

        Args:
            table: address of the words of a `pack_table` for these dtypes, a multiple of 8.
            num_tiles: of that table.
            bases: address of each base that the table names.

        Raises:
            InvalidArgument: dtypes that are neither one nor in `CASTS`, a negative size, no such address, or more than
                `MOST_BASES` bases.
        """
        check_cast("pack", source_dtype, destination_dtype)
        kernel = "pack_copy" if source_dtype == destination_dtype else f"pack_{source_dtype}_{destination_dtype}"
        self._run_table("pack", kernel, table, num_tiles, bases, stream)

    def _run_table(
        self, operation: str, kernel: str, table: int, num_tiles: int, bases: Sequence[int], stream: int
    ) -> None:
        _check_sizes(operation, num_tiles=num_tiles)
        if len(bases) > MOST_BASES:
            raise InvalidArgument(f"{operation}: expected at most {MOST_BASES} bases, got {len(bases)}")
        if not num_tiles:
            return
        _check_integers(operation, table=table)
        arguments = (table, num_tiles, *bases, *(0,) * (MOST_BASES - len(bases)))
        self._launch(operation, kernel, self._grid(num_tiles), _MOST_THREADS, arguments, stream)

    def _launch(
        self,
        source: str,
        kernel: str,
        grid: int,
        block: int,
        arguments: Sequence[int],
        stream: int,
        shared_bytes: int = 0,
    ) -> None:
        self._launcher.launch(source, kernel, grid, block, shared_bytes, np.array(arguments, np.int64), stream)

    def _grid(self, num_blocks: int) -> int:
        return min(num_blocks, self._num_multiprocessors * _BLOCKS_PER_MULTIPROCESSOR)

    def _split(self, num_rows: int, row_units: int, most_units: int) -> _Split:
        """How threads share rows: each takes up to ``most_units`` units of a row, fewer while threads are wanted."""
        num_units, wanted = num_rows * row_units, self._num_multiprocessors * _BUSY_THREADS
        each = most_units
        while each > 1 and num_units < each * wanted:
            each //= 2
        block = _MOST_THREADS
        while block > 32 and num_units < each * block * self._num_multiprocessors:
            block //= 2
        group = min(block, _power_of_two(-(-row_units // each)))
        segment = each * group
        num_segments = -(-row_units // segment)
        grid = self._grid(-(-num_rows * num_segments * group // block))
        return _Split((segment, num_segments, group.bit_length() - 1), grid, block)

    def _sort(self, num_assignments: int, num_experts: int) -> _Sort:
        """How assignments are cut into tiles: for one block if few are sorted and its memory holds all counts."""
        shared_words = _SHARED_BYTES // 4
        num_warps = min(32, (shared_words - 32 - num_experts) // num_experts)
        if num_warps > 0 and num_assignments <= _MOST_IN_SMALL_TILE * num_warps:
            tile_size = _round_up(max(1, -(-num_assignments // num_warps)), _SORT_STEP)
            num_tiles = max(1, -(-num_assignments // tile_size))
            return _Sort(True, tile_size, num_tiles, num_tiles, True)
        wanted = max(1, min(_TILES_PER_MULTIPROCESSOR * self._num_multiprocessors, _MOST_COUNTS // num_experts))
        tile_size = _round_up(-(-num_assignments // wanted), 2 * _SORT_STEP)
        num_tiles = max(1, -(-num_assignments // tile_size)) if tile_size else 1
        num_warps = min(8, shared_words // num_experts)
        return _Sort(False, tile_size, num_tiles, num_warps or 8, num_warps > 0)


class _Sort(NamedTuple):
    """How assignments are cut into tiles.

    Attributes:
        is_small: whether one block sorts them.
        tile_size: assignments in a tile.
        num_warps: of a block that walks tiles.
        has_shared_rows: whether the counts of these warps fit a block's memory.
    """

    is_small: bool
    tile_size: int
    num_tiles: int
    num_warps: int
    has_shared_rows: bool


class _Split(NamedTuple):
    """How threads share rows.

    Attributes:
        arguments: units in a segment of a row, segments of a row, and log2 of the threads that share a segment.
    """

    arguments: tuple[int, int, int]
    grid: int
    block: int


def _by_units(operation: str, dtype: str, dim: int, *addresses: int) -> tuple[str, int]:
    """The kernel for rows at these addresses, and its units in a row: 16 bytes where all are aligned, or elements."""
    if _alignment(*addresses, dim * itemsize(dtype)) == 16:
        return f"{operation}_wide_{dtype}", dim * itemsize(dtype) // 16
    return f"{operation}_{dtype}", dim


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


def _power_of_two(size: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(size - 1, 0).bit_length()


def _alignment(*numbers: int) -> int:
    """The largest power of two up to 16 that divides all."""
    bits = 16
    for number in numbers:
        bits |= number
    return bits & -bits


def _check_routing(operation: str, num_tokens: int, top_k: int, dim: int, dtype: str) -> None:
    if dtype not in _FLOATS:
        raise InvalidArgument(f"{operation}: expected dtype to be one of {', '.join(_FLOATS)}, got {dtype}")
    _check_sizes(operation, num_tokens=num_tokens, top_k=top_k, dim=dim)


def _check_sizes(operation: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 0:
            raise InvalidArgument(f"{operation}: expected {name} >= 0, got {size}")


def _check_addresses(operation: str, **addresses: int) -> None:
    for name, address in addresses.items():
        if not address:
            raise InvalidArgument(f"{operation}: expected an address for {name}, got 0")


def _check_integers(operation: str, **addresses: int) -> None:
    for name, address in addresses.items():
        if not address or address % 8:
            raise InvalidArgument(f"{operation}: expected an address for {name} that 8 divides, got {address}")

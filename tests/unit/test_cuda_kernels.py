"""The CUDA kernels' own text on the CPU, against NumPy and torch, and to the bit against the native kernels."""

from __future__ import annotations

import mmap
import threading
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparsecoll import native
from sparsecoll.cuda.kernels import Kernels
from sparsecoll.cuda.tables import CASTS, MOST_BASES, Place, Span, Sum, Table, pack_table, sum_table
from sparsecoll.errors import InvalidArgument
from tests.emulation.kernels import EmulatedLauncher, LaunchFailed, compile_text, launch_now

HALVES = ["bfloat16", "float16"]
FLOATS = ["float32", "float64", *HALVES]
INTEGERS = ["int8", "int16", "int32", "int64", "uint8"]
GARBAGE = 0xA5
RED = 64


class Memory:
    """Bytes between red zones, whose address leaves a given remainder modulo 64; full of garbage."""

    def __init__(self, num_bytes: int, remainder: int = 0) -> None:
        self._whole = np.full(num_bytes + 2 * RED + 128, GARBAGE, np.uint8)
        begin = RED + (remainder - self._whole.ctypes.data - RED) % 64
        self.bytes = self._whole[begin : begin + num_bytes]
        self._around = [self._whole[:begin], self._whole[begin + num_bytes :]]

    @classmethod
    def of(cls, values: NDArray | torch.Tensor, remainder: int = 0) -> Memory:
        content = values.reshape(-1).view(torch.uint8).numpy() if isinstance(values, torch.Tensor) else values
        content = np.ascontiguousarray(content).reshape(-1).view(np.uint8)
        memory = cls(content.nbytes, remainder)
        memory.bytes[:] = content
        return memory

    @property
    def address(self) -> int:
        return self.bytes.ctypes.data

    @property
    def range(self) -> tuple[int, int]:
        return self.address, self.address + self.bytes.size

    def check(self) -> None:
        """Nothing was written outside."""
        assert all((zone == GARBAGE).all() for zone in self._around)


def sparse(num_bytes: int) -> NDArray[np.uint8]:
    """Zeros of which only touched pages take memory."""
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which Python's mmap does not name
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return np.frombuffer(mmap.mmap(-1, num_bytes, flags=flags), np.uint8)


def bits(tensor: torch.Tensor) -> NDArray[np.uint8]:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def accumulation(dtype: str) -> torch.dtype:
    return torch.float32 if dtype in HALVES else getattr(torch, dtype)


def draw(dtype: str, *shape: int, seed: int = 0) -> torch.Tensor:
    """Values of many magnitudes, so that another order of summation gives other bits; full range for integers."""
    generator = torch.Generator().manual_seed(seed)
    torch_dtype = getattr(torch, dtype)
    if dtype in INTEGERS:
        limits = torch.iinfo(torch_dtype)
        return torch.randint(limits.min, limits.max, shape, generator=generator, dtype=torch_dtype)
    exponents = torch.randint(-8, 8, shape, generator=generator)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2.0**exponents).to(torch_dtype)


class Recorder:
    """A launcher that only notes the last launch, to run some of its blocks."""

    num_multiprocessors = 132

    def launch(self, source: str, kernel: str, grid: int, block: int, shared_bytes: int, arguments, stream) -> None:
        self.grid, self.block = grid, block
        self._launch = (kernel, grid, block, shared_bytes, arguments)

    def run(self, block: int) -> None:
        launch_now(*self._launch, blocks=range(block, block + 1))


@pytest.fixture(params=[(132, 0), (1, 1)], ids=["large", "small"])
def launcher(request: pytest.FixtureRequest) -> EmulatedLauncher:
    """Devices of two sizes, which run blocks and threads in different orders."""
    return EmulatedLauncher(*request.param)


@pytest.fixture
def kernels(launcher: EmulatedLauncher) -> Kernels:
    return Kernels(launcher)


ODD = """
#include "kernels.cuh"
struct Arguments { long long address; };
namespace sparsecoll {
SPARSECOLL_DEVICE void reverse(const Arguments& a, bool waits) {
    long long* shared = shared_memory<long long>();
    shared[threadIdx.x] = threadIdx.x;
    if (waits) __syncthreads();
    store_integer(a.address, threadIdx.x, shared[blockDim.x - 1 - threadIdx.x]);
}
SPARSECOLL_DEVICE void run_right(const Arguments& a) { reverse(a, true); }
SPARSECOLL_DEVICE void run_hasty(const Arguments& a) { reverse(a, false); }
SPARSECOLL_DEVICE void run_parted(const Arguments&) { if (threadIdx.x < 32) __syncthreads(); }
SPARSECOLL_DEVICE void run_crossed(const Arguments&) {
    if (threadIdx.x % 2) {
        __syncwarp();
    } else {
        __syncwarp();
    }
}
SPARSECOLL_DEVICE void run_skewed(const Arguments& a) { store_integer(a.address + 4, 0, 1); }
SPARSECOLL_DEVICE void run_past_shared(const Arguments&) { shared_memory<long long>()[blockDim.x] = 1; }
SPARSECOLL_KERNEL(right, Arguments, 64, 1, run_right)
SPARSECOLL_KERNEL(hasty, Arguments, 64, 1, run_hasty)
SPARSECOLL_KERNEL(parted, Arguments, 64, 1, run_parted)
SPARSECOLL_KERNEL(crossed, Arguments, 64, 1, run_crossed)
SPARSECOLL_KERNEL(skewed, Arguments, 64, 1, run_skewed)
SPARSECOLL_KERNEL(past_shared, Arguments, 64, 1, run_past_shared)
}
"""


class TestEmulation:
    """The tests below are worth what the emulation notices."""

    def test_notices_what_a_device_would_not_forgive(self) -> None:
        library = compile_text(ODD)
        result = np.zeros(64, np.int64)

        def launch(kernel: str, seed: int = 0, block: int = 64, words: int = 1, allowed: Any = ()) -> None:
            arguments = np.array([result.ctypes.data] * words)
            launch_now(kernel, 1, block, 8 * block, arguments, seed=seed, allowed=allowed, library=library)

        for seed in range(5):
            launch("right", seed)
            assert result.tolist() == list(range(63, -1, -1))
        wrong = 0
        for seed in range(5):
            launch("hasty", seed)
            wrong += result.tolist() != list(range(63, -1, -1))
        assert wrong == 5
        for kernel, message in [
            ("parted", "32 threads wait for others that never come"),
            ("crossed", "threads meet at lines"),
            ("skewed", "8 does not divide"),
            ("past_shared", "past shared memory"),
        ]:
            with pytest.raises(LaunchFailed, match=message):
                launch(kernel)
        with pytest.raises(LaunchFailed, match="an access of 8 bytes where nothing is"):
            launch("right", allowed=[(result.ctypes.data, result.ctypes.data + 63 * 8)])
        with pytest.raises(LaunchFailed, match="too many threads"):
            launch("right", block=128)
        with pytest.raises(LaunchFailed, match="no device takes"):
            launch("right", block=33)
        with pytest.raises(LaunchFailed, match="16 bytes of arguments for 8"):
            launch("right", words=2)

    def test_threads_have_launches_of_their_own(self) -> None:
        kernels = Kernels(EmulatedLauncher())
        source = np.random.default_rng(0).integers(0, 256, (50, 100), dtype=np.uint8)
        index = np.random.default_rng(1).integers(0, 50, 400)
        results = [np.zeros((400, 100), np.uint8) for _ in range(4)]

        def permute(result: NDArray[np.uint8]) -> None:
            for _ in range(20):
                kernels.permute_rows(result.ctypes.data, source.ctypes.data, index.ctypes.data, 400, 100, 0)

        threads = [threading.Thread(target=permute, args=(result,)) for result in results]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            np.testing.assert_array_equal(result, source[index])


class TestPermuteRows:
    @pytest.mark.parametrize("row_bytes", [1, 2, 3, 8, 12, 63, 64, 1040, 4097, 4096, 40_000])
    def test_gathers_rows_and_zeros(self, launcher: EmulatedLauncher, kernels: Kernels, row_bytes: int) -> None:
        rng = np.random.default_rng(row_bytes)
        rows = rng.integers(0, 256, (31, row_bytes), dtype=np.uint8)
        chosen = rng.integers(-3, 31, 77)
        source, index, destination = Memory.of(rows), Memory.of(chosen), Memory(77 * row_bytes)
        launcher.allowed = [source.range, index.range, destination.range]
        kernels.permute_rows(destination.address, source.address, index.address, 77, row_bytes, 0)
        expected = np.where(chosen[:, None] < 0, 0, rows[chosen])
        np.testing.assert_array_equal(destination.bytes, expected.reshape(-1))
        destination.check()

    @pytest.mark.parametrize(
        ("remainders", "row_bytes", "word_bytes"),
        [((0, 0), 48, 16), ((0, 8), 48, 8), ((4, 0), 48, 4), ((0, 0), 6, 2), ((2, 2), 48, 2), ((16, 7), 48, 1)],
    )
    def test_takes_the_widest_words_that_fit(
        self, remainders: tuple[int, int], row_bytes: int, word_bytes: int
    ) -> None:
        launcher = EmulatedLauncher()
        rows = np.random.default_rng(0).integers(0, 256, (9, row_bytes), dtype=np.uint8)
        source, destination = Memory.of(rows, remainders[0]), Memory(rows.nbytes, remainders[1])
        index = np.arange(8, -1, -1)
        Kernels(launcher).permute_rows(destination.address, source.address, index.ctypes.data, 9, row_bytes, 0)
        np.testing.assert_array_equal(destination.bytes, rows[::-1].reshape(-1))
        destination.check()
        assert launcher.launched == [f"permute_rows_{word_bytes}"]

    def test_nothing_to_do_launches_nothing(self, launcher: EmulatedLauncher, kernels: Kernels) -> None:
        kernels.permute_rows(0, 0, 0, 0, 8, 0)
        kernels.permute_rows(0, 0, 0, 8, 0, 0)
        assert launcher.launched == []

    def test_broken_rules_raise(self, kernels: Kernels) -> None:
        for arguments, message in [
            ((8, 8, 8, -1, 8), "num_rows"),
            ((8, 8, 8, 1, -8), "row_bytes"),
            ((0, 8, 8, 1, 8), "destination"),
            ((8, 0, 8, 1, 8), "source"),
            ((8, 8, 0, 1, 8), "index"),
            ((8, 8, 4, 1, 8), "index that 8 divides, got 4"),
        ]:
            with pytest.raises(InvalidArgument, match=message):
                kernels.permute_rows(*arguments, 0)

    def test_source_past_two_to_the_31(self) -> None:
        """Rows of 6 GiB, of which two are touched."""
        source = sparse(6 << 30).reshape(-1, 4096)
        source[-1] = np.arange(4096) % 251
        index, destination = np.array([len(source) - 1, 0]), np.full((2, 4096), GARBAGE, np.uint8)
        Kernels(EmulatedLauncher()).permute_rows(
            destination.ctypes.data, source.ctypes.data, index.ctypes.data, 2, 4096, 0
        )
        np.testing.assert_array_equal(destination, source[index])

    @pytest.mark.parametrize(
        ("num_rows", "row_bytes", "num_turns"), [((1 << 31) + 5, 1, (1 << 23) + 1), (3, 1 << 31, 3 << 21)]
    )
    def test_more_than_two_to_the_31_words(self, num_rows: int, row_bytes: int, num_turns: int) -> None:
        """Of all blocks, which take turns, only the one runs that takes the last turn."""
        index, destination = sparse(8 * num_rows).view(np.int64), sparse(num_rows * row_bytes)
        source = sparse(2 * row_bytes + 1)[1:]  # of odd address, for words of one byte
        index[-1], source[-1] = 1, 77
        recorder = Recorder()
        Kernels(recorder).permute_rows(
            destination.ctypes.data, source.ctypes.data, index.ctypes.data, num_rows, row_bytes, 0
        )
        assert recorder.grid < 1 << 31
        recorder.run((num_turns - 1) % recorder.grid)
        assert destination[-1] == 77


class Layout:
    """Spans of one base, apart from each other, of wanted remainders modulo 16."""

    def __init__(self) -> None:
        self.size = 0

    def place(self, base: int, num_bytes: int, remainder: int) -> Place:
        begin = self.size + RED + (remainder - self.size - RED) % 16
        self.size = begin + num_bytes
        return Place(base, begin)


class Case(NamedTuple):
    """A sum to be laid out.

    Attributes:
        aliased: the source that is the destination too; -1 for none.
        remainders: of the addresses, destination first.
    """

    partial: list[bool]
    destination_is_partial: bool
    aliased: int
    num_elements: int
    divisor: int
    remainders: list[int]


def run_sums(dtype: str, cases: list[Case], launcher: EmulatedLauncher, in_bases: int) -> None:
    """Lays sums out over some bases, runs them in one launch, and holds all memory against native sums."""
    layouts = [Layout() for _ in range(in_bases)]
    sums: list[Sum] = []
    for case in cases:
        sources, destination = [], None
        for s, (is_partial, remainder) in enumerate(zip(case.partial, case.remainders[1:], strict=False)):
            itemsize = native.accumulation_itemsize(dtype) if is_partial else native.itemsize(dtype)
            base = len(sums + sources) % in_bases
            sources.append(layouts[base].place(base, case.num_elements * itemsize, remainder))
            if s == case.aliased:
                destination, destination_is_partial = sources[-1], is_partial
        if destination is None:
            destination_is_partial = case.destination_is_partial
            itemsize = native.accumulation_itemsize(dtype) if destination_is_partial else native.itemsize(dtype)
            destination = layouts[-1].place(in_bases - 1, case.num_elements * itemsize, case.remainders[0])
        divisor = 1 if dtype in INTEGERS else case.divisor
        sums.append(
            Sum(destination, destination_is_partial, tuple(sources), tuple(case.partial), case.num_elements, divisor)
        )
    memory = [Memory(layout.size) for layout in layouts]
    for each in sums:
        for s, (place, is_partial) in enumerate(zip(each.sources, each.sources_are_partial, strict=True)):
            values = bits(draw("float32" if is_partial and dtype in HALVES else dtype, each.num_elements, seed=s))
            memory[place.base].bytes[place.offset : place.offset + values.size] = values
    expected = [Memory.of(each.bytes) for each in memory]

    def address(where: list[Memory], place: Place) -> int:
        return where[place.base].address + place.offset

    for each in sums:
        native.sum_rows(
            address(expected, each.destination),
            each.destination_is_partial,
            [address(expected, place) for place in each.sources],
            each.sources_are_partial,
            each.num_elements,
            dtype,
            each.divisor,
        )
    table = sum_table(sums, dtype, launcher.num_multiprocessors)
    bases = [each.address for each in memory]
    words = Memory.of(table.words)
    launcher.allowed = [words.range]
    for each in sums:
        for place, is_partial in zip(
            (each.destination, *each.sources), (each.destination_is_partial, *each.sources_are_partial), strict=True
        ):
            itemsize = native.accumulation_itemsize(dtype) if is_partial else native.itemsize(dtype)
            begin = address(memory, place)
            launcher.allowed.append((begin, begin + each.num_elements * itemsize))
    Kernels(launcher).sum_replicas(words.address, table.num_tiles, bases, dtype, 0)
    for found, right in zip(memory, expected, strict=True):
        np.testing.assert_array_equal(found.bytes, right.bytes)
        found.check()


@st.composite
def sum_cases(draw_: st.DrawFn) -> Case:
    partial = draw_(st.lists(st.booleans(), min_size=1, max_size=6))
    # Mostly what a Plan makes, all aligned or all cut at one element; then anything.
    remainder = st.sampled_from([0, 8, 4]) if draw_(st.booleans()) else st.integers(0, 15)
    remainders = [draw_(remainder)] * 7 if draw_(st.booleans()) else draw_(st.lists(remainder, min_size=7, max_size=7))
    return Case(
        partial,
        draw_(st.booleans()),
        draw_(st.integers(-1, len(partial) - 1)),
        draw_(st.one_of(st.integers(0, 40), st.integers(0, 9000))),
        draw_(st.sampled_from([1, 2, 3, 7])),
        remainders,
    )


class TestSumReplicas:
    @settings(max_examples=60)
    @given(
        dtype=st.sampled_from([*FLOATS, *INTEGERS]),
        cases=st.lists(sum_cases(), max_size=5),
        num_multiprocessors=st.sampled_from([1, 132]),
        seed=st.integers(0, 3),
        in_bases=st.integers(1, 4),
    )
    def test_all_memory_is_what_native_sums_leave(
        self, dtype: str, cases: list[Case], num_multiprocessors: int, seed: int, in_bases: int
    ) -> None:
        run_sums(dtype, cases, EmulatedLauncher(num_multiprocessors, seed), in_bases)

    @pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
    def test_every_dtype(self, launcher: EmulatedLauncher, dtype: str) -> None:
        cases = [
            Case([False] * 2, False, -1, 20_001, 1, [0] * 7),
            Case([False, True, False, True], False, 0, 5_003, 4, [2, 2, 4, 2, 4, 0, 0]),
            Case([True, False, True], True, 2, 1_000, 3, [8, 4, 8, 4, 0, 0, 0]),
            Case([False], True, -1, 1, 1, [0] * 7),
            Case([False] * 5, False, 3, 17, 5, [1, 2, 3, 4, 5, 6, 7]),
            Case([False, False], False, -1, 0, 1, [0] * 7),
        ]
        run_sums(dtype, cases, launcher, 3)

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_infinities_cancel_to_nan_and_negative_zero_stays(self, dtype: str) -> None:
        torch_dtype = getattr(torch, dtype)
        first = torch.tensor([np.inf, np.inf, -0.0, 1.0, np.nan] * 9, dtype=torch_dtype)
        second = torch.tensor([1.0, -np.inf, -0.0, -1.0, 0.0] * 9, dtype=torch_dtype)
        destination = torch.empty_like(first)
        places = Place(0, 0), Place(1, 0)
        table = sum_table([Sum(Place(2, 0), False, places, (False, False), 45, 1)], dtype)
        bases = [each.data_ptr() for each in (first, second, destination)]
        Kernels(EmulatedLauncher()).sum_replicas(table.words.ctypes.data, table.num_tiles, bases, dtype, 0)
        for row in destination.view(9, 5):
            assert row[0] == np.inf and row[1].isnan() and row[4].isnan()
            assert row[2:4].signbit().tolist() == [True, False]

    def test_no_sums_launch_nothing(self, launcher: EmulatedLauncher, kernels: Kernels) -> None:
        table = sum_table([], "float32")
        assert table.num_tiles == 0 and table.words.size == 0
        kernels.sum_replicas(0, 0, [], "float32", 0)
        assert launcher.launched == []

    def test_offsets_and_elements_past_two_to_the_31(self) -> None:
        num_elements = (1 << 31) + 9
        memory = sparse(3 << 31)
        source, destination = Place(0, 3), Place(0, (1 << 31) + 1024)
        memory[source.offset + num_elements - 1] = 7
        recorder = Recorder()
        table = sum_table([Sum(destination, False, (source, source), (False, False), num_elements, 1)], "uint8")
        Kernels(recorder).sum_replicas(table.words.ctypes.data, table.num_tiles, [memory.ctypes.data], "uint8", 0)
        recorder.run((table.num_tiles - 1) % recorder.grid)
        assert memory[destination.offset + num_elements - 1] == 14

    def test_broken_rules_raise(self, kernels: Kernels) -> None:
        good = Sum(Place(0, 0), False, (Place(1, 0),), (False,), 4, 1)
        for each, message in [
            (good._replace(sources=(), sources_are_partial=()), "at least one source"),
            (good._replace(sources_are_partial=(False, False)), "got 1 and 2"),
            (good._replace(num_elements=-1), "num_elements"),
            (good._replace(divisor=0), "divisor"),
            (good._replace(divisor=2), "1 for integers"),
            (good._replace(destination=Place(MOST_BASES, 0)), "base numbers in 0..63, got 64"),
            (good._replace(sources=(Place(-1, 0),)), "base numbers"),
            (good._replace(sources=(Place(0, -8),)), "offset"),
        ]:
            with pytest.raises(InvalidArgument, match=message):
                sum_table([good, each], "int32")
        with pytest.raises(InvalidArgument, match="bool"):
            sum_table([good], "bool")
        for arguments, message in [
            ((8, -1, [8], "float32"), "num_tiles"),
            ((0, 1, [8], "float32"), "table"),
            ((12, 1, [8], "float32"), "8 divides"),
            ((8, 1, [8] * 65, "float32"), "at most 64 bases, got 65"),
            ((8, 1, [8], "bool"), "bool"),
        ]:
            with pytest.raises(InvalidArgument, match=message):
                kernels.sum_replicas(*arguments, 0)


def tiles_of(table: Table, width: int) -> NDArray[np.int64]:
    return table.words[: table.num_tiles * width].reshape(-1, width)


class TestTables:
    @given(
        sizes=st.lists(st.integers(0, 1_000_000), max_size=20),
        num_multiprocessors=st.integers(1, 200),
        dtype=st.sampled_from(["float32", "uint8"]),
    )
    def test_tiles_cover_every_span_once(self, sizes: list[int], num_multiprocessors: int, dtype: str) -> None:
        spans = [Span(Place(n % 5, n * 10_000_000), Place(7, n << 40), size) for n, size in enumerate(sizes)]
        tiles = tiles_of(pack_table(spans, dtype, dtype, num_multiprocessors), 5)
        itemsize = native.itemsize(dtype)
        for n, span in enumerate(spans):
            mine = tiles[tiles[:, 3] >> 40 == n]
            assert (mine[:, 0] == span.destination.base).all() and (mine[:, 2] == 7).all()
            ends = np.cumsum(mine[:, 4])
            assert (ends[-1] if len(mine) else 0) == span.num_elements * itemsize
            np.testing.assert_array_equal(mine[:, 1], span.destination.offset + ends - mine[:, 4])
            np.testing.assert_array_equal(mine[:, 3], span.source.offset + ends - mine[:, 4])
            assert (mine[:-1, 4] % 16 == 0).all()
        assert (tiles[:, 4] > 0).all()

    def test_tiles_suit_the_device(self) -> None:
        """64 kB occupy a large device, and nothing makes tiles huge or tiny."""

        def num_tiles(num_bytes: int, num_multiprocessors: int) -> int:
            span = Span(Place(0, 0), Place(1, 0), num_bytes)
            return pack_table([span], "uint8", "uint8", num_multiprocessors).num_tiles

        assert num_tiles(1 << 16, 132) == 128
        assert num_tiles(1 << 20, 132) >= 132
        assert num_tiles(1 << 10, 132) == 2
        assert num_tiles(1 << 30, 132) == 1 << 15
        assert num_tiles(1 << 20, 1) < num_tiles(1 << 20, 132)


class TestPack:
    @settings(max_examples=60)
    @given(
        dtypes=st.sampled_from([*sorted(CASTS), ("uint8", "uint8"), ("float32", "float32"), ("int16", "int16")]),
        spans=st.lists(
            st.tuples(st.one_of(st.integers(0, 40), st.integers(0, 9000)), st.integers(0, 15), st.integers(0, 15)),
            max_size=6,
        ),
        aligned=st.sampled_from([1, 4, 8, 16]),
        num_multiprocessors=st.sampled_from([1, 132]),
        seed=st.integers(0, 3),
    )
    def test_copies_and_casts_as_torch_does(
        self,
        dtypes: tuple[str, str],
        spans: list[tuple[int, int, int]],
        aligned: int,
        num_multiprocessors: int,
        seed: int,
    ) -> None:
        from_dtype, to_dtype = dtypes
        layouts = [Layout(), Layout()]
        laid, values = [], []
        for n, (size, from_remainder, to_remainder) in enumerate(spans):
            source = layouts[0].place(5, size * native.itemsize(from_dtype), from_remainder // aligned * aligned)
            destination = layouts[1].place(63, size * native.itemsize(to_dtype), to_remainder // aligned * aligned)
            laid.append(Span(destination, source, size))
            values.append(draw(from_dtype, size, seed=n))
        source_memory, destination_memory = Memory(layouts[0].size), Memory(layouts[1].size)
        expected = Memory.of(destination_memory.bytes)
        for span, value in zip(laid, values, strict=True):
            begin = span.source.offset
            source_memory.bytes[begin : begin + bits(value).size] = bits(value)
            cast = bits(value.to(getattr(torch, to_dtype)))
            expected.bytes[span.destination.offset : span.destination.offset + cast.size] = cast
        table = pack_table(laid, from_dtype, to_dtype, num_multiprocessors)
        bases = [0] * MOST_BASES
        bases[5], bases[63] = source_memory.address, destination_memory.address
        words, launcher = Memory.of(table.words), EmulatedLauncher(num_multiprocessors, seed)
        launcher.allowed = [words.range]
        for span in laid:
            for place, dtype in [(span.source, from_dtype), (span.destination, to_dtype)]:
                begin = bases[place.base] + place.offset
                launcher.allowed.append((begin, begin + span.num_elements * native.itemsize(dtype)))
        Kernels(launcher).pack(words.address, table.num_tiles, bases, from_dtype, to_dtype, 0)
        np.testing.assert_array_equal(destination_memory.bytes, expected.bytes)
        destination_memory.check()

    @pytest.mark.parametrize("dtype", HALVES)
    def test_every_half_survives_and_a_nan_stays_one(self, dtype: str) -> None:
        halves = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.int16)).view(getattr(torch, dtype))
        wide, back = torch.empty(1 << 16), torch.empty_like(halves)
        kernels = Kernels(EmulatedLauncher())
        for source, destination, dtypes in [(halves, wide, (dtype, "float32")), (wide, back, ("float32", dtype))]:
            table = pack_table([Span(Place(1, 0), Place(0, 0), 1 << 16)], *dtypes)
            bases = [source.data_ptr(), destination.data_ptr()]
            kernels.pack(table.words.ctypes.data, table.num_tiles, bases, *dtypes, 0)
        is_nan = halves.isnan()
        assert torch.equal(wide.isnan(), is_nan) and torch.equal(back.isnan(), is_nan)
        assert torch.equal(wide[~is_nan], halves[~is_nan].float())
        assert torch.equal(back[~is_nan].view(torch.int16), halves[~is_nan].view(torch.int16))

    def test_spans_past_two_to_the_31(self) -> None:
        size = (1 << 32) + 11
        memory = sparse(2 * size + 100)
        memory[size - 1] = 9
        recorder = Recorder()
        table = pack_table([Span(Place(0, size + 5), Place(0, 0), size)], "uint8", "uint8")
        Kernels(recorder).pack(table.words.ctypes.data, table.num_tiles, [memory.ctypes.data], "uint8", "uint8", 0)
        recorder.run((table.num_tiles - 1) % recorder.grid)
        assert memory[size + 5 + size - 1] == 9

    def test_broken_rules_raise(self, kernels: Kernels) -> None:
        good = Span(Place(0, 0), Place(1, 0), 4)
        for dtypes in [("float32", "float64"), ("bfloat16", "float16"), ("int32", "float32"), ("bool", "bool")]:
            with pytest.raises(InvalidArgument, match=dtypes[0]):
                pack_table([good], *dtypes)
            with pytest.raises(InvalidArgument, match=dtypes[0]):
                kernels.pack(8, 1, [8], *dtypes, 0)
        for each, message in [
            (good._replace(num_elements=-1), "num_elements"),
            (good._replace(source=Place(64, 0)), "base"),
            (good._replace(destination=Place(0, -1)), "offset"),
        ]:
            with pytest.raises(InvalidArgument, match=message):
                pack_table([each], "uint8", "uint8")
        with pytest.raises(InvalidArgument, match="table"):
            kernels.pack(0, 1, [8], "uint8", "uint8", 0)


def routings() -> list[tuple[int, int, int]]:
    """T, K and D: odd, none, wide, across segments, and for groups of one thread to a block."""
    return [
        *[(5, 2, 16), (1, 1, 1), (7, 3, 129), (3, 8, 2056), (0, 2, 8), (4, 0, 8), (4, 2, 0), (40, 2, 65)],
        *[(9, 2, 256), (2, 1, 9000), (70, 4, 8)],
    ]


def routed(dtype: str, num_tokens: int, top_k: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Source rows (one more than are used), positions with some negative, and weights."""
    generator = torch.Generator().manual_seed(num_tokens * 100 + top_k)
    num_assignments = num_tokens * top_k
    source = draw(dtype, num_assignments + 1, dim, seed=1)
    position = torch.randperm(num_assignments + 1, generator=generator)[:num_assignments]
    position[3::5] = -1
    return source, position.view(num_tokens, top_k), draw(dtype, num_tokens, top_k, seed=2)


class TestCombine:
    @pytest.mark.parametrize("remainder", [0, 8, 5])
    @pytest.mark.parametrize("weighted", [True, False])
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_is_what_the_native_kernel_gives(
        self, launcher: EmulatedLauncher, dtype: str, weighted: bool, remainder: int
    ) -> None:
        kernels = Kernels(launcher)
        for num_tokens, top_k, dim in routings():
            values, position, weights = routed(dtype, num_tokens, top_k, dim)
            source, weight = Memory.of(values, remainder), Memory.of(weights, remainder)
            destination, positions = Memory(num_tokens * dim * values.itemsize, remainder), Memory.of(position)
            launcher.allowed = [each.range for each in (source, weight, destination, positions)]
            expected = np.full_like(destination.bytes, GARBAGE)
            address = weight.address if weighted else 0
            sizes = (num_tokens, top_k, dim, dtype)
            kernels.combine(destination.address, source.address, positions.address, address, *sizes, 0)
            native.combine(expected.ctypes.data, source.address, position.data_ptr(), address, *sizes)
            np.testing.assert_array_equal(destination.bytes, expected)
            destination.check()
        wide = {name for name in launcher.launched if "wide" in name}
        assert bool(wide) == (remainder == 0)

    def test_a_weight_of_infinity_is_not_multiplied_by_nothing(self) -> None:
        source, weight = torch.ones(1, 8), torch.tensor([[2.0, np.inf]])
        position, destination = torch.tensor([[0, -1]]), torch.empty(1, 8)
        Kernels(EmulatedLauncher()).combine(
            *(each.data_ptr() for each in (destination, source, position, weight)), 1, 2, 8, "float32", 0
        )
        assert (destination == 2).all()

    def test_rows_past_two_to_the_31(self) -> None:
        num_rows, dim = (5 << 31) // 4096, 2048
        source, destination = sparse(num_rows * 4096), np.full((1, 4096), GARBAGE, np.uint8)
        row = draw("bfloat16", dim)
        source[-4096:] = bits(row)
        position = np.array([[num_rows - 1]])
        addresses = (destination.ctypes.data, source.ctypes.data, position.ctypes.data, 0)
        Kernels(EmulatedLauncher()).combine(*addresses, 1, 1, dim, "bfloat16", 0)
        np.testing.assert_array_equal(destination[0], bits(row + 0))

    def test_broken_rules_raise(self, kernels: Kernels) -> None:
        for arguments, message in [
            ((8, 8, 8, 8, -1, 1, 1, "float32"), "num_tokens"),
            ((8, 8, 8, 8, 1, -1, 1, "float32"), "top_k"),
            ((8, 8, 8, 8, 1, 1, -1, "float32"), "dim"),
            ((8, 8, 8, 8, 1, 1, 1, "int32"), "int32"),
            ((0, 8, 8, 8, 1, 1, 1, "float32"), "destination"),
            ((8, 0, 8, 8, 1, 1, 1, "float32"), "source"),
            ((8, 8, 0, 8, 1, 1, 1, "float32"), "position"),
            ((8, 8, 4, 8, 1, 1, 1, "float32"), "8 divides"),
        ]:
            with pytest.raises(InvalidArgument, match=message):
                kernels.combine(*arguments, 0)


class TestCombineBackward:
    @pytest.mark.parametrize("remainder", [0, 8, 5])
    @pytest.mark.parametrize("weighted", [True, False])
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_is_the_gradient(self, launcher: EmulatedLauncher, dtype: str, weighted: bool, remainder: int) -> None:
        kernels = Kernels(launcher)
        for num_tokens, top_k, dim in routings():
            values, position, weights = routed(dtype, num_tokens, top_k, dim)
            gradients = draw(dtype, num_tokens, dim, seed=3) / 64  # dot products stay below a half's largest
            source, weight = Memory.of(values, remainder), Memory.of(weights, remainder)
            d_destination = Memory.of(gradients, remainder)
            d_source, d_weight = Memory(source.bytes.size, remainder), Memory(weight.bytes.size, remainder)
            positions = Memory.of(position)
            launcher.allowed = [each.range for each in (source, weight, d_destination, d_source, d_weight, positions)]
            expected = Memory.of(d_source.bytes)
            sizes = (num_tokens, top_k, dim, dtype)
            kernels.combine_backward(
                d_source.address,
                d_weight.address if weighted else 0,
                d_destination.address,
                source.address if weighted else 0,
                positions.address,
                weight.address if weighted else 0,
                *sizes,
                0,
            )
            native.combine_backward(
                expected.address,
                0,
                d_destination.address,
                0,
                position.data_ptr(),
                weight.address if weighted else 0,
                *sizes,
            )
            np.testing.assert_array_equal(d_source.bytes, expected.bytes)
            d_source.check()
            d_weight.check()
            if not weighted:
                assert (d_weight.bytes == GARBAGE).all()
                continue
            dots = torch.empty_like(weights)
            bits(dots)[:] = d_weight.bytes
            rows = torch.where(position[..., None] < 0, 0, values[position].double())
            products = gradients.double()[:, None] * rows
            # Half a unit in the last place of the result, and what summing D products in the wide dtype may lose.
            rounding = torch.finfo(values.dtype).eps / 2 * products.sum(2).abs()
            summing = dim * torch.finfo(accumulation(dtype)).eps * products.abs().sum(2)
            assert ((dots.double() - products.sum(2)).abs() <= rounding + summing).all()
            assert (dots[position < 0] == 0).all()

    @pytest.mark.parametrize("dim", [64, 600])
    def test_a_token_has_the_same_bits_in_every_batch_and_order(self, dim: int) -> None:
        """The smallest device lets blocks, and groups of more than a warp, take several turns."""
        values, position, weights = routed("float32", 300, 2, dim)
        gradients = draw("float32", 300, dim, seed=3)
        found = []
        for num_tokens, launcher in [
            (300, EmulatedLauncher(132, 0)),
            (300, EmulatedLauncher(1, 1)),
            (3, EmulatedLauncher(132, 2)),
            (1, EmulatedLauncher(2, 3)),
        ]:
            d_source, d_weight = torch.empty_like(values), torch.empty(num_tokens, 2)
            Kernels(launcher).combine_backward(
                *(each.data_ptr() for each in (d_source, d_weight, gradients, values, position, weights)),
                *(num_tokens, 2, dim, "float32", 0),
            )
            found.append(d_weight)
        for other in found[1:]:
            assert torch.equal(other, found[0][: len(other)])

    def test_broken_rules_raise(self, kernels: Kernels) -> None:
        for arguments, message in [
            ((8, 8, 8, 8, 8, 8, -1, 1, 1, "float32"), "num_tokens"),
            ((8, 8, 8, 8, 8, 8, 1, 1, 1, "uint8"), "uint8"),
            ((0, 8, 8, 8, 8, 8, 1, 1, 1, "float32"), "d_source"),
            ((8, 8, 0, 8, 8, 8, 1, 1, 1, "float32"), "d_destination"),
            ((8, 8, 8, 0, 8, 8, 1, 1, 1, "float32"), "source"),
            ((8, 8, 8, 8, 0, 8, 1, 1, 1, "float32"), "position"),
        ]:
            with pytest.raises(InvalidArgument, match=message):
                kernels.combine_backward(*arguments, 0)


def sort(
    ids: NDArray[np.int64], num_experts: int, launcher: EmulatedLauncher
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """Order, counts and ends; with scratch memory of the least size, and all of it garbage at first."""
    kernels = Kernels(launcher)
    order, counts, ends = Memory(8 * len(ids)), Memory(8 * num_experts), Memory(4 * num_experts)
    scratch = Memory(kernels.sort_scratch_bytes(len(ids), num_experts))
    memory = Memory.of(ids)
    launcher.allowed = [each.range for each in (memory, order, counts, ends)]
    kernels.sort_by_expert(
        memory.address,
        len(ids),
        num_experts,
        *(each.address for each in (order, counts, ends, scratch)),
        0,
    )
    for each in (order, counts, ends, scratch):
        each.check()
    return order.bytes.view(np.int64), counts.bytes.view(np.int64), ends.bytes.view(np.int32)


class TestSortByExpert:
    @pytest.mark.parametrize(
        ("num_assignments", "num_experts", "kernels"),
        [
            (0, 1, 1),
            (0, 20_000, 4),
            (1, 1, 1),
            (33, 2, 1),
            (1_000, 8, 1),
            (5_000, 64, 1),
            (16_384, 352, 1),
            (1_000, 3_000, 1),
            (1_000, 6_200, 4),
            (17_000, 16, 4),
            (9_000, 1_024, 4),
            (3_000, 13_000, 4),
            (2_000, 65_536, 4),
        ],
    )
    def test_is_a_stable_argsort(
        self, launcher: EmulatedLauncher, num_assignments: int, num_experts: int, kernels: int
    ) -> None:
        ids = np.random.default_rng(num_assignments).integers(0, num_experts, num_assignments)
        ids[: num_assignments // 3] = num_experts // 2  # a popular expert fills warps and tiles
        order, counts, ends = sort(ids, num_experts, launcher)
        np.testing.assert_array_equal(order, np.argsort(ids, kind="stable"))
        np.testing.assert_array_equal(counts, np.bincount(ids, minlength=num_experts))
        np.testing.assert_array_equal(ends, np.cumsum(counts))
        assert len(launcher.launched) == kernels

    @settings(max_examples=30)
    @given(
        ids=st.lists(st.integers(0, 9), max_size=700),
        more=st.integers(0, 5),
        num_multiprocessors=st.sampled_from([1, 132]),
        seed=st.integers(0, 3),
    )
    def test_any_ids(self, ids: list[int], more: int, num_multiprocessors: int, seed: int) -> None:
        expert_ids = np.array(ids, np.int64)
        order, counts, ends = sort(expert_ids, 10 + more, EmulatedLauncher(num_multiprocessors, seed))
        np.testing.assert_array_equal(order, np.argsort(expert_ids, kind="stable"))
        np.testing.assert_array_equal(counts, np.bincount(expert_ids, minlength=10 + more))
        np.testing.assert_array_equal(ends, np.cumsum(counts))

    @pytest.mark.parametrize(("num_assignments", "num_experts"), [(1_000, 8), (18_000, 8), (700, 13_000)])
    def test_what_is_no_expert_is_passed_over(
        self, launcher: EmulatedLauncher, num_assignments: int, num_experts: int
    ) -> None:
        ids = np.random.default_rng(0).integers(0, num_experts, num_assignments)
        ids[::7], ids[3::7], ids[5::70] = -1, num_experts, 1 << 40
        order, counts, ends = sort(ids, num_experts, launcher)
        good = (ids >= 0) & (ids < num_experts)
        expected = np.argsort(np.where(good, ids, num_experts), kind="stable")[: good.sum()]
        np.testing.assert_array_equal(order[: good.sum()], expected)
        assert (order[good.sum() :].view(np.uint8) == GARBAGE).all()
        np.testing.assert_array_equal(counts, np.bincount(ids[good], minlength=num_experts))
        np.testing.assert_array_equal(ends, np.cumsum(counts))

    def test_scratch_stays_small(self, kernels: Kernels) -> None:
        assert kernels.sort_scratch_bytes(8192, 256) == 0
        for num_experts in (1, 256, 65_536):
            assert kernels.sort_scratch_bytes((1 << 31) - 1, num_experts) <= 4 * ((1 << 22) + num_experts)

    def test_broken_rules_raise_and_no_experts_need_nothing(self, launcher: EmulatedLauncher, kernels: Kernels) -> None:
        kernels.sort_by_expert(0, 5, 0, 0, 0, 0, 0, 0)
        assert launcher.launched == []
        for arguments, message in [
            ((8, -1, 2, 8, 8, 8, 8), "num_assignments >= 0"),
            ((8, 1, -2, 8, 8, 8, 8), "num_experts"),
            ((8, 1 << 31, 2, 8, 8, 8, 8), "2\\^31"),
            ((0, 1, 2, 8, 8, 8, 8), "expert_ids"),
            ((8, 1, 2, 4, 8, 8, 8), "order that 8 divides"),
            ((8, 1, 2, 8, 0, 8, 8), "counts"),
            ((8, 1, 2, 8, 8, 0, 8), "ends"),
            ((8, 1 << 20, 2, 8, 8, 8, 0), "scratch"),
        ]:
            with pytest.raises(InvalidArgument, match=message):
                kernels.sort_by_expert(*arguments, 0)

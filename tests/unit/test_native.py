"""The native kernels against NumPy and torch, bit for bit wherever the order of the arithmetic is fixed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparsecoll import native
from sparsecoll.errors import InvalidArgument

HALVES = ["bfloat16", "float16"]
FLOATS = ["float32", "float64", *HALVES]
INTEGERS = ["int8", "int16", "int32", "int64", "uint8"]
# Around the sizes of vectors, of lanes and of blocks.
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 5000]


def bits(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The memory of a tensor, as a view."""
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


def sum_in_order(sources: list[torch.Tensor], dtype: str, divisor: int = 1) -> torch.Tensor:
    """What the kernel must give, in the accumulation type."""
    total = sources[0].to(accumulation(dtype), copy=True)
    for source in sources[1:]:
        total += source.to(accumulation(dtype))
    return total / divisor if divisor != 1 else total


def every_half(dtype: str) -> torch.Tensor:
    """All 65,536 values of a 16-bit float."""
    return torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.int16)).view(getattr(torch, dtype))


def poisoned(num_elements: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((num_elements * dtype.itemsize,), 0xA5, dtype=torch.uint8).view(dtype)


class TestSumRows:
    @pytest.mark.parametrize("num_sources", [1, 2, 3, 4, 5, 8, 9, 13])
    @pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
    def test_sums_in_the_given_order(self, dtype: str, num_sources: int) -> None:
        for length in LENGTHS:
            sources = [draw(dtype, length, seed=seed) for seed in range(num_sources)]
            destination = poisoned(length, getattr(torch, dtype))
            native.sum_views(bits(destination), [bits(source) for source in sources], dtype)
            expected = sum_in_order(sources, dtype).to(destination.dtype)
            np.testing.assert_array_equal(bits(destination), bits(expected))

    def test_another_order_gives_other_bits(self) -> None:
        sources = [bits(draw("float32", 1000, seed=seed)) for seed in range(6)]
        forward, backward = np.empty(4000, np.uint8), np.empty(4000, np.uint8)
        native.sum_views(forward, sources, "float32")
        native.sum_views(backward, sources[::-1], "float32")
        assert (forward != backward).any()

    @given(
        dtype=st.sampled_from([*FLOATS, *INTEGERS]),
        partial=st.lists(st.booleans(), min_size=1, max_size=11),
        destination_is_partial=st.booleans(),
        length=st.integers(0, 2100),
        divisor=st.sampled_from([1, 2, 3, 7]),
        num_threads=st.sampled_from([1, 2, 3]),
    )
    def test_partial_sums_in_and_out(
        self,
        dtype: str,
        partial: list[bool],
        destination_is_partial: bool,
        length: int,
        divisor: int,
        num_threads: int,
    ) -> None:
        divisor = 1 if dtype in INTEGERS else divisor
        sources = []
        for seed, is_partial in enumerate(partial):
            values = draw("float32" if is_partial and dtype in HALVES else dtype, length, seed=seed)
            sources.append(values)
        stored = accumulation(dtype) if destination_is_partial else getattr(torch, dtype)
        destination = poisoned(length, stored)
        native.sum_views(
            bits(destination),
            [bits(source) for source in sources],
            dtype,
            destination_is_partial=destination_is_partial,
            sources_are_partial=partial,
            divisor=divisor,
            num_threads=num_threads,
        )
        np.testing.assert_array_equal(bits(destination), bits(sum_in_order(sources, dtype, divisor).to(stored)))

    @pytest.mark.parametrize("num_sources", [1, 4, 5, 9])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int16"])
    def test_destination_may_be_any_source(self, dtype: str, num_sources: int) -> None:
        for aliased in range(num_sources):
            for num_threads in (1, 2):
                sources = [draw(dtype, 3001, seed=seed) for seed in range(num_sources)]
                expected = sum_in_order(sources, dtype).to(sources[0].dtype)
                views = [bits(source) for source in sources]
                native.sum_views(views[aliased], views, dtype, num_threads=num_threads)
                np.testing.assert_array_equal(views[aliased], bits(expected))

    def test_one_source_may_come_twice(self) -> None:
        source, destination = draw("int32", 100), torch.empty(100, dtype=torch.int32)
        native.sum_views(bits(destination), [bits(source)] * 3, "int32")
        assert torch.equal(destination, source * 3)

    @pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16", "int64"])
    def test_addresses_need_no_alignment_and_neighbours_stay(self, dtype: str) -> None:
        length = 1500
        size = length * native.itemsize(dtype)
        sources = [draw(dtype, length, seed=seed) for seed in range(5)]
        memory = [np.zeros(size + 16, np.uint8) for _ in sources]
        shifted = [block[1 + i : 1 + i + size] for i, block in enumerate(memory)]
        for view, source in zip(shifted, sources, strict=True):
            view[:] = bits(source)
        destination = np.full(size + 16, 0xA5, np.uint8)
        native.sum_views(destination[3 : 3 + size], shifted, dtype)
        np.testing.assert_array_equal(
            destination[3 : 3 + size], bits(sum_in_order(sources, dtype).to(getattr(torch, dtype)))
        )
        assert (destination[:3] == 0xA5).all() and (destination[3 + size :] == 0xA5).all()

    @pytest.mark.parametrize("dtype", HALVES)
    def test_all_65536_values_widen_exactly(self, dtype: str) -> None:
        values = every_half(dtype)
        destination = poisoned(1 << 16, torch.float32)
        native.sum_views(bits(destination), [bits(values)], dtype, destination_is_partial=True)
        expected = values.float()
        assert torch.equal(destination.isnan(), expected.isnan())
        numbers = ~expected.isnan()
        assert torch.equal(destination[numbers].view(torch.int32), expected[numbers].view(torch.int32))

    @pytest.mark.parametrize("dtype", HALVES)
    def test_all_65536_values_survive_a_round_trip(self, dtype: str) -> None:
        values = every_half(dtype)
        destination = poisoned(1 << 16, values.dtype)
        native.sum_views(bits(destination), [bits(values)], dtype)
        assert torch.equal(destination.isnan(), values.isnan())
        numbers = ~values.isnan()
        assert torch.equal(destination[numbers].view(torch.int16), values[numbers].view(torch.int16))

    @pytest.mark.parametrize("dtype", HALVES)
    def test_rounding_is_to_nearest_even(self, dtype: str) -> None:
        """Around every value: itself, the middle to the next one, and one float32 below and above that middle."""
        values = every_half(dtype).float()
        values = values[values.isfinite()]
        patterns = values.view(torch.int32)
        spacing = 1 << 16 if dtype == "bfloat16" else 1 << 13
        offsets = torch.tensor([0, 1, spacing // 2 - 1, spacing // 2, spacing // 2 + 1, spacing - 1], dtype=torch.int32)
        inputs = (patterns[:, None] + offsets).flatten().view(torch.float32)
        tiny = torch.linspace(-6.2e-5, 6.2e-5, 100_001)  # among a half's subnormals steps are not powers of two apart
        edge = torch.tensor([65504.0, 65519.996, 65520.0, 65536.0, 3.4e38, -65520.0, 1e-45, -1e-45, 2.0**-25, 2.0**-24])
        special = torch.tensor([np.inf, -np.inf, 0.0, -0.0])
        inputs = torch.cat([inputs, tiny, edge, special])
        inputs = inputs[~inputs.isnan()]
        destination = poisoned(len(inputs), getattr(torch, dtype))
        native.sum_views(bits(destination), [bits(inputs)], dtype, sources_are_partial=[True])
        np.testing.assert_array_equal(bits(destination), bits(inputs.to(destination.dtype)))

    @pytest.mark.parametrize("dtype", HALVES)
    def test_every_nan_stays_a_nan(self, dtype: str) -> None:
        payloads = np.concatenate([1 << np.arange(23), np.arange(1, 1 << 23, 997)]).astype(np.uint32)
        patterns = np.concatenate([payloads | 0x7F800000, payloads | 0xFF800000]).astype(np.uint32)
        destination = poisoned(len(patterns), getattr(torch, dtype))
        native.sum_views(bits(destination), [patterns.view(np.uint8)], dtype, sources_are_partial=[True])
        assert destination.isnan().all()

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_infinities_cancel_to_nan_and_negative_zero_stays(self, dtype: str) -> None:
        torch_dtype = getattr(torch, dtype)
        first = torch.tensor([np.inf, np.inf, -0.0, 1.0], dtype=torch_dtype)
        second = torch.tensor([1.0, -np.inf, -0.0, -1.0], dtype=torch_dtype)
        destination = torch.empty_like(first)
        native.sum_views(bits(destination), [bits(first), bits(second)], dtype)
        assert destination[0] == np.inf and destination[1].isnan()
        assert destination[2:].signbit().tolist() == [True, False]

    def test_integers_wrap(self) -> None:
        destination = torch.empty(2, dtype=torch.int8)
        source = torch.tensor([127, -128], dtype=torch.int8)
        native.sum_views(bits(destination), [bits(source), bits(source)], "int8")
        assert destination.tolist() == [-2, 0]

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_threads_do_not_show(self, dtype: str) -> None:
        sources = [bits(draw(dtype, 100_003, seed=seed)) for seed in range(7)]
        results = []
        for num_threads in (1, 2, 3, 8):
            destination = np.empty_like(sources[0])
            native.sum_views(destination, sources, dtype, divisor=7, num_threads=num_threads)
            results.append(destination)
        for other in results[1:]:
            np.testing.assert_array_equal(results[0], other)

    def test_other_threads_run_meanwhile(self) -> None:
        """With the GIL held, this thread could not note the time in the middle of a kernel."""
        source = np.zeros(1 << 24, np.uint8)
        destination = np.empty_like(source)
        span_s: list[float] = []

        def sum_up() -> None:
            span_s.append(time.perf_counter())
            native.sum_views(destination, [source] * 64, "uint8")
            span_s.append(time.perf_counter())

        for _ in range(10):  # a busy machine may leave this thread no core during one kernel, not during all
            span_s.clear()
            kernel = threading.Thread(target=sum_up)
            kernel.start()
            noted_s = []
            while kernel.is_alive():
                noted_s.append(time.perf_counter())
                kernel.join(0.001)
            begin_s, end_s = span_s
            quarter_s = (end_s - begin_s) / 4
            if any(begin_s + quarter_s < now_s < end_s - quarter_s for now_s in noted_s):
                return
        pytest.fail("no other thread ran in the middle of 10 kernels")

    def test_broken_rules_raise_and_write_nothing(self) -> None:
        good, destination = np.zeros(16, np.uint8), np.full(16, 0xA5, np.uint8)
        memory = np.zeros(64, np.uint8)
        read_only = np.zeros(16, np.uint8)
        read_only.flags.writeable = False
        cases = [
            ("bool", lambda: native.sum_views(destination, [good], "bool")),
            ("at least one source", lambda: native.sum_views(destination, [], "float32")),
            ("sources of 16 bytes, got 12", lambda: native.sum_views(destination, [good[:12]], "float32")),
            ("got 14 bytes", lambda: native.sum_views(destination[:14], [good[:14]], "float32")),
            ("contiguous uint8", lambda: native.sum_views(destination, [memory[::4]], "float32")),
            ("contiguous uint8", lambda: native.sum_views(destination, [good.view(np.int8)], "float32")),
            ("contiguous uint8", lambda: native.sum_views(destination, [good.reshape(4, 4)], "float32")),
            ("writeable", lambda: native.sum_views(read_only, [good], "float32")),
            ("overlap", lambda: native.sum_views(memory[4:20], [memory[:16]], "float32")),
            ("divisor", lambda: native.sum_views(destination, [good], "int32", divisor=2)),
            ("divisor", lambda: native.sum_views(destination, [good], "float32", divisor=0)),
            ("num_threads", lambda: native.sum_views(destination, [good], "float32", num_threads=0)),
            ("sources_are_partial", lambda: native.sum_views(destination, [good], "float32", sources_are_partial=[])),
            ("num_elements", lambda: native.sum_rows(1, False, [1], [False], -1, "float32")),
            ("address for destination", lambda: native.sum_rows(0, False, [1], [False], 1, "float32")),
            ("address for sources", lambda: native.sum_rows(1, False, [1, 0], [False] * 2, 1, "float32")),
        ]
        for message, call in cases:
            with pytest.raises(InvalidArgument, match=message):
                call()
        assert (destination == 0xA5).all()


class TestItemsizes:
    @pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
    def test_agree_with_torch(self, dtype: str) -> None:
        assert native.itemsize(dtype) == getattr(torch, dtype).itemsize
        assert native.accumulation_itemsize(dtype) == accumulation(dtype).itemsize

    def test_reducible_is_all_of_them(self) -> None:
        assert set(FLOATS + INTEGERS) == native.REDUCIBLE
        for name in ("complex64", "bool", "uint16"):
            with pytest.raises(InvalidArgument, match=name):
                native.itemsize(name)
            with pytest.raises(InvalidArgument, match=name):
                native.accumulation_itemsize(name)


def sort_by_expert(ids: NDArray[np.int64], num_experts: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    order, counts = np.full(len(ids), -1), np.full(num_experts, -1)
    native.sort_by_expert(ids.ctypes.data, len(ids), num_experts, order.ctypes.data, counts.ctypes.data)
    return order, counts


class TestSortByExpert:
    @given(ids=st.lists(st.integers(0, 9), max_size=300), more=st.integers(0, 5))
    def test_is_a_stable_argsort(self, ids: list[int], more: int) -> None:
        expert_ids, num_experts = np.array(ids, np.int64), 10 + more
        order, counts = sort_by_expert(expert_ids, num_experts)
        np.testing.assert_array_equal(order, np.argsort(expert_ids, kind="stable"))
        np.testing.assert_array_equal(counts, np.bincount(expert_ids, minlength=num_experts))

    def test_large(self) -> None:
        expert_ids = np.random.default_rng(0).integers(0, 512, 200_000)
        order, counts = sort_by_expert(expert_ids, 512)
        np.testing.assert_array_equal(order, np.argsort(expert_ids, kind="stable"))
        np.testing.assert_array_equal(counts, np.bincount(expert_ids, minlength=512))

    @pytest.mark.parametrize("bad", [-1, 4, 2**40, -(2**62)])
    def test_bad_id_is_named(self, bad: int) -> None:
        with pytest.raises(InvalidArgument, match=r"expert ids in 0\.\.3, got .*assignment 2"):
            sort_by_expert(np.array([0, 3, bad, 1]), 4)

    def test_no_experts_or_no_assignments(self) -> None:
        order, counts = sort_by_expert(np.array([], np.int64), 3)
        assert order.size == 0 and counts.tolist() == [0, 0, 0]
        assert sort_by_expert(np.array([], np.int64), 0)[1].size == 0
        with pytest.raises(InvalidArgument, match="assignment 0"):
            sort_by_expert(np.array([0]), 0)

    def test_negative_sizes_and_null_addresses_raise(self) -> None:
        for arguments in [(1, -1, 2, 1, 1), (1, 1, -2, 1, 1), (0, 1, 2, 1, 1), (1, 1, 2, 0, 1), (1, 1, 2, 1, 0)]:
            with pytest.raises(InvalidArgument, match="sort_by_expert"):
                native.sort_by_expert(*arguments)


class TestPermuteRows:
    @pytest.mark.parametrize("num_threads", [1, 2])
    @pytest.mark.parametrize("row_bytes", [1, 2, 3, 8, 63, 64, 4097])
    def test_gathers(self, row_bytes: int, num_threads: int) -> None:
        rng = np.random.default_rng(row_bytes)
        source = rng.integers(0, 256, (301, row_bytes), dtype=np.uint8)
        index = rng.integers(0, 301, 777)
        destination = np.zeros((777, row_bytes), np.uint8)
        native.permute_rows(
            destination.ctypes.data, source.ctypes.data, index.ctypes.data, len(index), row_bytes, num_threads
        )
        np.testing.assert_array_equal(destination, source[index])

    @pytest.mark.parametrize("row_bytes", [1, 7, 64, 4097])
    def test_negative_index_is_a_row_of_zeros(self, row_bytes: int) -> None:
        rng = np.random.default_rng(row_bytes)
        source = rng.integers(1, 256, (31, row_bytes), dtype=np.uint8)
        index = rng.integers(-20, 31, 500)
        index[0], index[-1] = -1, -(2**62)
        destination = np.full((500, row_bytes), 255, np.uint8)
        native.permute_rows(destination.ctypes.data, source.ctypes.data, index.ctypes.data, len(index), row_bytes, 2)
        np.testing.assert_array_equal(destination, np.where(index[:, None] < 0, 0, source[index.clip(0)]))

    def test_nothing_to_do_needs_no_memory(self) -> None:
        native.permute_rows(0, 0, 0, 0, 8)
        native.permute_rows(0, 0, 0, 8, 0)

    def test_negative_sizes_and_null_addresses_raise(self) -> None:
        for arguments in [(1, 1, 1, -1, 1), (1, 1, 1, 1, -1), (0, 1, 1, 1, 1), (1, 0, 1, 1, 1), (1, 1, 0, 1, 1)]:
            with pytest.raises(InvalidArgument, match="permute_rows"):
                native.permute_rows(*arguments)
        with pytest.raises(InvalidArgument, match="num_threads"):
            native.permute_rows(1, 1, 1, 1, 1, 0)

    def test_offsets_past_two_gigabytes(self) -> None:
        """Sparse memory: of 3 GiB only the pages of one row are ever touched."""
        row_bytes = 4096
        num_rows = (3 << 30) // row_bytes
        source = np.zeros((num_rows, row_bytes), np.uint8)
        source[-1] = np.arange(row_bytes, dtype=np.uint64).astype(np.uint8)
        index, destination = np.array([num_rows - 1]), np.zeros(row_bytes, np.uint8)
        native.permute_rows(destination.ctypes.data, source.ctypes.data, index.ctypes.data, 1, row_bytes)
        np.testing.assert_array_equal(destination, source[-1])


def routings() -> Iterator[tuple[int, int, int]]:
    """T, K and D: odd, none, and across block bounds."""
    yield from [(5, 2, 16), (1, 1, 1), (7, 3, 129), (3, 8, 2050), (0, 2, 8), (4, 0, 8), (4, 2, 0), (40, 2, 65)]


def routed(dtype: str, num_tokens: int, top_k: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Source rows (one more than are used), positions with some negative, and weights."""
    generator = torch.Generator().manual_seed(num_tokens * 100 + top_k)
    num_assignments = num_tokens * top_k
    source = draw(dtype, num_assignments + 1, dim, seed=1)
    position = torch.randperm(num_assignments + 1, generator=generator)[:num_assignments]
    position[3::5] = -1
    return source, position.view(num_tokens, top_k), draw(dtype, num_tokens, top_k, seed=2)


class TestCombine:
    @pytest.mark.parametrize("num_threads", [1, 3])
    @pytest.mark.parametrize("weighted", [True, False])
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_weighs_and_sums_in_order(self, dtype: str, weighted: bool, num_threads: int) -> None:
        for num_tokens, top_k, dim in routings():
            source, position, weight = routed(dtype, num_tokens, top_k, dim)
            if not weighted:
                weight.fill_(1)
            destination = poisoned(num_tokens * dim, source.dtype)
            native.combine(
                destination.data_ptr(),
                source.data_ptr(),
                position.data_ptr(),
                weight.data_ptr() if weighted else 0,
                num_tokens,
                top_k,
                dim,
                dtype,
                num_threads,
            )
            expected = torch.zeros(num_tokens, dim, dtype=accumulation(dtype))
            for k in range(top_k):
                named = position[:, k] >= 0
                rows = source[position[named, k]].to(expected.dtype)
                expected[named] += weight[named, k, None].to(expected.dtype) * rows
            np.testing.assert_array_equal(bits(destination), bits(expected.to(source.dtype)))

    def test_broken_rules_raise(self) -> None:
        for arguments, message in [
            ((1, 1, 1, 1, -1, 1, 1, "float32"), "num_tokens"),
            ((1, 1, 1, 1, 1, -1, 1, "float32"), "top_k"),
            ((1, 1, 1, 1, 1, 1, -1, "float32"), "dim"),
            ((1, 1, 1, 1, 1, 1, 1, "int32"), "int32"),
            ((0, 1, 1, 1, 1, 1, 1, "float32"), "destination"),
            ((1, 0, 1, 1, 1, 1, 1, "float32"), "source"),
            ((1, 1, 0, 1, 1, 1, 1, "float32"), "position"),
            ((1, 1, 1, 1, 1, 1, 1, "float32", 0), "num_threads"),
        ]:
            with pytest.raises(InvalidArgument, match=message):
                native.combine(*arguments)


class TestCombineBackward:
    @pytest.mark.parametrize("num_threads", [1, 3])
    @pytest.mark.parametrize("weighted", [True, False])
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_is_the_gradient(self, dtype: str, weighted: bool, num_threads: int) -> None:
        for num_tokens, top_k, dim in routings():
            source, position, weight = routed(dtype, num_tokens, top_k, dim)
            d_destination = draw(dtype, num_tokens, dim, seed=3) / 64  # dot products stay below a half's largest
            d_source = poisoned(source.numel(), source.dtype).view(source.shape)
            untouched = torch.ones(len(source), dtype=torch.bool)
            untouched[position[position >= 0]] = False
            d_weight = poisoned(weight.numel(), weight.dtype).view(weight.shape)
            native.combine_backward(
                d_source.data_ptr(),
                d_weight.data_ptr() if weighted else 0,
                d_destination.data_ptr(),
                source.data_ptr() if weighted else 0,
                position.data_ptr(),
                weight.data_ptr() if weighted else 0,
                num_tokens,
                top_k,
                dim,
                dtype,
                num_threads,
            )
            wide = accumulation(dtype)
            assert (bits(d_source[untouched]) == 0xA5).all()
            for token, k in np.ndindex(num_tokens, top_k):
                row = position[token, k]
                if row >= 0:
                    scale = weight[token, k].to(wide) if weighted else 1
                    expected = (scale * d_destination[token].to(wide)).to(source.dtype)
                    np.testing.assert_array_equal(bits(d_source[row]), bits(expected))
                if not weighted:
                    continue
                if row < 0:
                    assert d_weight[token, k] == 0
                else:
                    products = d_destination[token].double() * source[row].double()
                    error = abs(d_weight[token, k].double() - products.sum())
                    # Half a unit in the last place of the result, and what summing D products in wide may lose.
                    rounding = torch.finfo(source.dtype).eps / 2 * products.sum().abs()
                    summing = dim * torch.finfo(wide).eps * products.abs().sum()
                    assert error <= rounding + summing

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_agrees_with_autograd(self, dtype: str) -> None:
        """The same formula by torch, on small integers, where every order of summation is exact."""
        generator = torch.Generator().manual_seed(0)
        num_tokens, top_k, dim = 6, 2, 70
        torch_dtype = getattr(torch, dtype)

        def integers(*shape: int) -> torch.Tensor:
            return torch.randint(-1, 2, shape, generator=generator).to(torch_dtype)

        source, weight = integers(12, dim).requires_grad_(), integers(num_tokens, top_k).requires_grad_()
        position, d_destination = torch.randperm(12, generator=generator), integers(num_tokens, dim)
        output = (source[position] * weight.view(-1, 1)).view(num_tokens, top_k, dim).sum(1)
        expected_source, expected_weight = torch.autograd.grad(output, (source, weight), d_destination)
        d_source, d_weight = torch.empty_like(source), torch.empty_like(weight)
        native.combine_backward(
            d_source.data_ptr(),
            d_weight.data_ptr(),
            d_destination.data_ptr(),
            source.data_ptr(),
            position.data_ptr(),
            weight.data_ptr(),
            num_tokens,
            top_k,
            dim,
            dtype,
        )
        assert torch.equal(d_source, expected_source)
        assert torch.equal(d_weight, expected_weight)

    def test_broken_rules_raise(self) -> None:
        for arguments, message in [
            ((1, 1, 1, 1, 1, 1, -1, 1, 1, "float32"), "num_tokens"),
            ((1, 1, 1, 1, 1, 1, 1, 1, 1, "uint8"), "uint8"),
            ((0, 1, 1, 1, 1, 1, 1, 1, 1, "float32"), "d_source"),
            ((1, 1, 0, 1, 1, 1, 1, 1, 1, "float32"), "d_destination"),
            ((1, 1, 1, 0, 1, 1, 1, 1, 1, "float32"), "source"),
            ((1, 1, 1, 1, 0, 1, 1, 1, 1, "float32"), "position"),
            ((1, 1, 1, 1, 1, 1, 1, 1, 1, "float32", 0), "num_threads"),
        ]:
            with pytest.raises(InvalidArgument, match=message):
                native.combine_backward(*arguments)

"""The CUDA kernels on a GPU: equal to the CPU's to the bit, within their memory, and past 2^31 elements."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from sparsecoll.cuda.device import cuda_device
from tests.gpu import kernel_checks, large_checks
from tests.gpu.kernel_checks import CASTS, FLOATS, INTEGERS, Rig, remainders

# Compiling the kernels takes seconds; checks that draw and compare gigabytes take some as well.
pytestmark = pytest.mark.timeout(120)

PACKS = [*sorted(CASTS), ("uint8", "uint8"), ("float32", "float32")]
SORTS = [
    (0, 3),
    (1, 1),
    (16_384, 352),
    (1_000, 6_200),
    (300_000, 64),
    (1_000_003, 256),
    (9_000, 1_024),
    (2_000, 65_536),
]


@pytest.fixture
def rig(gpu: None) -> Iterator[Rig]:
    """The current device, on a stream of its own."""
    device = cuda_device(torch.cuda.current_device())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        yield Rig(device.kernels, device.name, stream.cuda_stream)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("remainder", [0, 8, 5])
@pytest.mark.parametrize("row_bytes", [1, 2, 3, 8, 12, 16, 48, 1040, 4096, 4097, 40_000])
def test_permute_rows(rig: Rig, row_bytes: int, remainder: int) -> None:
    kernel_checks.check_permute_rows(rig, row_bytes, remainder)


@pytest.mark.parametrize("dtype", FLOATS)
def test_combine(rig: Rig, dtype: str) -> None:
    for remainder in remainders(dtype):
        kernel_checks.check_combine(rig, dtype, remainder)


@pytest.mark.parametrize("dtype", FLOATS)
def test_combine_backward(rig: Rig, dtype: str) -> None:
    for remainder in remainders(dtype):
        kernel_checks.check_combine_backward(rig, dtype, remainder)


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
def test_sum_replicas(rig: Rig, dtype: str) -> None:
    for remainder in remainders(dtype):
        kernel_checks.check_sum_replicas(rig, dtype, remainder)


@pytest.mark.parametrize(("source", "destination"), PACKS)
def test_pack(rig: Rig, source: str, destination: str) -> None:
    for remainder in (0, 2, 5):
        kernel_checks.check_pack(rig, source, destination, remainder)


@pytest.mark.parametrize(("num_assignments", "num_experts"), SORTS)
def test_sort_by_expert(rig: Rig, num_assignments: int, num_experts: int) -> None:
    kernel_checks.check_sort(rig, num_assignments, num_experts)


@pytest.mark.parametrize(
    ("check", "size", "gib"),
    [
        (large_checks.check_large_permute_rows, large_checks.PAST_INTEGERS, 12),
        (large_checks.check_large_combine, large_checks.PAST_INTEGERS, 20),
        (large_checks.check_large_sum_replicas, large_checks.PAST_INTEGERS, 16),
        (large_checks.check_large_pack, large_checks.PAST_INTEGERS, 16),
        (large_checks.check_large_sort, (1 << 31) - 1, 48),
    ],
    ids=lambda value: value.__name__.removeprefix("check_large_") if callable(value) else "",
)
def test_past_two_to_the_31_elements(rig: Rig, check: Callable[[Rig, int], None], size: int, gib: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib << 30:
        pytest.skip(f"needs {gib} GiB of free memory, found {free / 2**30:.1f}")
    check(rig, size)

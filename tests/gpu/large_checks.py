"""Checks of the CUDA kernels past 2^31 elements, in real memory; what they must give is worked out beside them, part by
part, on the same device.

``size`` is a number of elements, so that the checks themselves can be run where there is less memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsecoll.cuda.tables import Place, Span, Sum, pack_table, sum_table
from tests.gpu.kernel_checks import Rig

__all__ = [
    "PAST_INTEGERS",
    "check_large_combine",
    "check_large_pack",
    "check_large_permute_rows",
    "check_large_sort",
    "check_large_sum_replicas",
]

PAST_INTEGERS = (1 << 31) + (1 << 15) + 6
_DIM = 2048
_PART = 1 << 26


def check_large_permute_rows(rig: Rig, size: int) -> None:
    num_rows = -(-size // _DIM)
    source = _drawn(rig, num_rows * _DIM, torch.bfloat16).view(num_rows, _DIM)
    index = torch.randperm(num_rows, device=rig.device)
    index[::7] = -1
    destination = torch.full_like(source, 9)
    rig.kernels.permute_rows(
        destination.data_ptr(), source.data_ptr(), index.data_ptr(), num_rows, 2 * _DIM, rig.stream
    )
    for part in _parts(num_rows, _PART // _DIM):
        chosen = index[part]
        expected = source[chosen.clamp(min=0)].masked_fill_((chosen < 0)[:, None], 0)
        assert torch.equal(destination[part], expected), part


def check_large_combine(rig: Rig, size: int) -> None:
    """And its gradient, with which the source's memory is written over."""
    num_tokens = -(-size // (2 * _DIM))
    source = _drawn(rig, 2 * num_tokens * _DIM, torch.bfloat16).view(2 * num_tokens, _DIM)
    position = torch.randperm(2 * num_tokens, device=rig.device).view(num_tokens, 2)
    weight = _drawn(rig, 2 * num_tokens, torch.bfloat16).view(num_tokens, 2)
    out, d_source = source.new_full((num_tokens, _DIM), 9), torch.full_like(source, 9)
    d_weight = torch.full_like(weight, 9)
    sizes = (num_tokens, 2, _DIM, "bfloat16")
    addresses = (each.data_ptr() for each in (out, source, position, weight))
    rig.kernels.combine(*addresses, *sizes, rig.stream)
    addresses = (each.data_ptr() for each in (d_source, d_weight, out, source, position, weight))
    rig.kernels.combine_backward(*addresses, *sizes, rig.stream)
    for part in _parts(num_tokens, _PART // (2 * _DIM)):
        rows, factors = source[position[part]].float(), weight[part, :, None].float()  # [T, 2, D] and [T, 2, 1]
        products = rows * factors
        assert torch.equal(out[part], (products[:, 0] + products[:, 1]).bfloat16()), part
        gradient = out[part, None].float()
        assert torch.equal(d_source[position[part]], (gradient * factors).bfloat16()), part
        dots = gradient.double() * rows.double()
        allowed = 2**-8 * dots.sum(2).abs() + 2**-12 * dots.abs().sum(2)
        assert bool(((d_weight[part].double() - dots.sum(2)).abs() <= allowed).all()), part


def check_large_sum_replicas(rig: Rig, size: int) -> None:
    sources = [_drawn(rig, size, torch.bfloat16) for _ in range(2)]
    destination = torch.full_like(sources[0], 9)
    one = Sum(Place(0, 0), False, (Place(1, 0), Place(2, 0)), (False, False), size, 1)
    with rig.table(sum_table([one], "bfloat16")) as (table, num_tiles):
        bases = [each.data_ptr() for each in (destination, *sources)]
        rig.kernels.sum_replicas(table, num_tiles, bases, "bfloat16", rig.stream)
        for part in _parts(size, _PART):
            expected = (sources[0][part].float() + sources[1][part].float()).bfloat16()
            assert torch.equal(destination[part], expected), part


def check_large_pack(rig: Rig, size: int) -> None:
    source = _drawn(rig, size, torch.float32)
    destination = torch.full((size,), 9, dtype=torch.bfloat16, device=rig.device)
    spans = [Span(Place(1, 0), Place(0, 0), size)]
    with rig.table(pack_table(spans, "float32", "bfloat16")) as (table, num_tiles):
        bases = [source.data_ptr(), destination.data_ptr()]
        rig.kernels.pack(table, num_tiles, bases, "float32", "bfloat16", rig.stream)
        for part in _parts(size, _PART):
            assert torch.equal(destination[part], source[part].bfloat16()), part


def check_large_sort(rig: Rig, num_assignments: int) -> None:
    """Order is right if every expert's assignments are its own, ascend, and are as many as there are."""
    num_experts = 256
    ids = torch.randint(num_experts, (num_assignments,), device=rig.device)
    order = torch.full_like(ids, -9)
    counts = ids.new_full((num_experts,), -9)
    ends = torch.full((num_experts,), -9, dtype=torch.int32, device=rig.device)
    scratch = torch.empty(
        rig.kernels.sort_scratch_bytes(num_assignments, num_experts), dtype=torch.uint8, device=rig.device
    )
    rig.kernels.sort_by_expert(
        ids.data_ptr(),
        num_assignments,
        num_experts,
        *(each.data_ptr() for each in (order, counts, ends, scratch)),
        rig.stream,
    )
    expected = torch.zeros_like(counts)
    for part in _parts(num_assignments, _PART):
        expected += torch.bincount(ids[part], minlength=num_experts)
    assert torch.equal(counts, expected)
    assert torch.equal(ends.long(), counts.cumsum(0))
    for part in _parts(num_assignments - 1, _PART):
        here, following = order[part], order[part.start + 1 : part.stop + 1]
        expert, next_expert = ids[here], ids[following]
        assert bool(((expert < next_expert) | ((expert == next_expert) & (here < following))).all()), part


def _drawn(rig: Rig, size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device=rig.device).normal_()


def _parts(size: int, part: int) -> Iterator[slice]:
    for begin in range(0, size, part):
        yield slice(begin, min(begin + part, size))

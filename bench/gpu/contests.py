"""The CUDA kernels beside the torch expressions that a user would write instead.

Sizes are bytes: of the rows moved (permute_rows), of the experts' rows (combine and its backward), of one source
(sum_replicas), of what is cast (pack), of the ids (sort_by_expert). Every contest has many equal data sets, so that
none is in the cache when its turn comes.

``T`` tokens, ``K`` top-k, ``A`` assignments (``T * K``), ``D`` dim, ``S`` data sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecoll.cuda import Kernels, Place, Span, Sum, Table, pack_table, sum_table

__all__ = ["Contest", "Rig", "contests"]

_DIM, _TOP_K, _NUM_EXPERTS, _NUM_SPANS = 2048, 2, 256, 32
_REPLICAS = (2, 4, 8)


class Rig(NamedTuple):
    """Where kernels run.

    Attributes:
        stream: handle of the current stream.
        cold_bytes: data sets together take at least as much.
    """

    kernels: Kernels
    device: str
    stream: int
    cold_bytes: int


class Contest(NamedTuple):
    """One kernel at one size; callables take the number of a data set.

    Attributes:
        moved_bytes: read and written, as few as can be.
        is_memory_bound: whether moving them is all the work there is.
        is_right: whether the results of ``ours`` on a data set are.
    """

    kernel: str
    dtype: str
    size: int
    moved_bytes: int
    is_memory_bound: bool
    num_sets: int
    ours: Callable[[int], object]
    rivals: Mapping[str, Callable[[int], object]]
    is_right: Callable[[int], bool]


def contests(rig: Rig, size: int, seed: int) -> Iterator[Callable[[], Contest]]:
    """Makers of all contests of a size; each takes its memory when called."""
    for dtype in (torch.float32, torch.bfloat16):
        yield lambda dtype=dtype: _permute_rows(rig, size, dtype, seed)
        yield lambda dtype=dtype: _combine(rig, size, dtype, seed)
        yield lambda dtype=dtype: _combine_backward(rig, size, dtype, seed)
        for num_sources in _REPLICAS:
            yield lambda dtype=dtype, num_sources=num_sources: _sum_replicas(rig, size, dtype, num_sources, seed)
    yield lambda: _pack(rig, size, seed)
    yield lambda: _sort_by_expert(rig, size, seed)


def _permute_rows(rig: Rig, size: int, dtype: torch.dtype, seed: int) -> Contest:
    draw = _Draw(rig, seed)
    num_rows, row_bytes = size // (_DIM * dtype.itemsize), _DIM * dtype.itemsize
    moved_bytes = 2 * size + 8 * num_rows
    sets = draw.num_sets(moved_bytes)
    source, out = draw.normal(dtype, sets, num_rows, _DIM), draw.empty(dtype, sets, num_rows, _DIM)
    index = draw.permutation(num_rows)
    sources, outs = source.unbind(), out.unbind()

    def ours(n: int) -> None:
        addresses = outs[n].data_ptr(), sources[n].data_ptr(), index.data_ptr()
        rig.kernels.permute_rows(*addresses, num_rows, row_bytes, rig.stream)

    rivals = {"index_select": lambda n: torch.index_select(sources[n], 0, index, out=outs[n])}
    is_right = lambda n: torch.equal(outs[n], sources[n][index])  # noqa: E731
    return Contest("permute_rows", _name(dtype), size, moved_bytes, True, sets, ours, rivals, is_right)


class _Routed:
    """Experts' rows ``[S, A, D]``, the row of each assignment ``[T, K]``, and weights ``[T, K]``."""

    def __init__(self, draw: _Draw, size: int, dtype: torch.dtype, sets: int) -> None:
        self.num_tokens = size // (_TOP_K * _DIM * dtype.itemsize)
        num_assignments = self.num_tokens * _TOP_K
        self.rows = draw.normal(dtype, sets, num_assignments, _DIM).unbind()
        # Sorted by expert, as dispatch leaves them: neighbours among the rows come from tokens far apart, in order.
        order = draw.integers(_NUM_EXPERTS, num_assignments).argsort(stable=True)
        self.position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        self.position = self.position.view(self.num_tokens, _TOP_K)
        self.weight = draw.normal(dtype, self.num_tokens, _TOP_K)
        self.sizes = (self.num_tokens, _TOP_K, _DIM, _name(dtype))

    def chosen(self, n: int) -> Tensor:
        """``[T, K, D]``."""
        return self.rows[n].index_select(0, self.position.flatten()).view(self.num_tokens, _TOP_K, _DIM)


def _combine(rig: Rig, size: int, dtype: torch.dtype, seed: int) -> Contest:
    draw = _Draw(rig, seed)
    num_tokens = size // (_TOP_K * _DIM * dtype.itemsize)
    moved_bytes = size + size // _TOP_K + num_tokens * _TOP_K * (8 + dtype.itemsize)
    sets = draw.num_sets(moved_bytes)
    routed = _Routed(draw, size, dtype, sets)
    position, weight = routed.position, routed.weight
    outs = draw.empty(dtype, sets, num_tokens, _DIM).unbind()
    token = torch.empty_like(position.flatten())
    token[position.flatten()] = torch.arange(num_tokens, device=token.device).repeat_interleave(_TOP_K)
    by_row = torch.empty_like(weight.flatten())
    by_row[position.flatten()] = weight.flatten()

    def ours(n: int) -> None:
        addresses = (each.data_ptr() for each in (outs[n], routed.rows[n], position, weight))
        rig.kernels.combine(*addresses, *routed.sizes, rig.stream)

    def is_right(n: int) -> bool:
        rows, factors = routed.chosen(n).float(), weight.float()[..., None]
        expected = rows[:, 0] * factors[:, 0]
        for k in range(1, _TOP_K):
            expected = expected + rows[:, k] * factors[:, k]
        return torch.equal(outs[n], expected.to(dtype))

    rivals = {
        "einsum": lambda n: torch.einsum("tk,tkd->td", weight, routed.chosen(n)),
        "select*w .sum(1)": lambda n: (routed.chosen(n) * weight[..., None]).sum(1),
        "index_add_": lambda n: outs[n].zero_().index_add_(0, token, routed.rows[n] * by_row[:, None]),
    }
    return Contest("combine", _name(dtype), size, moved_bytes, True, sets, ours, rivals, is_right)


def _combine_backward(rig: Rig, size: int, dtype: torch.dtype, seed: int) -> Contest:
    draw = _Draw(rig, seed)
    num_tokens = size // (_TOP_K * _DIM * dtype.itemsize)
    moved_bytes = 2 * size + size // _TOP_K + num_tokens * _TOP_K * (8 + 2 * dtype.itemsize)
    sets = draw.num_sets(moved_bytes)
    routed = _Routed(draw, size, dtype, sets)
    position, weight = routed.position, routed.weight
    gradients = draw.normal(dtype, sets, num_tokens, _DIM).unbind()
    d_rows = draw.empty(dtype, sets, num_tokens * _TOP_K, _DIM).unbind()
    d_weights = draw.empty(dtype, sets, num_tokens, _TOP_K).unbind()

    def ours(n: int) -> None:
        tensors = (d_rows[n], d_weights[n], gradients[n], routed.rows[n], position, weight)
        rig.kernels.combine_backward(*(each.data_ptr() for each in tensors), *routed.sizes, rig.stream)

    def theirs(n: int) -> Tensor:
        d_rows[n].index_copy_(0, position.flatten(), (weight[..., None] * gradients[n][:, None]).flatten(0, 1))
        return torch.einsum("td,tkd->tk", gradients[n], routed.chosen(n))

    def is_right(n: int) -> bool:
        expected = (weight.float()[..., None] * gradients[n].float()[:, None]).to(dtype)
        if not torch.equal(d_rows[n][position], expected):
            return False
        del expected
        products = gradients[n].float()[:, None] * routed.chosen(n).float()
        dots, magnitude = products.sum(2), products.abs_().sum(2)
        # Half a last place of the result, and what two float32 sums in different orders may differ by.
        allowed = torch.finfo(dtype).eps / 2 * dots.abs() + 1e-5 * magnitude
        return bool(((d_weights[n].float() - dots).abs() <= allowed).all())

    rivals = {"index_copy_+einsum": theirs}
    return Contest("combine_backward", _name(dtype), size, moved_bytes, True, sets, ours, rivals, is_right)


def _sum_replicas(rig: Rig, size: int, dtype: torch.dtype, num_sources: int, seed: int) -> Contest:
    draw = _Draw(rig, seed)
    num_elements, moved_bytes = size // dtype.itemsize, (num_sources + 1) * size
    sets = draw.num_sets(moved_bytes)
    sources = [each.unbind() for each in draw.normal(dtype, sets, num_sources, num_elements).unbind()]
    outs = draw.empty(dtype, sets, num_elements).unbind()
    places = tuple(Place(1 + number, 0) for number in range(num_sources))
    one = Sum(Place(0, 0), False, places, (False,) * num_sources, num_elements, 1)
    table, num_tiles = draw.table(sum_table([one], _name(dtype)))

    def ours(n: int) -> None:
        bases = [outs[n].data_ptr(), *(source.data_ptr() for source in sources[n])]
        rig.kernels.sum_replicas(table.data_ptr(), num_tiles, bases, _name(dtype), rig.stream)

    def loop(n: int) -> None:
        torch.add(sources[n][0], sources[n][1], out=outs[n])
        for source in sources[n][2:]:
            outs[n].add_(source)

    def is_right(n: int) -> bool:
        expected = sources[n][0].float()
        for source in sources[n][1:]:
            expected += source
        return torch.equal(outs[n], expected.to(dtype))

    rivals = {"add_ loop": loop, "stack.sum(0)": lambda n: torch.sum(torch.stack(sources[n]), 0, out=outs[n])}
    return Contest(f"sum_replicas[{num_sources}]", _name(dtype), size, moved_bytes, True, sets, ours, rivals, is_right)


def _pack(rig: Rig, size: int, seed: int) -> Contest:
    """Matrices of many experts, one after the other in one place and apart in the other."""
    draw = _Draw(rig, seed)
    each = size // (4 * _NUM_SPANS)
    moved_bytes = size + size // 2
    sets = draw.num_sets(moved_bytes)
    source = draw.normal(torch.float32, sets, _NUM_SPANS, each + 16)[:, :, :each]
    out = draw.empty(torch.bfloat16, sets, _NUM_SPANS, each)
    sources, outs = [s.unbind() for s in source.unbind()], [o.unbind() for o in out.unbind()]
    spans = [Span(Place(1, 2 * each * k), Place(0, 4 * (each + 16) * k), each) for k in range(_NUM_SPANS)]
    table, num_tiles = draw.table(pack_table(spans, "float32", "bfloat16"))

    def ours(n: int) -> None:
        bases = [sources[n][0].data_ptr(), outs[n][0].data_ptr()]
        rig.kernels.pack(table.data_ptr(), num_tiles, bases, "float32", "bfloat16", rig.stream)

    def copies(n: int) -> None:
        for there, here in zip(outs[n], sources[n], strict=True):
            there.copy_(here)

    def casts_and_copies(n: int) -> None:
        for there, here in zip(outs[n], sources[n], strict=True):
            there.copy_(here.to(torch.bfloat16))

    rivals = {"copy_ loop": copies, "to+copy_ loop": casts_and_copies}
    is_right = lambda n: torch.equal(out[n], source[n].to(torch.bfloat16))  # noqa: E731
    return Contest("pack", "float32", size, moved_bytes, True, sets, ours, rivals, is_right)


def _sort_by_expert(rig: Rig, size: int, seed: int) -> Contest:
    draw = _Draw(rig, seed)
    num_assignments = size // 8
    moved_bytes = 2 * size
    sets = draw.num_sets(moved_bytes)
    ids = draw.integers(_NUM_EXPERTS, sets, num_assignments).unbind()
    orders = draw.empty(torch.int64, sets, num_assignments).unbind()
    counts = draw.empty(torch.int64, _NUM_EXPERTS)
    ends = draw.empty(torch.int32, _NUM_EXPERTS)
    scratch = draw.empty(torch.uint8, max(1, rig.kernels.sort_scratch_bytes(num_assignments, _NUM_EXPERTS)))

    def ours(n: int) -> None:
        rest = (each.data_ptr() for each in (orders[n], counts, ends, scratch))
        rig.kernels.sort_by_expert(ids[n].data_ptr(), num_assignments, _NUM_EXPERTS, *rest, rig.stream)

    def with_scatter_add(n: int) -> tuple[Tensor, Tensor]:
        found = ids[n].new_zeros(_NUM_EXPERTS).scatter_add_(0, ids[n], torch.ones_like(ids[n]))
        return torch.argsort(ids[n], stable=True), found

    def with_bincount(n: int) -> tuple[Tensor, Tensor]:
        return torch.argsort(ids[n], stable=True), torch.bincount(ids[n], minlength=_NUM_EXPERTS)

    def is_right(n: int) -> bool:
        order, found = with_bincount(n)
        ended = torch.equal(ends, found.cumsum(0).to(torch.int32))
        return torch.equal(orders[n], order) and torch.equal(counts, found) and ended

    rivals = {"argsort+scatter_add_": with_scatter_add, "argsort+bincount": with_bincount}
    return Contest("sort_by_expert", "int64", size, moved_bytes, False, sets, ours, rivals, is_right)


class _Draw:
    """Memory and random numbers of one contest."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self._rig = rig
        self._generator = torch.Generator(rig.device).manual_seed(seed)

    def num_sets(self, moved_bytes: int) -> int:
        return max(2, -(-self._rig.cold_bytes // moved_bytes))

    def normal(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._rig.device).normal_(generator=self._generator)

    def integers(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, device=self._rig.device, generator=self._generator)

    def permutation(self, size: int) -> Tensor:
        return torch.randperm(size, device=self._rig.device, generator=self._generator)

    def empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._rig.device)

    def table(self, table: Table) -> tuple[Tensor, int]:
        return torch.from_numpy(table.words).to(self._rig.device), table.num_tiles


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

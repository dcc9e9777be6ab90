"""Which kernels move the rows of a tensor: native ones on the CPU, CUDA ones where CuPy is installed, torch elsewhere.

None of them waits for a GPU, or reads from one. On CUDA tensors they run on the current stream of the tensor's device.

Legend: ``T`` tokens, ``K`` top-k, ``D`` dim, ``N`` rows, ``A`` assignments, ``E`` experts. Indices are int64; negative
ones mean no row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsecoll import native
from sparsecoll.cuda import kernels_for

__all__ = ["CudaKernels", "NativeKernels", "RowKernels", "TorchKernels", "kernels_of"]


class RowKernels(ABC):
    """The four kernels between tokens and experts. Arguments may have any strides; results are contiguous."""

    @abstractmethod
    def permute_rows(self, x: Tensor, index: Tensor) -> Tensor:
        """``out[i] = x[index[i]]``, zeros where negative."""

    @abstractmethod
    def combine(self, y: Tensor, position: Tensor, weights: Tensor | None) -> Tensor:
        """``out[t] = sum_k weights[t, k] * y[position[t, k]]``; without weights, the plain sum."""

    @abstractmethod
    def combine_backward(
        self, d_out: Tensor, y: Tensor | None, position: Tensor, weights: Tensor, num_rows: int, is_permutation: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of `combine` with weights.

        Args:
            y: None if nobody wants the gradient of the weights.
            num_rows: of ``y``.
            is_permutation: every row has a position. Otherwise those without one get zeros, which costs a pass.

        Returns:
            The gradient of ``y`` ``[N, D]``, and that of the weights ``[T, K]`` (zero where there is no row) or None.
        """

    @abstractmethod
    def sort_by_expert(self, expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        """Stable: the assignment ``[A]`` at each place, and the counts ``[E]``, from ``expert_ids`` ``[A]``."""


def kernels_of(x: Tensor) -> RowKernels:
    """The kernels for tensors like ``x``."""
    if x.device.type == "cpu":
        return _NATIVE
    if x.device.type == "cuda":
        found = kernels_for(torch.cuda.current_device() if x.device.index is None else x.device.index)
        if found is not None:
            return CudaKernels(found)
    return _TORCH


class _AddressKernels(RowKernels):
    """Kernels of a library that takes addresses, sizes, and one last number that says how to run."""

    def __init__(self, library: Any) -> None:
        self._library = library

    @abstractmethod
    def _last(self, x: Tensor) -> int: ...

    def permute_rows(self, x: Tensor, index: Tensor) -> Tensor:
        if not len(x):  # no row to name, and an address of 0
            return x.new_zeros(len(index), x.shape[1])
        x, index = x.contiguous(), index.contiguous()
        out = x.new_empty(len(index), x.shape[1])
        row_bytes = x.shape[1] * x.element_size()
        self._library.permute_rows(out.data_ptr(), x.data_ptr(), index.data_ptr(), len(index), row_bytes, self._last(x))
        return out

    def combine(self, y: Tensor, position: Tensor, weights: Tensor | None) -> Tensor:
        if not len(y):
            return y.new_zeros(len(position), y.shape[1])
        y, position = y.contiguous(), position.contiguous()
        weights = None if weights is None else weights.contiguous()
        out = y.new_empty(len(position), y.shape[1])
        self._library.combine(
            out.data_ptr(),
            y.data_ptr(),
            position.data_ptr(),
            _address(weights),
            *position.shape,
            y.shape[1],
            _dtype_name(y),
            self._last(y),
        )
        return out

    def combine_backward(
        self, d_out: Tensor, y: Tensor | None, position: Tensor, weights: Tensor, num_rows: int, is_permutation: bool
    ) -> tuple[Tensor, Tensor | None]:
        dy = _rows_to_fill(d_out, num_rows, is_permutation)
        if not num_rows:
            return dy, None if y is None else torch.zeros_like(weights)
        d_out, position, weights = d_out.contiguous(), position.contiguous(), weights.contiguous()
        y = None if y is None else y.contiguous()
        d_weights = None if y is None else torch.empty_like(weights)
        self._library.combine_backward(
            dy.data_ptr(),
            _address(d_weights),
            d_out.data_ptr(),
            _address(y),
            position.data_ptr(),
            weights.data_ptr(),
            *position.shape,
            d_out.shape[1],
            _dtype_name(d_out),
            self._last(d_out),
        )
        return dy, d_weights


class NativeKernels(_AddressKernels):
    """`sparsecoll.native`, on all of torch's threads."""

    def __init__(self) -> None:
        super().__init__(native)

    def _last(self, x: Tensor) -> int:
        return torch.get_num_threads()

    def sort_by_expert(self, expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        expert_ids = expert_ids.contiguous()
        order, counts = torch.empty_like(expert_ids), expert_ids.new_empty(num_experts)
        native.sort_by_expert(expert_ids.data_ptr(), len(order), num_experts, order.data_ptr(), counts.data_ptr())
        return order, counts


def _current_stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


class CudaKernels(_AddressKernels):
    """`sparsecoll.cuda.Kernels`, on the current stream.

    What a call allocates is freed on that stream, so the allocator keeps it from others until the kernel has ended.
    """

    def __init__(self, kernels: Any, stream_of: Callable[[torch.device], int] = _current_stream) -> None:
        super().__init__(kernels)
        self._stream_of = stream_of

    def _last(self, x: Tensor) -> int:
        return self._stream_of(x.device)

    def sort_by_expert(self, expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        expert_ids = expert_ids.contiguous()
        order, counts = torch.empty_like(expert_ids), expert_ids.new_empty(num_experts)
        if not len(order):
            return order, counts.zero_()
        scratch_bytes = self._library.sort_scratch_bytes(len(order), num_experts)
        ends = expert_ids.new_empty(num_experts, dtype=torch.int32)
        scratch = expert_ids.new_empty(scratch_bytes, dtype=torch.uint8)
        self._library.sort_by_expert(
            expert_ids.data_ptr(),
            len(order),
            num_experts,
            order.data_ptr(),
            counts.data_ptr(),
            ends.data_ptr(),
            scratch.data_ptr(),
            self._last(expert_ids),
        )
        return order, counts


class TorchKernels(RowKernels):
    """The same in torch's operations, for every other device. They make copies that kernels of our own do without."""

    def permute_rows(self, x: Tensor, index: Tensor) -> Tensor:
        if not len(x):
            return x.new_zeros(len(index), x.shape[1])
        return x.index_select(0, index.clamp(min=0)).masked_fill_((index < 0).unsqueeze(1), 0)

    def combine(self, y: Tensor, position: Tensor, weights: Tensor | None) -> Tensor:
        rows = self._rows(y, position)
        return rows.sum(1) if weights is None else torch.einsum("tk,tkd->td", weights, rows)

    def combine_backward(
        self, d_out: Tensor, y: Tensor | None, position: Tensor, weights: Tensor, num_rows: int, is_permutation: bool
    ) -> tuple[Tensor, Tensor | None]:
        # A boolean mask would make the host wait for the device; one row more takes what has no place.
        dy = _rows_to_fill(d_out, num_rows + 1, is_permutation)
        place = torch.where(position < 0, num_rows, position).flatten()
        dy.index_copy_(0, place, (weights.unsqueeze(-1) * d_out.unsqueeze(1)).flatten(0, 1))
        d_weights = None if y is None else torch.einsum("td,tkd->tk", d_out, self._rows(y, position))
        return dy[:num_rows], d_weights

    def sort_by_expert(self, expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        # scatter_add_ and not bincount, which waits for a GPU to learn the size of its result.
        counts = expert_ids.new_zeros(num_experts).scatter_add_(0, expert_ids, torch.ones_like(expert_ids))
        return expert_ids.argsort(stable=True), counts

    def _rows(self, y: Tensor, position: Tensor) -> Tensor:
        return self.permute_rows(y, position.flatten()).unflatten(0, position.shape)


_NATIVE, _TORCH = NativeKernels(), TorchKernels()


def _rows_to_fill(like: Tensor, num_rows: int, is_permutation: bool) -> Tensor:
    return (like.new_empty if is_permutation else like.new_zeros)(num_rows, like.shape[1])


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")

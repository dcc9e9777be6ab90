"""Tokens to expert order and back: sort, permute, combine. Native kernels on the CPU, torch elsewhere.

Legend: ``T`` tokens, ``K`` top-k, ``D`` dim, ``N = T * K`` assignments (assignment ``t * K + k`` is token t's k-th
choice), ``E`` experts. All indices are int64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsecoll import native

__all__ = ["combine", "inverse_permutation", "permute", "sort_by_expert"]


def sort_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Stable sort of the assignments ``expert_ids`` ``[T, K]`` by expert.

    Returns:
        ``order`` ``[N]``, the assignment at each place, and ``counts`` ``[E]``.

    Raises:
        InvalidArgument: an expert out of range (on the CPU).
    """
    flat = expert_ids.flatten()
    if not _is_native(flat):
        # scatter_add_ and not bincount, which waits for a GPU to learn the size of its result.
        counts = flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))
        return flat.argsort(stable=True), counts
    order, counts = torch.empty_like(flat), flat.new_empty(num_experts)
    native.sort_by_expert(flat.data_ptr(), len(flat), num_experts, order.data_ptr(), counts.data_ptr())
    return order, counts


def inverse_permutation(order: Tensor) -> Tensor:
    """``[N]``: the place of each element, where ``order`` ``[N]`` names the element at each place."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def permute(x: Tensor, index: Tensor, position: Tensor | None = None) -> Tensor:
    """Gathers rows: ``x[index]``, ``[M, D]`` from ``x`` ``[T, D]`` and ``index`` ``[M]``.

    Args:
        position: ``[T, K]``, where each row of ``x`` went: ``index[position[t, k]] == t``, every place named once.
            With it the backward is a deterministic sum over K rows; without it, rows are added one by one.
    """
    result: Tensor = _Permute.apply(x, index, position)
    return result


def combine(y: Tensor, position: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows: ``out[t] = sum_k weights[t, k] * y[position[t, k]]``, ``[T, D]``.

    Args:
        y: ``[N, D]``.
        position: ``[T, K]``, every place named once.
        weights: ``[T, K]``; rounded to ``y``'s dtype. Sums are kept in float32 for 16-bit floats.
    """
    result: Tensor = _Combine.apply(y, position, weights.to(y.dtype))
    return result


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, position: Tensor | None) -> Tensor:
        ctx.save_for_backward(index, position)
        ctx.num_rows = len(x)
        return _gather(x, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        index, position = ctx.saved_tensors
        if position is None:
            dx = dy.new_zeros(ctx.num_rows, dy.shape[1]).index_add_(0, index, dy)
        else:
            dx = _weighted_sum(dy, position, None)
        return dx, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, position: Tensor, weights: Tensor) -> Tensor:
        y, position, weights = y.contiguous(), position.contiguous(), weights.contiguous()
        # y itself is only needed for the gradient of the weights.
        ctx.save_for_backward(y if ctx.needs_input_grad[2] else None, position, weights)
        ctx.num_rows = len(y)
        return _weighted_sum(y, position, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, position, weights = ctx.saved_tensors
        dout = dout.contiguous()
        dy = dout.new_empty(ctx.num_rows, dout.shape[1])
        d_weights = None if y is None else torch.empty_like(weights)
        if not _is_native(dout):
            dy[position.flatten()] = (weights.unsqueeze(-1) * dout.unsqueeze(1)).flatten(0, 1)
            if y is not None:
                d_weights = torch.einsum("td,tkd->tk", dout, _rows(y, position))
            return dy, None, d_weights
        num_tokens, top_k = position.shape
        native.combine_backward(
            dy.data_ptr(),
            _address(d_weights),
            dout.data_ptr(),
            _address(y),
            position.data_ptr(),
            weights.data_ptr(),
            num_tokens,
            top_k,
            dout.shape[1],
            _dtype_name(dout),
            torch.get_num_threads(),
        )
        return dy, None, d_weights


def _gather(x: Tensor, index: Tensor) -> Tensor:
    if not _is_native(x):
        return x.index_select(0, index)
    x, index = x.contiguous(), index.contiguous()
    out = x.new_empty(len(index), x.shape[1])
    row_bytes = x.shape[1] * x.element_size()
    native.permute_rows(out.data_ptr(), x.data_ptr(), index.data_ptr(), len(index), row_bytes, torch.get_num_threads())
    return out


def _weighted_sum(y: Tensor, position: Tensor, weights: Tensor | None) -> Tensor:
    if not _is_native(y):
        rows = _rows(y, position)
        return rows.sum(1) if weights is None else torch.einsum("tk,tkd->td", weights, rows)
    y, position = y.contiguous(), position.contiguous()
    num_tokens, top_k = position.shape
    out = y.new_empty(num_tokens, y.shape[1])
    native.combine(
        out.data_ptr(),
        y.data_ptr(),
        position.data_ptr(),
        _address(weights),
        num_tokens,
        top_k,
        y.shape[1],
        _dtype_name(y),
        torch.get_num_threads(),
    )
    return out


def _rows(y: Tensor, position: Tensor) -> Tensor:
    return y.index_select(0, position.flatten()).unflatten(0, position.shape)


def _is_native(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")

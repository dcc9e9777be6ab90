"""Tokens to expert order and back: sort, permute, combine, with their gradients.

Legend: ``T`` tokens, ``K`` top-k, ``D`` dim, ``N`` rows (``T * K`` where every assignment has one; assignment
``t * K + k`` is token t's k-th choice), ``E`` experts. All indices are int64; negative ones mean no row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsecoll.moe.kernels import kernels_of

__all__ = ["combine", "inverse_permutation", "permute", "sort_by_expert"]


def sort_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Stable sort of the assignments ``expert_ids`` ``[T, K]`` by expert.

    Returns:
        ``order`` ``[T * K]``, the assignment at each place, and ``counts`` ``[E]``.

    Raises:
        InvalidArgument: an expert out of range (on the CPU).
    """
    return kernels_of(expert_ids).sort_by_expert(expert_ids.flatten(), num_experts)


def inverse_permutation(order: Tensor) -> Tensor:
    """``[N]``: the place of each element, where ``order`` ``[N]`` names the element at each place."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def permute(x: Tensor, index: Tensor, position: Tensor | None = None) -> Tensor:
    """Gathers rows: ``x[index]``, ``[M, D]`` from ``x`` ``[T, D]`` and ``index`` ``[M]``; zeros where it is negative.

    Args:
        position: ``[T, K]``, where each row of ``x`` went: ``index[position[t, k]] == t``, every place named once, or
            negative for nowhere. With it the backward is a deterministic sum over K rows; without it, rows are added
            one by one, and no index may be negative.
    """
    result: Tensor = _Permute.apply(x, index, position)
    return result


def combine(y: Tensor, position: Tensor, weights: Tensor, *, is_permutation: bool = False) -> Tensor:
    """Weighted sums of rows: ``out[t] = sum_k weights[t, k] * y[position[t, k]]``, ``[T, D]``.

    Args:
        y: ``[N, D]``.
        position: ``[T, K]``, a row named at most once; a negative one contributes nothing and its weight gets no
            gradient.
        weights: ``[T, K]``; rounded to ``y``'s dtype. Sums are kept in float32 for 16-bit floats.
        is_permutation: promises that every row is named, so that backward need not write zeros for the others first.
    """
    result: Tensor = _Combine.apply(y, position, weights.to(y.dtype), is_permutation)
    return result


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, position: Tensor | None) -> Tensor:
        ctx.save_for_backward(index, position)
        ctx.num_rows = len(x)
        return kernels_of(x).permute_rows(x, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        index, position = ctx.saved_tensors
        if position is None:
            dx = dy.new_zeros(ctx.num_rows, dy.shape[1]).index_add_(0, index, dy)
        else:
            dx = kernels_of(dy).combine(dy, position, None)
        return dx, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, position: Tensor, weights: Tensor, is_permutation: bool) -> Tensor:
        # y itself is only needed for the gradient of the weights.
        ctx.save_for_backward(y if ctx.needs_input_grad[2] else None, position, weights)
        ctx.num_rows, ctx.is_permutation = len(y), is_permutation
        return kernels_of(y).combine(y, position, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        y, position, weights = ctx.saved_tensors
        dy, d_weights = kernels_of(d_out).combine_backward(
            d_out, y, position, weights, ctx.num_rows, ctx.is_permutation
        )
        return dy, None, d_weights, None

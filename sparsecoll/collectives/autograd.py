"""The sparse collectives as torch operations: each is the other's backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sparsecoll.collectives.all_to_all import run_all_to_all
from sparsecoll.collectives.call import Call
from sparsecoll.collectives.rows import flatten, unflatten
from sparsecoll.group import Group

__all__ = ["differentiable", "differentiable_all_to_all"]


def differentiable(call: Call, value: Any, group: Group, timeout_s: float | None) -> Any:
    """Runs ``call`` so that autograd can go back through it."""
    structure: list[Any] = []
    outputs = _SparseCollective.apply(call, value, group, timeout_s, structure, *flatten(value))
    return unflatten(structure[0], iter(outputs))


class _SparseCollective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, value: Any, group: Group, timeout_s: Any, structure: Any, *tensors: Any) -> Any:
        operation = group.operation(call.name, timeout_s)
        held = unflatten(value, (tensor.detach() for tensor in tensors))
        result = group.run(operation, lambda: call.run(group, operation, held, None))
        structure.append(result)
        ctx.call, ctx.group, ctx.timeout_s, ctx.result_structure, ctx.value_structure = (
            call, group, timeout_s, unflatten(result, iter(range(10**9))), unflatten(value, iter(range(10**9))),
        )  # fmt: skip
        ctx.likes = [(tensor.shape, tensor.dtype) for tensor in tensors]
        return tuple(flatten(result))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        call: Call = ctx.call
        mirror = replace(
            call, name="sparse_reduce_scatter" if call.gathers else "sparse_all_gather", plan=None, mean=False
        )
        given = unflatten(ctx.result_structure, (grad.contiguous() for grad in grads))
        if not call.gathers and call.mean:
            given = _divided(call, given, ctx.group.rank)
        # Rows that did not take part have zero gradient.
        results = [torch.zeros(shape, dtype=dtype, device=ctx.group.device) for shape, dtype in ctx.likes]
        out = unflatten(ctx.value_structure, iter(results))
        operation = ctx.group.operation(mirror.name, ctx.timeout_s)
        ctx.group.run(operation, lambda: mirror.run(ctx.group, operation, given, out))
        return (None, None, None, None, None, *results)


def _divided(call: Call, owned: Any, rank: int) -> Any:
    """Gradients of a mean: each owned row over its number of holders."""
    taking_part = set(call.chunks) if call.chunks is not None else None
    chunks = [c for c in call.place.owned_by(rank).tolist() if taking_part is None or c in taking_part]
    counts = call.place.holders.sum(axis=1)[chunks].tolist()
    if isinstance(owned, list):
        return [unflatten(row, (t / n for t in flatten(row))) for row, n in zip(owned, counts, strict=True)]
    return unflatten(owned, (t / _like(t, counts).view(-1, *[1] * (t.dim() - 1)) for t in flatten(owned)))


def _like(tensor: torch.Tensor, numbers: list[int]) -> torch.Tensor:
    """Numbers beside ``tensor``, sent to a GPU without waiting for it."""
    made = torch.tensor(numbers, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return made.to(tensor.device, non_blocking=True)


def differentiable_all_to_all(x: Any, send_counts: Any, recv_counts: Any, group: Group, timeout_s: Any) -> Any:
    """`all_to_all` that autograd can go back through."""
    return _AllToAll.apply(x, send_counts, recv_counts, group, timeout_s)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, send_counts: Any, recv_counts: Any, group: Group, timeout_s: Any) -> Any:
        operation = group.operation("all_to_all", timeout_s)
        out, received = group.run(operation, lambda: run_all_to_all(group, operation, x, send_counts, recv_counts))
        ctx.counts, ctx.group, ctx.timeout_s = (received, send_counts), group, timeout_s
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        group: Group = ctx.group
        operation = group.operation("all_to_all", ctx.timeout_s)
        out, _ = group.run(operation, lambda: run_all_to_all(group, operation, grad, *ctx.counts))
        return out, None, None, None, None

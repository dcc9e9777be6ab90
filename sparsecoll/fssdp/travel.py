"""The way of rows: to the ranks that hold their experts, through those, and back; and the same mirrored in backward.

What is sent where has been decided (`sparsecoll.fssdp.dispatch`); nothing here asks another rank, or waits for a GPU.

Legend: ``T`` tokens, ``K`` top-k, ``D`` model dim, ``S`` rows sent, ``M`` rows received, ``W`` ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsecoll.collectives.all_to_all import run_all_to_all
from sparsecoll.fssdp.backward import Backward
from sparsecoll.fssdp.layer import Forward, ShardedLayer, is_recomputing
from sparsecoll.moe.experts import Stack, grouped_backward, grouped_forward
from sparsecoll.moe.grouped import Groups
from sparsecoll.moe.permute import combine, inverse_permutation, permute
from sparsecoll.moe.routes import Routes
from sparsecoll.moe.upload import upload

__all__ = ["LocalRoutes", "Sending", "travel"]


class Sending(NamedTuple):
    """The rows that a rank sends, in their order.

    Attributes:
        token: int64 ``[S]``, the token that each row copies, negative for a row of zeros.
        position: int64 ``[T, K]``, which row each assignment has, negative for none.
        is_permutation: whether every row has an assignment, and every assignment a row.
    """

    token: Tensor
    position: Tensor
    is_permutation: bool


@dataclass(frozen=True, eq=False)
class LocalRoutes:
    """A rank's `RankRoutes`: sizes on the host, orders on the device.

    Attributes:
        send_order: ``[S]``, as in `RankRoutes`.
        send_counts, recv_counts: ``[W]`` rows.
        by_expert: ``[M]``, the place among the received rows of the row that is computed i-th.
        by_source: ``[M]``, its inverse.
        gathered: rows of each expert that is computed from gathered rows, gather by gather.
        stored: rows of each expert of which this rank stores a row; with slices none is computed from those.
    """

    send_order: Tensor
    send_counts: list[int]
    recv_counts: list[int]
    by_expert: Tensor
    by_source: Tensor
    gathered: list[Groups]
    stored: Groups

    @classmethod
    def of(
        cls, routes: Routes, layer: ShardedLayer, gathered: Sequence[Sequence[int]], device: torch.device
    ) -> LocalRoutes:
        """One small copy to the device, on the current stream.

        Args:
            gathered: for each gather, the experts that this rank computes from it.
        """
        stacks = [*gathered, layer.computed_from_parameters()]
        mine = routes.of_rank(layer.group.rank, [expert for stack in stacks for expert in stack])
        counts = np.split(mine.expert_counts, np.cumsum([len(stack) for stack in stacks])[:-1])
        ends = [np.cumsum(each) for each in counts]
        uploaded = upload([mine.send_order, mine.recv_order, np.concatenate(ends)], device)
        send_order, by_expert, ends_there = uploaded
        groups = [
            Groups(each.tolist(), device, there)
            for each, there in zip(
                counts, ends_there.to(torch.int32).split([len(each) for each in counts]), strict=True
            )
        ]
        return cls(
            send_order,
            mine.send_counts.tolist(),
            mine.recv_counts.tolist(),
            by_expert,
            inverse_permutation(by_expert),
            groups[:-1],
            groups[-1],
        )

    def present(self, of_gathered: Sequence[Stack], of_stored: Stack) -> tuple[list[Groups], list[Stack]]:
        """The stacks that have an expert to compute, and their rows."""
        pairs = [*zip(self.gathered, of_gathered, strict=True), (self.stored, of_stored)]
        chosen = [(groups, stack) for groups, stack in pairs if groups.places]
        return [groups for groups, _ in chosen], [stack for _, stack in chosen]


def travel(
    layer: ShardedLayer,
    backward: Backward,
    forward: Forward,
    tokens: Tensor,
    weights: Tensor,
    sending: Sending,
    routes: LocalRoutes,
) -> Tensor:
    """``[T, D]``: the results of ``tokens`` ``[T, D]``, weighted with ``weights`` ``[T, K]``.

    Collective: all ranks call it, with routes that fit each other, and all of them record a graph or none does.
    Stream: the current one; results are ready on it.
    """
    outgoing = permute(tokens, sending.token, sending.position)
    incoming = _AllToAll.apply(outgoing, routes.send_counts, routes.recv_counts, layer, "dispatch")
    x = permute(incoming, routes.by_expert, routes.by_source.unsqueeze(1))
    y = _HeldExperts.apply(x, routes, forward, layer, backward, *layer.experts)
    results = permute(y, routes.by_source, routes.by_expert.unsqueeze(1))
    returned = _AllToAll.apply(results, routes.recv_counts, routes.send_counts, layer, "combine")
    out = combine(returned, sending.position, weights, is_permutation=sending.is_permutation)
    backward.after_forward(layer, forward, has_graph=y.requires_grad)
    return out


class _AllToAll(torch.autograd.Function):
    """An all-to-all whose counts all ranks know already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, send_counts: list[int], recv_counts: list[int], layer: Any, step: str) -> Tensor:
        ctx.send_counts, ctx.recv_counts, ctx.layer, ctx.step = send_counts, recv_counts, layer, step
        return _all_to_all(x, send_counts, recv_counts, layer, step)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back = _all_to_all(grad, ctx.recv_counts, ctx.send_counts, ctx.layer, f"{ctx.step} backward")
        return back, None, None, None, None


def _all_to_all(x: Tensor, send_counts: list[int], recv_counts: list[int], layer: ShardedLayer, step: str) -> Tensor:
    group = layer.group
    operation = group.operation(f"FSSDP {step} ({layer.fqn})")

    def run() -> Tensor:
        before = group.transport.counters.snapshot()
        out, _ = run_all_to_all(group, operation, x, send_counts, recv_counts, trusted=True)
        layer.count_dispatch(group.transport.counters.since(before))
        return out

    with layer.span(step, "dispatch"):
        return group.run(operation, run)


class _HeldExperts(torch.autograd.Function):
    """Grouped compute over the experts that this rank holds.

    The parameters are inputs so that autograd records the node; their gradients do not go back through it, but to
    `Backward`, which brings those of replicas to their owners and sets ``.grad`` when the whole backward ends.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        routes: LocalRoutes,
        forward: Forward,
        layer: ShardedLayer,
        backward: Backward,
        *weights: Tensor,
    ) -> Tensor:
        gathered = forward.replicas.stacks()
        layer.load.gathered = forward.replicas.moved
        begin = layer.meter.stamp()
        with layer.span("experts", "compute"):
            y, hidden = grouped_forward(x, *routes.present(gathered, weights), layer.layer.experts.activation)
        if not is_recomputing():
            layer.meter.computed(begin, len(x))
        # Saving the parameters, with which backward computes again, lets autograd notice in-place changes.
        ctx.save_for_backward(x, *weights, *hidden)
        ctx.num_weights = len(weights)
        ctx.routes, ctx.forward, ctx.layer, ctx.backward = routes, forward, layer, backward
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        weights, hidden = saved[: ctx.num_weights], saved[ctx.num_weights :]
        layer: ShardedLayer = ctx.layer
        forward: Forward = ctx.forward
        routes: LocalRoutes = ctx.routes
        trains = any(ctx.needs_input_grad[5:])
        ctx.backward.before_experts(forward)
        groups, stacks = routes.present(forward.replicas.stacks(), weights)
        owned = tuple(torch.empty_like(weight) for weight in weights) if trains else ()
        leases = forward.replicas.new_gradients() if trains else []
        with layer.span("experts_backward", "compute"):
            dx = grouped_backward(
                dy.contiguous(),
                x,
                hidden,
                groups,
                stacks,
                layer.layer.experts.activation,
                routes.present([lease.stack for lease in leases], owned)[1] if trains else None,
                ctx.needs_input_grad[0],
                # The gradient rule's 1/W costs nothing as a factor of the matrix product.
                scale=1 / layer.group.world_size,
            )
        del stacks  # or the rows that are released now would stay beside those that are gathered next
        if trains:
            ctx.backward.reduce(layer, forward, owned, leases)
        ctx.backward.after_experts(forward)
        return dx, None, None, None, None, *(None for _ in weights)

"""The way of rows: to the ranks that hold their experts, through those, and back; and the same mirrored in backward.

What is sent where has been decided (`sparsecoll.fssdp.dispatch`); nothing here asks another rank, or waits for a GPU.

Legend: ``T`` tokens, ``K`` top-k, ``D`` model dim, ``S`` rows sent, ``M`` rows received, ``W`` ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from sparsecoll.collectives.all_to_all import run_all_to_all
from sparsecoll.fssdp.backward import Backward
from sparsecoll.fssdp.layer import Materialized, ShardedLayer
from sparsecoll.moe.experts import grouped_backward, grouped_forward
from sparsecoll.moe.grouped import Groups
from sparsecoll.moe.permute import combine, inverse_permutation, permute
from sparsecoll.moe.routes import RankRoutes
from sparsecoll.moe.upload import upload

__all__ = ["LocalRoutes", "Sending", "travel"]

T = TypeVar("T")


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
        replicas: rows of each hot expert that is held here.
        owned: rows of each expert that this rank owns, of which only those that are not hot compute with owned weights.
    """

    send_order: Tensor
    send_counts: list[int]
    recv_counts: list[int]
    by_expert: Tensor
    by_source: Tensor
    replicas: Groups
    owned: Groups

    @classmethod
    def of(cls, routes: RankRoutes, owned: Sequence[int], device: torch.device) -> LocalRoutes:
        """One small copy to the device, on the current stream.

        Args:
            owned: experts that this rank owns, ascending.
        """
        hot, others = np.split(routes.expert_counts, [routes.num_hot])
        places = np.flatnonzero(np.isin(owned, routes.experts[routes.num_hot :]))
        own = np.zeros(len(owned), np.int64)
        own[places] = others
        ends = np.concatenate([np.cumsum(hot), np.cumsum(own)])
        send_order, by_expert, ends_there = upload([routes.send_order, routes.recv_order, ends], device)
        hot_ends, own_ends = ends_there.to(torch.int32).split([len(hot), len(own)])
        return cls(
            send_order,
            routes.send_counts.tolist(),
            routes.recv_counts.tolist(),
            by_expert,
            inverse_permutation(by_expert),
            Groups(hot.tolist(), device, hot_ends),
            Groups(own.tolist(), device, own_ends, places.tolist()),
        )

    def present(self, of_replicas: T, of_owned: T) -> list[T]:
        """Of two things that belong to `replicas` and `owned` those, in this order, that have an expert to compute."""
        pairs = ((self.replicas, of_replicas), (self.owned, of_owned))
        return [thing for groups, thing in pairs if groups.places]


def travel(
    layer: ShardedLayer, backward: Backward, tokens: Tensor, weights: Tensor, sending: Sending, routes: LocalRoutes
) -> Tensor:
    """``[T, D]``: the results of ``tokens`` ``[T, D]``, weighted with ``weights`` ``[T, K]``.

    Collective: all ranks call it, with routes that fit each other, and all of them record a graph or none does.
    Stream: the current one; results are ready on it.
    """
    outgoing = permute(tokens, sending.token, sending.position)
    incoming = _AllToAll.apply(outgoing, routes.send_counts, routes.recv_counts, layer, "dispatch")
    x = permute(incoming, routes.by_expert, routes.by_source.unsqueeze(1))
    materialized = layer.materialize()
    y = _HeldExperts.apply(x, routes, materialized, layer, backward, *layer.experts)
    results = permute(y, routes.by_source, routes.by_expert.unsqueeze(1))
    returned = _AllToAll.apply(results, routes.recv_counts, routes.send_counts, layer, "combine")
    out = combine(returned, sending.position, weights, is_permutation=sending.is_permutation)
    backward.after_layer(layer)
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
        before = group.stats()
        out, _ = run_all_to_all(group, operation, x, send_counts, recv_counts, trusted=True)
        layer.count_dispatch(group.stats().since(before))
        return out

    with record_function(f"FSSDP::{step} ({layer.fqn})"):
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
        materialized: Materialized,
        layer: ShardedLayer,
        backward: Backward,
        *weights: Tensor,
    ) -> Tensor:
        y, hidden = grouped_forward(
            x,
            routes.present(routes.replicas, routes.owned),
            routes.present(materialized.weights, weights),
            layer.layer.experts.activation,
        )
        # Saving the parameters, with which backward computes again, lets autograd notice in-place changes.
        ctx.save_for_backward(x, *weights, *hidden)
        ctx.num_weights = len(weights)
        ctx.routes, ctx.materialized, ctx.layer, ctx.backward = routes, materialized, layer, backward
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        weights, hidden = saved[: ctx.num_weights], saved[ctx.num_weights :]
        layer: ShardedLayer = ctx.layer
        materialized: Materialized = ctx.materialized
        routes: LocalRoutes = ctx.routes
        trains = any(ctx.needs_input_grad[5:])
        owned = tuple(torch.empty_like(weight) for weight in weights) if trains else ()
        replicas = tuple(torch.empty_like(weight) for weight in materialized.weights) if trains else ()
        dx = grouped_backward(
            dy.contiguous(),
            x,
            hidden,
            routes.present(routes.replicas, routes.owned),
            routes.present(materialized.weights, weights),
            layer.layer.experts.activation,
            routes.present(replicas, owned) if trains else None,
            ctx.needs_input_grad[0],
            # The gradient rule's 1/W costs nothing as a factor of the matrix product.
            scale=1 / layer.group.world_size,
        )
        if trains:
            ctx.backward.reduce(layer, materialized, owned, replicas)
        return dx, None, None, None, None, *(None for _ in weights)

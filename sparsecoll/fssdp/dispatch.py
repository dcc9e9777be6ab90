"""Tokens to the nearest holder of their experts, and the results back.

Legend: ``T`` tokens, ``K`` top-k, ``D`` model dim, ``N = T * K`` assignments sent, ``M`` assignments received.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from sparsecoll.collectives.all_to_all import run_all_to_all
from sparsecoll.fssdp.backward import Backward
from sparsecoll.fssdp.layer import Materialized, ShardedLayer
from sparsecoll.moe.experts import Experts, Row, grouped_backward, grouped_forward, rows_of
from sparsecoll.moe.permute import combine, inverse_permutation, permute, sort_by_expert
from sparsecoll.moe.router import Routing
from sparsecoll.moe.routes import Routes, plan_routes

__all__ = ["ShardedDispatcher"]


class ShardedDispatcher:
    """The dispatcher of a layer whose experts are sharded: exchange counts, dispatch, compute, combine."""

    def __init__(self, layer: ShardedLayer, backward: Backward) -> None:
        self._layer = layer
        self._backward = backward

    def __call__(self, tokens: Tensor, routing: Routing, experts: Experts) -> Tensor:
        layer = self._layer
        rank, group = layer.group.rank, layer.group
        top_k = routing.expert_ids.shape[1]
        order, counts = sort_by_expert(routing.expert_ids, experts.num_experts)
        place = layer.prefetch()
        requires_grad = tokens.requires_grad and torch.is_grad_enabled()
        loads, any_requires_grad = layer.exchange_counts(counts, requires_grad)
        if any_requires_grad and not requires_grad:
            # A rank without tokens of its own has no graph behind them, yet must take part in all of backward.
            tokens = tokens.detach().requires_grad_()
        routes = plan_routes(loads, place.holders, place.owners, group.topology.node_of)
        mine = routes.of_rank(rank)
        _report(layer, loads, routes)

        sent = order[torch.from_numpy(mine.send_order)]
        position = inverse_permutation(sent).view_as(routing.expert_ids)
        by_expert = torch.from_numpy(mine.recv_order)
        by_source = inverse_permutation(by_expert)
        send_counts, recv_counts = mine.send_counts.tolist(), mine.recv_counts.tolist()

        outgoing = permute(tokens, sent.div(top_k, rounding_mode="floor"), position)
        incoming = _AllToAll.apply(outgoing, send_counts, recv_counts, layer, "dispatch")
        x = permute(incoming, by_expert, by_source.unsqueeze(1))
        materialized = layer.materialize()
        y = _HeldExperts.apply(
            x, mine.expert_counts.tolist(), mine.experts, materialized, layer, self._backward, *layer.experts
        )
        results = permute(y, by_source, by_expert.unsqueeze(1))
        returned = _AllToAll.apply(results, recv_counts, send_counts, layer, "combine")
        out = combine(returned, position, routing.weights, is_permutation=True)
        self._backward.after_layer(layer)
        return out


def _report(layer: ShardedLayer, loads: np.ndarray, routes: Routes) -> None:
    load = layer.load
    load.tokens = loads.sum(axis=0).tolist()
    load.hot = tuple(np.flatnonzero(routes.holders.sum(axis=1) > 1).tolist())
    load.dispatch_bytes = 0
    at_owner = np.bincount(layer.base.owners, weights=load.tokens, minlength=layer.group.world_size)
    computed = routes.quotas.sum(axis=(0, 1))
    load.imbalance_before, load.imbalance_after = _imbalance(at_owner), _imbalance(computed)


def _imbalance(by_rank: np.ndarray) -> float:
    return float(by_rank.max() / by_rank.mean()) if by_rank.any() else 1.0


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
        counts: list[int],
        experts: np.ndarray,
        materialized: Materialized,
        layer: ShardedLayer,
        backward: Backward,
        *weights: Tensor,
    ) -> Tensor:
        activation = layer.layer.experts.activation
        y, hidden = grouped_forward(x, counts, layer.rows(materialized, experts), activation)
        # Saving the parameters, of which rows are taken again in backward, lets autograd notice in-place changes.
        ctx.save_for_backward(x, hidden, *weights)
        ctx.counts, ctx.experts, ctx.materialized = counts, experts, materialized
        ctx.layer, ctx.backward = layer, backward
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, *weights = ctx.saved_tensors
        layer: ShardedLayer = ctx.layer
        materialized: Materialized = ctx.materialized
        trains = any(ctx.needs_input_grad[6:])
        owned = tuple(torch.empty_like(weight) for weight in weights) if trains else ()
        replicas = tuple(torch.empty_like(weight) for weight in materialized.weights) if trains else ()
        dx = grouped_backward(
            dy.contiguous(),
            x,
            hidden,
            ctx.counts,
            layer.rows(materialized, ctx.experts),
            layer.layer.experts.activation,
            _grad_rows(layer, materialized, ctx.experts, owned, replicas) if trains else None,
            ctx.needs_input_grad[0],
            # The gradient rule's 1/W costs nothing as a factor of the matrix product.
            scale=1 / layer.group.world_size,
        )
        if trains:
            ctx.backward.reduce(layer, materialized, owned, replicas)
        return dx, None, None, None, None, None, *(None for _ in weights)


def _grad_rows(
    layer: ShardedLayer,
    materialized: Materialized,
    experts: np.ndarray,
    owned: tuple[Tensor, ...],
    replicas: tuple[Tensor, ...],
) -> list[Row]:
    """Where each held expert's gradient is written: hot ones to be reduced, others straight to the owned rows."""
    at_owner = dict(zip(layer.layer.experts.owned, rows_of(owned), strict=True))
    hot = dict(zip(layer.held_hot(materialized), rows_of(replicas), strict=True))
    return [hot[expert] if expert in hot else at_owner[expert] for expert in experts.tolist()]

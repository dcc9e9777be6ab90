"""What each rank sends where: to the nearest holder of each expert, by the loads of this forward or a fixed capacity.

[Note: waiting for the device] On a GPU the host runs ahead of the device, and waits only where it needs a number that
the device has. In `LoadDispatcher` that is once for each layer and forward, for the counts that say how many rows
travel (`sparsecoll.collectives.counts`); in `FixedDispatcher`, and in the backward of both, it is never. Outside of
layers: ``clip_grad_norm_(error_if_nonfinite=True)``, and the parts of a report that only the device knows. What the
host works out goes the other way in one copy for each layer, which nobody waits for. Hosts also ask each other, without
a device, at the end of each backward, who has which dense gradients; with a fixed capacity they do not.

Legend: ``T`` tokens, ``K`` top-k, ``D`` model dim, ``W`` ranks, ``E`` experts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsecoll.fssdp.backward import Backward
from sparsecoll.fssdp.layer import ShardedLayer
from sparsecoll.fssdp.travel import LocalRoutes, Sending, travel
from sparsecoll.moe.capacity import assign_slots
from sparsecoll.moe.experts import Experts
from sparsecoll.moe.permute import inverse_permutation, sort_by_expert
from sparsecoll.moe.router import Routing
from sparsecoll.moe.routes import Routes, plan_routes
from sparsecoll.placement import Placement

__all__ = ["FixedDispatcher", "LoadDispatcher"]


class LoadDispatcher:
    """Ranks tell each other their loads, and from those each works out all routes; every assignment is computed."""

    def __init__(self, layer: ShardedLayer, backward: Backward) -> None:
        self._layer = layer
        self._backward = backward

    def __call__(
        self, tokens: Tensor, routing: Routing, experts: Experts, meanwhile: Callable[[], Tensor] | None = None
    ) -> Tensor:
        layer, group = self._layer, self._layer.group
        top_k = routing.expert_ids.shape[1]
        order, counts = sort_by_expert(routing.expert_ids, experts.num_experts)
        requires_grad = tokens.requires_grad and torch.is_grad_enabled()
        exchange = layer.start_counts(counts, requires_grad)
        beside = None if meanwhile is None else meanwhile()
        loads, any_requires_grad, forward = layer.finish_counts(exchange)
        if any_requires_grad and not requires_grad:
            # A rank without tokens of its own has no graph behind them, yet must take part in all of backward.
            tokens = tokens.detach().requires_grad_()

        place = forward.place
        routes = plan_routes(loads, place.holders, place.owners, group.topology.node_of, forward.quotas)
        _report(layer, routes)
        layer.load.tokens = loads.sum(axis=0).tolist()
        mine = LocalRoutes.of(routes, layer, forward.replicas.experts, tokens.device)
        sent = order[mine.send_order]
        position = inverse_permutation(sent).view_as(routing.expert_ids)
        sending = Sending(sent.div(top_k, rounding_mode="floor"), position, is_permutation=True)
        out = travel(layer, self._backward, forward, tokens, routing.weights, sending, mine)
        return out if beside is None else out + beside


class FixedDispatcher:
    """Every rank sends ``rows_per_expert`` rows to every expert, so that all routes are known beforehand.

    A forward and backward then make no exchange between hosts, read nothing from a device and have the same shapes
    every time: on a GPU, a graph can capture them.
    """

    def __init__(self, layer: ShardedLayer, backward: Backward, place: Placement, rows_per_expert: int) -> None:
        self._layer = layer
        self._backward = backward
        self._rows_per_expert = layer.load.rows_per_expert = rows_per_expert
        group = layer.group
        loads = np.full((group.world_size, place.num_chunks), rows_per_expert, np.int64)
        routes = plan_routes(loads, place.holders, place.owners, group.topology.node_of)
        _report(layer, routes)
        self._routes = LocalRoutes.of(routes, layer, layer.gathered_here(place), layer.experts[0].device)
        # The last entry is what slot -1 finds.
        place_of_slot = inverse_permutation(self._routes.send_order)
        self._place_of_slot = torch.cat([place_of_slot, place_of_slot.new_full((1,), -1)])

    def __call__(
        self, tokens: Tensor, routing: Routing, experts: Experts, meanwhile: Callable[[], Tensor] | None = None
    ) -> Tensor:
        layer, top_k = self._layer, routing.expert_ids.shape[1]
        forward = layer.fixed_forward()
        if torch.is_grad_enabled() and not tokens.requires_grad:
            # Ranks do not ask each other whose tokens require a gradient, so all of them record the same graph.
            tokens = tokens.detach().requires_grad_()
        order, counts = sort_by_expert(routing.expert_ids, experts.num_experts)
        slots = assign_slots(routing.expert_ids, order, counts, self._rows_per_expert)
        token = slots.assignment[self._routes.send_order].div(top_k, rounding_mode="floor")
        sending = Sending(token, self._place_of_slot[slots.slot], is_permutation=False)
        layer.load.dispatch_bytes, layer.load.chosen = 0, counts
        beside = None if meanwhile is None else meanwhile()
        out = travel(layer, self._backward, forward, tokens, routing.weights, sending, self._routes)
        return out if beside is None else out + beside


def _report(layer: ShardedLayer, routes: Routes) -> None:
    load = layer.load
    load.hot = tuple(np.flatnonzero(routes.holders.sum(axis=1) > 1).tolist())
    load.dispatch_bytes = 0
    rows = routes.quotas.sum(axis=(0, 2))
    at_owner = np.bincount(layer.base.owners, weights=rows, minlength=layer.group.world_size)
    load.imbalance_before, load.imbalance_after = _imbalance(at_owner), _imbalance(routes.quotas.sum(axis=(0, 1)))


def _imbalance(by_rank: NDArray[np.floating | np.integer]) -> float:
    return float(by_rank.max() / by_rank.mean()) if by_rank.any() else 1.0

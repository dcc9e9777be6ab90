"""Mixture-of-experts layers: router, grouped experts, dispatch and combine, and the routes between ranks."""

from sparsecoll.moe.activation import Activation, find_activation
from sparsecoll.moe.capacity import Capacity, Slots, assign_slots
from sparsecoll.moe.experts import Experts, GroupedFFN, Row, grouped_backward, grouped_forward, rows_of
from sparsecoll.moe.layer import Dispatcher, LocalDispatcher, MoELayer, auxiliary_loss
from sparsecoll.moe.permute import combine, inverse_permutation, permute, sort_by_expert
from sparsecoll.moe.router import Router, Routing
from sparsecoll.moe.routes import RankRoutes, Routes, plan_routes

__all__ = [
    "Activation",
    "Capacity",
    "Dispatcher",
    "Experts",
    "GroupedFFN",
    "LocalDispatcher",
    "MoELayer",
    "RankRoutes",
    "Router",
    "Routes",
    "Routing",
    "Row",
    "Slots",
    "assign_slots",
    "auxiliary_loss",
    "combine",
    "find_activation",
    "grouped_backward",
    "grouped_forward",
    "inverse_permutation",
    "permute",
    "plan_routes",
    "rows_of",
    "sort_by_expert",
]

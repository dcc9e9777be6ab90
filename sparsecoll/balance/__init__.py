"""Balancers: loads of past iterations → Placement of the next. Pure, the same on every rank."""

from sparsecoll.balance.base import Balancer, find_balancer
from sparsecoll.balance.busiest import Busiest
from sparsecoll.balance.none import NoReplicas

__all__ = ["Balancer", "Busiest", "NoReplicas", "find_balancer"]

"""Balancers by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sparsecoll.balance.base import Balancer
from sparsecoll.balance.eplb import Eplb
from sparsecoll.balance.faster_moe import FasterMoE
from sparsecoll.balance.hecate import Hecate
from sparsecoll.balance.least_loaded import LeastLoaded
from sparsecoll.balance.none import NoReplicas
from sparsecoll.balance.quota import Quota
from sparsecoll.errors import InvalidArgument

__all__ = ["BALANCERS", "find_balancer"]

BALANCERS: Mapping[str, Any] = MappingProxyType(
    {
        "hecate": Hecate,
        "quota": Quota,
        "least_loaded": LeastLoaded,
        "eplb": Eplb,
        "faster_moe": FasterMoE,
        "none": NoReplicas,
    }
)
"""Names that `sparsecoll.FSSDP` takes, and the classes that they stand for."""


def find_balancer(balancer: str | Balancer) -> Balancer:
    """A balancer by name, or the user's own object.

    Raises:
        InvalidArgument: an unknown name, or an object without ``exact`` and ``balance``.
    """
    if isinstance(balancer, str) and balancer in BALANCERS:
        made: Balancer = BALANCERS[balancer]()
        return made
    if isinstance(balancer, (str, type)) or not isinstance(balancer, Balancer) or not callable(balancer.balance):
        names = ", ".join(BALANCERS)
        raise InvalidArgument(f"balancer: expected {names} or an object with exact and balance, got {balancer!r}")
    exact: Any = balancer.exact
    if not isinstance(exact, bool):
        raise InvalidArgument(f"balancer: expected exact to be True or False, got {exact!r}")
    return balancer

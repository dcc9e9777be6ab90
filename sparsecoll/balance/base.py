"""The one interface of balancers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sparsecoll.balance.busiest import Busiest
from sparsecoll.balance.none import NoReplicas
from sparsecoll.errors import InvalidArgument
from sparsecoll.placement import Placement

__all__ = ["Balancer", "find_balancer"]

_BY_NAME = {"busiest": Busiest, "none": NoReplicas}


@runtime_checkable
class Balancer(Protocol):
    """Decides which experts get replicas, and where."""

    @property
    def window(self) -> int:
        """How many past iterations it looks at."""
        ...

    def place(self, history: Sequence[NDArray[np.int64]], base: Placement) -> Placement:
        """The Placement of the next iteration.

        Must be a pure function of its arguments, for every rank computes it for itself.

        Args:
            history: the loads of the last iterations, oldest first, ``[W, E]`` each: assignments from each source rank
                to each expert; empty at first.
            base: owners, and no replicas.
        """
        ...


def find_balancer(balancer: str | Balancer) -> Balancer:
    """A balancer by name, or the user's own object.

    Raises:
        InvalidArgument: an unknown name, or an object without ``place`` and ``window``.
    """
    if isinstance(balancer, str) and balancer in _BY_NAME:
        made: Any = _BY_NAME[balancer]()
        return made
    if isinstance(balancer, (str, type)) or not isinstance(balancer, Balancer):
        names = ", ".join(sorted(_BY_NAME))
        raise InvalidArgument(f"balancer: expected {names} or an object with place and window, got {balancer!r}")
    window: Any = balancer.window
    if not isinstance(window, int) or window < 1:
        raise InvalidArgument(f"balancer: expected a window of at least 1 iteration, got {window!r}")
    return balancer

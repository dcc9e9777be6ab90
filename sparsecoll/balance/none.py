"""Plain expert parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsecoll.placement import Placement

__all__ = ["NoReplicas"]


@dataclass(frozen=True)
class NoReplicas:
    """No replicas at all: every token travels to its expert's owner."""

    window: int = 1

    def place(self, history: Sequence[NDArray[np.int64]], base: Placement) -> Placement:
        return base

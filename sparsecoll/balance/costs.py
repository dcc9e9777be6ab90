"""What copying and computing the experts of a layer costs: the numbers on which balancers weigh one against the other.

Costs are equal on all ranks, given by the user or measured and agreed on, and decisions take only sums, products,
quotients and comparisons of them, which IEEE arithmetic makes the same everywhere.

Legend: ``W`` ranks, ``E`` experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsecoll.errors import InvalidArgument
from sparsecoll.topology import Topology

__all__ = ["Costs", "Loads"]

Loads = NDArray[np.int64]
"""``[W, E]``: assignments from each source rank to each expert."""


@dataclass(frozen=True)
class Costs:
    """Costs of one layer.

    Attributes:
        topology: which ranks share a node.
        expert_bytes: one expert's parameters, as they travel.
        token_bytes: one token, one way.
        bytes_per_s: with which every rank receives, when experts or tokens travel to all at once.
        token_s: computing one assignment in forward; backward takes twice that.
        hidden_s: dense compute before the layer, under which a gather travels for nothing.
        spare_experts: replicas for which every rank has memory, in this layer.
    """

    topology: Topology
    expert_bytes: int
    token_bytes: int
    bytes_per_s: float
    token_s: float
    hidden_s: float = 0.0
    spare_experts: int = 1 << 30

    def __post_init__(self) -> None:
        positive = {"expert_bytes": self.expert_bytes, "token_bytes": self.token_bytes, "bytes_per_s": self.bytes_per_s}
        for name, value in positive.items():
            if not value > 0:
                raise InvalidArgument(f"Costs: expected {name} > 0, got {value}")
        for name, least in {
            "token_s": self.token_s,
            "hidden_s": self.hidden_s,
            "spare_experts": self.spare_experts,
        }.items():
            if not least >= 0:
                raise InvalidArgument(f"Costs: expected {name} >= 0, got {least}")

    @property
    def copy_s(self) -> float:
        """Copying one expert to all ranks, or its gradients back."""
        return self.expert_bytes / self.bytes_per_s

    @property
    def overlap_degree(self) -> int:
        """How many experts can be copied to all ranks under the dense compute: Hecate's t (section 3.2)."""
        return int(min(self.hidden_s / self.copy_s, 1 << 30))

    def layer_s(self, computed: NDArray[np.int64], sent: NDArray[np.int64], received: NDArray[np.int64]) -> float:
        """Expert compute and all-to-alls of one forward and backward of the layer, on the rank that takes longest.

        Args:
            computed: ``[W]`` assignments that each rank computes.
            sent, received: ``[W]`` of them, those that leave each rank and those that come from another.
        """
        compute_s = 3 * self.token_s * int(computed.max(initial=0))
        busiest = max(int(sent.max(initial=0)), int(received.max(initial=0)))
        return compute_s + 4 * busiest * self.token_bytes / self.bytes_per_s

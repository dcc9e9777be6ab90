"""What a wrapped model tells of itself: measured, local to the rank, and free of communication."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsecoll.fssdp.pool import ReplicaPool
from sparsecoll.transport.base import Counters

__all__ = ["LayerLoad", "MemoryReport", "memory_report"]


@dataclass
class LayerLoad:
    """Measurements of a layer's last forward and backward on this rank.

    Attributes:
        fqn: name of the layer.
        num_experts: over all ranks.
        tokens: ``[num_experts]`` assignments over all ranks; empty with a fixed capacity, where no rank learns them.
        imbalance_before: busiest rank over mean rank, in rows, had every expert computed at its owner. With a fixed
            capacity rows of zeros count as any other.
        imbalance_after: the same as it was computed, with replicas.
        hot: experts that had replicas.
        gathered: what the sparse all-gather moved (`Counters`).
        reduced: what the sparse reduce-scatter moved.
        dispatch_bytes: sent by all-to-all, forward and backward.
        dense_bytes: what this rank would have sent had the all-gather and reduce-scatter been dense.
        rows_per_expert: the fixed capacity, or None.
        chosen: int64 ``[num_experts]`` on the device with a fixed capacity, this rank's assignments; otherwise None.
            Under a captured graph it is the last replay's; what Python counts (bytes) is the capture's.
    """

    fqn: str
    num_experts: int
    tokens: list[int] = field(default_factory=list)
    imbalance_before: float = 1.0
    imbalance_after: float = 1.0
    hot: tuple[int, ...] = ()
    gathered: Counters = field(default_factory=Counters)
    reduced: Counters = field(default_factory=Counters)
    dispatch_bytes: int = 0
    dense_bytes: int = 0
    rows_per_expert: int | None = None
    chosen: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def dropped(self) -> list[int]:
        """``[num_experts]`` assignments of this rank that were beyond the capacity; waits for the device."""
        if self.rows_per_expert is None or self.chosen is None:
            return [0] * self.num_experts
        return (self.chosen - self.rows_per_expert).clamp(min=0).tolist()

    @property
    def sparse_bytes(self) -> int:
        """Sent by the sparse all-gather and reduce-scatter."""
        return self.gathered.sent_bytes + self.reduced.sent_bytes

    @property
    def dead_experts(self) -> list[int]:
        """Experts that no token of any rank chose; empty with a fixed capacity."""
        return [expert for expert, tokens in enumerate(self.tokens) if tokens == 0]

    @property
    def percentiles(self) -> dict[str, float]:
        """Load of experts over the load that each would have in perfect balance: p50, p75, p90, p95, max.

        All 0 where there are no tokens, or no rank knows them.
        """
        mean = sum(self.tokens) / max(1, len(self.tokens))
        relative = np.asarray(self.tokens, float) / mean if mean else np.zeros(max(1, len(self.tokens)))
        named = {f"p{q}": float(np.percentile(relative, q)) for q in (50, 75, 90, 95)}
        return {**named, "max": float(relative.max())}


@dataclass(frozen=True)
class MemoryReport:
    """Bytes that really lie in this rank's memory.

    Attributes:
        param_bytes: parameters as sharded.
        replica_bytes: materialized rows, and their gradients on the way, that are alive now.
        peak_param_bytes: the most that parameters and those have taken together.
        pool_bytes: what they are lent from, with what is kept for the next ones.
        grad_bytes: gradients.
        optimizer_bytes: tensors in the optimizer's state.
        staging_bytes: buffers that the collectives keep.
    """

    param_bytes: int
    replica_bytes: int
    peak_param_bytes: int
    pool_bytes: int
    grad_bytes: int
    optimizer_bytes: int
    staging_bytes: int


def memory_report(
    module: nn.Module, pool: ReplicaPool, optimizer: torch.optim.Optimizer | None, staging_bytes: int
) -> MemoryReport:
    """Adds up ``module``'s tensors and those of ``optimizer``."""
    params = _storage_bytes(module.parameters())
    grads = _storage_bytes(param.grad for param in module.parameters() if param.grad is not None)
    states: list[Any] = [] if optimizer is None else [v for state in optimizer.state.values() for v in state.values()]
    return MemoryReport(
        param_bytes=params,
        replica_bytes=pool.lent_bytes,
        peak_param_bytes=params + pool.peak_bytes,
        pool_bytes=pool.lent_bytes + pool.free_bytes,
        grad_bytes=grads,
        optimizer_bytes=_storage_bytes(value for value in states if isinstance(value, Tensor)),
        staging_bytes=staging_bytes,
    )


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())

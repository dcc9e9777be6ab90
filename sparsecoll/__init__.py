"""sparsecoll: sparse collectives and fully sharded sparse data parallelism for mixture-of-experts training."""

from typing import TYPE_CHECKING, Any

from sparsecoll.collectives import all_to_all, sparse_all_gather, sparse_reduce_scatter
from sparsecoll.errors import (
    BackendUnavailable,
    CollectiveMismatch,
    CollectiveTimeout,
    InvalidArgument,
    PeerFailure,
    SparsecollError,
    TransportError,
)
from sparsecoll.group import Group, init_group, run_local
from sparsecoll.placement import Placement
from sparsecoll.plan import Plan, plan_all_gather, plan_reduce_scatter
from sparsecoll.topology import Link, Topology
from sparsecoll.work import Work

if TYPE_CHECKING:
    from sparsecoll.fssdp import FSSDP, FSSDPModule, JsonLinesWriter, StepRecord, TensorBoardWriter
    from sparsecoll.moe import Capacity

__version__ = "0.1.0"

__all__ = [
    "FSSDP",
    "BackendUnavailable",
    "Capacity",
    "CollectiveMismatch",
    "CollectiveTimeout",
    "FSSDPModule",
    "Group",
    "InvalidArgument",
    "JsonLinesWriter",
    "Link",
    "PeerFailure",
    "Placement",
    "Plan",
    "SparsecollError",
    "StepRecord",
    "TensorBoardWriter",
    "Topology",
    "TransportError",
    "Work",
    "all_to_all",
    "init_group",
    "plan_all_gather",
    "plan_reduce_scatter",
    "run_local",
    "sparse_all_gather",
    "sparse_reduce_scatter",
]


def __getattr__(name: str) -> Any:
    # The wrapper needs torch, which users of the bare collectives may not have.
    if name in ("FSSDP", "FSSDPModule", "JsonLinesWriter", "StepRecord", "TensorBoardWriter"):
        from sparsecoll import fssdp

        return getattr(fssdp, name)
    if name == "Capacity":
        from sparsecoll import moe

        return moe.Capacity
    raise AttributeError(f"module 'sparsecoll' has no attribute {name!r}")

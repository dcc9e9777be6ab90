"""One sharded MoE layer: what it knows of its loads, its Placement, and the replicas under way."""

from __future__ import annotations

import math
import weakref
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.profiler import record_function

from sparsecoll.balance import Balancer
from sparsecoll.collectives.agreement import digest_of
from sparsecoll.collectives.call import Call
from sparsecoll.collectives.counts import CountExchange
from sparsecoll.collectives.pending import Pending
from sparsecoll.errors import InvalidArgument, SparsecollError
from sparsecoll.fssdp.reports import LayerLoad, ReplicaMemory
from sparsecoll.group import Group
from sparsecoll.moe import MoELayer
from sparsecoll.placement import Placement
from sparsecoll.plan import Plan, plan_all_gather, plan_reduce_scatter
from sparsecoll.transport.base import Counters

__all__ = ["Materialized", "ShardedLayer", "is_recomputing"]


@dataclass(frozen=True, eq=False)
class Materialized:
    """The experts that a rank can compute in one forward, and in the backward that belongs to it.

    Attributes:
        place: where every expert is.
        hot: experts with replicas, ascending; all their holders compute with gathered rows, the owner too.
        weights: gathered rows ``[len(held hot), ...]`` of each weight name, of hot experts that this rank holds,
            ascending; empty without replicas.
        plan: of the reduce-scatter that brings their gradients back, or None without replicas.
    """

    place: Placement
    hot: tuple[int, ...]
    weights: tuple[Tensor, ...]
    plan: Plan | None


class _Decision(NamedTuple):
    """Where experts will be in the next forward, and the gather that brings them there, if there is any.

    ``problem`` is what is wrong with the balancer's answer, to be raised on all ranks together.
    """

    place: Placement
    hot: tuple[int, ...] = ()
    gather: Pending | None = None
    problem: Exception | None = None


class ShardedLayer:
    """The state of one MoE layer whose experts are sharded over a group.

    Attributes:
        fqn: name of the layer in the wrapped module.
        base: owners, no replicas.
        chunk_bytes: of one expert.
        load: measurements of the last forward and backward.
        last_plan: of the last sparse all-gather, or None before the first.
    """

    def __init__(
        self, fqn: str, layer: MoELayer, group: Group, base: Placement, balancer: Balancer, memory: ReplicaMemory
    ) -> None:
        self.fqn = fqn
        self.layer = layer
        self.group = group
        self.base = base
        self.balancer = balancer
        self.chunk_bytes = sum(_row_elements(weight) * weight.element_size() for weight in layer.experts.weights)
        self.load = LayerLoad(fqn, layer.experts.num_experts, dense_bytes=self._dense_bytes())
        self.last_plan: Plan | None = None
        self._memory = memory
        self._history: deque[NDArray[np.int64]] = deque(maxlen=balancer.window)
        self._decision: _Decision | None = None
        self._given_up: list[_Decision] = []
        self._last: weakref.ref[Materialized] | None = None

    @property
    def experts(self) -> tuple[torch.nn.Parameter, ...]:
        """The owned rows, ``[num_owned, ...]`` for each weight name."""
        return self.layer.experts.weights

    def prefetch(self) -> Placement:
        """Decides the Placement of the next forward and issues the gather of its replicas; only once."""
        if self._decision is None:
            self._decision = self._decide()
        return self._decision.place

    def _decide(self) -> _Decision:
        last = self._last() if self._last is not None and is_recomputing() else None
        if last is not None:
            return _Decision(last.place, last.hot)
        place = self.balancer.place(list(self._history), self.base)
        if not isinstance(place, Placement) or not np.array_equal(place.owners, self.base.owners):
            text = f"balancer: expected a Placement with the owners of its base {self.base}, got {place}"
            return _Decision(self.base, problem=InvalidArgument(f"{text} {self.group.place_of_error}"))
        hot = tuple(place.replicated().tolist())
        if not hot:
            return _Decision(place)
        self.last_plan = plan_all_gather(place, self.chunk_bytes, self.group.topology, chunks=hot)
        with record_function(f"FSSDP::sparse_all_gather ({self.fqn})"):
            shard = tuple(weight.detach() for weight in self.experts)
            # The exchange of counts makes sure that all ranks have decided alike before any of them waits for this.
            call = Call("sparse_all_gather", place, hot, self.last_plan, "auto", mean=False, trusted=True)
            return _Decision(place, hot, Pending(call, shard, None, self.group))

    def materialize(self) -> Materialized:
        """Waits for the replicas of this forward.

        [Note: recomputation] Under activation checkpointing the forward runs again inside backward. It must route as
        it did, so it takes the same experts, which the first forward's graph keeps alive, and leaves no trace in the
        history.
        """
        last = self._last() if self._last is not None and is_recomputing() else None
        if last is None:
            last = self._wait()
            self._last = weakref.ref(last)
        self._decision = None
        return last

    def _wait(self) -> Materialized:
        assert self._decision is not None
        place, hot, gather, _ = self._decision
        if gather is None:
            self.load.gathered = Counters()
            return Materialized(place, (), (), None)
        with record_function(f"FSSDP::wait_for_sparse_all_gather ({self.fqn})"):
            weights = gather.result()
        self._memory.track(weights)
        self.load.gathered = gather.moved
        plan = plan_reduce_scatter(
            place, self.chunk_bytes, self.group.topology, chunks=hot, partial_bytes=self._partial_bytes()
        )
        return Materialized(place, hot, weights, plan)

    def drop_prefetch(self) -> None:
        """Ends a gather that no forward has asked for."""
        if self._decision is not None and self._decision.gather is not None:
            self._decision.gather.result()
        self._decision = None

    def start_counts(self, counts: Tensor, requires_grad: bool) -> CountExchange:
        """Starts the one exchange that a layer needs in forward; issues the gather of replicas first.

        It carries this rank's ``counts`` ``[E]``, the digest of everything on which ranks must agree, and whether the
        tokens of this rank require a gradient.
        """
        place = self.prefetch()
        assert self._decision is not None
        training, recording = self.layer.training, torch.is_grad_enabled()

        def describe() -> dict[str, object]:
            holders = [np.flatnonzero(row).tolist() for row in place.holders]
            return {"layer": self.fqn, "holders": holders, "training": training, "grad_enabled": recording}

        return CountExchange(
            self.group,
            f"FSSDP counts ({self.fqn})",
            digest_of("FSSDP counts", self.fqn, place.digest, training, recording),
            describe,
            counts,
            requires_grad,
            self._decision.problem,
        )

    def finish_counts(self, exchange: CountExchange) -> tuple[NDArray[np.int64], bool]:
        """All loads ``[W, E]``, and whether the tokens of any rank require a gradient.

        By the latter all ranks record the same graph, and so communicate alike in backward.
        """
        try:
            with record_function(f"FSSDP::exchange_counts ({self.fqn})"):
                loads, flags = exchange.result()
        except SparsecollError:
            # Nobody may answer this gather; its buffers stay, for the back end may still use them.
            assert self._decision is not None
            self._given_up.append(self._decision)
            self._decision = None
            raise
        if self.layer.training and not is_recomputing():
            self._history.append(loads)
        return loads, bool(flags.any())

    def count_dispatch(self, moved: Counters) -> None:
        """Adds the traffic of an all-to-all to the report."""
        self.load.dispatch_bytes += moved.sent_bytes

    def _dense_bytes(self) -> int:
        """What this rank would send if gather and reduction of all experts were dense."""
        gather = plan_all_gather(self.base, self.chunk_bytes, self.group.topology, "dense")
        reduce = plan_reduce_scatter(
            self.base, self.chunk_bytes, self.group.topology, "dense", partial_bytes=self._partial_bytes()
        )
        return int(gather.sent_bytes[self.group.rank] + reduce.sent_bytes[self.group.rank])

    def _partial_bytes(self) -> int:
        return sum(
            _row_elements(weight) * max(weight.element_size(), torch.float32.itemsize) for weight in self.experts
        )


def is_recomputing() -> bool:
    """Whether a forward runs inside a backward, as activation checkpointing makes it."""
    return torch._C._current_graph_task_id() != -1


def _row_elements(weight: Tensor) -> int:
    """Elements of one expert's matrix, also where a rank owns none."""
    return math.prod(weight.shape[1:])

"""One sharded MoE layer: what it knows of its loads and costs, and where its experts are in each forward."""

from __future__ import annotations

import math
import weakref
from collections import deque
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsecoll.balance import Balance, Costs, Loads, divide_loads, exposed_s, predicted_s
from sparsecoll.collectives.agreement import agree, digest_of
from sparsecoll.collectives.counts import CountExchange
from sparsecoll.errors import InvalidArgument, SparsecollError
from sparsecoll.fssdp.measure import Meter
from sparsecoll.fssdp.policy import Policy
from sparsecoll.fssdp.pool import ReplicaPool
from sparsecoll.fssdp.replicas import Replicas
from sparsecoll.fssdp.reports import LayerLoad
from sparsecoll.fssdp.storage import Travel, experts_to_gather, rows_stored, storage, travel_of
from sparsecoll.fssdp.timeline import Kind, Span, Timeline
from sparsecoll.group import Group
from sparsecoll.moe import MoELayer
from sparsecoll.placement import Placement
from sparsecoll.plan import Plan, plan_all_gather, plan_reduce_scatter
from sparsecoll.transport.base import Counters

__all__ = ["Forward", "ShardedLayer", "Shared", "is_recomputing"]

_MOST_RECORDS = 64
"""Forwards of a layer that activation checkpointing may compute again."""

_NOBODY = -1


@dataclass
class Shared:
    """What the layers of a model have in common.

    Attributes:
        copies: the same ranks, for replicas and their gradients, whose messages wait for no others.
        num_layers: of them.
        bytes_per_s: as `sparsecoll.balance.Costs` has it.
        room_bytes: what this rank has left for replicas, read at the begin of each forward.
        dense_begin: stamp of where dense compute began.
    """

    group: Group
    copies: Group
    policy: Policy
    pool: ReplicaPool
    timeline: Timeline
    num_layers: int
    bytes_per_s: float
    room_bytes: int = 0
    dense_begin: Any = None


class Forward(NamedTuple):
    """How one forward of a layer computes.

    Attributes:
        place: who holds which expert.
        quotas: assignments of each expert that each holder takes; None for the nearest holders.
        replicas: what this rank gathers for it.
        rematerializes: whether replicas are released between forward and backward.
    """

    place: Placement
    quotas: NDArray[np.int64] | None
    replicas: Replicas
    rematerializes: bool


class _Record(NamedTuple):
    """A forward that may be computed again, by a number that is the same on all ranks."""

    number: int
    digest: bytes
    counts: bytes
    place: Placement
    quotas: NDArray[np.int64] | None
    gathers: tuple[tuple[int, ...], ...]
    rematerializes: bool
    replicas: weakref.ref[Replicas]


class _Prefetched(NamedTuple):
    """What has been decided before the router; ``problem`` is to be raised on all ranks together."""

    place: Placement
    replicas: Replicas
    problem: Exception | None = None


class ShardedLayer:
    """The state of one MoE layer whose experts are sharded over a group.

    Attributes:
        fqn: name of the layer in the wrapped module.
        base: owners, no replicas; with slices, the rank that computes an expert without replicas.
        slices: into how many chunks an expert is cut: see [Note: owners and slices] of `sparsecoll.fssdp.storage`.
        costs: agreed on by all ranks.
        load: measurements of the last forward and backward.
        last_plan: of the last sparse all-gather, or None before the first.
        history: loads of the last iterations, oldest first.
    """

    def __init__(self, fqn: str, layer: MoELayer, base: Placement, shared: Shared) -> None:
        self.fqn = fqn
        self.layer = layer
        self.shared = shared
        self._base = base
        self.slices = shared.policy.slices(shared.group.world_size)
        # As they are before they are cut down to what this rank stores.
        self.expert_like = tuple(torch.empty_like(w[:0], requires_grad=False) for w in layer.experts.weights)
        self.expert_bytes = sum(_row_elements(weight) * weight.element_size() for weight in self.expert_like)
        self.costs = self._first_costs()
        self.load = LayerLoad(fqn, layer.experts.num_experts, dense_bytes=self._dense_bytes())
        self.last_plan: Plan | None = None
        self.history: deque[Loads] = deque(maxlen=shared.policy.predictor.window)
        self.meter = Meter(torch.device(shared.group.device))
        self._prefetched: _Prefetched | None = None
        self._given_up: list[_Prefetched] = []
        self._records: deque[_Record] = deque(maxlen=_MOST_RECORDS)
        self._num_forwards = 0
        self._room_bytes = 0

    @property
    def base(self) -> Placement:
        return self._base

    @base.setter
    def base(self, base: Placement) -> None:
        """Experts have moved; what was computed before cannot be computed again."""
        self._base = base
        self._records.clear()
        self.load.dense_bytes = self._dense_bytes()

    @property
    def group(self) -> Group:
        return self.shared.group

    @property
    def copies(self) -> Group:
        return self.shared.copies

    @property
    def pool(self) -> ReplicaPool:
        return self.shared.pool

    @property
    def timeline(self) -> Timeline:
        return self.shared.timeline

    @property
    def experts(self) -> tuple[torch.nn.Parameter, ...]:
        """The stored rows, ``[num_owned, ...]`` for each weight name; with slices ``[num_experts, ...]`` of them."""
        return self.layer.experts.weights

    def stored(self) -> list[int]:
        """The experts of which this rank stores a row."""
        return rows_stored(self.base, self.slices, self.group.rank)

    def computed_from_parameters(self) -> list[int]:
        """The experts that this rank computes without a gather."""
        return self.stored() if self.slices == 1 else []

    def span(self, name: str, kind: Kind) -> Span:
        return self.timeline.span(name, self.fqn, kind)

    # Before the router

    def prefetch(self) -> None:
        """Decides the Placement of the next forward and issues the gather of its replicas; only once."""
        if self._prefetched is None and not is_recomputing():
            self._prefetched = self._decide()

    def _decide(self) -> _Prefetched:
        policy, place, problem = self.shared.policy, self.base, None
        if self.fqn in policy.fixed:
            place = policy.fixed[self.fqn]
        elif self.history and not policy.balancer.exact:
            try:
                loads = policy.predictor.predict(list(self.history))
                place = self._balance(loads, self.base, self.costs).place
            except InvalidArgument as error:
                problem = error
        replicas = Replicas(self)
        experts = experts_to_gather(place, self.slices)
        if experts and not (self.slices > 1 and policy.balancer.exact):
            self._gather(replicas, place, experts)
        return _Prefetched(place, replicas, problem)

    def drop_prefetch(self) -> None:
        """Ends a gather that no forward has asked for."""
        if self._prefetched is not None:
            self._prefetched.replicas.release()
        self._prefetched = None

    # The exchange of counts

    def start_counts(self, counts: Tensor, requires_grad: bool) -> CountExchange:
        """Starts the one exchange that a layer needs in forward; issues the gather of replicas first.

        It carries this rank's ``counts`` ``[E]``, the digest of everything on which ranks must agree, whether the
        tokens of this rank require a gradient, its measurements, and when it recomputes, which forward that was.
        """
        if not is_recomputing():
            self.meter.dense(self.shared.dense_begin)
        self.prefetch()
        prefetched, training, recording = self._prefetched, self.layer.training, torch.is_grad_enabled()
        place = None if prefetched is None else prefetched.place

        def describe() -> dict[str, object]:
            holders = None if place is None else [np.flatnonzero(row).tolist() for row in place.holders]
            return {"layer": self.fqn, "holders": holders, "training": training, "grad_enabled": recording}

        agreed = digest_of("FSSDP counts", self.fqn, place and place.digest, training, recording)
        measured = self.meter.dense_ns(), self.meter.assignment_ps(), self.shared.room_bytes
        numbers = (requires_grad, *measured, self._find_own(counts) if prefetched is None else _NOBODY)
        problem = None if prefetched is None else prefetched.problem
        return CountExchange(self.group, f"FSSDP counts ({self.fqn})", agreed, describe, counts, numbers, problem)

    def finish_counts(self, exchange: CountExchange) -> tuple[Loads, bool, Forward]:
        """All loads ``[W, E]``, whether the tokens of any rank require a gradient, and how to compute.

        By the second all ranks record the same graph, and so communicate alike in backward.
        """
        try:
            with self.span("exchange_counts", "counts"):
                loads, numbers = exchange.result()
        except SparsecollError:
            # Nobody may answer this gather; its buffers stay, for the back end may still use them.
            if self._prefetched is not None:
                self._given_up.append(self._prefetched)
                self._prefetched = None
            raise
        requires_grad, dense_ns, assignment_ps, room, candidates = numbers.T
        if self._prefetched is None:
            return loads, bool(requires_grad.any()), self._again(loads, candidates)
        self._room_bytes = int(room.min())
        self._learn(dense_ns, assignment_ps)
        forward = self._settle(loads)
        if self.layer.training:
            self.history.append(loads)
        return loads, bool(requires_grad.any()), forward

    # After the router

    def _settle(self, loads: Loads) -> Forward:
        """What is decided with the true loads."""
        assert self._prefetched is not None
        policy, (place, replicas, _) = self.shared.policy, self._prefetched
        self._prefetched = None
        quotas: NDArray[np.int64] | None = None
        gathered = set() if not replicas.are_present else set(experts_to_gather(place, self.slices))
        if policy.balancer.exact:
            balance = self._balance(loads, place, self.costs)
            place, quotas = balance.place, balance.quotas
        elif policy.calibrate and self.slices == 1:
            place = self._calibrated(loads, place)
        if policy.spread == "quota" and quotas is None:
            quotas = divide_loads(loads, place, self.group.topology.node_of)
        more = tuple(expert for expert in experts_to_gather(place, self.slices) if expert not in gathered)
        if policy.balancer.exact or policy.calibrate:
            self._agree_on(place)
        if more:
            self._gather(replicas, place, more)
        forward = Forward(place, quotas, replicas, self._rematerializes(place))
        self._remember(loads, forward)
        return forward

    def _calibrated(self, loads: Loads, place: Placement) -> Placement:
        """``place`` with replicas of further experts, if they save more time than their gather takes (section 4.2)."""
        spare = self.costs.spare_experts - int((place.holders & ~self.base.holders).sum(axis=0).max(initial=0))
        costs = replace(self.costs, hidden_s=0.0, spare_experts=max(0, spare))
        wanted = self._balance(loads, place, costs).place
        # Rows that are gathered already stay where they are, for both gathers bring rows of different experts.
        new = np.where(place.holders.sum(axis=1, keepdims=True) > 1, place.holders, wanted.holders)
        calibrated = Placement(place.owners, new)
        num_copied = int((new & ~place.holders).sum(axis=0).max(initial=0))
        if not num_copied:
            return place
        before_s, after_s = (predicted_s(loads, Balance(each), costs) for each in (place, calibrated))
        return calibrated if before_s - after_s > exposed_s(num_copied, self.costs, exact=True) else place

    def _balance(self, loads: Loads, base: Placement, costs: Costs) -> Balance:
        """Asks the balancer.

        Raises:
            InvalidArgument: it raised an error, or its answer is none. Equal on all ranks, if it is a pure function.
        """
        where = self.group.place_of_error
        try:
            answer = self.shared.policy.balancer.balance(loads, base, costs)
        except Exception as error:
            raise InvalidArgument(
                f"balancer: expected an answer, got {type(error).__name__}: {error} {where}"
            ) from error
        place = answer.place if isinstance(answer, Balance) else None
        if not isinstance(place, Placement) or not np.array_equal(place.owners, base.owners):
            text = f"balancer: expected a Balance with a Placement with the owners of its base {base}, got {answer}"
            raise InvalidArgument(f"{text} {where}")
        if place.world_size != base.world_size or (base.holders & ~place.holders).any():
            raise InvalidArgument(f"balancer: expected at least the holders of its base {base}, got {place} {where}")
        return answer

    def _agree_on(self, place: Placement) -> None:
        """What is decided after the exchange of counts has not been held against other ranks yet."""
        if self.group.checked and self.group.world_size > 1:
            operation = self.group.operation(f"FSSDP placement ({self.fqn})")
            holders = {"holders": [np.flatnonzero(row).tolist() for row in place.holders]}
            digest = digest_of("FSSDP placement", self.fqn, place.digest)
            self.group.run(operation, lambda: agree(self.group, operation, digest, lambda: holders))

    def fixed_forward(self) -> Forward:
        """With fixed routes, how the next forward computes."""
        self.prefetch()
        prefetched = self._prefetched or self._decide()
        self._prefetched = None
        return Forward(prefetched.place, None, prefetched.replicas, self._rematerializes(prefetched.place))

    def gathered_here(self, place: Placement) -> list[tuple[int, ...]]:
        """For the one gather that brings experts to ``place``, if there is one, those that this rank computes."""
        experts = experts_to_gather(place, self.slices)
        return [self._travel(place, experts).experts] if experts else []

    def _gather(self, replicas: Replicas, place: Placement, experts: tuple[int, ...]) -> None:
        travel = self._travel(place, experts)
        self.last_plan = travel.gather
        replicas.add(travel)

    def _travel(self, place: Placement, experts: tuple[int, ...]) -> Travel:
        return travel_of(
            place,
            experts,
            self.slices,
            self.expert_bytes // self.slices,
            self._partial_bytes() // self.slices,
            self.group.topology,
            self.group.rank,
        )

    def _rematerializes(self, place: Placement) -> bool:
        """Whether to release replicas between forward and backward; equal on all ranks."""
        asked = self.shared.policy.rematerialize
        if asked == "auto":
            most = int((place.holders & ~self.base.holders).sum(axis=0).max(initial=0))
            return most * self.expert_bytes * (self.shared.num_layers + 1) > self._room_bytes
        return bool(asked)

    # Recomputation

    def _remember(self, loads: Loads, forward: Forward) -> None:
        self._num_forwards += 1
        record = _Record(
            self._num_forwards,
            digest_of(loads.tobytes()),
            loads[self.group.rank].tobytes(),
            forward.place,
            forward.quotas,
            tuple(forward.replicas.gathered),
            forward.rematerializes,
            weakref.ref(forward.replicas),
        )
        self._records.appendleft(record)

    def _find_own(self, counts: Tensor) -> int:
        """The last forward with these counts whose replicas are still known here."""
        mine = np.array(counts.tolist(), np.int64).tobytes()
        for record in self._records:
            if record.counts == mine and record.replicas() is not None:
                return record.number
        return _NOBODY

    def _again(self, loads: Loads, candidates: NDArray[np.int64]) -> Forward:
        """How a forward computes that runs a second time.

        [Note: recomputation] Under activation checkpointing the forward runs again inside backward. It must route as
        it did, so it takes the Placement and quotas of the forward with the same loads, and leaves no trace in the
        history. Where all ranks still know the replicas of that forward it takes them too; else, and after a first
        forward that recorded no graph, it gathers them again. A rank alone cannot know which, as it may keep a graph
        alive that others have dropped, so ranks tell each other in the exchange of counts.
        """
        digest = digest_of(loads.tobytes())
        for record in self._records:
            if record.digest != digest:
                continue
            replicas = record.replicas() if (candidates == record.number).all() else None
            if replicas is None:
                replicas = Replicas(self)
                for experts in record.gathers:
                    replicas.add(self._travel(record.place, experts))
            return Forward(record.place, record.quotas, replicas, record.rematerializes)
        raise SparsecollError(
            f"FSSDP ({self.fqn}): expected a recomputation to have the loads of one of the last "
            f"{_MOST_RECORDS} forwards, got others; is the router deterministic? {self.group.place_of_error}"
        )

    # Costs

    def _learn(self, dense_ns: NDArray[np.int64], assignment_ps: NDArray[np.int64]) -> None:
        """Takes what all ranks have measured."""
        if self.fqn in self.shared.policy.costs:
            return
        computing = assignment_ps[assignment_ps > 0]
        # Where ranks copy through the memory of one machine, copies take the cores that are to hide them.
        topology = self.group.topology
        hides = self.group.is_stream_ordered or topology.num_nodes > 1 or not topology.shared_memory
        keeps = 2 if self.shared.policy.rematerialize else self.shared.num_layers + 1
        self.costs = replace(
            self.costs,
            hidden_s=int(dense_ns.min()) * 1e-9 if hides else 0.0,
            token_s=(int(computing.sum()) // len(computing)) * 1e-12 if len(computing) else 0.0,
            spare_experts=self._room_bytes // (keeps * self.expert_bytes),
        )

    def _first_costs(self) -> Costs:
        given = self.shared.policy.costs.get(self.fqn)
        weight = self.layer.experts.weights[0]
        return given or Costs(
            topology=self.group.topology,
            expert_bytes=self.expert_bytes,
            token_bytes=self.layer.dim * weight.element_size(),
            bytes_per_s=self.shared.bytes_per_s,
            token_s=0.0,
        )

    # Reports

    def count_dispatch(self, moved: Counters) -> None:
        """Adds the traffic of an all-to-all to the report."""
        self.load.dispatch_bytes += moved.sent_bytes

    def _dense_bytes(self) -> int:
        """What this rank would send if gather and reduction of all experts were dense."""
        topology, place = self.group.topology, storage(self.base, self.slices)
        chunk_bytes, partial_bytes = (each // self.slices for each in (self.expert_bytes, self._partial_bytes()))
        gather = plan_all_gather(place, chunk_bytes, topology, "dense")
        reduce = plan_reduce_scatter(place, chunk_bytes, topology, "dense", partial_bytes=partial_bytes)
        return int(gather.sent_bytes[self.group.rank] + reduce.sent_bytes[self.group.rank])

    def _partial_bytes(self) -> int:
        width = torch.float32.itemsize
        return sum(_row_elements(weight) * max(weight.element_size(), width) for weight in self.expert_like)


def is_recomputing() -> bool:
    """Whether a forward runs inside a backward, as activation checkpointing makes it."""
    return torch._C._current_graph_task_id() != -1


def _row_elements(weight: Tensor) -> int:
    """Elements of one expert's matrix, also where a rank owns none."""
    return math.prod(weight.shape[1:])

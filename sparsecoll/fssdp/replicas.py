"""Experts that a rank computes without storing them, from the gather before a forward to the end of its backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sparsecoll.collectives.pending import Pending
from sparsecoll.collectives.stacks import Rows, StackCall
from sparsecoll.fssdp.pool import Lease, ReplicaPool, Stack
from sparsecoll.fssdp.storage import Travel
from sparsecoll.fssdp.timeline import Flight, Kind, Span, Timeline
from sparsecoll.group import Group
from sparsecoll.transport.base import Counters

__all__ = ["Home", "Reduction", "Replicas"]


class Home(Protocol):
    """What replicas are copies of: a sharded layer."""

    @property
    def fqn(self) -> str: ...

    @property
    def copies(self) -> Group: ...

    @property
    def slices(self) -> int: ...

    @property
    def pool(self) -> ReplicaPool: ...

    @property
    def timeline(self) -> Timeline: ...

    @property
    def experts(self) -> tuple[torch.nn.Parameter, ...]: ...

    @property
    def expert_like(self) -> tuple[Tensor, ...]: ...


class Replicas:
    """The gathered experts of one forward.

    They may be released and gathered again; all ranks do the same at the same points of their programs, so that nothing
    here depends on what a rank's garbage collector has done.

    Attributes:
        home: the layer.
        moved: what the gathers have sent and received.
        previous: those of the layer before, in the same forward of the model.
    """

    def __init__(self, home: Home) -> None:
        self.home = home
        self._travels: list[Travel] = []
        self._leases: list[Lease] | None = None
        self._pending: list[tuple[Pending, Flight]] = []
        self.moved = Counters()
        self.previous: Replicas | None = None

    @property
    def experts(self) -> list[tuple[int, ...]]:
        """For each gather, the experts that this rank computes from it."""
        return [travel.experts for travel in self._travels]

    @property
    def gathered(self) -> list[tuple[int, ...]]:
        """For each gather, the experts that it brings to any rank."""
        return [travel.gathered for travel in self._travels]

    @property
    def are_present(self) -> bool:
        """Gathered, or on their way."""
        return self._leases is not None

    def add(self, travel: Travel) -> None:
        """Gathers more experts, none of which have been gathered before."""
        if self._leases is None:
            self._leases = []
        self._travels.append(travel)
        self._gather(travel)

    def start(self) -> None:
        """Gathers again what was released."""
        if self._leases is None:
            self._leases = []
            for travel in self._travels:
                self._gather(travel)

    def stacks(self) -> list[Stack]:
        """The gathered rows, ``[len(experts[i]), ...]`` of each weight; waits for them."""
        self.start()
        for pending, flight in self._pending:
            with self._span("wait_for_sparse_all_gather", "wait"):
                pending.result()
            flight.end()
            self.moved = self.moved + pending.moved
        self._pending = []
        assert self._leases is not None
        return [lease.stack for lease in self._leases]

    def release(self) -> None:
        """Gives the memory back, after the end of what is on its way."""
        if self._leases is not None:
            self.stacks()  # what is on its way writes into that memory
            for lease in self._leases:
                lease.give_back()
            self._leases = None

    def new_gradients(self) -> list[Lease]:
        """Memory for a gradient of each of `stacks`."""
        return [self.home.pool.take(len(travel.experts), self.home.expert_like) for travel in self._travels]

    def reduce(self, owned: Stack, gradients: Sequence[Lease]) -> Reduction:
        """Starts bringing gradients home.

        Args:
            owned: gradients of the stored rows, with this rank's contributions where it computes from those; gets the
                sums over all ranks.
            gradients: of the gathered rows.
        """
        pending = []
        for travel, lease in zip(self._travels, gradients, strict=True):
            call = StackCall.of("sparse_reduce_scatter", travel.reduce, self.home.experts)
            source = Rows([owned, self._cut(lease.stack)], travel.contributions)
            with self._span("sparse_reduce_scatter", "issue"):
                flight = self.home.timeline.flight("sparse_reduce_scatter", self.home.fqn)
                pending.append((Pending(call, source, Rows([owned], travel.home), self.home.copies), flight))
        return Reduction(self.home, owned, gradients, pending)

    def _gather(self, travel: Travel) -> None:
        lease = self.home.pool.take(len(travel.experts), self.home.expert_like)
        assert self._leases is not None
        self._leases.append(lease)
        parameters = [tuple(weight.detach() for weight in self.home.experts)]
        call = StackCall.of("sparse_all_gather", travel.gather, self.home.experts)
        with self._span("sparse_all_gather", "issue"):
            flight = self.home.timeline.flight("sparse_all_gather", self.home.fqn)
            destination = Rows([self._cut(lease.stack)], travel.destination)
            pending = Pending(call, Rows(parameters, travel.source), destination, self.home.copies)
        self._pending.append((pending, flight))

    def _cut(self, stack: Stack) -> Stack:
        """Rows of experts as rows of chunks."""
        slices = self.home.slices
        return tuple(each.view(len(each) * slices, each.shape[1] // slices, *each.shape[2:]) for each in stack)

    def _span(self, name: str, kind: Kind) -> Span:
        return self.home.timeline.span(name, self.home.fqn, kind)


class Reduction:
    """Gradients on their way home.

    Attributes:
        moved: what the reduce-scatters have sent and received.
    """

    def __init__(
        self, home: Home, owned: Stack, gradients: Sequence[Lease], pending: list[tuple[Pending, Flight]]
    ) -> None:
        self._home, self._owned, self._gradients, self._pending = home, owned, gradients, pending
        self.moved = Counters()

    def finish(self) -> Stack:
        """Waits, gives the memory of the gathered rows' gradients back, and returns those of the stored rows."""
        for pending, flight in self._pending:
            with self._home.timeline.span("wait_for_sparse_reduce_scatter", self._home.fqn, "wait"):
                pending.result()
            flight.end()
            self.moved = self.moved + pending.moved
        for lease in self._gradients:
            lease.give_back()
        self._pending, self._gradients = [], ()
        return self._owned

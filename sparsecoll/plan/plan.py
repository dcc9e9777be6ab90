"""A frozen schedule of transfers: what a sparse collective will do, known before a byte moves."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecoll.errors import InvalidArgument
from sparsecoll.placement import Placement
from sparsecoll.plan.algorithms import Case, draft
from sparsecoll.plan.bounds import holders_bound_s, universal_bound_s
from sparsecoll.plan.compiled import simulate
from sparsecoll.plan.costs import costs_of
from sparsecoll.plan.explain import explain
from sparsecoll.plan.picture import save_picture
from sparsecoll.plan.simulate import Timeline
from sparsecoll.plan.trace import save_trace
from sparsecoll.plan.transfer import TRANSFER, Table, freeze, in_rounds
from sparsecoll.topology import Topology

__all__ = ["Plan"]


@dataclass(frozen=True, eq=False)
class Plan:
    """The transfers of one sparse collective over all ranks; equal on all ranks, compared by `digest`.

    Shapes: ``C`` chunks of the Placement, ``W`` ranks.

    Attributes:
        op: ``all_gather`` or ``reduce_scatter``.
        algorithm: ``direct``, ``relay``, ``hierarchical`` or ``dense``.
        place: owners and holders.
        chunks: the chunks that take part, ascending.
        chunk_bytes: ``[C]``, size of a chunk in the input's dtype.
        partial_bytes: ``[C]``, size of a partial sum of it in the accumulation dtype.
        topology: what predictions are made with.
        transfers: array of `sparsecoll.plan.transfer.TRANSFER`.
    """

    op: str
    algorithm: str
    place: Placement
    chunks: tuple[int, ...]
    chunk_bytes: tuple[int, ...]
    partial_bytes: tuple[int, ...]
    topology: Topology
    transfers: NDArray[Any]

    @cached_property
    def transfer_bytes(self) -> NDArray[np.int64]:
        """``[num_transfers]``, bytes on the wire of each transfer."""
        table = self.transfers
        whole = np.maximum(np.asarray(self.chunk_bytes, np.int64), 1)[table["chunk"]]
        # Chunks that are cut have one width of partial sums for all bytes, so ratios are whole numbers there.
        partial = np.asarray(self.partial_bytes, np.int64)[table["chunk"]]
        length = table["end"] - table["begin"]
        sums = np.where(length == whole, partial, length * (partial // whole))
        return freeze(np.where(table["partial"], sums, length))

    @cached_property
    def sent_bytes(self) -> NDArray[np.int64]:
        """``[W]``, bytes that each rank sends; own copies do not count."""
        return self._per_rank("src", self.transfer_bytes)

    @cached_property
    def received_bytes(self) -> NDArray[np.int64]:
        """``[W]``, bytes that each rank receives."""
        return self._per_rank("dst", self.transfer_bytes)

    @cached_property
    def sent_transfers(self) -> NDArray[np.int64]:
        """``[W]``, pieces that each rank sends; each is one message per tensor of a chunk that it is cut from."""
        return self._per_rank("src", self.transfers["pieces"].astype(np.int64))

    @cached_property
    def staging_bytes(self) -> NDArray[np.int64]:
        """``[W]``, buffer space that each rank needs beside the caller's input and output."""
        transfers, place = self.transfers, self.place
        dst, chunk = transfers["dst"], transfers["chunk"]
        if self.op == "all_gather":
            return self._per_rank("dst", np.where(place.holders[chunk, dst], 0, self.transfer_bytes))
        arrivals = self._per_rank("dst", self.transfer_bytes)
        sent_sums = self._per_rank("src", np.where(transfers["partial"], self.transfer_bytes, 0))
        # A rank that must contribute without holding the chunk sends from one block of zeros.
        without = ~transfers["partial"] & ~place.holders[chunk, transfers["src"]]
        zeros = np.zeros(place.world_size, np.int64)
        np.maximum.at(zeros, transfers["src"], np.where(without, self.transfer_bytes, 0))
        return freeze(arrivals + sent_sums + zeros)

    @cached_property
    def played(self) -> Table:
        """``transfers`` as `timeline` counts their pieces: those that are all posted at once travel side by side."""
        return in_rounds(self.transfers)

    @cached_property
    def timeline(self) -> Timeline:
        """When each piece of ``played`` travels if links are all that takes time; see `sparsecoll.plan.simulate`.

        Raises:
            InvalidArgument: pieces wait for each other in a circle; only a table made by hand can have one.
        """
        table, row_bytes, gathers = self.played, self.transfer_bytes, self.op == "all_gather"
        found = simulate(table, row_bytes, self.topology.node_of, costs_of(self.topology), gathers=gathers)
        size, count = row_bytes[found.row], table["pieces"][found.row].astype(np.int64)
        has_bytes = size * (found.piece + 1) // count > size * found.piece // count
        stuck = has_bytes & (found.arrived == 0)
        if stuck.any():
            row = int(found.row[stuck.argmax()])
            raise InvalidArgument(f"plan: expected every transfer to end, got {table[row]} that waits for ever")
        return found

    @cached_property
    def predicted_s(self) -> float:
        """Seconds that the schedule takes on ``topology``, with latencies and the filling of the pipeline."""
        return self.timeline.finish * costs_of(self.topology).tick_s

    @cached_property
    def bound_s(self) -> float:
        """Seconds below which no schedule gets in which only holders carry chunks; see `sparsecoll.plan.bounds`."""
        return holders_bound_s(self.place, self.chunks, self.chunk_bytes, self.topology)

    @cached_property
    def universal_bound_s(self) -> float:
        """Seconds below which no schedule at all gets, whoever carries chunks."""
        return universal_bound_s(self.place, self.chunks, self.chunk_bytes, self.topology)

    @cached_property
    def digest(self) -> str:
        """Hash of everything that moves; ranks may only run plans of equal digest together."""
        content = hashlib.blake2b(digest_size=16)
        content.update(f"{self.op} {self.algorithm} {self.place.digest} {len(self.chunks)} ".encode())
        for numbers in (self.chunks, self.chunk_bytes, self.partial_bytes):
            content.update(np.asarray(numbers, "<i8").tobytes())
        for name in TRANSFER.names or ():  # one by one, as a table may have anything between its columns
            content.update(np.ascontiguousarray(self.transfers[name]).tobytes())
        return content.hexdigest()

    def redrafted(self, algorithm: str, *, divisible: bool = True) -> Plan:
        """What the readable planner makes of the same inputs, to hold the native one against; it is slow.

        Args:
            algorithm, divisible: that this plan was asked for with.
        """
        chunks, sizes, partial_sizes = (
            np.array(numbers, np.int64) for numbers in (self.chunks, self.chunk_bytes, self.partial_bytes)
        )
        case = Case.of(self.op, self.place, chunks, sizes, partial_sizes, self.topology, divisible)
        made = draft(case, algorithm)
        return replace(self, algorithm=made.algorithm, transfers=made.table)

    def explain(self) -> str:
        """The schedule as tables to read: totals, ranks, and the trees of chunks."""
        return explain(self)

    def show(self, path: str | os.PathLike[str]) -> None:
        """Writes an HTML page with the timeline of every link and the bounds; see `sparsecoll.plan.picture`.

        Raises:
            InvalidArgument: the file cannot be written; names the path.
        """
        save_picture(self, path)

    def trace(self, path: str | os.PathLike[str]) -> None:
        """Writes the timeline as a Chrome trace, for ui.perfetto.dev; see `sparsecoll.plan.trace`.

        Raises:
            InvalidArgument: the file cannot be written; names the path.
        """
        save_trace(self, path)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Plan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return (
            f"Plan({self.op}, {self.algorithm}, {len(self.chunks)} of {self.place.num_chunks} chunks, "
            f"{len(self.transfers)} transfers, {int(self.sent_bytes.sum())} bytes, digest={self.digest[:8]})"
        )

    def _per_rank(self, side: str, amounts: NDArray[np.int64]) -> NDArray[np.int64]:
        totals = np.zeros(self.place.world_size, np.int64)
        np.add.at(totals, self.transfers[side], amounts)
        return freeze(totals)

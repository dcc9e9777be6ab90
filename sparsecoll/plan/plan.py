"""A frozen schedule of transfers: what a sparse collective will do, known before a byte moves."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecoll.placement import Placement
from sparsecoll.plan.bounds import bound_s
from sparsecoll.plan.explain import explain
from sparsecoll.topology import Topology

__all__ = ["TRANSFER", "Plan", "transfer_table"]

TRANSFER = np.dtype([("stage", "<i4"), ("src", "<i4"), ("dst", "<i4"), ("chunk", "<i4"), ("partial", "?")])
"""One row of `Plan.transfers`.

``stage``: a rank forwards in stage k what it received in stages before k. ``partial``: the payload is a sum that a
relay made of several contributions, in the accumulation dtype, rather than a contribution in the input's dtype.
"""


@dataclass(frozen=True, eq=False)
class Plan:
    """The transfers of one sparse collective over all ranks; equal on all ranks, compared by `digest`.

    Shapes: ``C`` chunks of the Placement, ``W`` ranks.

    Attributes:
        op: ``all_gather`` or ``reduce_scatter``.
        algorithm: ``direct`` or ``dense``.
        place: owners and holders.
        chunks: the chunks that take part, ascending.
        chunk_bytes: ``[C]``, size of a chunk in the input's dtype.
        partial_bytes: ``[C]``, size of a partial sum of it in the accumulation dtype.
        topology: what predictions are made with.
        transfers: array of `TRANSFER`; messages of a pair of ranks travel in this order.
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
        whole = np.asarray(self.chunk_bytes, np.int64)
        partial = np.asarray(self.partial_bytes, np.int64)
        chunk = self.transfers["chunk"]
        return _frozen(np.where(self.transfers["partial"], partial[chunk], whole[chunk]))

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
        """``[W]``, transfers that each rank sends; each is one message per tensor of a chunk."""
        return self._per_rank("src", np.ones(len(self.transfers), np.int64))

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
        return _frozen(arrivals + sent_sums + zeros)

    @cached_property
    def predicted_s(self) -> float:
        """Time of the schedule on ``topology``: stages one after the other, in each the busiest link direction."""
        transfers, topology = self.transfers, self.topology
        if not len(transfers):
            return 0.0
        nodes = np.asarray(topology.node_of)
        inside = nodes[transfers["src"]] == nodes[transfers["dst"]]
        num_stages, world_size = int(transfers["stage"].max()) + 1, self.place.world_size
        busiest = np.zeros(num_stages)
        for link, crossing in ((topology.scale_up, inside), (topology.scale_out, ~inside)):
            cost = link.latency_s + self.transfer_bytes[crossing] / link.bandwidth_bytes_per_s
            for side in ("src", "dst"):
                busy = np.zeros((num_stages, world_size))
                np.add.at(busy, (transfers["stage"][crossing], transfers[side][crossing]), cost)
                busiest = np.maximum(busiest, busy.max(axis=1))
        return float(busiest.sum())

    @cached_property
    def bound_s(self) -> float:
        """No schedule at all is faster than this on ``topology``; see `sparsecoll.plan.bounds`."""
        return bound_s(self.place, self.chunks, self.chunk_bytes, self.topology)

    @cached_property
    def digest(self) -> str:
        """Hash of everything that moves; ranks may only run plans of equal digest together."""
        content = hashlib.blake2b(digest_size=16)
        content.update(f"{self.op} {self.algorithm} {self.place.digest} {len(self.chunks)} ".encode())
        for numbers in (self.chunks, self.chunk_bytes, self.partial_bytes):
            content.update(np.asarray(numbers, "<i8").tobytes())
        content.update(self.transfers.tobytes())
        return content.hexdigest()

    def explain(self) -> str:
        """The schedule as a table to read."""
        return explain(self)

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
        return _frozen(totals)


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    """Plans are shared by all callers with equal arguments, so none may change what another sees."""
    array.flags.writeable = False
    return array


def transfer_table(stage: Any, src: Any, dst: Any, chunk: Any, partial: Any) -> NDArray[Any]:
    """Packs equally long columns (or scalars) into a read-only array of `TRANSFER`."""
    columns = np.broadcast_arrays(stage, src, dst, chunk, partial)
    table = np.zeros(columns[0].shape, TRANSFER)
    for name, column in zip(TRANSFER.names or (), columns, strict=True):
        table[name] = column
    return _frozen(table)

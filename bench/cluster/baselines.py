"""What a user of torch.distributed would write instead, on the same Gloo and the same links."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bench.cluster.buffers import Buffers
from bench.cluster.contestants import Contestant
from bench.cluster.placements import Scene

__all__ = ["Subgroups", "baselines"]


class Subgroups:
    """A process group for the holders of each chunk that has several, made before anything is timed.

    Collective: all ranks make it.
    """

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._made: dict[tuple[int, ...], Any] = {tuple(range(scene.place.world_size)): dist.group.WORLD}
        for chunk in scene.place.replicated().tolist():
            ranks = self._holders(chunk)
            if ranks not in self._made:
                self._made[ranks] = dist.new_group(list(ranks), backend="gloo")

    def of(self, chunk: int) -> Any:
        """Of all holders of a chunk."""
        return self._made[self._holders(chunk)]

    def close(self, rank: int) -> None:
        """Destroys those that ``rank`` is in."""
        for ranks, group in self._made.items():
            if group is not dist.group.WORLD and rank in ranks:
                dist.destroy_process_group(group)

    def _holders(self, chunk: int) -> tuple[int, ...]:
        return tuple(np.flatnonzero(self._scene.place.holders[chunk]).tolist())


def baselines(scene: Scene, collective: str, buffers: Buffers, rank: int, groups: Subgroups) -> list[Contestant]:
    """All of a collective."""
    if collective == "ag":
        return [
            Broadcasts(scene, buffers, rank, groups),
            SendsAndReceives(scene, buffers, rank),
            DenseAllGather(scene, buffers, rank),
        ]
    return [
        Reductions(scene, buffers, rank, groups),
        SendsAndSums(scene, buffers, rank),
        DenseReduceScatter(scene, buffers, rank),
    ]


class _OverTorch(Contestant):
    """Rows of the buffers as tensors over the same memory."""

    def __init__(self, scene: Scene, buffers: Buffers, rank: int) -> None:
        self._rank = rank
        self._owners = scene.place.owners.tolist()
        self._holders = [np.flatnonzero(row).tolist() for row in scene.place.holders]
        self._chunks = scene.place.replicated().tolist()
        self._source = {chunk: torch.from_numpy(row) for chunk, row in buffers.source.items()}
        self._destination = {chunk: torch.from_numpy(row) for chunk, row in buffers.destination.items()}

    def _mine(self) -> Iterator[int]:
        """Chunks that this rank takes part in moving."""
        return (chunk for chunk in self._chunks if self._rank in self._holders[chunk])

    def _others(self, chunk: int) -> Iterator[int]:
        return (holder for holder in self._holders[chunk] if holder != self._owners[chunk])

    def _copy_own(self) -> None:
        for chunk in self._source.keys() & self._destination.keys():
            self._destination[chunk].copy_(self._source[chunk])


class Broadcasts(_OverTorch):
    """One broadcast per chunk over its holders, all in flight together (Hecate, section 5.1)."""

    name = "broadcast"
    detail = "dist.broadcast(async_op=True) for each chunk"

    def __init__(self, scene: Scene, buffers: Buffers, rank: int, groups: Subgroups) -> None:
        super().__init__(scene, buffers, rank)
        self._groups = groups

    def run(self) -> None:
        works = []
        for chunk in self._mine():
            owner = self._owners[chunk]
            row = self._source[chunk] if owner == self._rank else self._destination[chunk]
            works.append(dist.broadcast(row, owner, group=self._groups.of(chunk), async_op=True))
        self._copy_own()
        for work in works:
            work.wait()


class Reductions(_OverTorch):
    """One reduction per chunk over its holders, all in flight together."""

    name = "reduce"
    detail = "dist.reduce(async_op=True) for each chunk"

    def __init__(self, scene: Scene, buffers: Buffers, rank: int, groups: Subgroups) -> None:
        super().__init__(scene, buffers, rank)
        self._groups = groups

    def run(self) -> None:
        self._copy_own()
        works = []
        for chunk in self._mine():
            owner = self._owners[chunk]
            # In place: at the owner in its output, elsewhere in the input, which is written anew for every run.
            row = self._destination[chunk] if owner == self._rank else self._source[chunk]
            works.append(dist.reduce(row, owner, group=self._groups.of(chunk), async_op=True))
        for work in works:
            work.wait()


class SendsAndReceives(_OverTorch):
    """The owner sends every holder its copy."""

    name = "send_recv"
    detail = "dist.batch_isend_irecv, owner to holders"

    def run(self) -> None:
        operations = []
        for chunk in self._mine():
            if self._owners[chunk] == self._rank:
                row = self._source[chunk]
                operations += [dist.P2POp(dist.isend, row, holder, tag=chunk) for holder in self._others(chunk)]
            else:
                operations.append(dist.P2POp(dist.irecv, self._destination[chunk], self._owners[chunk], tag=chunk))
        works = dist.batch_isend_irecv(operations) if operations else []
        self._copy_own()
        for work in works:
            work.wait()


class SendsAndSums(_OverTorch):
    """Every holder sends the owner its contribution, and the owner sums."""

    name = "send_recv"
    detail = "dist.batch_isend_irecv, holders to owner, and additions"

    def __init__(self, scene: Scene, buffers: Buffers, rank: int) -> None:
        super().__init__(scene, buffers, rank)
        self._arriving = {
            chunk: {holder: torch.empty_like(row) for holder in self._others(chunk)}
            for chunk, row in self._destination.items()
        }

    def run(self) -> None:
        operations = []
        for chunk in self._mine():
            if self._owners[chunk] == self._rank:
                arriving = self._arriving[chunk].items()
                operations += [dist.P2POp(dist.irecv, row, holder, tag=chunk) for holder, row in arriving]
            else:
                operations.append(dist.P2POp(dist.isend, self._source[chunk], self._owners[chunk], tag=chunk))
        works = dist.batch_isend_irecv(operations) if operations else []
        self._copy_own()
        for work in works:
            work.wait()
        for chunk, rows in self._arriving.items():
            for row in rows.values():
                self._destination[chunk] += row


class _Dense(_OverTorch):
    """Every rank has a share of the largest rank's size, chunks one after the other in it."""

    def __init__(self, scene: Scene, buffers: Buffers, rank: int) -> None:
        super().__init__(scene, buffers, rank)
        self._length = 0
        self._spans: list[slice] = [slice(0)] * scene.place.num_chunks
        for owner in range(scene.place.world_size):
            begin = 0
            for chunk in scene.place.owned_by(owner).tolist():
                self._spans[chunk] = slice(begin, begin := begin + scene.lengths[chunk])
            self._length = max(self._length, begin)
        self._share = torch.zeros(self._length)
        self._whole = torch.zeros(scene.place.world_size, self._length)

    def _row(self, chunk: int) -> Tensor:
        return self._whole[self._owners[chunk], self._spans[chunk]]


class DenseAllGather(_Dense):
    """Everything to everybody, padded to the largest share."""

    name = "torch_dense"
    detail = "dist.all_gather_single (or _into_tensor)"

    def prepare(self) -> None:
        for chunk, row in self._source.items():
            self._share[self._spans[chunk]] = row

    def run(self) -> None:
        _dense_call("all_gather_single", "all_gather_into_tensor")(self._whole.view(-1), self._share)

    def finish(self) -> None:
        for chunk, row in self._destination.items():
            row.copy_(self._row(chunk))


class DenseReduceScatter(_Dense):
    """Sums of everything, with zeros where a rank holds nothing."""

    name = "torch_dense"
    detail = "dist.reduce_scatter_single (or _tensor)"

    def prepare(self) -> None:
        self._whole.zero_()
        for chunk, row in self._source.items():
            self._row(chunk).copy_(row)

    def run(self) -> None:
        _dense_call("reduce_scatter_single", "reduce_scatter_tensor")(self._share, self._whole.view(-1))

    def finish(self) -> None:
        for chunk, row in self._destination.items():
            row.copy_(self._share[self._spans[chunk]])


def _dense_call(name: str, older_name: str) -> Any:
    """torch 2.13 has renamed them."""
    return getattr(dist, name, None) or getattr(dist, older_name)

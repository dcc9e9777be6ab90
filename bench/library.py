"""What a user would call instead: the dense collectives of mpi4py, torch.distributed and NCCL, on the same ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

import sparsecoll as sc

__all__ = ["Baseline", "Library", "library_of"]

Array = Any  # NumPy's, or CuPy's on a GPU

_NCCL_ID_BYTES = 128


class Baseline(NamedTuple):
    """A dense collective, ready to call as ``call(source, destination)``.

    Attributes:
        name: as its library calls it.
        num_source_rows: rows of the source, padding included.
        rows: of the destination where each chunk arrives.
        num_rows: of the destination, padding included.
    """

    name: str
    call: Callable[[Array, Array], None]
    num_source_rows: int
    rows: Sequence[int]
    num_rows: int


class Library(ABC):
    """One library's collectives; ``shares`` are the rows of each rank, ``rank`` is this one."""

    @abstractmethod
    def all_gather(self, shares: Sequence[int], rank: int) -> Baseline: ...

    @abstractmethod
    def reduce_scatter(self, shares: Sequence[int], rank: int, mean: bool) -> Baseline: ...

    @abstractmethod
    def all_to_all(self, sends: Sequence[int], receives: Sequence[int]) -> Baseline:
        """``sends`` and ``receives`` are elements."""


def library_of(group: sc.Group) -> Library | None:
    """The library below ``group``; threads as ranks have none. Collective."""
    if group.backend == "nccl":
        return _Nccl(group)
    if group.backend == "mpi":
        return _Mpi()
    return _Torch() if group.backend == "torch" else None


class _Mpi(Library):
    def __init__(self) -> None:
        from mpi4py import MPI  # sparsecoll has loaded it

        self._mpi, self._comm = MPI, MPI.COMM_WORLD

    def all_gather(self, shares: Sequence[int], rank: int) -> Baseline:
        comm, byte = self._comm, self._mpi.BYTE
        rows, num_rows = range(sum(shares)), sum(shares)
        if len(set(shares)) == 1:

            def even(source: Array, destination: Array) -> None:
                comm.Allgather([source, byte], [destination, byte])

            return Baseline("MPI_Allgather", even, shares[rank], rows, num_rows)

        def uneven(source: Array, destination: Array) -> None:
            row_bytes = destination[0].nbytes
            comm.Allgatherv([source, byte], [destination, [share * row_bytes for share in shares], byte])

        return Baseline("MPI_Allgatherv", uneven, shares[rank], rows, num_rows)

    def reduce_scatter(self, shares: Sequence[int], rank: int, mean: bool) -> Baseline:
        def call(source: Array, destination: Array) -> None:
            row_size = source[0].size
            self._comm.Reduce_scatter(source, destination, [share * row_size for share in shares], self._mpi.SUM)
            if mean:
                np.divide(destination, len(shares), out=destination)

        name = "MPI_Reduce_scatter" + (" and a division" if mean else "")
        return Baseline(name, call, sum(shares), range(shares[rank]), shares[rank])

    def all_to_all(self, sends: Sequence[int], receives: Sequence[int]) -> Baseline:
        def call(source: Array, destination: Array) -> None:
            self._comm.Alltoallv([source, sends], [destination, receives])

        return Baseline("MPI_Alltoallv", call, sum(sends), range(sum(receives)), sum(receives))


class _Torch(Library):
    def __init__(self) -> None:
        import torch
        import torch.distributed

        self._torch, self._dist = torch, torch.distributed

    def all_gather(self, shares: Sequence[int], rank: int) -> Baseline:
        tensor, largest = self._torch.from_numpy, max(shares)
        name = self._first_of("all_gather_single", "all_gather_into_tensor")
        gather = getattr(self._dist, name)

        def call(source: Array, destination: Array) -> None:
            gather(tensor(destination), tensor(source))

        rows = [owner * largest + row for owner, share in enumerate(shares) for row in range(share)]
        padding = "" if len(set(shares)) == 1 else " padded to the largest share"
        return Baseline(name + padding, call, largest, rows, largest * len(shares))

    def reduce_scatter(self, shares: Sequence[int], rank: int, mean: bool) -> Baseline:
        tensor = self._torch.from_numpy
        name = self._first_of("reduce_scatter_single", "reduce_scatter_tensor")
        scatter = getattr(self._dist, name)
        is_even = len(set(shares)) == 1

        def call(source: Array, destination: Array) -> None:
            if is_even:
                scatter(tensor(destination), tensor(source))
            else:
                self._dist.reduce_scatter(tensor(destination), list(tensor(source).split(list(shares))))
            if mean:
                np.divide(destination, len(shares), out=destination)

        name = (name if is_even else "reduce_scatter of uneven lists") + (" and a division" if mean else "")
        return Baseline(name, call, sum(shares), range(shares[rank]), shares[rank])

    def all_to_all(self, sends: Sequence[int], receives: Sequence[int]) -> Baseline:
        tensor = self._torch.from_numpy

        def call(source: Array, destination: Array) -> None:
            self._dist.all_to_all_single(tensor(destination), tensor(source), list(receives), list(sends))

        return Baseline("all_to_all_single", call, sum(sends), range(sum(receives)), sum(receives))

    def _first_of(self, *names: str) -> str:
        """torch 2.13 has new names, and warns of the old ones."""
        return next(name for name in names if hasattr(self._dist, name))


class _Nccl(Library):
    """NCCL's own collectives on the current stream, over a communicator beside the group's."""

    def __init__(self, group: sc.Group) -> None:
        import cupy
        from cupy.cuda import nccl

        mine = nccl.get_unique_id() if group.rank == 0 else b""
        unique_id, *_ = group.exchange(mine.ljust(_NCCL_ID_BYTES, b"\0"), "bench")
        self._cupy, self._nccl = cupy, nccl
        self._comm = nccl.NcclCommunicator(group.world_size, unique_id, group.rank)

    @property
    def _stream(self) -> int:
        return int(self._cupy.cuda.get_current_stream().ptr)

    def all_gather(self, shares: Sequence[int], rank: int) -> Baseline:
        largest, byte = max(shares), self._nccl.NCCL_UINT8

        def call(source: Array, destination: Array) -> None:
            self._comm.allGather(source.data.ptr, destination.data.ptr, source.nbytes, byte, self._stream)

        rows = [owner * largest + row for owner, share in enumerate(shares) for row in range(share)]
        padding = "" if len(set(shares)) == 1 else " padded to the largest share"
        return Baseline("ncclAllGather" + padding, call, largest, rows, largest * len(shares))

    def reduce_scatter(self, shares: Sequence[int], rank: int, mean: bool) -> Baseline:
        is_even = len(set(shares)) == 1

        def call(source: Array, destination: Array) -> None:
            kind = self._kind(source)
            if is_even:
                self._comm.reduceScatter(
                    source.data.ptr, destination.data.ptr, destination.size, kind, self._nccl.NCCL_SUM, self._stream
                )
            else:
                self._reduce_each(source, destination, shares, rank)
            if mean:
                self._cupy.divide(destination, len(shares), out=destination)

        name = "ncclReduceScatter" if is_even else "grouped ncclReduce"
        return Baseline(
            name + (" and a division" if mean else ""), call, sum(shares), range(shares[rank]), shares[rank]
        )

    def _reduce_each(self, source: Array, destination: Array, shares: Sequence[int], rank: int) -> None:
        begin, kind, stream = 0, self._kind(source), self._stream
        self._nccl.groupStart()
        for owner, share in enumerate(shares):
            part = source[begin : begin + share]
            begin += share
            if share:
                to = destination.data.ptr if owner == rank else 0
                self._comm.reduce(part.data.ptr, to, part.size, kind, self._nccl.NCCL_SUM, owner, stream)
        self._nccl.groupEnd()

    def all_to_all(self, sends: Sequence[int], receives: Sequence[int]) -> Baseline:
        def call(source: Array, destination: Array) -> None:
            stream, send_begin, receive_begin = self._stream, 0, 0
            kind, itemsize = self._kind(source), source.itemsize
            self._nccl.groupStart()
            for peer, (sent, received) in enumerate(zip(sends, receives, strict=True)):
                if sent:
                    self._comm.send(source.data.ptr + send_begin * itemsize, sent, kind, peer, stream)
                if received:
                    self._comm.recv(destination.data.ptr + receive_begin * itemsize, received, kind, peer, stream)
                send_begin, receive_begin = send_begin + sent, receive_begin + received
            self._nccl.groupEnd()

        return Baseline("grouped ncclSend and ncclRecv", call, sum(sends), range(sum(receives)), sum(receives))

    def _kind(self, array: Array) -> int:
        """NCCL's number of an element type; its names are NumPy's."""
        return int(getattr(self._nccl, f"NCCL_{array.dtype.name.upper()}"))

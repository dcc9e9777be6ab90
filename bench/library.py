"""What a user would call instead: the dense collectives of mpi4py and torch.distributed, on the same ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import sparsecoll as sc

__all__ = ["Baseline", "Library", "library_of"]

Array = NDArray[Any]


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
    """The library below ``group``; threads as ranks have none."""
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

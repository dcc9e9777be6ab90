"""Staging memory that outlives one operation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Arena", "ArenaPool"]

_ALIGNMENT = 64


class Arena:
    """Staging memory that is kept from operation to operation, so that steady state allocates nothing.

    One operation uses it at a time; it grows to the largest one seen.
    """

    def __init__(self) -> None:
        self._blocks: list[NDArray[np.uint8]] = []
        self._used = 0

    @property
    def reserved_bytes(self) -> int:
        return sum(block.nbytes for block in self._blocks)

    def reset(self, expected_bytes: int) -> None:
        """Begins an operation that will take about ``expected_bytes``; all earlier views become free."""
        if len(self._blocks) != 1 or self._blocks[0].nbytes < expected_bytes:
            self._blocks = [np.empty(max(expected_bytes, self.reserved_bytes), np.uint8)]
        self._used = 0

    def take(self, num_bytes: int) -> NDArray[np.uint8]:
        """A view of ``num_bytes``, contents undefined."""
        begin = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if begin + num_bytes > self._blocks[-1].nbytes:
            self._blocks.append(np.empty(max(num_bytes, self._blocks[-1].nbytes), np.uint8))
            begin = 0
        self._used = begin + num_bytes
        return self._blocks[-1][begin : self._used]


class ArenaPool:
    """Arenas that no operation uses at the moment. Operations in flight at the same time have one each."""

    def __init__(self) -> None:
        self._free: list[Arena] = []
        self._all: list[Arena] = []

    @property
    def reserved_bytes(self) -> int:
        return sum(arena.reserved_bytes for arena in self._all)

    def borrow(self) -> Arena:
        """The largest that is free, so that small operations do not make others grow."""
        self._free.sort(key=lambda arena: arena.reserved_bytes)
        if not self._free:
            self._free.append(Arena())
            self._all.append(self._free[-1])
        return self._free.pop()

    def give_back(self, arena: Arena) -> None:
        """After an operation that ended well; one that failed may still be written to by the back end."""
        self._free.append(arena)

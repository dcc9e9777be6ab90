"""Staging memory that outlives one operation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Arena"]

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

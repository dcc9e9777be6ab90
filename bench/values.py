"""Numbers that tell rank, chunk, element and input set apart, and whose sums over all ranks are exact."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Values", "poison"]

Array = NDArray[Any]

_LARGEST = {"int8": 127, "uint8": 254, "float16": 2048, "float32": 1 << 24}


class Values:
    """Rows ``(element + offset(rank, chunk, number)) mod m``, small enough that ``world_size`` of them sum exactly.

    Args:
        longest: most elements of a row.
    """

    def __init__(self, dtype: str, world_size: int, longest: int) -> None:
        self._modulus = max(2, min(_LARGEST.get(dtype, 1 << 31) // world_size, 65521))
        self._ramp = (np.arange(longest + self._modulus) % self._modulus).astype(dtype)

    def row(self, rank: int, chunk: int, number: int, length: int) -> Array:
        """A read-only row of input set ``number``."""
        begin = (rank * 104729 + chunk * 7919 + number * 1299709) % self._modulus
        row = self._ramp[begin : begin + length]
        row.flags.writeable = False
        return row


def poison(array: Any) -> None:
    """Writes what `Values` never makes (NaN, -1 or 255) everywhere; also leaves ``array`` warm."""
    array.view(np.uint8).fill(0xFF)

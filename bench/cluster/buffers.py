"""One rank's inputs and outputs of a collective, and what must stand in them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.cluster.placements import Scene
from bench.values import Values, poison

__all__ = ["Buffers"]

Array = NDArray[np.float32]


class Buffers:
    """Rows by chunk: ``source`` is read, ``destination`` written.

    In an all-gather a rank's source is what it owns and its destination what it holds; in a reduce-scatter it is the
    other way round. Inputs differ from run to run (``number``), so that nothing of an earlier one passes for right.

    Args:
        collective: ``ag`` or ``rs``.
    """

    def __init__(self, scene: Scene, collective: str, rank: int) -> None:
        self._scene, self._rank = scene, rank
        self._is_gather = collective == "ag"
        owned, held = scene.place.owned_by(rank).tolist(), scene.place.held_by(rank).tolist()
        sides = (owned, held) if self._is_gather else (held, owned)
        self.source, self.destination = (
            {chunk: np.zeros(scene.lengths[chunk], np.float32) for chunk in chunks} for chunks in sides
        )
        self._values = Values("float32", scene.place.world_size, max(scene.lengths))

    def fill(self, number: int) -> None:
        """Writes the input of a run, and poison where its output will be."""
        for chunk, row in self.source.items():
            row[:] = self._contribution(self._rank, chunk, number)
        for row in self.destination.values():
            poison(row)

    def count_wrong(self, number: int) -> int:
        """Elements of the output that are not what they must be."""
        pairs = ((row, self._expected(chunk, number)) for chunk, row in self.destination.items())
        return sum(int(np.count_nonzero(row != expected)) for row, expected in pairs)

    def _expected(self, chunk: int, number: int) -> Array:
        if self._is_gather:
            return self._contribution(int(self._scene.place.owners[chunk]), chunk, number)
        holders = np.flatnonzero(self._scene.place.holders[chunk]).tolist()
        return np.sum([self._contribution(rank, chunk, number) for rank in holders], axis=0)

    def _contribution(self, rank: int, chunk: int, number: int) -> Any:
        return self._values.row(rank, chunk, number, self._scene.lengths[chunk])

"""In which order layers are used, learned from the last iteration, so that the next one's replicas come in time."""

from __future__ import annotations

from sparsecoll.fssdp.layer import ShardedLayer

__all__ = ["PrefetchOrder"]


class PrefetchOrder:
    """Issues the gather for the layer that will be used next.

    Forwards of all ranks use layers in the same order, so every rank issues the same gathers at the same points.
    """

    def __init__(self) -> None:
        self._expected: list[ShardedLayer] = []
        self._seen: list[ShardedLayer] = []

    def begin(self) -> None:
        """A forward of the whole model starts."""
        for layer in self._expected:
            layer.drop_prefetch()
        self._expected, self._seen = self._seen or self._expected, []
        self._issue_next()

    def used(self, layer: ShardedLayer) -> None:
        """A layer's forward has ended."""
        self._seen.append(layer)
        if self._expected[: len(self._seen)] == self._seen:
            self._issue_next()

    def _issue_next(self) -> None:
        position = len(self._seen)
        if position < len(self._expected):
            self._expected[position].prefetch()

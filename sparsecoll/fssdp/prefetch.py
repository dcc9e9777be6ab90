"""In which order layers are used, learned from the last iteration or told, so that replicas come in time."""

from __future__ import annotations

from collections.abc import Sequence

from sparsecoll.fssdp.layer import ShardedLayer
from sparsecoll.fssdp.replicas import Replicas

__all__ = ["PrefetchOrder"]


class PrefetchOrder:
    """Issues the gather for the layer that will be used next, in forward and in backward.

    All ranks use layers in the same order, so every rank issues the same gathers at the same points.
    """

    def __init__(self) -> None:
        self._told: list[ShardedLayer] | None = None
        self._told_backward: list[ShardedLayer] | None = None
        self._expected: list[ShardedLayer] = []
        self._seen: list[ShardedLayer] = []
        self._last: Replicas | None = None

    def tell(self, layers: Sequence[ShardedLayer]) -> None:
        """Sets the order of forward; an empty one makes it learn again."""
        self._told = list(layers) or None

    def tell_backward(self, layers: Sequence[ShardedLayer]) -> None:
        """Sets the order of backward; with an empty one it is that of the forward, turned round."""
        self._told_backward = list(layers) or None

    def end(self) -> None:
        """Ends what was gathered for forwards that did not come."""
        for layer in dict.fromkeys(self._expected):
            layer.drop_prefetch()

    def begin(self) -> None:
        """A forward of the whole model starts."""
        learned = self._seen or self._expected
        expected = self._told if self._told is not None else learned
        self._expected, self._seen, self._last = list(expected), [], None
        self._issue_next()

    def used(self, layer: ShardedLayer, released: Replicas | None) -> bool:
        """A layer's forward has ended.

        Args:
            released: its replicas, if they are to be released until backward.

        Returns:
            Whether they are better kept, as this is the last layer, whose backward comes first.
        """
        self._seen.append(layer)
        is_last = len(self._seen) == len(self._expected)
        if released is not None:
            released.previous, self._last = self._last, None if is_last else released
        if self._expected[: len(self._seen)] == self._seen:
            self._issue_next()
        return is_last

    def before(self, replicas: Replicas) -> Replicas | None:
        """Those whose backward follows the backward of these."""
        told = self._told_backward
        if told is None or replicas.home not in told:
            return replicas.previous
        position = [*told, None].index(replicas.home) + 1
        wanted, found = told[position] if position < len(told) else None, replicas.previous
        while found is not None and found.home is not wanted:
            found = found.previous
        return found

    def _issue_next(self) -> None:
        position = len(self._seen)
        if position < len(self._expected):
            self._expected[position].prefetch()

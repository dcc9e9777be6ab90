"""Which chunks are hot at each step: as many at every step, and other ones at the next."""

from __future__ import annotations

import numpy as np

import sparsecoll as sc

__all__ = ["SKEWS", "HotChunks"]

SKEWS = ("even", "hot_owner")


class HotChunks:
    """Goes round each owner's chunks in an order drawn once.

    Args:
        place: owners of all chunks.
        density: share of the chunks that are hot; rounded to whole chunks.
        skew: ``even`` spreads them over owners as equally as can be; with ``hot_owner`` rank 0 owns them all.

    Raises:
        InvalidArgument: no chunk would be hot, or more than rank 0 owns.
    """

    def __init__(self, place: sc.Placement, density: float, skew: str, seed: int) -> None:
        self.num_hot = round(density * place.num_chunks)
        if self.num_hot == 0:
            raise sc.InvalidArgument(f"--density: expected at least one of {place.num_chunks} chunks, got {density}")
        random = np.random.default_rng(seed)
        self._owned = [random.permutation(place.owned_by(rank)) for rank in range(place.world_size)]
        if skew == "hot_owner":
            if self.num_hot > len(self._owned[0]):
                raise sc.InvalidArgument(
                    f"--density: expected at most the {len(self._owned[0])} chunks of rank 0 with --skew hot_owner, "
                    f"got {self.num_hot}"
                )
            self._quotas = [self.num_hot] + [0] * (place.world_size - 1)
        else:
            share, extra = divmod(self.num_hot, place.world_size)
            self._quotas = [share + (rank < extra) for rank in range(place.world_size)]

    def at(self, step: int) -> tuple[int, ...]:
        """The hot chunks of a step, ascending."""
        return tuple(
            sorted(
                int(owned[(step * quota + position) % len(owned)])
                for owned, quota in zip(self._owned, self._quotas, strict=True)
                for position in range(quota)
            )
        )

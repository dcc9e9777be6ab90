"""What is gathered and reduced: one hot owner, and random placements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import sparsecoll as sc

__all__ = ["ITEM_BYTES", "NUM_RANDOM", "Scene", "cross_bytes", "hot_scene", "random_scenes", "scene_name"]

ITEM_BYTES = 4
NUM_RANDOM = 3


@dataclass(frozen=True)
class Scene:
    """Chunks of float32 and where they are.

    Attributes:
        pattern: ``hot`` or ``random``.
        number: counts the scenes of a pattern.
        chunk_bytes: ``[num_chunks]``.
    """

    pattern: str
    number: int
    place: sc.Placement
    chunk_bytes: tuple[int, ...]

    @property
    def name(self) -> str:
        """``hot``, ``random0``, ``random1``, …"""
        return scene_name(self.pattern, self.number)

    @property
    def lengths(self) -> tuple[int, ...]:
        """``[num_chunks]``, elements."""
        return tuple(size // ITEM_BYTES for size in self.chunk_bytes)


def scene_name(pattern: str, number: int) -> str:
    """The pattern, with the number where there are several."""
    return pattern if pattern == "hot" else f"{pattern}{number}"


def hot_scene(world_size: int, num_chunks: int, chunk_bytes: int) -> Scene:
    """Rank 0 owns every chunk, and all want all."""
    place = sc.Placement([0] * num_chunks, np.ones((num_chunks, world_size), bool))
    return Scene("hot", 0, place, (_whole(chunk_bytes),) * num_chunks)


def random_scenes(world_size: int, num_chunks: int, chunk_bytes: int, seed: int) -> list[Scene]:
    """`NUM_RANDOM` scenes with half as many chunks again as ``num_chunks``.

    Owners are uniform, sizes uniform between half and one and a half ``chunk_bytes``. For each chunk a share is drawn,
    and every rank holds the chunk with that probability: some stay at their owner, some go everywhere.
    """
    scenes = []
    for number in range(NUM_RANDOM):
        random = np.random.default_rng([seed, number])
        count = num_chunks + num_chunks // 2
        owners = random.integers(world_size, size=count)
        holders = random.random((count, world_size)) < random.random((count, 1))
        holders[np.arange(count), owners] = True
        sizes = random.integers(chunk_bytes // 2, chunk_bytes * 3 // 2, endpoint=True, size=count)
        place = sc.Placement(owners, holders)
        scenes.append(Scene("random", number, place, tuple(_whole(int(size)) for size in sizes)))
    return scenes


def cross_bytes(scene: Scene, host_of: Sequence[int]) -> int:
    """Payload that must cross between hosts: each chunk once to (or, reduced, from) every other host that holds it."""
    total = 0
    for chunk, size in enumerate(scene.chunk_bytes):
        hosts = {host_of[rank] for rank in np.flatnonzero(scene.place.holders[chunk]).tolist()}
        total += size * len(hosts - {host_of[int(scene.place.owners[chunk])]})
    return total


def _whole(num_bytes: int) -> int:
    """Whole elements, at least one."""
    return max(1, num_bytes // ITEM_BYTES) * ITEM_BYTES

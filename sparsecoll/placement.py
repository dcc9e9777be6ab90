"""Chunk → owner, chunk → holders: both sides of a sparse collective."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsecoll.errors import InvalidArgument

__all__ = ["Placement"]


class Placement:
    """Owners and holders of all chunks; immutable, and equal by content.

    Attributes:
        owners: int32 ``[num_chunks]``, the one rank that stores a chunk.
        holders: bool ``[num_chunks, world_size]``, who has a chunk after materialization; owners included.
    """

    owners: NDArray[np.int32]
    holders: NDArray[np.bool_]

    def __init__(self, owners: ArrayLike, holders: ArrayLike) -> None:
        """Checks and copies both.

        Raises:
            InvalidArgument: an owner out of range, a mask of the wrong shape, or one that leaves out an owner.
        """
        owner_ranks = _integers("owners", owners)
        try:
            mask = np.asarray(holders)
        except ValueError as error:
            raise InvalidArgument(f"Placement: expected holders to be a rectangular mask: {error}") from None
        if mask.dtype != np.bool_:
            raise InvalidArgument(f"Placement: expected holders to be a bool mask, got {mask.dtype}")
        if mask.ndim != 2 or mask.shape[0] != len(owner_ranks) or mask.shape[1] < 1:
            raise InvalidArgument(
                f"Placement: expected holders of shape [{len(owner_ranks)}, world_size], got {list(mask.shape)}"
            )
        world_size = mask.shape[1]
        for chunk in np.flatnonzero((owner_ranks < 0) | (owner_ranks >= world_size)):
            raise InvalidArgument(
                f"Placement: expected owners in 0..{world_size - 1}, got {owner_ranks[chunk]} for chunk {chunk}"
            )
        for chunk in np.flatnonzero(~mask[np.arange(len(owner_ranks)), owner_ranks]):
            raise InvalidArgument(
                f"Placement: expected holders to include the owner, but chunk {chunk} leaves out rank "
                f"{owner_ranks[chunk]}"
            )
        self.owners = owner_ranks.astype(np.int32)
        self.holders = mask.copy()
        self.owners.flags.writeable = False
        self.holders.flags.writeable = False

    @classmethod
    def even(cls, num_chunks: int, world_size: int) -> Placement:
        """Contiguous shares, as equal as they can be, the larger ones first; no replicas."""
        if not _is_integer(num_chunks) or not _is_integer(world_size) or num_chunks < 0 or world_size < 1:
            raise InvalidArgument(
                f"Placement.even: expected num_chunks >= 0 and world_size >= 1, got {num_chunks} and {world_size}"
            )
        share, extra = divmod(num_chunks, world_size)
        counts = [share + (rank < extra) for rank in range(world_size)]
        return cls.of_owners(np.repeat(np.arange(world_size), counts), world_size)

    @classmethod
    def of_owners(cls, owners: ArrayLike, world_size: int) -> Placement:
        """Every chunk at its owner and nowhere else."""
        owner_ranks = _integers("owners", owners)
        return cls(owner_ranks, owner_ranks[:, None] == np.arange(world_size)[None, :])

    def replicate(self, replicas: Mapping[int, Iterable[int]]) -> Placement:
        """A Placement with more holders: chunk → ranks that hold it too."""
        mask = self.holders.copy()
        for chunk, ranks in replicas.items():
            if not _is_integer(chunk) or not 0 <= chunk < self.num_chunks:
                raise InvalidArgument(f"Placement.replicate: expected chunks in 0..{self.num_chunks - 1}, got {chunk}")
            for rank in ranks:
                if not _is_integer(rank) or not 0 <= rank < self.world_size:
                    raise InvalidArgument(
                        f"Placement.replicate: expected ranks in 0..{self.world_size - 1}, got {rank} for chunk {chunk}"
                    )
                mask[chunk, rank] = True
        return Placement(self.owners, mask)

    @property
    def num_chunks(self) -> int:
        return len(self.owners)

    @property
    def world_size(self) -> int:
        return self.holders.shape[1]

    def owned_by(self, rank: int) -> NDArray[np.int64]:
        """Chunks that ``rank`` owns, ascending."""
        return np.flatnonzero(self.owners == rank)

    def held_by(self, rank: int) -> NDArray[np.int64]:
        """Chunks that ``rank`` holds, ascending."""
        return np.flatnonzero(self.holders[:, rank])

    def replicated(self) -> NDArray[np.int64]:
        """Chunks with more than one holder, ascending."""
        return np.flatnonzero(self.holders.sum(axis=1) > 1)

    @cached_property
    def digest(self) -> str:
        """Hash of the content; equal Placements have equal digests in every process."""
        content = hashlib.blake2b(digest_size=16)
        content.update(np.array(self.holders.shape, "<i8").tobytes())
        content.update(self.owners.astype("<i4").tobytes())
        content.update(np.packbits(self.holders).tobytes())
        return content.hexdigest()

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Placement) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        # Through the constructor, so that copies are immutable too.
        return Placement, (self.owners, self.holders)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            raise AttributeError(f"Placement: expected to be left unchanged, got a new {name}")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        replicas = int(self.holders.sum()) - self.num_chunks
        return (
            f"Placement(num_chunks={self.num_chunks}, world_size={self.world_size}, replicas={replicas}, "
            f"digest={self.digest[:8]})"
        )


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _integers(name: str, values: ArrayLike | Sequence[int]) -> NDArray[np.int64]:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise InvalidArgument(f"Placement: expected {name} to be a list of integers: {error}") from None
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InvalidArgument(
            f"Placement: expected {name} to be a list of integers, got {array.dtype} of shape {list(array.shape)}"
        )
    return array.astype(np.int64)

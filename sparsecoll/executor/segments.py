"""A chunk in host memory: one uint8 view for each tensor that its rows come from."""

from __future__ import annotations

from collections.abc import Sequence

from sparsecoll.transport.base import View

__all__ = ["Segments", "cut", "cut_sizes"]

Segments = tuple[View, ...]


def cut(segments: Segments, begin: int, end: int) -> Segments:
    """Bytes ``begin`` to ``end`` of a chunk: a view of each segment, empty where the range has nothing of it."""
    parts = []
    for segment in segments:
        parts.append(segment[max(begin, 0) : max(end, 0)])
        begin, end = begin - segment.nbytes, end - segment.nbytes
    return tuple(parts)


def cut_sizes(sizes: Sequence[int], begin: int, end: int) -> list[int]:
    """Sizes of what `cut` gives."""
    parts = []
    for size in sizes:
        parts.append(max(min(end, size), 0) - max(min(begin, size), 0))
        begin, end = begin - size, end - size
    return parts

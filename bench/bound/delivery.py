"""Whether a plan moves what it must: every byte to everyone who lacks it, once, and from someone who has it by then."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import sparsecoll as sc

__all__ = ["delivers"]

Numbers = NDArray[np.int64]


def delivers(plan: sc.Plan) -> bool:
    """Whether the transfers do the plan's work.

    In an all-gather every holder but the owner receives each byte of the chunk once, and whoever forwards bytes has
    received them in earlier stages. A reduce-scatter is looked at in the mirror, last stage first: there, what a relay
    sums before it sends is what it forwards after it has received, and a sum is marked as one.
    """
    rows = plan.transfers
    mirrored = plan.op == "reduce_scatter"
    stage, chunk, begin, end = (rows[name].astype(np.int64) for name in ("stage", "chunk", "begin", "end"))
    src, dst = (rows[name].astype(np.int64) for name in (("dst", "src") if mirrored else ("src", "dst")))
    stage = -stage if mirrored else stage
    world_size = plan.place.world_size
    sizes, owners = np.asarray(plan.chunk_bytes, np.int64), plan.place.owners.astype(np.int64)
    if (begin < 0).any() or (begin >= end).any() or (end > sizes[chunk]).any() or (dst == owners[chunk]).any():
        return False
    if not np.isin(chunk, plan.chunks).all() or (rows["pieces"] < 1).any():
        return False
    # Bytes of all (chunk, rank) pairs on one line, one pair after the other, so that a range there is a range of bytes.
    room = int(sizes.max(initial=0)) + 1
    place_of_dst = (chunk * world_size + dst) * room
    order = np.argsort(place_of_dst + begin, kind="stable")
    starts, stops = (place_of_dst + begin)[order], (place_of_dst + end)[order]
    if (starts[1:] < stops[:-1]).any():
        return False  # something arrives twice
    if not _have_arrived(starts, stops, *_wanted(plan, room)).all():
        return False
    forwarded = src != owners[chunk]
    place_of_src = ((chunk * world_size + src) * room)[forwarded]
    first, last = place_of_src + begin[forwarded], place_of_src + end[forwarded]
    if not _have_arrived(starts, stops, first, last).all():
        return False
    feeds, fed = _overlaps(starts, stops, first, last)
    if not (stage[order][feeds] < stage[forwarded][fed]).all():
        return False
    is_sum = np.zeros(len(rows), bool)
    is_sum[order[feeds]] = mirrored
    return bool((rows["partial"] == is_sum).all())


def _wanted(plan: sc.Plan, room: int) -> tuple[Numbers, Numbers]:
    """The whole range of every chunk that somebody lacks, for each who does."""
    sizes = np.asarray(plan.chunk_bytes, np.int64)
    chunks = np.array([chunk for chunk in plan.chunks if sizes[chunk]], np.int64)
    position, rank = np.nonzero(plan.place.holders[chunks])
    chunk = chunks[position]
    lacks = rank != plan.place.owners[chunk]
    first = (chunk * plan.place.world_size + rank)[lacks] * room
    return first, first + sizes[chunk[lacks]]


def _have_arrived(starts: Numbers, stops: Numbers, first: Numbers, last: Numbers) -> NDArray[np.bool_]:
    """Whether ascending, disjoint ranges cover each of other ranges."""
    arrived = np.concatenate([[0], np.cumsum(stops - starts)])

    def until(at: Numbers) -> Numbers:
        """Bytes in the ranges before a place."""
        before = np.searchsorted(starts, at)  # ranges that start before it
        beyond = np.where(before > 0, np.maximum(stops[before - 1] - at, 0), 0) if len(starts) else 0
        return arrived[before] - beyond

    return until(last) - until(first) == last - first


def _overlaps(starts: Numbers, stops: Numbers, first: Numbers, last: Numbers) -> tuple[Numbers, Numbers]:
    """All pairs of an ascending, disjoint range and another that overlap: index of the one, index of the other."""
    low, high = np.searchsorted(stops, first, side="right"), np.searchsorted(starts, last)
    counts = high - low
    other = np.repeat(np.arange(len(first)), counts)
    within = np.arange(len(other)) - np.repeat(np.cumsum(counts) - counts, counts)
    return low[other] + within, other

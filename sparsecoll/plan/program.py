"""One rank's part of a Plan, in the order in which an executor walks through it."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from sparsecoll.plan.plan import Plan

__all__ = ["Move", "Program", "Stage", "program"]


class Move(NamedTuple):
    """One transfer seen from one side: the peer at the other end, the chunk, and whether a partial sum travels."""

    peer: int
    chunk: int
    partial: bool


class Stage(NamedTuple):
    """Transfers that are in flight together."""

    sends: tuple[Move, ...]
    receives: tuple[Move, ...]


class Program(NamedTuple):
    """What one rank does.

    Attributes:
        stages: sends of a stage may forward what earlier stages received.
        owned: chunks of the plan that the rank owns, ascending.
        held: chunks of the plan that the rank holds, ascending.
        arrivals: chunk → number of transfers that bring this rank something of it.
    """

    stages: tuple[Stage, ...]
    owned: tuple[int, ...]
    held: tuple[int, ...]
    arrivals: dict[int, int]


@lru_cache(maxsize=512)
def program(plan: Plan, rank: int) -> Program:
    """The part of ``rank`` in ``plan``."""
    transfers = plan.transfers
    chunks = np.asarray(plan.chunks, np.int64)
    mine = transfers[(transfers["src"] == rank) | (transfers["dst"] == rank)]
    stages = []
    arrivals: dict[int, int] = {}
    for stage in np.unique(mine["stage"]):
        sends, receives = [], []
        for _, src, dst, chunk, partial in mine[mine["stage"] == stage].tolist():
            if src == rank:
                sends.append(Move(dst, chunk, partial))
            else:
                receives.append(Move(src, chunk, partial))
                arrivals[chunk] = arrivals.get(chunk, 0) + 1
        stages.append(Stage(tuple(sends), tuple(receives)))
    owned = chunks[plan.place.owners[chunks] == rank].tolist()
    held = chunks[plan.place.holders[chunks, rank]].tolist()
    return Program(tuple(stages), tuple(owned), tuple(held), arrivals)

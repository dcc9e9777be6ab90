"""One rank's part of a Plan, piece by piece, as an executor walks through it."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from sparsecoll.errors import InvalidArgument
from sparsecoll.plan.plan import Plan
from sparsecoll.plan.simulate import needs_of, pieces_of
from sparsecoll.plan.transfer import piece_bounds

__all__ = ["Move", "Program", "program"]


class Move(NamedTuple):
    """One piece seen from one side.

    Attributes:
        peer: the rank at the other end.
        chunk, begin, end: the piece's bytes, counted in the input's dtype.
        partial: whether a sum travels, in the accumulation dtype.
        stage: what a rank has at hand of earlier stages it sends first.
        port: 0 inside the node, 1 to other nodes.
        needs: of a send, the receives (by position) that bring what it forwards or sums, in the order of summation.
        row: position of its transfer in the Plan.
    """

    peer: int
    chunk: int
    begin: int
    end: int
    partial: bool
    stage: int
    port: int
    needs: tuple[int, ...]
    row: int


class Program(NamedTuple):
    """What one rank does.

    Attributes:
        sends, receives: in the order in which they are wanted; those of a pair of ranks travel in this order.
        owned: chunks of the plan that the rank owns, ascending.
        held: chunks of the plan that the rank holds, ascending.
        passing: chunks of which it receives something without holding them, ascending.
        sums: what the rank adds up at the end of a reduce-scatter, ``(chunk, begin, end, receives)`` with the receives
            in the order of summation; all of every owned chunk, in ranges that were cut alike.
    """

    sends: tuple[Move, ...]
    receives: tuple[Move, ...]
    owned: tuple[int, ...]
    held: tuple[int, ...]
    passing: tuple[int, ...]
    sums: tuple[tuple[int, int, int, tuple[int, ...]], ...]

    @property
    def is_immediate(self) -> bool:
        """Whether all messages can be posted at once: none waits for another, and none is to come before another."""
        return not any(move.needs or move.stage for move in self.sends + self.receives)


def program(plan: Plan, rank: int) -> Program:
    """The part of ``rank`` in ``plan``."""
    return _program(plan, rank, plan.topology.node_of)


@lru_cache(maxsize=512)
def _program(plan: Plan, rank: int, node_of: tuple[int, ...]) -> Program:
    # Plans are equal when they move the same; on other nodes they have other ports.
    table, gathers = plan.transfers, plan.op == "all_gather"
    chunks = np.asarray(plan.chunks, np.int64)
    mine = np.flatnonzero((table["src"] == rank) | (table["dst"] == rank))
    local = table[mine]
    columns = local.tolist()
    bounds = [piece_bounds(row[6], row[7], row[5]) for row in columns]
    needs = needs_of(local, gathers=gathers)
    sends: list[Move] = []
    receives: list[Move] = []
    position: dict[tuple[int, int], int] = {}
    order = [each.tolist() for each in pieces_of(local)]
    for row, piece, stage in zip(*order, strict=True):
        _, _, src, dst, chunk, _, _, _, partial = columns[row]
        begin, end = bounds[row][piece : piece + 2]
        port = int(node_of[src] != node_of[dst])
        if dst == rank:
            position[row, piece] = len(receives)
            receives.append(Move(src, chunk, begin, end, partial, stage, port, (), int(mine[row])))
        else:
            if not all((need, piece) in position for need in needs[row]):
                raise InvalidArgument(
                    f"plan: expected rank {rank} to have bytes {begin}..{end} of chunk {chunk} before it sends them in "
                    f"stage {stage}"
                )
            after = tuple(position[need, piece] for need in needs[row])
            sends.append(Move(dst, chunk, begin, end, partial, stage, port, after, int(mine[row])))
    owned = chunks[plan.place.owners[chunks] == rank].tolist()
    held = chunks[plan.place.holders[chunks, rank]].tolist()
    passing = sorted({move.chunk for move in receives} - set(held))
    sums = () if gathers else _sums(plan, owned, receives)
    return Program(tuple(sends), tuple(receives), tuple(owned), tuple(held), tuple(passing), sums)


def _sums(plan: Plan, owned: list[int], receives: list[Move]) -> tuple[tuple[int, int, int, tuple[int, ...]], ...]:
    arrivals: dict[int, dict[tuple[int, int], list[int]]] = {chunk: {} for chunk in owned}
    for number, move in enumerate(receives):
        if move.chunk in arrivals:
            arrivals[move.chunk].setdefault((move.begin, move.end), []).append(number)
    sums = []
    for chunk, ranges in arrivals.items():
        for begin, end in sorted(ranges) or [(0, plan.chunk_bytes[chunk])]:
            order = sorted(ranges.get((begin, end), []), key=lambda number: receives[number].row)
            sums.append((chunk, begin, end, tuple(order)))
    return tuple(sums)

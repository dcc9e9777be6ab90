"""When every piece of a Plan arrives, on the links of a Topology.

A rank sends what is next for some other rank and at hand, earliest stage first, one message at a time on each of its
two links; a message then passes the links on its way, each of which serves messages in the order in which they come. It
is forwarded by a link while it still comes in, and arrives a latency after its last byte has left. This is what the
executor does when links are the only thing that takes time.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsecoll.plan.costs import Costs
from sparsecoll.plan.transfer import LEAD, Table

__all__ = ["Timeline", "pieces_of", "simulate"]


class Timeline(NamedTuple):
    """Ticks; entries are pieces, in the order of `pieces_of`.

    Attributes:
        finish: when the last piece has arrived; 0 without any.
        row, piece: which transfer, and which of its pieces.
        sent: when a piece begins to leave.
        arrived: when its last byte is there.
    """

    finish: int
    row: NDArray[np.int32]
    piece: NDArray[np.int32]
    sent: NDArray[np.int64]
    arrived: NDArray[np.int64]


def pieces_of(table: Table) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
    """``(row, piece, stage)`` of every piece, in the order in which a rank prefers to send them.

    Within a stage a rank begins with the receiver that follows it and goes round, so that not all begin with the same.
    """
    counts = table["pieces"].astype(np.int64)
    row = np.repeat(np.arange(len(table)), counts)
    piece = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    stage = table["stage"][row] + piece * table["span"][row] // counts[row]
    src, dst = table["src"][row], table["dst"][row]
    order = np.lexsort((row, dst, dst < src, stage))
    return row[order].astype(np.int32), piece[order].astype(np.int32), stage[order]


def needs_of(table: Table, *, gathers: bool) -> list[list[int]]:
    """For each row, the rows whose pieces it forwards (or sums): those that bring its sender the same range."""
    arrivals: dict[tuple[int, int, int], list[int]] = {}
    for number, (_, _, _, dst, chunk, _, begin, _, _) in enumerate(table.tolist()):
        arrivals.setdefault((dst, chunk, begin), []).append(number)
    return [
        arrivals.get((src, chunk, begin), []) if gathers or partial else []
        for _, _, src, _, chunk, _, begin, _, partial in table.tolist()
    ]


def simulate(
    table: Table, row_bytes: Sequence[int], node_of: Sequence[int], costs: Costs, *, gathers: bool
) -> Timeline:
    """Plays a table of transfers through; ``row_bytes`` are the bytes on the wire of each row."""
    row, piece, stage = pieces_of(table)
    src, dst = table["src"].tolist(), table["dst"].tolist()
    counts = table["pieces"].tolist()
    needs = needs_of(table, gathers=gathers)
    number_of = {(r, p): number for number, (r, p) in enumerate(zip(row.tolist(), piece.tolist(), strict=True))}
    missing = [len(needs[r]) for r in row.tolist()]
    feeds: list[list[int]] = [[] for _ in row]
    for number, (r, p) in enumerate(zip(row.tolist(), piece.tolist(), strict=True)):
        for need in needs[r]:
            feeds[number_of[need, p]].append(number)
    queues: dict[tuple[int, int], list[int]] = {}
    for number in range(len(row) - 1, -1, -1):
        queues.setdefault((src[row[number]], dst[row[number]]), []).append(number)
    sent, arrived = [0] * len(row), [0] * len(row)
    # Ports: 2 * rank inside a node, 2 * rank + 1 to others; each with the heads of its queues that can go.
    world_size = len(node_of)
    heads: list[list[int]] = [[] for _ in range(2 * world_size)]
    leaving, entering = [0] * (2 * world_size), [0] * (2 * world_size)
    node_leaving, node_entering = [0] * len(costs.node), [0] * len(costs.node)
    # What each rank still expects, earliest last; and heads that wait until it expects them soon enough.
    expected: list[list[int]] = [[] for _ in range(2 * len(node_of))]
    for number in range(len(row) - 1, -1, -1):
        r = row[number]
        expected[2 * dst[r] + (node_of[src[r]] != node_of[dst[r]])].append(number)
    has_arrived = [False] * len(row)
    refused: list[list[int]] = [[] for _ in range(2 * len(node_of))]
    due = stage.tolist()
    events: list[tuple[int, int, int]] = []  # (time, 0 and a piece that arrives or 1 and a port that is free)
    finish = 0

    def port_of(number: int) -> int:
        r = row[number]
        return 2 * src[r] + (node_of[src[r]] != node_of[dst[r]])

    def offer(number: int, now: int) -> None:
        r = row[number]
        rank = 2 * dst[r] + (node_of[src[r]] != node_of[dst[r]])
        if due[number] > due[expected[rank][-1]] + LEAD:
            refused[rank].append(number)
            return
        port = port_of(number)
        heapq.heappush(heads[port], number)
        if leaving[port] <= now:
            heapq.heappush(events, (now, 1, port))

    for queue in queues.values():
        if not missing[queue[-1]]:
            offer(queue[-1], 0)
    while events:
        now, kind, which = heapq.heappop(events)
        if kind == 0:
            has_arrived[which] = True
            r = row[which]
            rank = 2 * dst[r] + (node_of[src[r]] != node_of[dst[r]])
            waiting = expected[rank]
            if waiting[-1] == which:
                while waiting and has_arrived[waiting[-1]]:
                    waiting.pop()
                heads_refused, refused[rank] = refused[rank], []
                for number in heads_refused:
                    offer(number, now)
            for number in feeds[which]:
                missing[number] -= 1
                r = row[number]
                if not missing[number] and queues[src[r], dst[r]][-1] == number:
                    offer(number, now)
            continue
        if leaving[which] > now or not heads[which]:
            continue
        number = heapq.heappop(heads[which])
        r, p = int(row[number]), int(piece[number])
        num_bytes = row_bytes[r] * (p + 1) // counts[r] - row_bytes[r] * p // counts[r]
        rank, peer, crosses = src[r], dst[r], which % 2
        link = costs.out if crosses else costs.up
        latency = costs.out_latency if crosses else costs.up_latency
        begin, end = now, now + num_bytes * link[rank]
        sent[number], leaving[which] = now, end
        heapq.heappush(events, (end, 1, which))
        passes = [(entering, 2 * peer + crosses, link[peer])]
        if crosses:
            home, away = node_of[rank], node_of[peer]
            passes = [(node_leaving, home, costs.node[home]), (node_entering, away, costs.node[away]), *passes]
        for free, index, cost in passes:
            if not cost:  # nothing is shared, so nobody waits for anybody there
                continue
            begin = max(begin, free[index])
            end = max(end, begin + num_bytes * cost)
            free[index] = end
        arrived[number] = end + latency
        finish = max(finish, end + latency)
        heapq.heappush(events, (end + latency, 0, number))
        queue = queues[rank, peer]
        queue.pop()
        if queue and not missing[queue[-1]]:
            offer(queue[-1], now)
    return Timeline(finish, row, piece, np.array(sent, np.int64), np.array(arrived, np.int64))

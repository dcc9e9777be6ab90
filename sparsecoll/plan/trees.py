"""Relayed schedules: every byte of a chunk travels along a tree of holders, so that no link carries more than it must.

The argument stands in `docs/bounds.md`. On one level (ranks that all reach each other alike) the owner sends each part
of a chunk to one holder, which forwards it to the others; who forwards how much is what `division` decides. With nodes
the same holds between nodes, and once more inside each:

1. Between nodes: which holders forward how much of a chunk to the other nodes that hold it, and which holders in the
   owner's node send them their parts (`_Between`).
2. At which holder each part enters a node; it spreads from there (`_Entries`).
3. Inside the owner's node: which holder forwards how much to the others there (`_Inside`).

Each decision cuts a chunk; the cuts of all of them together make *cells*, and every cell has one tree (`_Forest`).

This is the readable planner. The native one (`csrc/plan_trees.cpp`) takes the same steps in the same order and gives
the same bytes; all numbers are integers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from math import isqrt
from typing import NamedTuple

import numpy as np

from sparsecoll.plan.costs import Costs
from sparsecoll.plan.division import Division, divide
from sparsecoll.plan.transfer import GRANULE_BYTES, SLOTS, TRANSFER, Table, freeze

__all__ = ["Schedule", "Trees", "trees"]

_MOST_PIECES = 32
"""Pieces into which a relay cuts what it forwards: the pipeline needs one more piece's time than the links do."""

_LEAST_PIECE_BYTES = 1 << 16

_MESSAGES_PER_LATENCY = 256
"""How many messages a rank is taken to issue in the time in which one arrives."""

_NOBODY = -1

Parts = list[tuple[int, int]]
"""Who has a range: ``(end, who)``, ascending; the first begins at 0 and each where the one before it ends."""


class Schedule(NamedTuple):
    """What to move where. Lists have an entry for each chunk that moves.

    Attributes:
        chunks: numbers, ascending.
        sizes: bytes, positive.
        first_bytes: bytes of what a relay and the owner exchange: ``sizes``, or the size of partial sums.
        owners, holders: ranks; holders ascending, the owner among them.
        node_of: ``[W]``.
        costs: of the links.
        divisible: whether chunks may be cut.
    """

    chunks: Sequence[int]
    sizes: Sequence[int]
    first_bytes: Sequence[int]
    owners: Sequence[int]
    holders: Sequence[Sequence[int]]
    node_of: Sequence[int]
    costs: Costs
    divisible: bool

    @property
    def granule_bytes(self) -> int:
        """Chunks are cut at multiples of this."""
        return GRANULE_BYTES if self.divisible else 1 << 62


class Trees(NamedTuple):
    """Attributes:
    level: ticks that the busiest link needs for its bytes.
    expected: ticks that the schedule is expected to take, with latencies and the filling of the pipeline.
    table: transfers of the all-gather, or of the reduce-scatter.
    """

    level: int
    expected: int
    table: Table


def trees(schedule: Schedule, *, mirrored: bool) -> Trees:
    """The relayed schedule of an all-gather, or ``mirrored`` of a reduce-scatter."""
    between = _Between(schedule)
    entries = _Entries(schedule, between)
    inside = _Inside(schedule, entries)
    forest = _Forest(schedule, between, entries, inside, mirrored)
    return Trees(forest.level, forest.expected, forest.table())


class _Between:
    """How holders share the work of sending chunks to other nodes."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        node_of = schedule.node_of
        self.homes = [node_of[owner] for owner in schedule.owners]
        self.members = [_by_node(holders, node_of) for holders in schedule.holders]
        """For each chunk: node → its holders there, nodes ascending."""
        self.others = [
            [node for node in members if node != home] for members, home in zip(self.members, self.homes, strict=True)
        ]
        """For each chunk: the nodes that it must be sent to, ascending."""
        self.relays, level = self._divide_forwarding()
        """For each chunk, which holder forwards a range to the other nodes; `_NOBODY` where only one other has it."""
        self.senders, self.level = self._divide_sending(level)
        """For each chunk, which holder in the owner's node sends a range out."""

    def _divide_forwarding(self) -> tuple[list[Parts], int]:
        schedule = self._schedule
        work, allowed, home = [], [], []
        for item, others in enumerate(self.others):
            owner, size, first = schedule.owners[item], schedule.sizes[item], schedule.first_bytes[item]
            work += [(len(others) - 1) * size if others else 0, (size if len(others) == 1 else first) if others else 0]
            allowed += [schedule.holders[item], self.members[item][self.homes[item]]]
            home += [owner, owner]
        division = self._divide(work, [0] * len(schedule.node_of), allowed, home, self._arriving())
        relays = []
        for item, others in enumerate(self.others):
            size = schedule.sizes[item]
            default = schedule.owners[item] if len(others) > 1 else _NOBODY
            relays.append(_parts(division.shares[2 * item], default, size, schedule.granule_bytes))
        return relays, division.level

    def _arriving(self) -> int:
        """Ticks that some node, or some rank that is a node's only holder, needs to let its chunks in."""
        schedule = self._schedule
        nodes, ranks = [0] * len(schedule.costs.node), [0] * len(schedule.node_of)
        for item, others in enumerate(self.others):
            for node in others:
                nodes[node] += schedule.sizes[item]
                holders = self.members[item][node]
                ranks[holders[0]] += schedule.sizes[item] if len(holders) == 1 else 0
        times = [amount * ticks for amount, ticks in zip(nodes, _node_costs(schedule), strict=True)]
        times += [amount * ticks for amount, ticks in zip(ranks, schedule.costs.out, strict=True)]
        return max(times)

    def _divide_sending(self, level: int) -> tuple[list[Parts], int]:
        """Who sends relays their ranges, now that it is known who sends what to all other nodes by itself."""
        schedule, node_of = self._schedule, self._schedule.node_of
        base, work = [0] * len(node_of), []
        for item, others in enumerate(self.others):
            given, begin = 0, 0
            for end, relay in self.relays[item]:
                if not others:
                    pass
                elif relay == _NOBODY:
                    given += end - begin
                elif node_of[relay] == self.homes[item]:
                    base[relay] += (end - begin) * len(others)
                else:
                    base[relay] += (end - begin) * (len(others) - 1)
                    given += (end - begin) * schedule.first_bytes[item] // schedule.sizes[item]
                begin = end
            work.append(given)
        allowed = [members[home] for members, home in zip(self.members, self.homes, strict=True)]
        division = self._divide(work, base, allowed, schedule.owners, level)
        return [self._sender_parts(item, shares) for item, shares in enumerate(division.shares)], division.level

    def _sender_parts(self, item: int, shares: list[tuple[int, int]]) -> Parts:
        """Lays shares along the ranges that are not sent by a relay in the owner's node itself."""
        schedule, begin, given = self._schedule, 0, 0
        parts: Parts = []
        lines = []  # (begin, end, who sends it or _NOBODY)
        for end, relay in self.relays[item]:
            at_home = relay != _NOBODY and schedule.node_of[relay] == self.homes[item]
            lines.append((begin, end, relay if at_home else _NOBODY))
            given += 0 if at_home else end - begin
            begin = end
        cuts = _parts(shares, schedule.owners[item], given, schedule.granule_bytes) if given else []
        passed, turn = 0, 0  # bytes of ``given`` before this line, and whose turn it is
        for begin, end, who in lines:
            if who != _NOBODY:
                parts.append((end, who))
                continue
            while cuts[turn][0] - passed < end - begin:
                parts.append((begin + cuts[turn][0] - passed, cuts[turn][1]))
                turn += 1
            parts.append((end, cuts[turn][1]))
            passed += end - begin
            turn += cuts[turn][0] == passed
        return _joined(parts)

    def _divide(
        self,
        work: Sequence[int],
        base: Sequence[int],
        allowed: Sequence[Sequence[int]],
        home: Sequence[int],
        floor: int,
    ) -> Division:
        costs = self._schedule.costs
        return divide(work, base, allowed, costs.out, floor, home, self._schedule.node_of, costs.node)


class _Entries:
    """At which holders chunks enter the nodes that their owner is not in."""

    def __init__(self, schedule: Schedule, between: _Between) -> None:
        self._schedule, self._between = schedule, between
        self._place_of = _places(schedule.node_of)
        self._in = [0] * len(schedule.node_of)
        self.spread = [0] * len(schedule.node_of)
        """``[W]``, bytes that each rank sends inside its node because it let them in."""
        self.level = max(between.level, self._least_inside())
        self.of: list[dict[int, Parts]] = [{} for _ in schedule.sizes]
        """For each chunk: other node → at which rank a range enters."""
        self._take_relayed()
        for item in sorted(range(len(schedule.sizes)), key=lambda item: (-schedule.sizes[item], item)):
            for node in between.others[item]:
                self.of[item][node] = self._enter(item, node)

    def _least_inside(self) -> int:
        """Ticks that some rank needs for what it gets from, or must send to, its own node."""
        schedule, between = self._schedule, self._between
        gets, sends = [0] * len(schedule.node_of), [0] * len(schedule.node_of)
        for item, members in enumerate(between.members):
            inside = members[between.homes[item]]
            for rank in inside:
                gets[rank] += schedule.sizes[item] if rank != schedule.owners[item] else 0
            if len(inside) > 1:
                first = schedule.sizes[item] if len(inside) == 2 else schedule.first_bytes[item]
                sends[schedule.owners[item]] += first
        return max(max(got, sent) * ticks for got, sent, ticks in zip(gets, sends, schedule.costs.up, strict=True))

    def _take_relayed(self) -> None:
        """What a node relays enters at the rank that forwards it."""
        between, node_of = self._between, self._schedule.node_of
        for item, relays in enumerate(between.relays):
            begin = 0
            for end, relay in relays:
                if relay != _NOBODY and node_of[relay] != between.homes[item]:
                    self._take(relay, end - begin, len(between.members[item][node_of[relay]]) - 1)
                begin = end

    def _enter(self, item: int, node: int) -> Parts:
        between, node_of = self._between, self._schedule.node_of
        parts: Parts = []
        begin = 0
        for end in sorted({end for end, _ in between.relays[item] + between.senders[item]}):
            relay = _who(between.relays[item], begin)
            if relay != _NOBODY and node_of[relay] == node:
                parts.append((end, relay))
            else:
                from_home = relay == _NOBODY or node_of[relay] == between.homes[item]
                carrier = _who(between.senders[item], begin) if from_home else relay
                parts += self._enter_range(begin, end, between.members[item][node], self._place_of[carrier])
            begin = end
        return _joined(parts)

    def _enter_range(self, begin: int, end: int, ranks: Sequence[int], place: int) -> Parts:
        """Lets a range in at the rank with its carrier's place in the node, or else where most room is.

        Ranks that send at an even pace then fill those that they send to at an even pace too.
        """
        granule, fanout = self._schedule.granule_bytes, len(ranks) - 1
        parts: Parts = []
        while begin < end:
            rank = next((rank for rank in ranks if self._place_of[rank] == place), _NOBODY)
            if rank == _NOBODY or self._room(rank, fanout) < end - begin:
                rank = max(ranks, key=lambda rank: (self._room(rank, fanout), -rank))
            length = min(end - begin, self._room(rank, fanout) // granule * granule)
            if length <= 0 or end - begin - length < granule:
                length = end - begin
            self._take(rank, length, fanout)
            parts.append((begin + length, rank))
            begin += length
        return parts

    def _room(self, rank: int, fanout: int) -> int:
        """Bytes that ``rank`` can still let in and spread."""
        costs = self._schedule.costs
        room = self.level // costs.out[rank] - self._in[rank]
        return min(room, (self.level // costs.up[rank] - self.spread[rank]) // fanout) if fanout else room

    def _take(self, rank: int, amount: int, fanout: int) -> None:
        self._in[rank] += amount
        self.spread[rank] += amount * fanout


class _Inside:
    """How the holders in the owner's node share the work of forwarding a chunk to each other."""

    def __init__(self, schedule: Schedule, entries: _Entries) -> None:
        base = list(entries.spread)
        work, allowed = [], []
        for item, owner in enumerate(schedule.owners):
            ranks = _by_node(schedule.holders[item], schedule.node_of)[schedule.node_of[owner]]
            size = schedule.sizes[item]
            if len(ranks) > 1:
                base[owner] += size if len(ranks) == 2 else schedule.first_bytes[item]
            work.append(max(len(ranks) - 2, 0) * size)
            allowed.append(ranks if len(ranks) > 2 else [])
        division = divide(work, base, allowed, schedule.costs.up, entries.level, schedule.owners)
        self.relays = [
            _parts(shares, schedule.owners[item], schedule.sizes[item], schedule.granule_bytes)
            for item, shares in enumerate(division.shares)
        ]
        """For each chunk, which rank of the owner's node forwards a range to the others; the owner sends to all."""


class _Branch(NamedTuple):
    """Hops of a cell's tree whose pieces are due together, as they follow from one rank's work.

    Attributes:
        hops: ``(depth, src, dst)``.
        carrier: the rank whose work on them is hardest to fit in, and the bytes of that work.
        is_relayed: whether the carrier had to be sent the cell first.
    """

    hops: list[tuple[int, int, int]]
    carrier: int
    carried_bytes: int
    is_relayed: bool
    crosses: bool

    @property
    def line(self) -> tuple[int, bool, bool]:
        """Work that the same rank does on the same link, one cell after the other."""
        return self.carrier, self.is_relayed, self.crosses


class _Cell(NamedTuple):
    """A range of a chunk and its tree: inside the owner's node, and to and in all others."""

    item: int
    begin: int
    end: int
    branches: list[_Branch]

    @property
    def hops(self) -> Iterator[tuple[int, int, int]]:
        return (hop for branch in self.branches for hop in branch.hops)

    @property
    def forwards(self) -> frozenset[int]:
        """The ranks but the owner that send it on; in the mirror they send a sum."""
        return frozenset(src for hop, src, _ in self.hops if hop)


class _Forest:
    """Cells and their trees, when their pieces are due, and the table of their hops."""

    def __init__(
        self, schedule: Schedule, between: _Between, entries: _Entries, inside: _Inside, mirrored: bool
    ) -> None:
        self._schedule, self._between, self._entries, self._inside = schedule, between, entries, inside
        self._mirrored = mirrored
        self._cells = [cell for item in range(len(schedule.sizes)) for cell in self._cells_of(item)]
        self.level = self._busiest()
        latency = max(schedule.costs.up_latency, schedule.costs.out_latency)
        fanout = max((len(holders) - 1 for holders in schedule.holders), default=1)
        self._num_pieces = _choose_pieces(self.level, fanout, latency)
        depth = 1 + max((hop for cell in self._cells for hop, _, _ in cell.hops), default=-1)
        self.expected = self.level + depth * latency
        if depth > 1:
            self.expected += (depth - 1) * self.level // self._num_pieces

    def _cells_of(self, item: int) -> list[_Cell]:
        between, entries = self._between, self._entries
        partitions = [between.relays[item], between.senders[item], self._inside.relays[item]]
        partitions += entries.of[item].values()
        cuts = sorted({end for parts in partitions for end, _ in parts})
        return [self._cell(item, begin, end) for begin, end in zip([0, *cuts], cuts, strict=False)]

    def _cell(self, item: int, begin: int, end: int) -> _Cell:
        between, node_of = self._between, self._schedule.node_of
        owner, home, members = self._schedule.owners[item], between.homes[item], between.members[item]
        hops: list[tuple[int, int, int]] = []
        carrier = _who(self._inside.relays[item], begin)
        depth_of = _spread(hops, 0, owner, members[home], carrier)
        is_relayed = carrier != owner
        carried = (end - begin) * (len(members[home]) - 1 - is_relayed)
        branches = []
        if between.others[item]:
            sender, relay = _who(between.senders[item], begin), _who(between.relays[item], begin)
            entries = [_who(self._entries.of[item][node], begin) for node in between.others[item]]
            if sender == owner and hops:  # else what goes out sets the pace for what its sender gets
                branches.append(_Branch(hops, carrier, carried, is_relayed, False))
                hops = []
            carrier, depth, is_relayed = sender, depth_of[sender], sender != owner
            if relay != _NOBODY and node_of[relay] != home:
                hops.append((depth, sender, relay))
                carrier, depth, is_relayed = relay, depth + 1, True
                _spread(hops, depth, relay, members[node_of[relay]], relay)
                entries.remove(relay)
            for entry in entries:
                hops.append((depth, carrier, entry))
                _spread(hops, depth + 1, entry, members[node_of[entry]], entry)
            carried = (end - begin) * len(entries)
        if hops:
            branches.append(_Branch(hops, carrier, carried, is_relayed, bool(between.others[item])))
        return _Cell(item, begin, end, branches)

    def _busiest(self) -> int:
        """Ticks that the busiest link needs."""
        schedule, node_of, costs = self._schedule, self._schedule.node_of, self._schedule.costs
        up, out, node = [[[0] * len(each), [0] * len(each)] for each in (costs.up, costs.out, costs.node)]
        for cell in self._cells:
            forwards = cell.forwards if self._mirrored else frozenset()
            whole = cell.end - cell.begin
            partial = whole * schedule.first_bytes[cell.item] // schedule.sizes[cell.item]
            for _, src, dst in cell.hops:
                num_bytes = partial if dst in forwards else whole
                for side, rank in enumerate((src, dst)):
                    if node_of[src] == node_of[dst]:
                        up[side][rank] += num_bytes
                    else:
                        out[side][rank] += num_bytes
                        node[side][node_of[rank]] += num_bytes
        times = [0]
        for links, ticks in ((up, costs.up), (out, costs.out), (node, costs.node)):
            for loads in links:
                times += [load * cost for load, cost in zip(loads, ticks, strict=True)]
        return max(times)

    def table(self) -> Table:
        """The transfers; a rank's *line* of work takes turns over all slots, each as long as its share of the line."""
        totals: dict[tuple[int, bool, bool], int] = {}
        for cell in self._cells:
            for branch in cell.branches:
                totals[branch.line] = totals.get(branch.line, 0) + branch.carried_bytes
        rows: list[tuple[int, int, int, int, int, int, int, int, bool]] = []
        position = dict.fromkeys(totals, 0)
        last = 0
        for cell in self._cells:
            first, spans = [], []
            for branch in cell.branches:
                total = max(totals[branch.line], 1)
                first.append(SLOTS * position[branch.line] // total)
                position[branch.line] += branch.carried_bytes
                spans.append(max(SLOTS * position[branch.line] // total - first[-1], 1))
            # All branches are cut alike: who forwards in one what came by another does so piece by piece.
            pieces = -(-max(spans) * self._num_pieces // SLOTS)
            most = (cell.end - cell.begin) // _LEAST_PIECE_BYTES if self._schedule.divisible else 1
            pieces = max(min(pieces, most), 1)
            forwards = cell.forwards if self._mirrored else frozenset()
            chunk = self._schedule.chunks[cell.item]
            for branch, begin, span in zip(cell.branches, first, spans, strict=True):
                lag = -(-span // pieces)
                for hop, src, dst in branch.hops:
                    stage = begin + hop * lag
                    last = max(last, stage + span)
                    row = (-(stage + span), span, dst, src) if self._mirrored else (stage, span, src, dst)
                    rows.append((*row, chunk, pieces, cell.begin, cell.end, dst in forwards))
        table = np.zeros(len(rows), TRANSFER)  # padding too, as digests see it
        for name, column in zip(TRANSFER.names or (), zip(*rows, strict=True), strict=bool(rows)):
            table[name] = column
        if self._mirrored:  # the same schedule with time and arrows turned round
            table["stage"] += last
        return freeze(table)


def _choose_pieces(level: int, fanout: int, latency: int) -> int:
    """As many pieces as balance the filling of the pipeline against the messages that they cost."""
    message_ticks = fanout * latency // _MESSAGES_PER_LATENCY
    best = isqrt(level // message_ticks) if message_ticks else _MOST_PIECES
    return min(max(best, 1), _MOST_PIECES)


def _spread(
    hops: list[tuple[int, int, int]], depth: int, source: int, ranks: Sequence[int], relay: int
) -> dict[int, int]:
    """Adds the hops from ``source`` to all of ``ranks``, through ``relay``; gives the depth at which each can send."""
    depth_of = {source: depth}
    if relay != source:
        hops.append((depth, source, relay))
        depth += 1
        depth_of[relay] = depth
    for rank in ranks:
        if rank not in depth_of:
            hops.append((depth, relay, rank))
            depth_of[rank] = depth + 1
    return depth_of


def _by_node(ranks: Sequence[int], node_of: Sequence[int]) -> dict[int, list[int]]:
    """Node → those of ``ranks`` that live on it, nodes ascending."""
    found: dict[int, list[int]] = {}
    for rank in ranks:
        found.setdefault(node_of[rank], []).append(rank)
    return dict(sorted(found.items()))


def _places(node_of: Sequence[int]) -> list[int]:
    """How many lower ranks share a rank's node."""
    counts = [0] * len(node_of)
    places = []
    for node in node_of:
        places.append(counts[node])
        counts[node] += 1
    return places


def _node_costs(schedule: Schedule) -> list[int]:
    """Ticks that a byte takes a node: its shared link, or the links of its ranks together."""
    costs = schedule.costs
    rates = [0] * len(costs.node)
    for rank, node in enumerate(schedule.node_of):
        rates[node] += (1 << 40) // costs.out[rank]
    return [max(shared, (1 << 40) // rate) for shared, rate in zip(costs.node, rates, strict=True)]


def _parts(shares: list[tuple[int, int]], owner: int, size: int, granule: int) -> Parts:
    """Turns shares of work into ranges as long, at multiples of the granule; without any the owner has it all."""
    if not shares:
        return [(size, owner)]
    parts: Parts = []
    total, done = sum(amount for _, amount in shares), 0
    for who, amount in shares:
        done += amount
        end = (done * size // total + granule // 2) // granule * granule if done < total else size
        if end > (parts[-1][0] if parts else 0):
            parts.append((min(end, size), who))
    if parts[-1][0] < size:
        parts[-1] = (size, parts[-1][1])
    return parts


def _joined(parts: Parts) -> Parts:
    """Without empty ranges, and neighbours of one rank as one."""
    joined: Parts = []
    for end, rank in parts:
        if joined and (joined[-1][1] == rank or end <= joined[-1][0]):
            joined[-1] = (max(end, joined[-1][0]), joined[-1][1])
        else:
            joined.append((end, rank))
    return joined


def _who(parts: Parts, begin: int) -> int:
    return parts[bisect_right(parts, begin, key=lambda part: part[0])][1]

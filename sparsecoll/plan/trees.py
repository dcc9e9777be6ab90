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
from sparsecoll.plan.transfer import GRANULE_BYTES, LEAD, SLOTS, TRANSFER, Table, freeze

__all__ = ["Schedule", "Trees", "trees"]

_MOST_PIECES = 32
"""Pieces into which a relay cuts what it forwards: each further hop takes one more piece's time. Twice as many where
there are more than two hops."""

_LEAST_PIECE_BYTES = 1 << 14

_MESSAGES_PER_LATENCY = 512
"""How many messages a rank is taken to issue in the time in which one arrives."""

_SLACK = 12
"""Where relays have room they are filled to one part in so many less than the busiest link, and catch up with it."""

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
        division = self._divide()
        self.level = division.level
        granule = schedule.granule_bytes
        self.relays: list[Parts] = []
        """For each chunk, which holder sends a range to the other nodes but one; `_NOBODY` where only one has it."""
        self.senders: list[Parts] = []
        """For each chunk, which holder in the owner's node sends a range to that one, or to the relay elsewhere."""
        for item, (owner, size) in enumerate(zip(schedule.owners, schedule.sizes, strict=True)):
            default = owner if len(self.others[item]) > 1 else _NOBODY
            self.relays.append(_parts(division.shares[2 * item], default, size, granule))
            self.senders.append(_parts(division.shares[2 * item + 1], owner, size, granule))

    def _divide(self) -> Division:
        """Two items for each chunk: what holders forward to all other nodes but one, and what must leave its node."""
        schedule = self._schedule
        work, allowed, home = [], [], []
        for item, others in enumerate(self.others):
            owner, size, first = schedule.owners[item], schedule.sizes[item], schedule.first_bytes[item]
            work += [(len(others) - 1) * size if others else 0, (size if len(others) == 1 else first) if others else 0]
            allowed += [schedule.holders[item], self.members[item][self.homes[item]]]
            home += [owner, owner]
        base, costs = [0] * len(schedule.node_of), schedule.costs
        floor = self._arriving()
        return divide(work, base, allowed, costs.out, floor - floor // _SLACK, home, schedule.node_of, costs.node)

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


class _Range(NamedTuple):
    """What ``carrier`` sends to ``node``, or what node it is a relay of."""

    node: int
    begin: int
    end: int
    carrier: int


class _Entries:
    """At which holders chunks enter the nodes that their owner is not in."""

    def __init__(self, schedule: Schedule, between: _Between) -> None:
        self._schedule, self._between = schedule, between
        self._ranges = [self._ranges_of(item) for item in range(len(schedule.sizes))]
        self.of, self.spread, self.level = self._divide(max(between.level, self._least_inside()))
        """For each chunk: other node → at which rank a range enters. For each rank: bytes that it sends inside its node
        because it let them in."""

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

    def _ranges_of(self, item: int) -> list[_Range]:
        """Ranges of a chunk on their way from one carrier to one node."""
        between, node_of = self._between, self._schedule.node_of
        relays, senders, others = between.relays[item], between.senders[item], between.others[item]
        ranges = []
        begin = 0
        for end in sorted({end for end, _ in relays + senders}) if others else []:
            relay, sender = _who(relays, begin), _who(senders, begin)
            at_home = relay == _NOBODY or node_of[relay] == between.homes[item]
            for number, node in enumerate(others):
                ranges.append(_Range(node, begin, end, sender if at_home and not number else relay))
            begin = end
        return ranges

    def _divide(self, floor: int) -> tuple[list[dict[int, Parts]], list[int], int]:
        """Chooses entries so that neither what ranks let in nor what they then spread is more than it must be.

        A range enters at the rank that has its carrier's place in the node, if there is room: at the relay itself in
        its own node, and in others so that ranks that send evenly fill those that they send to evenly too.
        """
        schedule, between, costs = self._schedule, self._between, self._schedule.costs
        place_of = _places(schedule.node_of)
        base = [0] * len(schedule.node_of)
        work, allowed, home = [], [], []
        for item, ranges in enumerate(self._ranges):
            for each in ranges:
                ranks = between.members[item][each.node]
                work.append(self._weighed(each.end - each.begin, ranks))
                allowed.append(ranks)
                home.append(next((rank for rank in ranks if place_of[rank] == place_of[each.carrier]), _NOBODY))
        division = divide(work, base, allowed, costs.out, floor, home)
        entries: list[dict[int, Parts]] = [{node: [] for node in others} for others in between.others]
        spread = [0] * len(schedule.node_of)
        shares = iter(division.shares)
        for item, ranges in enumerate(self._ranges):
            for each in ranges:
                length, others = each.end - each.begin, len(between.members[item][each.node]) - 1
                begin = 0
                for end, rank in _parts(next(shares), _NOBODY, length, schedule.granule_bytes):
                    spread[rank] += (end - begin) * others
                    entries[item][each.node].append((each.begin + end, rank))
                    begin = end
        return entries, spread, division.level

    def _weighed(self, num_bytes: int, ranks: Sequence[int]) -> int:
        """Bytes that a rank lets in, or as many as stand for what it costs to spread them where that is more."""
        costs, rank = self._schedule.costs, ranks[0]
        return max(num_bytes, num_bytes * (len(ranks) - 1) * costs.up[rank] // costs.out[rank])


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
        division = divide(
            work, base, allowed, schedule.costs.up, entries.level - entries.level // _SLACK, schedule.owners
        )
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
        depth = 1 + max((hop for cell in self._cells for hop, _, _ in cell.hops), default=-1)
        self._num_pieces = _choose_pieces(self.level, depth, fanout, latency)
        # Ranks may run ahead by an eighth of the schedule (`LEAD`), and by as much as is on its way.
        self._slots = max(SLOTS * self.level // (self.level + 2 * latency * SLOTS // LEAD), 1) if self.level else 1
        self._latency_slots = min(latency * self._slots // self.level, LEAD // 2) if self.level else 0
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
            is_away = relay != _NOBODY and node_of[relay] != home
            carrier_out = sender if relay == _NOBODY or is_away else relay
            # If others than the owner send it out, that sets the pace for what they get.
            if hops and sender == carrier_out == owner:
                branches.append(_Branch(hops, carrier, carried, is_relayed, False))
                hops = []
            first = next(entry for entry in entries if not is_away or node_of[entry] == node_of[relay])
            if is_away:  # the relay gets it where it enters its node
                carrier, depth, is_relayed = relay, depth_of[sender] + 1 + (first != relay), True
            else:
                carrier, depth, is_relayed = carrier_out, depth_of[carrier_out], carrier_out != owner
            rest = [entry for entry in entries if entry != first]
            hops.append((depth_of[sender], sender, first))
            _spread(hops, depth_of[sender] + 1, first, members[node_of[first]], first)
            for entry in rest:
                hops.append((depth, carrier, entry))
                _spread(hops, depth + 1, entry, members[node_of[entry]], entry)
            carried = (end - begin) * max(len(rest), 1)
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
                first.append(self._slots * position[branch.line] // max(totals[branch.line], 1))
                position[branch.line] += branch.carried_bytes
                spans.append(self._slots_of(branch))
            # All branches are cut alike: who forwards in one what came by another does so piece by piece.
            pieces = -(-max(spans) * self._num_pieces // self._slots)
            most = (cell.end - cell.begin) // _LEAST_PIECE_BYTES if self._schedule.divisible else 1
            pieces = max(min(pieces, most), 1)
            forwards = cell.forwards if self._mirrored else frozenset()
            chunk = self._schedule.chunks[cell.item]
            for branch, begin, span in zip(cell.branches, first, spans, strict=True):
                lag = -(-span // pieces) + self._latency_slots  # until those who forward a piece have it
                for hop, src, dst in branch.hops:
                    # Pieces of all cells of a line take turns, so that nobody gets much of one and nothing of others.
                    stage = begin // pieces + hop * lag
                    end = stage + self._slots * (pieces - 1) // pieces + lag
                    last = max(last, end)
                    row = (-end, self._slots, dst, src) if self._mirrored else (stage, self._slots, src, dst)
                    rows.append((*row, chunk, pieces, cell.begin, cell.end, dst in forwards))
        table = np.zeros(len(rows), TRANSFER)  # padding too, as digests see it
        for name, column in zip(TRANSFER.names or (), zip(*rows, strict=True), strict=bool(rows)):
            table[name] = column
        if self._mirrored:  # the same schedule with time and arrows turned round
            table["stage"] += last
        return freeze(table)

    def _slots_of(self, branch: _Branch) -> int:
        """How many slots its carrier is busy with a branch."""
        costs = self._schedule.costs.out if branch.crosses else self._schedule.costs.up
        return max(-(-self._slots * branch.carried_bytes * costs[branch.carrier] // max(self.level, 1)), 1)


def _choose_pieces(level: int, depth: int, fanout: int, latency: int) -> int:
    """As many pieces as balance the filling of the pipeline against the messages that they cost."""
    most = _MOST_PIECES if depth < 3 else 2 * _MOST_PIECES
    message_ticks = fanout * latency // _MESSAGES_PER_LATENCY
    best = isqrt(level // message_ticks) if message_ticks else most
    return min(max(best, 1), most)


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


def _who(parts: Parts, begin: int) -> int:
    return parts[bisect_right(parts, begin, key=lambda part: part[0])][1]

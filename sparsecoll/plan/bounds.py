"""What no schedule can beat; derived in ``docs/bounds.md`` and held there against a linear programme.

Every rank has a port to its node (scale-up) and one to other nodes (scale-out), every node perhaps a shared one, and
each carries its bandwidth in both directions at once. Two bounds follow, both of fluid schedules, which cut chunks as
finely as they like, and both with the least latency of a message on top.

`holders_bound_s` is about schedules in which only holders of a chunk carry it. Where all ranks are on one node, or each
is on its own, it is the optimum of such schedules and not only a bound. `universal_bound_s` holds for any schedule.

The reduce-scatter is the mirror: with sending and receiving exchanged the same numbers come out, counted in bytes of
the input's dtype. Partial sums in a wider dtype may need more, never less.

``K`` kinds of chunks (of one owner and one set of holders), ``W`` ranks, ``N`` nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsecoll.placement import Placement
from sparsecoll.plan.division import Division, divide
from sparsecoll.topology import Link, Topology

__all__ = ["holders_bound_s", "universal_bound_s"]

Floats = NDArray[np.float64]

# Costs and amounts as the integers that `divide` takes: costs to one part in 2^14 and over a range of 2^14, amounts to
# 2^-40 of all bytes. Neither limits the bound, which is computed from the bins that prove to be the bottleneck.
_COST_UNIT = 1 << 14
_COST_RANGE = 1 << 14
_LEAST_TOTAL = 1 << 40
_ENDLESS = 1e30
_SAME = 1 + 1e-8


def holders_bound_s(place: Placement, chunks: Sequence[int], chunk_bytes: Sequence[int], topology: Topology) -> float:
    """Seconds that gathering ``chunks``, or reducing them back, takes at least if only holders of a chunk carry it.

    Exact for fluid schedules on one node and on nodes of one rank each.

    Args:
        place: owners and holders.
        chunks: the chunks that take part.
        chunk_bytes: ``[num_chunks]``, of all chunks of ``place``.
        topology: the links.
    """
    demand = _Demand.of(place, chunks, chunk_bytes, topology)
    if not len(demand.sizes):
        return 0.0
    ports = _Ports.of(topology)
    level = _ingress(demand, ports, relayed=False)
    for items in _divisions(demand, topology):
        level = _divided(items, ports.bins, level)
    return level + ports.latency_s


def universal_bound_s(place: Placement, chunks: Sequence[int], chunk_bytes: Sequence[int], topology: Topology) -> float:
    """Seconds that any schedule takes at least, whoever carries what; arguments as in `holders_bound_s`."""
    demand = _Demand.of(place, chunks, chunk_bytes, topology)
    if not len(demand.sizes):
        return 0.0
    ports = _Ports.of(topology)
    inside = _sums(demand.node_of, ports.up, topology.num_nodes)
    loads = [_ingress(demand, ports, relayed=True)]
    # A byte that anybody lacks leaves its owner, and its owner's node if it is lacked elsewhere.
    loads.append(_longest(_sums(demand.owners, demand.sizes, place.world_size), ports.up + ports.out))
    elsewhere = demand.sizes * (demand.num_holder_nodes > 1)
    loads.append(_longest(_sums(demand.owner_nodes, elsewhere, topology.num_nodes), ports.node))
    arrives = demand.present > 0
    arrives[np.arange(len(arrives)), demand.owner_nodes] = False
    arriving = demand.sizes @ arrives
    loads.append(_longest(arriving, ports.node))
    # All deliveries share all ports: between nodes, within each node, and both together.
    delivered = demand.sizes @ demand.receivers
    loads.append(_longest(arriving.sum(), ports.node.sum()))
    loads.append(_longest(_sums(demand.node_of, delivered, topology.num_nodes), inside + ports.node))
    loads.append(_longest(delivered.sum(), (inside + ports.node).sum()))
    return max(loads) + ports.latency_s


@dataclass(frozen=True)
class _Demand:
    """What has to move; chunks that have the same owner and holders are one.

    Attributes:
        owners: ``[K]``.
        holders: bool ``[K, W]``.
        sizes: ``[K]``, bytes.
        node_of: ``[W]``.
    """

    owners: NDArray[np.int64]
    holders: NDArray[np.bool_]
    sizes: Floats
    node_of: NDArray[np.int64]

    @classmethod
    def of(cls, place: Placement, chunks: Sequence[int], chunk_bytes: Sequence[int], topology: Topology) -> _Demand:
        index = np.asarray(chunks, np.int64)
        sizes = np.asarray(chunk_bytes, np.float64)[index]
        moves = (sizes > 0) & (np.count_nonzero(place.holders[index], axis=1) > 1)
        index, sizes = index[moves], sizes[moves]
        owners, holders = place.owners[index].astype(np.int64), place.holders[index]
        rows = np.concatenate([owners.astype("<i8")[:, None].view(np.uint8), np.packbits(holders, axis=1)], axis=1)
        _, first, kind = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        return cls(
            owners[first],
            holders[first],
            _sums(kind.ravel(), sizes, len(first)),
            np.asarray(topology.node_of, np.int64),
        )

    @cached_property
    def receivers(self) -> NDArray[np.bool_]:
        """``[K, W]``: holders without the owner."""
        mask = self.holders.copy()
        mask[np.arange(len(mask)), self.owners] = False
        return mask

    @cached_property
    def present(self) -> NDArray[np.int64]:
        """``[K, N]``: how many holders a node has."""
        member = self.node_of[:, None] == np.arange(self.node_of.max() + 1)
        return (self.holders.astype(np.float32) @ member.astype(np.float32)).astype(np.int64)

    @cached_property
    def num_holder_nodes(self) -> NDArray[np.int64]:
        """``[K]``: how many nodes have a holder."""
        return np.count_nonzero(self.present, axis=1)

    @property
    def owner_nodes(self) -> NDArray[np.int64]:
        """``[K]``."""
        return self.node_of[self.owners]


class _Ports(NamedTuple):
    """Bytes per second in each direction; 0 where there is nobody to talk to.

    A port can do no more than all ports that it faces together, so that is what it counts for.

    Attributes:
        up, out: ``[W]``, scale-up and scale-out.
        node: ``[N]``, what a node exchanges with others, over its ranks' ports and the shared link.
        latency_s: the least of a message.
    """

    up: Floats
    out: Floats
    node: Floats
    latency_s: float

    @classmethod
    def of(cls, topology: Topology) -> _Ports:
        node_of = np.asarray(topology.node_of, np.int64)
        ranks, nodes = range(topology.world_size), range(topology.num_nodes)
        ups, outs = [topology.scale_up_of(rank) for rank in ranks], [topology.scale_out_of(rank) for rank in ranks]
        shared = [topology.node_link_of(node) for node in nodes]
        limits = _rates(shared)
        up, out = _facing(_rates(ups), node_of), _rates(outs)
        node = _facing(np.minimum(_sums(node_of, out, len(nodes)), limits), np.zeros(len(nodes), np.int64))
        latencies = [link.latency_s for rank, link in enumerate(ups) if up[rank]]
        if len(nodes) > 1:
            both = [(link, shared[topology.node_of[rank]]) for rank, link in enumerate(outs)]
            latencies += [max(link.latency_s, 0.0 if node is None else node.latency_s) for link, node in both]
        return cls(up, np.minimum(out, node[node_of]), node, min(latencies))

    @property
    def bins(self) -> Floats:
        """``[2 * W + N]``, the ports as bins of a division: ``up``, then ``out``, then ``node``."""
        return np.concatenate([self.up, self.out, self.node])


def _rates(links: Sequence[Link | None]) -> Floats:
    """Bandwidths; one that nothing limits is very large, as infinities do not divide."""
    return np.array([_ENDLESS if link is None else min(link.bandwidth_bytes_per_s, _ENDLESS) for link in links])


def _facing(rates: Floats, group_of: NDArray[np.int64]) -> Floats:
    """``rates``, each at most what the others of its group have together."""
    limited = rates.copy()
    for group in range(int(group_of.max()) + 1):
        members = np.flatnonzero(group_of == group)
        # Only the largest can be more than all others.
        largest = members[rates[members].argmax()]
        limited[largest] = min(rates[largest], rates[members[members != largest]].sum())
    return limited


class _Item(NamedTuple):
    """Bytes that only these bins can take, in any proportion."""

    num_bytes: float
    bins: tuple[int, ...]


def _ingress(demand: _Demand, ports: _Ports, relayed: bool) -> float:
    """Time of the receiver with most to take in.

    Args:
        relayed: whether outsiders may relay. If not, what nobody in another node holds comes by scale-up.
    """
    received = demand.sizes @ demand.receivers
    longest = _longest(received, ports.up + ports.out)
    if relayed:
        return longest
    inside = demand.sizes * (demand.num_holder_nodes == 1)
    return max(longest, _longest(inside @ demand.receivers, ports.up))


def _divisions(demand: _Demand, topology: Topology) -> Iterator[list[_Item]]:
    """Each a set of transmissions that ports have to share in any schedule among holders."""
    world_size = topology.world_size
    yield list(_from_owners(demand, world_size))
    if topology.num_nodes == 1 or topology.num_nodes == world_size:
        return  # the above is all there is to it
    crossings = [np.arange(world_size) + world_size]
    if topology.node_link is not None:
        crossings.append(demand.node_of + 2 * world_size)
    for crossing in crossings:
        yield list(_departures(demand, crossing))
        yield list(_arrivals(demand, crossing))


def _from_owners(demand: _Demand, world_size: int) -> Iterator[_Item]:
    """Egress: owners send everything once, and all holders share the rest."""
    for kind, owner in enumerate(demand.owners):
        holders = np.flatnonzero(demand.holders[kind])
        has_neighbour = holders[demand.present[kind, demand.node_of[holders]] > 1]
        crossing = holders if demand.num_holder_nodes[kind] > 1 else holders[:0]
        num_bytes = demand.sizes[kind]
        own = [owner] * bool(owner in has_neighbour) + [owner + world_size] * bool(len(crossing))
        yield _Item(num_bytes, tuple(own))
        yield _Item(num_bytes * (len(holders) - 2), (*has_neighbour, *(crossing + world_size)))


def _departures(demand: _Demand, crossing: NDArray[np.int64]) -> Iterator[_Item]:
    """Egress: chunks leave the owner's node once, cross to all other nodes once, and spread there.

    Args:
        crossing: ``[W]``, the bin that a rank's messages to other nodes pass.
    """
    for kind, owner in enumerate(demand.owners):
        num_bytes, num_nodes = demand.sizes[kind], demand.num_holder_nodes[kind]
        holders = np.flatnonzero(demand.holders[kind])
        nodes = demand.node_of[holders]
        if num_nodes > 1:
            yield _Item(num_bytes, _distinct(crossing[holders[nodes == demand.node_of[owner]]]))
            yield _Item(num_bytes * (num_nodes - 2), _distinct(crossing[holders]))
        else:
            yield _Item(num_bytes, (owner,))
        for node in np.flatnonzero(demand.present[kind] > 1):
            # Only the owner has been served so far if there is one node, only one holder of each if there are more.
            served = 1 if num_nodes > 1 else 2
            inside, outside = holders[nodes == node], holders[nodes != node]
            yield _Item(num_bytes * (len(inside) - served), (*inside, *_distinct(crossing[outside])))


def _arrivals(demand: _Demand, crossing: NDArray[np.int64]) -> Iterator[_Item]:
    """Ingress of nodes and egress in them: a chunk enters every other node once, more often or spreads there.

    Args:
        crossing: ``[W]``, the bin that a rank's messages from other nodes pass.
    """
    for kind, owner in enumerate(demand.owners):
        num_bytes = demand.sizes[kind]
        holders = np.flatnonzero(demand.holders[kind])
        nodes = demand.node_of[holders]
        for node in np.flatnonzero(demand.present[kind]):
            inside = holders[nodes == node]
            if node != demand.node_of[owner]:
                yield _Item(num_bytes, _distinct(crossing[inside]))
            if len(inside) > 1:
                yield _Item(num_bytes * (len(inside) - 1), (*inside, *_distinct(crossing[inside])))


def _distinct(bins: NDArray[np.int64]) -> tuple[int, ...]:
    return tuple(np.unique(bins).tolist())


def _divided(items: Sequence[_Item], rates: Floats, floor: float) -> float:
    """The least time in which the bins can take all items, or ``floor`` where that is more.

    What `divide` finds to integer costs is only asked where the bottleneck is. The bound is what that set of bins
    needs for the items that have nowhere else to go, and so holds whatever the set.

    Args:
        rates: bytes per second of every bin.
    """
    items = [item for item in items if item.num_bytes]
    if not items:
        return floor
    forced = [item for item in items if len(item.bins) == 1]
    loads = _sums([item.bins[0] for item in forced], [item.num_bytes for item in forced], len(rates))
    used = np.unique(np.concatenate([item.bins for item in items]))
    floor = max(floor, _longest(loads, rates), _longest(sum(item.num_bytes for item in items), rates[used].sum()))
    position = {each: place for place, each in enumerate(used.tolist())}
    allowed = [sorted(position[each] for each in item.bins) for item in items]
    rates = rates[used]
    cost, ticks_per_s = _costs(rates)
    amounts = [int(item.num_bytes) for item in items]
    shift = max(0, _LEAST_TOTAL.bit_length() - sum(amounts).bit_length())
    work = [amount << shift for amount in amounts]
    ticks_per_s *= 1 << shift
    while True:
        aim = int(floor * ticks_per_s * _SAME)
        division = divide(work, [0] * len(cost), allowed, cost, aim, home=[-1] * len(work))
        if division.level <= aim:
            return floor
        found = max(floor, _bottleneck(amounts, allowed, division, rates, cost))
        if found <= floor * _SAME or division.level <= found * ticks_per_s * _SAME:
            return found
        floor = found


def _costs(rates: Floats) -> tuple[list[int], float]:
    """Ticks that a byte takes every bin, and how many ticks a second has."""
    fastest = min(rates.max(), rates.min() * _COST_RANGE)
    unit = 1 if fastest == rates.min() else _COST_UNIT
    return [round(unit * fastest / min(rate, fastest)) for rate in rates.tolist()], fastest * unit


def _bottleneck(
    amounts: Sequence[int],
    allowed: Sequence[Sequence[int]],
    division: Division,
    rates: Floats,
    cost: Sequence[int],
) -> float:
    """The most that a set of bins needs for what it alone can take, over the sets that a division shows.

    Work can leave a bin for any other that its items allow. Bins whose work can get nowhere with room to spare, by any
    number of exchanges, are the bottleneck; how much room that is grows from set to set.
    """
    room = [division.level] * len(cost)
    holds_work: list[list[int]] = [[] for _ in cost]  # bin → bins whose work may move there
    for bins, shares in zip(allowed, division.shares, strict=True):
        for each, share in shares:
            room[each] -= share * cost[each]
        for each in bins:
            holds_work[each] += [source for source, _ in shares]
    order: list[int] = []
    reached = [False] * len(room)
    for start in sorted(range(len(room)), key=lambda each: -room[each]):
        waiting = [] if reached[start] else [start]
        reached[start] = True
        while waiting:
            order.append(waiting[-1])
            for source in holds_work[waiting.pop()]:
                if not reached[source]:
                    reached[source] = True
                    waiting.append(source)
    rank = {each: place for place, each in enumerate(reversed(order))}
    closed_at = [max(rank[each] for each in bins) for bins in allowed]
    needed = _sums(closed_at, amounts, len(order)).cumsum()
    return float((needed / rates[order[::-1]].cumsum()).max())


def _sums(keys: Sequence[int] | NDArray, amounts: Sequence[float] | Floats, count: int) -> Floats:
    """``[count]``: the amounts of each key, added up."""
    return np.bincount(np.asarray(keys, np.int64), np.asarray(amounts, np.float64), count).astype(np.float64)


def _longest(loads: NDArray | float, rates: NDArray | float) -> float:
    """The largest load over its rate; without a load no rate is needed."""
    loads, rates = np.atleast_1d(loads), np.atleast_1d(rates)
    return float((loads[loads > 0] / rates[loads > 0]).max(initial=0.0))

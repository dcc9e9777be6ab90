"""Who talks to whom, and when: rounds of disjoint pairs. Pure, and the same on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import TypeVar

__all__ = ["NodePair", "Pair", "scale_out_rounds", "scale_up_rounds", "shared_rounds", "tournament"]

T = TypeVar("T")

Pair = tuple[int, int]
"""Two ranks; the first one leads."""

NodePair = tuple[Pair, ...]
"""Pairs between two nodes that talk at once: the first ranks of all are on one node, the second ones on the other."""

# More peers would say little more about a rank, and in a large world take long.
_MOST_ROUNDS = 12
_MOST_PEER_NODES = 3


def tournament(num_players: int) -> list[list[Pair]]:
    """Rounds in which everybody meets everybody once, and nobody two at a time.

    An odd number of players gives as many rounds, in each of which another one rests; an even number one round less.
    The circle method (Kirkman 1847): one stays, the others move round it.
    """
    if num_players < 2:
        return []
    even = num_players + num_players % 2
    circle = list(range(even))
    rounds = []
    for _ in range(even - 1):
        pairs = [tuple(sorted((circle[place], circle[-1 - place]))) for place in range(even // 2)]
        rounds.append(sorted((first, second) for first, second in pairs if second < num_players))
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def scale_up_rounds(node_of: Sequence[int]) -> list[list[Pair]]:
    """Pairs inside nodes. All nodes and all pairs of a node at once, as links inside a node belong to one rank each."""
    nodes = [
        [[(ranks[a], ranks[b]) for a, b in pairs] for pairs in tournament(len(ranks))]
        for ranks in _ranks_of_nodes(node_of)
    ]
    return _bounded([list(chain.from_iterable(parts)) for parts in zip_longest(*nodes, fillvalue=())])


def scale_out_rounds(node_of: Sequence[int]) -> list[list[Pair]]:
    """Pairs between nodes, one rank of each node at a time, as ranks of a node may share its link."""
    nodes = _ranks_of_nodes(node_of)
    meetings = tournament(len(nodes))
    rounds = []
    for place in range(max(map(len, nodes))):
        # The next rank starts with the next meeting, so that over all ranks more pairs of nodes meet.
        for step in range(min(len(meetings), _MOST_PEER_NODES)):
            meeting = meetings[(place + step) % len(meetings)]
            rounds.append([(_in_turn(nodes[a], place), _in_turn(nodes[b], place)) for a, b in meeting])
    return _bounded(rounds)


def shared_rounds(node_of: Sequence[int]) -> list[list[NodePair]]:
    """Pairs of nodes of which several ranks talk at once, as many as the smaller node has."""
    nodes = _ranks_of_nodes(node_of)
    rounds = []
    for meeting in tournament(len(nodes))[:_MOST_PEER_NODES]:
        pairs = [tuple(zip(nodes[a], nodes[b], strict=False)) for a, b in meeting]
        rounds.append([pair for pair in pairs if len(pair) > 1])
    return [pairs for pairs in rounds if pairs]


def _ranks_of_nodes(node_of: Sequence[int]) -> list[list[int]]:
    nodes: list[list[int]] = [[] for _ in range(max(node_of) + 1)]
    for rank, node in enumerate(node_of):
        nodes[node].append(rank)
    return nodes


def _in_turn(ranks: Sequence[int], place: int) -> int:
    return ranks[place % len(ranks)]


def _bounded(rounds: Sequence[T]) -> list[T]:
    """At most a fixed number of them, evenly spread."""
    count = min(len(rounds), _MOST_ROUNDS)
    return [rounds[number * len(rounds) // count] for number in range(count)]

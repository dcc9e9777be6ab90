"""The pure parts of the probe: who meets whom in which round, and what follows from what they measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain, combinations

import pytest

from sparsecoll import InvalidArgument, Link, Topology
from sparsecoll.probe.__main__ import main
from sparsecoll.probe.combine import NodeSample, PairSample, combine, rank_links, snapped
from sparsecoll.probe.rounds import scale_out_rounds, scale_up_rounds, shared_rounds, tournament

NODES = [
    (0,),
    (0, 0),
    (0, 1),
    (0, 0, 0),
    (0, 1, 2),
    (0, 1, 0, 2, 1),
    (0, 0, 1, 1),
    (1, 1, 1, 0),
    (0, 0, 0, 1, 1, 2, 2, 2, 2),
    tuple(rank // 8 for rank in range(64)),
    tuple(rank // 64 for rank in range(192)),
    tuple(range(100)),
]


# --- rounds


@pytest.mark.parametrize("num_players", range(12))
def test_in_a_tournament_everybody_meets_everybody_once(num_players: int) -> None:
    rounds = tournament(num_players)
    assert sorted(chain.from_iterable(rounds)) == list(combinations(range(num_players), 2))
    for pairs in rounds:
        players = list(chain.from_iterable(pairs))
        assert len(set(players)) == len(players)
        assert len(players) >= num_players - 1, "at most one rests"
    assert len(rounds) == (0 if num_players < 2 else num_players - 1 + num_players % 2), "no round more than it needs"


@pytest.mark.parametrize("node_of", NODES, ids=str)
def test_rounds_inside_nodes(node_of: tuple[int, ...]) -> None:
    rounds = scale_up_rounds(node_of)
    sizes = Counter(node_of)
    assert len(rounds) <= 12 and (len(rounds) > 0) == (max(sizes.values()) > 1)
    for pairs in rounds:
        ranks = list(chain.from_iterable(pairs))
        assert pairs and len(set(ranks)) == len(ranks), "nobody talks to two at a time"
    meetings = list(chain.from_iterable(rounds))
    assert len(set(meetings)) == len(meetings)
    assert all(first != second and node_of[first] == node_of[second] for first, second in meetings)
    measured = set(chain.from_iterable(meetings))
    assert measured == {rank for rank, node in enumerate(node_of) if sizes[node] > 1}, "everybody who has a neighbour"


@pytest.mark.parametrize("node_of", NODES, ids=str)
def test_rounds_between_nodes_use_one_rank_of_a_node(node_of: tuple[int, ...]) -> None:
    rounds = scale_out_rounds(node_of)
    assert len(rounds) <= 12 and (len(rounds) > 0) == (len(set(node_of)) > 1)
    for pairs in rounds:
        nodes = [node_of[rank] for rank in chain.from_iterable(pairs)]
        assert pairs and len(set(nodes)) == len(nodes), "or a shared link would look like a slow one"
    if rounds and max(Counter(node_of).values()) <= 12:
        assert set(chain.from_iterable(chain.from_iterable(rounds))) == set(range(len(node_of)))


@pytest.mark.parametrize("node_of", NODES, ids=str)
def test_shared_rounds_take_as_many_ranks_as_both_nodes_have(node_of: tuple[int, ...]) -> None:
    sizes = Counter(node_of)
    met = set()
    for node_pairs in shared_rounds(node_of):
        assert node_pairs
        ranks = list(chain.from_iterable(chain.from_iterable(node_pairs)))
        assert len(set(ranks)) == len(ranks)
        for pairs in node_pairs:
            ((first, second),) = {(node_of[a], node_of[b]) for a, b in pairs}
            assert len(pairs) == min(sizes[first], sizes[second]) > 1
            met |= {first, second}
    several = {node for node, size in sizes.items() if size > 1}
    assert met == (several if len(several) > 1 else set()), "every node that can share, if it has somebody to talk to"


# --- links of ranks


def test_a_rank_is_as_fast_as_with_its_best_peer() -> None:
    """Rank 2 is slow, and so is everything with it; that is no fault of the others."""
    samples = [PairSample(0, 1, 1e-5, 8e9), PairSample(0, 2, 9e-5, 1e9), PairSample(1, 2, 8e-5, 1.1e9)]
    assert rank_links(3, samples) == [Link(8e9, 1e-5), Link(8e9, 1e-5), Link(1.1e9, 8e-5)]


def test_a_rank_that_nobody_met_is_like_the_others() -> None:
    samples = [PairSample(0, 1, 1e-5, 8e9), PairSample(2, 4, 1e-5, 8e9)]
    assert rank_links(6, samples) == [Link(8e9, 1e-5)] * 6


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([100.0, 81.0, 119.0, 100.0], [100.0] * 4),
        ([100.0, 79.0, 121.0, 100.0], [100.0, 79.0, 121.0, 100.0]),
        ([100.0, 300.0, 100.0, 300.0, 100.0], [100.0, 300.0, 100.0, 300.0, 100.0]),
        ([90.0, 110.0], [100.0, 100.0]),
        ([123456.0], [123000.0]),
    ],
)
def test_noise_becomes_the_median(values: list[float], expected: list[float]) -> None:
    assert snapped(dict(enumerate(values)), len(values), 0.2) == expected


# --- topologies


def pairs_of(node_of: Sequence[int], same_node: bool, latency_s: float, bandwidth: float) -> list[PairSample]:
    """All pairs, all alike."""
    return [
        PairSample(a, b, latency_s, bandwidth)
        for a, b in combinations(range(len(node_of)), 2)
        if (node_of[a] == node_of[b]) == same_node
    ]


def test_without_pairs_there_is_nothing_to_say() -> None:
    assert combine((0,), [], [], []) == Topology.flat(1)
    inside = combine((0, 0), pairs_of((0, 0), True, 2e-6, 5e9), [], [])
    assert inside == Topology((0, 0), scale_up=Link(5e9, 2e-6))
    between = combine((0, 1), [], pairs_of((0, 1), False, 3e-5, 2e9), [])
    assert between == Topology((0, 1), scale_out=Link(2e9, 3e-5))


def on_two_nodes(together: float) -> Topology:
    node_of = (0, 0, 1, 1)
    inside, between = pairs_of(node_of, True, 2e-6, 5e9), pairs_of(node_of, False, 3e-5, 1e9)
    return combine(node_of, inside, between, [NodeSample(0, 1, 2e9, together)])


def test_a_shared_link_shows_in_what_ranks_get_together() -> None:
    own = Topology((0, 0, 1, 1), Link(5e9, 2e-6), Link(1e9, 3e-5))
    for together in (2.1e9, 2e9, 1.65e9):
        assert on_two_nodes(together) == own
    for together in (1.55e9, 1e9, 0.5e9):
        assert on_two_nodes(together) == Topology(own.node_of, own.scale_up, own.scale_out, Link(together, 3e-5))


def test_a_node_answers_for_its_best_round_only() -> None:
    """Node 2 has a narrow link: what the others got with it says nothing about theirs."""
    node_of = (0, 0, 1, 1, 2, 2)
    shared = [NodeSample(0, 2, 2e9, 0.5e9), NodeSample(1, 2, 2e9, 0.5e9), NodeSample(0, 1, 2e9, 2e9)]
    topology = combine(node_of, [], pairs_of(node_of, False, 1e-5, 1e9), shared)
    assert topology.node_link == (Link(2e9, 1e-5), Link(2e9, 1e-5), Link(0.5e9, 1e-5))


def test_a_node_of_one_rank_shares_with_nobody() -> None:
    node_of = (0, 0, 1, 1, 2)
    shared = [NodeSample(0, 1, 2e9, 0.9e9)]
    topology = combine(node_of, [], pairs_of(node_of, False, 1e-5, 1e9), shared)
    assert topology.node_link == (Link(0.9e9, 1e-5), Link(0.9e9, 1e-5), Link(1e9, 1e-5))


# --- the command


@pytest.mark.parametrize("arguments", [["--backend", "smoke"], ["--duration-s", "soon"], ["--uot", "x"], ["x"]])
def test_misuse_ends_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m sparsecoll.probe" in capsys.readouterr().err


@pytest.mark.parametrize("duration", ["0", "-1", "nan", "inf"])
def test_a_duration_is_positive(duration: str) -> None:
    with pytest.raises(InvalidArgument, match=f"duration_s > 0, got {float(duration)}"):
        main(["--backend", "local", "--duration-s", duration])

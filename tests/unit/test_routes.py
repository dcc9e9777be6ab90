"""Every token is computed once, at the nearest holder or by quota; the index arithmetic of all ranks fits together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparsecoll.errors import InvalidArgument
from sparsecoll.moe.routes import plan_routes


class World:
    """A random problem: counts, holders, owners, nodes; with or without quotas."""

    def __init__(
        self,
        world_size: int,
        num_experts: int,
        num_nodes: int,
        density: float,
        seed: int,
        by_quota: bool = False,
    ) -> None:
        random = np.random.default_rng(seed)
        self.world_size, self.num_experts = world_size, num_experts
        asked_for = random.random((world_size, num_experts)) < 0.7
        self.counts = random.integers(0, 9, (world_size, num_experts)) * asked_for
        self.owners = random.integers(0, world_size, num_experts)
        self.holders = random.random((num_experts, world_size)) < density
        self.holders[np.arange(num_experts), self.owners] = True
        self.node_of = tuple(random.integers(0, num_nodes, world_size).tolist())
        self.wanted = random_quotas(random, self.counts.sum(axis=0), self.holders) if by_quota else None
        self.routes = plan_routes(self.counts, self.holders, self.owners, self.node_of, self.wanted)
        # Ranks may compute in any order, each in its own.
        self.orders = [random.permutation(np.flatnonzero(held)).tolist() for held in self.holders.T]
        self.ranks = [self.routes.of_rank(rank, self.orders[rank]) for rank in range(world_size)]


def random_quotas(
    random: np.random.Generator, loads: NDArray[np.int64], holders: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Some holders may get nothing, and some of them everything."""
    quotas = np.zeros(holders.shape, np.int64)
    for expert, load in enumerate(loads):
        share = holders[expert] * random.choice([0.0, 0.1, 1.0], holders.shape[1])
        share = share if share.any() else holders[expert]
        quotas[expert] = random.multinomial(load, share / share.sum())
    return quotas


shapes: dict[str, Any] = {
    "world_size": st.integers(1, 9),
    "num_experts": st.integers(0, 7),
    "num_nodes": st.integers(1, 4),
    "density": st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    "seed": st.integers(0, 2**32 - 1),
}
nearest_worlds = st.builds(World, **shapes)
quota_worlds = st.builds(World, **shapes, by_quota=st.just(True))
worlds = st.builds(World, **shapes, by_quota=st.booleans())


@given(nearest_worlds)
def test_quotas_go_to_the_nearest_holders(world: World) -> None:
    quotas = world.routes.quotas
    assert quotas.dtype == np.int64 and (quotas >= 0).all()
    np.testing.assert_array_equal(quotas.sum(axis=2), world.counts)
    for source in range(world.world_size):
        for expert in range(world.num_experts):
            holders = np.flatnonzero(world.holders[expert])
            near = [rank for rank in holders if world.node_of[rank] == world.node_of[source]]
            allowed = [source] if source in holders else near or [world.owners[expert]]
            taken = quotas[source, expert]
            assert taken[allowed].sum() == world.counts[source, expert]
            assert taken[allowed].max() - taken[allowed].min() <= 1


@given(quota_worlds)
def test_given_quotas_are_filled_exactly_and_from_nearby_first(world: World) -> None:
    quotas, wanted, size = world.routes.quotas, world.wanted, world.world_size
    assert wanted is not None
    assert quotas.dtype == np.int64 and (quotas >= 0).all()
    np.testing.assert_array_equal(quotas.sum(axis=2), world.counts)
    np.testing.assert_array_equal(quotas.sum(axis=0), wanted)
    stays = quotas[np.arange(size), :, np.arange(size)]
    np.testing.assert_array_equal(stays, np.minimum(world.counts, wanted.T))
    nodes = np.array(world.node_of)
    for node in range(max(world.node_of) + 1):
        there = nodes == node
        inside = quotas[there][:, :, there].sum(axis=(0, 2))
        offered, room = world.counts[there].sum(axis=0), wanted[:, there].sum(axis=1)
        np.testing.assert_array_equal(inside, np.minimum(offered, room))


@given(quota_worlds)
def test_sources_fill_one_holder_after_the_other(world: World) -> None:
    """Pairs of an expert are fewer than sources and holders together, inside each node and between nodes."""
    nodes = np.array(world.node_of)
    for expert in range(world.num_experts):
        source, holder = np.nonzero(world.routes.quotas[:, expert])
        is_inside = (nodes[source] == nodes[holder]) & (source != holder)
        for among in (
            *(is_inside & (nodes[source] == node) for node in set(world.node_of)),
            nodes[source] != nodes[holder],
        ):
            if among.any():
                assert among.sum() < len({*source[among]}) + len({*holder[among]})


@given(worlds)
def test_simulated_dispatch_reaches_every_holder_in_the_order_asked_for(world: World) -> None:
    size = world.world_size
    # An assignment is (source, expert, number among the source's assignments, sorted by expert).
    assignments = []
    for source in range(size):
        experts = np.repeat(np.arange(world.num_experts), world.counts[source])
        assignments.append(np.stack([np.full_like(experts, source), experts, np.arange(len(experts))], axis=1))

    mailbox: list[list[NDArray[np.int64]]] = [[] for _ in range(size)]
    for source, rank in enumerate(world.ranks):
        assert sorted(rank.send_order) == list(range(len(assignments[source])))
        parts = np.split(assignments[source][rank.send_order], np.cumsum(rank.send_counts)[:-1])
        for destination, part in enumerate(parts):
            # Grouped by expert, and in the old order inside: that is, ascending in (expert, number).
            assert (np.diff(part[:, 2]) > 0).all()
            mailbox[destination].append(part)

    computed = []
    for destination, rank in enumerate(world.ranks):
        assert [len(part) for part in mailbox[destination]] == rank.recv_counts.tolist()
        received = np.concatenate(mailbox[destination])
        assert sorted(rank.recv_order) == list(range(len(received)))
        rows = received[rank.recv_order]
        turn_of = {expert: turn for turn, expert in enumerate(world.orders[destination])}
        keys = [(turn_of[expert], source, number) for _, expert, number, source in ((*row, row[0]) for row in rows)]
        assert keys == sorted(keys)
        assert rank.experts.tolist() == world.orders[destination]
        np.testing.assert_array_equal(rows[:, 1], np.repeat(rank.experts, rank.expert_counts))
        computed.extend(map(tuple, rows))
    assert sorted(computed) == [tuple(row) for source in assignments for row in source]


@given(worlds)
def test_results_come_home_by_the_same_orders(world: World) -> None:
    numbers = [np.arange(counts.sum()) + 1000 * source for source, counts in enumerate(world.counts)]
    sent = [
        np.split(numbers[source][rank.send_order], np.cumsum(rank.send_counts)[:-1])
        for source, rank in enumerate(world.ranks)
    ]
    back = []
    for destination, rank in enumerate(world.ranks):
        computed = np.concatenate([parts[destination] for parts in sent])[rank.recv_order]
        returned = np.empty_like(computed)
        returned[rank.recv_order] = computed
        back.append(np.split(returned, np.cumsum(rank.recv_counts)[:-1]))
    for source, rank in enumerate(world.ranks):
        home = np.empty_like(numbers[source])
        home[rank.send_order] = np.concatenate([parts[source] for parts in back])
        np.testing.assert_array_equal(home, numbers[source])


def test_the_three_cases_by_hand() -> None:
    # Ranks 0 1 2 on node 0, rank 3 on node 1. Expert 0: owner 3, replicas 1 and 2. Expert 1: owner 0, no replica.
    holders = [[False, True, True, True], [True, False, False, False]]
    routes = plan_routes([[5, 0], [4, 0], [0, 2], [7, 3]], holders, owners=[3, 0], node_of=[0, 0, 0, 1])
    assert routes.quotas[:, 0].tolist() == [[0, 3, 2, 0], [0, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 7]]
    assert routes.quotas[:, 1].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [2, 0, 0, 0], [3, 0, 0, 0]]


def test_quotas_by_hand() -> None:
    # Ranks 0 1 on node 0, ranks 2 3 on node 1; one expert, held by 0, 1 and 3.
    holders = [[True, True, False, True]]
    routes = plan_routes([[9], [1], [4], [2]], holders, [0], [0, 0, 1, 1], quotas=[[3, 5, 0, 8]])
    # 3, 1 and 2 stay; node 0 has 6 left over for 4 on rank 1, node 1 has 4 left over for 6 on rank 3; 2 go there.
    assert routes.quotas[:, 0].tolist() == [[3, 4, 0, 2], [0, 1, 0, 0], [0, 0, 0, 4], [0, 0, 0, 2]]


def test_ranks_compute_in_ascending_order_by_default() -> None:
    routes = plan_routes([[1, 2, 3]], np.ones((3, 1), bool), [0] * 3, [0])
    assert routes.of_rank(0).experts.tolist() == [0, 1, 2]
    assert routes.of_rank(0, [2, 0, 1]).expert_counts.tolist() == [3, 1, 2]


def test_extra_tokens_rotate_over_the_holders_of_a_node() -> None:
    # One token from each of 4 sources and for each of 2 experts, all held by ranks 4..7 of the only node.
    holders = np.zeros((2, 8), bool)
    holders[:, 4:] = True
    counts = np.zeros((8, 2), int)
    counts[:4] = 1
    quotas = plan_routes(counts, holders, [4, 4], [0] * 8).quotas
    assert quotas.sum(axis=(0, 1)).tolist() == [0, 0, 0, 0, 2, 2, 2, 2]


@settings(max_examples=10)
@given(seed=st.integers(0, 1000))
def test_a_large_world_matches_a_plain_loop(seed: int) -> None:
    world = World(16, 32, 4, 0.3, seed)
    for source in range(16):
        for expert in range(32):
            held = [rank for rank in range(16) if world.holders[expert, rank]]
            near = [rank for rank in held if world.node_of[rank] == world.node_of[source]]
            expected = np.zeros(16, int)
            if source in held:
                expected[source] = world.counts[source, expert]
            elif near:
                for token in range(world.counts[source, expert]):
                    expected[near[(source + expert + token) % len(near)]] += 1
            else:
                expected[world.owners[expert]] = world.counts[source, expert]
            assert world.routes.quotas[source, expert].tolist() == expected.tolist()


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"expected counts \[2, 1\] and holders \[1, 2\]"):
        plan_routes([[1]], [[True, True]], [0], [0, 0])
    with pytest.raises(InvalidArgument, match="at least 0, got -1"):
        plan_routes([[-1]], [[True]], [0], [0])
    with pytest.raises(InvalidArgument, match=r"expected quotas \[1, 2\], got \[2\]"):
        plan_routes([[1], [1]], [[True, True]], [0], [0, 0], quotas=[1, 1])
    with pytest.raises(InvalidArgument, match="quotas for the 2 assignments to expert 0, got 3"):
        plan_routes([[1], [1]], [[True, True]], [0], [0, 0], quotas=[[1, 2]])
    with pytest.raises(InvalidArgument, match="only of holders, got 1 of expert 0 for rank 1"):
        plan_routes([[1], [1]], [[True, False]], [0], [0, 0], quotas=[[1, 1]])
    with pytest.raises(InvalidArgument, match="at least 0, and only of holders, got -1 of expert 0 for rank 0"):
        plan_routes([[1], [1]], [[True, True]], [0], [0, 0], quotas=[[-1, 3]])

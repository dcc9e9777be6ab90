"""Plans, by property: what is delivered, how often, at what cost, and that both ends agree.

Transfers are walked through here in plain Python sets and integers, apart from the vectorized code under test.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecoll import InvalidArgument, Link, Placement, Plan, Topology, plan_all_gather, plan_reduce_scatter
from sparsecoll.plan import TRANSFER, chunk_subset, program

ALGORITHMS = ["direct", "dense"]


class Case(NamedTuple):
    """Arguments of a planner; ``chunks`` is None for all."""

    place: Placement
    chunk_bytes: list[int]
    chunks: list[int] | None
    topology: Topology

    @property
    def subset(self) -> list[int]:
        return list(range(self.place.num_chunks)) if self.chunks is None else self.chunks

    @property
    def moving(self) -> list[int]:
        return [chunk for chunk in self.subset if self.chunk_bytes[chunk]]

    def gather(self, algorithm: str = "auto") -> Plan:
        return plan_all_gather(self.place, self.chunk_bytes, self.topology, algorithm, chunks=self.chunks)

    def reduce(self, algorithm: str = "auto") -> Plan:
        """Partial sums are twice as wide as contributions, as for 16-bit floats."""
        partial = [2 * size for size in self.chunk_bytes]
        return plan_reduce_scatter(
            self.place, self.chunk_bytes, self.topology, algorithm, chunks=self.chunks, partial_bytes=partial
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    world_size, num_chunks = draw(st.integers(1, 12)), draw(st.integers(0, 20))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    owners = random.integers(0, world_size, num_chunks)
    mask = random.random((num_chunks, world_size)) < draw(st.sampled_from([0.0, 0.2, 0.6, 1.0]))
    mask[np.arange(num_chunks), owners] = True
    sizes = draw(st.sampled_from([[0], [1], [64], [0, 1, 7, 1000, 1 << 20]]))
    chunks = None
    if draw(st.booleans()):
        chunks = np.flatnonzero(random.random(num_chunks) < 0.5).tolist()
    nodes = sorted(random.integers(0, 3, world_size).tolist())
    numbered = {node: number for number, node in enumerate(dict.fromkeys(nodes))}
    links = [Link(draw(st.sampled_from([1e6, 1e9])), draw(st.sampled_from([0.0, 1e-6, 1e-3]))) for _ in range(2)]
    topology = Topology(tuple(numbered[node] for node in nodes), *links)
    return Case(Placement(owners, mask), random.choice(sizes, num_chunks).tolist(), chunks, topology)


def stages_of(plan: Plan) -> list[list[Any]]:
    """Transfers as tuples, grouped by stage in order."""
    grouped = defaultdict(list)
    for row in plan.transfers.tolist():
        grouped[row[0]].append(row)
    return [grouped[stage] for stage in sorted(grouped)]


@settings(deadline=None)
@given(case=cases(), algorithm=st.sampled_from([*ALGORITHMS, "auto"]))
def test_all_gather_delivers_every_chunk_to_every_holder(case: Case, algorithm: str) -> None:
    plan = case.gather(algorithm)
    has = [set(case.place.owned_by(rank).tolist()) for rank in range(case.place.world_size)]
    for stage in stages_of(plan):
        for _, src, dst, chunk, partial in stage:
            assert chunk in has[src], "a rank sends only what it has had before the stage"
            assert src != dst and not partial
        for _, _, dst, chunk, _ in stage:
            assert chunk not in has[dst], "nothing arrives twice"
            has[dst].add(chunk)
    for rank, chunks in enumerate(has):
        assert chunks >= {chunk for chunk in case.moving if case.place.holders[chunk, rank]}
        if plan.algorithm == "dense":
            assert chunks >= set(case.moving), "dense brings everything to everyone"
    assert set(plan.transfers["chunk"].tolist()) <= set(case.moving), "other chunks and empty ones stay"


@settings(deadline=None)
@given(case=cases())
def test_direct_sends_each_replica_once_and_nothing_else(case: Case) -> None:
    expected = Counter(
        (int(case.place.owners[chunk]), rank, chunk)
        for chunk in case.moving
        for rank in np.flatnonzero(case.place.holders[chunk]).tolist()
        if rank != case.place.owners[chunk]
    )
    gather, reduce = case.gather("direct").transfers, case.reduce("direct").transfers
    assert Counter((src, dst, chunk) for _, src, dst, chunk, _ in gather.tolist()) == expected
    assert Counter((dst, src, chunk) for _, src, dst, chunk, _ in reduce.tolist()) == expected
    assert not gather["stage"].any() and not reduce["stage"].any() and not reduce["partial"].any()


@settings(deadline=None)
@given(case=cases())
def test_direct_goes_round_from_each_ranks_right_neighbour(case: Case) -> None:
    """So ranks begin with different receivers, and an owner sums contributions from itself upwards."""
    world_size = case.place.world_size
    distances: dict[int, list[int]] = defaultdict(list)
    for _, src, dst, _, _ in case.gather("direct").transfers.tolist():
        distances[src].append((dst - src) % world_size)
    assert all(each == sorted(each) for each in distances.values())
    summed: dict[int, list[int]] = defaultdict(list)
    for _, src, dst, chunk, _ in case.reduce("direct").transfers.tolist():
        summed[chunk].append((src - dst) % world_size)
    assert all(each == sorted(set(each)) for each in summed.values())


@settings(deadline=None)
@given(case=cases(), algorithm=st.sampled_from([*ALGORITHMS, "auto"]))
def test_reduce_scatter_brings_each_contribution_to_the_owner_once(case: Case, algorithm: str) -> None:
    plan = case.reduce(algorithm)
    ranks = range(case.place.world_size)

    def own(rank: int, chunk: int) -> Counter[int]:
        return Counter([rank] if case.place.holders[chunk, rank] else [])

    arrived: list[dict[int, Counter[int]]] = [defaultdict(Counter) for _ in ranks]
    for stage in stages_of(plan):
        carried = []
        for _, src, dst, chunk, partial in stage:
            assert src != dst
            assert partial == bool(chunk in arrived[src]), "exactly what has passed a relay is a sum"
            carried.append((dst, chunk, own(src, chunk) + (arrived[src][chunk] if partial else Counter())))
        for dst, chunk, contributions in carried:
            arrived[dst][chunk] += contributions
    for chunk in case.moving:
        owner = int(case.place.owners[chunk])
        holders = Counter(np.flatnonzero(case.place.holders[chunk]).tolist())
        assert own(owner, chunk) + arrived[owner][chunk] == holders
    assert set(plan.transfers["chunk"].tolist()) <= set(case.moving)


@settings(deadline=None)
@given(case=cases(), algorithm=st.sampled_from(ALGORITHMS))
def test_bytes_and_messages_are_counted_right(case: Case, algorithm: str) -> None:
    for plan in (case.gather(algorithm), case.reduce(algorithm)):
        world_size = case.place.world_size
        sent, received, messages, staging, zeros = ([0] * world_size for _ in range(5))
        for row, (_, src, dst, chunk, partial) in enumerate(plan.transfers.tolist()):
            size = case.chunk_bytes[chunk] * (2 if partial else 1)
            assert plan.transfer_bytes[row] == size > 0
            sent[src] += size
            received[dst] += size
            messages[src] += 1
            if plan.op == "all_gather":
                staging[dst] += 0 if case.place.holders[chunk, dst] else size
            else:
                staging[dst] += size
                staging[src] += size if partial else 0
                if not partial and not case.place.holders[chunk, src]:
                    zeros[src] = max(zeros[src], size)
        assert plan.sent_bytes.tolist() == sent
        assert plan.received_bytes.tolist() == received
        assert plan.sent_transfers.tolist() == messages
        assert plan.staging_bytes.tolist() == [a + b for a, b in zip(staging, zeros, strict=True)]
        assert sum(sent) == sum(received)


@settings(deadline=None)
@given(case=cases(), algorithm=st.sampled_from(ALGORITHMS))
def test_prediction_is_the_sum_over_stages_of_the_busiest_link(case: Case, algorithm: str) -> None:
    for plan in (case.gather(algorithm), case.reduce(algorithm)):
        expected = 0.0
        for stage in stages_of(plan):
            busy: dict[tuple[int, str, bool], float] = defaultdict(float)
            for _, src, dst, chunk, partial in stage:
                link = case.topology.link(src, dst)
                crosses = case.topology.node_of[src] != case.topology.node_of[dst]
                cost = link.latency_s + case.chunk_bytes[chunk] * (2 if partial else 1) / link.bandwidth_bytes_per_s
                busy[src, "out", crosses] += cost
                busy[dst, "in", crosses] += cost
            expected += max(busy.values())
        assert plan.predicted_s == pytest.approx(expected, rel=1e-9)


@settings(deadline=None)
@given(case=cases(), algorithm=st.sampled_from(ALGORITHMS))
def test_nothing_is_predicted_faster_than_the_bound(case: Case, algorithm: str) -> None:
    for plan in (case.gather(algorithm), case.reduce(algorithm)):
        assert plan.predicted_s >= plan.bound_s * (1 - 1e-12)
        assert (plan.bound_s == 0.0) == (case.gather("direct").sent_bytes.sum() == 0)


def test_the_bound_is_met_where_it_can_be() -> None:
    """One replica of one chunk: nothing is faster than sending it."""
    topology = Topology((0, 0), Link(1e6, 1e-3))
    plan = plan_all_gather(Placement.even(1, 2).replicate({0: [1]}), 2_000_000, topology)
    assert plan.bound_s == pytest.approx(2.001) and plan.predicted_s == pytest.approx(2.001)


@pytest.mark.parametrize(
    ("replicas", "owners", "expected_s"),
    [
        ({0: [1], 1: [1], 2: [1]}, [0, 2, 3], 3.0),  # rank 1 must take in three
        ({0: [1], 1: [2], 2: [3]}, [0, 0, 0], 3.0),  # rank 0 must give out three
        ({0: [1, 2, 3], 1: [1, 2, 3]}, [0, 0], 2.0),  # relays share the six sendings, receivers take in two
        ({0: [1], 1: [2], 2: [3], 3: [0]}, [0, 1, 2, 3], 1.0),
    ],
)
def test_bound_by_hand(replicas: dict[int, list[int]], owners: list[int], expected_s: float) -> None:
    place = Placement.of_owners(owners, 4).replicate(replicas)
    topology = Topology((0,) * 4, Link(1000.0, 0.0))
    assert plan_all_gather(place, 1000, topology).bound_s == pytest.approx(expected_s)
    assert plan_reduce_scatter(place, 1000, topology).bound_s == pytest.approx(expected_s)


def test_the_bound_lets_a_rank_use_both_kinds_of_links_at_once() -> None:
    place = Placement.of_owners([0, 0], 3).replicate({0: [1], 1: [2]})
    plan = plan_all_gather(place, 1000, Topology((0, 0, 1), Link(1000.0, 0.0), Link(1000.0, 0.0)))
    assert plan.predicted_s == pytest.approx(1.0) and plan.bound_s == pytest.approx(1.0)


@settings(deadline=None)
@given(case=cases())
def test_auto_takes_the_cheaper(case: Case) -> None:
    for make in (case.gather, case.reduce):
        plans = {name: make(name) for name in ALGORITHMS}
        chosen = make("auto")
        assert chosen.predicted_s == min(plan.predicted_s for plan in plans.values())
        assert chosen == plans[chosen.algorithm]


def test_auto_depends_on_what_is_held_and_where() -> None:
    """A ring crosses the border between nodes once for each chunk, an owner once for each holder beyond it."""
    two_nodes = Topology((0, 0, 0, 0, 1, 1, 1, 1), Link(1e9, 0.0), Link(1e6, 0.0))
    everyone = Placement.of_owners([0] * 8, 8).replicate(dict.fromkeys(range(8), range(8)))
    gather = {name: plan_all_gather(everyone, 1 << 20, two_nodes, name) for name in ALGORITHMS}
    assert gather["direct"].predicted_s == pytest.approx(4 * 8 * (1 << 20) / 1e6)
    assert gather["dense"].predicted_s == pytest.approx(8 * (1 << 20) / 1e6 + 6 * 8 * (1 << 20) / 1e9)
    assert plan_all_gather(everyone, 1 << 20, two_nodes) == gather["dense"]
    beyond = Placement.of_owners([0] * 8, 8).replicate({3: [5]})
    assert plan_all_gather(beyond, 1 << 20, two_nodes).algorithm == "direct"


@settings(deadline=None)
@given(case=cases(), algorithm=st.sampled_from(ALGORITHMS))
def test_both_ends_of_every_message_agree(case: Case, algorithm: str) -> None:
    """Messages of a pair match by order, so both programs must list them in the same one."""
    for plan in (case.gather(algorithm), case.reduce(algorithm)):
        ranks = range(case.place.world_size)
        programs = [program(plan, rank) for rank in ranks]
        sends, receives = defaultdict(list), defaultdict(list)
        for rank in ranks:
            for stage in programs[rank].stages:
                assert stage.sends or stage.receives
                for move in stage.sends:
                    sends[rank, move.peer].append((move.chunk, move.partial))
                for move in stage.receives:
                    receives[move.peer, rank].append((move.chunk, move.partial))
        assert sends == receives
        assert sum(map(len, sends.values())) == len(plan.transfers)
        for rank in ranks:
            mine = programs[rank]
            moves = [move.chunk for stage in mine.stages for move in stage.receives]
            assert mine.arrivals == Counter(moves)
            assert list(mine.owned) == [chunk for chunk in case.subset if case.place.owners[chunk] == rank]
            assert list(mine.held) == [chunk for chunk in case.subset if case.place.holders[chunk, rank]]


@settings(deadline=None)
@given(case=cases(), algorithm=st.sampled_from(ALGORITHMS))
def test_ranks_that_wait_after_every_stage_all_come_to_the_end(case: Case, algorithm: str) -> None:
    """An executor posts a stage and waits for all of it; a message ends when both sides have posted it."""
    for plan in (case.gather(algorithm), case.reduce(algorithm)):
        ranks = range(case.place.world_size)
        stages = [program(plan, rank).stages for rank in ranks]
        position = [-1] * len(ranks)
        posted: Counter[tuple[str, int, int]] = Counter()

        def advance(
            rank: int, stages: Any = stages, position: list[int] = position, posted: Counter[Any] = posted
        ) -> None:
            position[rank] += 1
            if position[rank] < len(stages[rank]):
                posted.update(("send", rank, move.peer) for move in stages[rank][position[rank]].sends)
                posted.update(("receive", move.peer, rank) for move in stages[rank][position[rank]].receives)

        for rank in ranks:
            advance(rank)
        progress = True
        while progress:
            progress = False
            for rank in ranks:
                if position[rank] >= len(stages[rank]):
                    continue
                stage = stages[rank][position[rank]]
                pairs = {(rank, move.peer) for move in stage.sends} | {(move.peer, rank) for move in stage.receives}
                # All of this rank's own messages are posted, so the other side must have come as far.
                sent_by_me = all(posted["receive", *pair] >= posted["send", *pair] for pair in pairs if pair[0] == rank)
                sent_to_me = all(posted["send", *pair] >= posted["receive", *pair] for pair in pairs if pair[1] == rank)
                if sent_by_me and sent_to_me:
                    advance(rank)
                    progress = True
        assert position == [len(each) for each in stages], "ranks wait for each other in a circle"


BASE = Placement.of_owners([0, 1, 2, 0], 3).replicate({0: [1, 2], 3: [1]})


def test_digest_is_equal_for_equal_inputs() -> None:
    one = plan_all_gather(BASE, 12, Topology.flat(3), "direct")
    twin = Placement(BASE.owners.copy(), BASE.holders.copy())
    for other in (
        plan_all_gather(twin, [12] * 4, Topology.flat(3), "direct"),
        plan_all_gather(twin, np.full(4, 12), Topology.flat(3), "direct", chunks=range(4)),
        plan_all_gather(twin, np.int64(12), Topology((0, 1, 2)), "direct"),  # links decide the choice, not what moves
    ):
        assert other.digest == one.digest and other == one and hash(other) == hash(one)
    assert one != "plan"


def test_digest_differs_when_anything_changes() -> None:
    flat = Topology.flat(3)
    plans = {
        "base": plan_reduce_scatter(BASE, 12, flat, "direct"),
        "operation": plan_all_gather(BASE, 12, flat, "direct"),
        "algorithm": plan_reduce_scatter(BASE, 12, flat, "dense"),
        "holders": plan_reduce_scatter(BASE.replicate({1: [0]}), 12, flat, "direct"),
        "owner": plan_reduce_scatter(Placement([1, 1, 2, 0], BASE.holders), 12, flat, "direct"),
        "one size": plan_reduce_scatter(BASE, [12, 12, 12, 13], flat, "direct"),
        "partial sums": plan_reduce_scatter(BASE, 12, flat, "direct", partial_bytes=24),
        "one partial sum": plan_reduce_scatter(BASE, 12, flat, "direct", partial_bytes=[12, 24, 12, 12]),
        "chunks": plan_reduce_scatter(BASE, 12, flat, "direct", chunks=[0, 1, 2]),
        "chunks that do not travel": plan_reduce_scatter(BASE, 12, flat, "direct", chunks=[0, 1, 3]),
        "no chunks": plan_reduce_scatter(BASE, 12, flat, "direct", chunks=[]),
        "no bytes": plan_reduce_scatter(BASE, 0, flat, "direct"),
    }
    assert len({plan.digest for plan in plans.values()}) == len(plans)


def test_digest_sees_the_order_of_transfers() -> None:
    plan = plan_reduce_scatter(BASE, 12, Topology.flat(3), "direct")
    swapped = dataclasses.replace(plan, transfers=plan.transfers[::-1])
    assert swapped.digest != plan.digest


def test_a_plan_cannot_change() -> None:
    """Plans are kept and shared, so that a change would be seen by everybody who plans the same."""
    plan = plan_all_gather(BASE, 12, Topology.flat(3), "direct")
    assert plan.transfers.dtype == TRANSFER
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.op = "reduce_scatter"  # type: ignore[misc]
    arrays = ("transfers", "transfer_bytes", "sent_bytes", "received_bytes", "sent_transfers", "staging_bytes")
    for name in arrays:
        with pytest.raises(ValueError, match="read-only"):
            getattr(plan, name)[0] = 0


def test_world_of_one_and_no_chunks_have_nothing_to_do() -> None:
    for plan in (
        plan_all_gather(Placement.even(5, 1), 100, Topology.flat(1)),
        plan_reduce_scatter(Placement.even(5, 1), 100, Topology.flat(1), "dense"),
        plan_all_gather(Placement.even(0, 4), 100, Topology.flat(4), "dense"),
        plan_reduce_scatter(Placement.even(0, 4), [], Topology.flat(4)),
    ):
        assert len(plan.transfers) == 0 and plan.predicted_s == plan.bound_s == 0.0
        assert plan.sent_bytes.tolist() == [0] * plan.place.world_size
        assert "none travels" in plan.explain()


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda p: plan_all_gather(p, 4, Topology.flat(3), "magic"), "algorithm auto, direct or dense, got 'magic'"),
        (lambda p: plan_all_gather(p, 4, Topology.flat(3), None), "algorithm auto, direct or dense, got None"),
        (lambda p: plan_reduce_scatter(p, 4, Topology.flat(3), ""), "algorithm auto, direct or dense, got ''"),
        (lambda p: plan_all_gather(p, 4, Topology.flat(4)), "topology of 3 ranks .*, got 4"),
        (lambda p: plan_all_gather(p, -1, Topology.flat(3)), "none negative, got -1"),
        (lambda p: plan_all_gather(p, [1, 2, -3, 4], Topology.flat(3)), "4 sizes, none negative"),
        (lambda p: plan_all_gather(p, [1, 2, 3], Topology.flat(3)), r"4 sizes.*got \[1, 2, 3\]"),
        (lambda p: plan_all_gather(p, [], Topology.flat(3)), "4 sizes"),
        (lambda p: plan_all_gather(p, 1.5, Topology.flat(3)), "chunk_bytes"),
        (lambda p: plan_all_gather(p, [1.5] * 4, Topology.flat(3)), "chunk_bytes"),
        (lambda p: plan_all_gather(p, "abcd", Topology.flat(3)), "chunk_bytes"),
        (lambda p: plan_all_gather(p, None, Topology.flat(3)), "chunk_bytes"),
        (lambda p: plan_reduce_scatter(p, 4, Topology.flat(3), partial_bytes=-8), "partial_bytes.*got -8"),
        (lambda p: plan_reduce_scatter(p, 4, Topology.flat(3), partial_bytes=[8]), "partial_bytes.*4 sizes"),
        (lambda p: plan_all_gather(p, 4, Topology.flat(3), chunks=[1, 0]), r"ascending.*got \[1, 0\]"),
        (lambda p: plan_all_gather(p, 4, Topology.flat(3), chunks=[1, 1]), "without duplicates"),
        (lambda p: plan_all_gather(p, 4, Topology.flat(3), chunks=[4]), r"0\.\.3, got \[4\]"),
        (lambda p: plan_all_gather(p, 4, Topology.flat(3), chunks=[-1, 2]), r"0\.\.3, got \[-1, 2\]"),
        (lambda p: plan_all_gather(p, 4, Topology.flat(3), chunks=[0.5]), "chunks"),
        (lambda p: plan_all_gather(p, 4, Topology.flat(3), chunks=5), "chunks"),
        (lambda p: plan_all_gather(p, 2**63, Topology.flat(3)), "chunk_bytes"),
        (lambda p: plan_all_gather(p, 2**62, Topology.flat(3), "dense"), "chunk_bytes"),
    ],
)
def test_unsound_arguments_are_refused_by_name(make: Callable[[Placement], Plan], rule: str) -> None:
    with pytest.raises(InvalidArgument, match=rule):
        make(BASE)


def test_chunk_subset() -> None:
    assert chunk_subset(BASE, None) == (0, 1, 2, 3)
    assert chunk_subset(BASE, []) == ()
    assert chunk_subset(BASE, iter([1, 3])) == (1, 3)
    assert chunk_subset(BASE, np.array([0, 2])) == (0, 2)
    assert all(type(chunk) is int for chunk in chunk_subset(BASE, np.array([0, 2])))


@pytest.mark.parametrize("chunk_bytes", [2**31 + 5, 2**40 + 1, 2**53 + 1, 2**56 - 1])
def test_sizes_beyond_32_bits_are_counted_to_the_byte(chunk_bytes: int) -> None:
    """2**53 + 1 is no float, so sums must be integers throughout."""
    place = Placement.even(3, 3).replicate({chunk: range(3) for chunk in range(3)})
    for algorithm in ALGORITHMS:
        gather = plan_all_gather(place, chunk_bytes, Topology.flat(3), algorithm)
        assert gather.sent_bytes.tolist() == gather.received_bytes.tolist() == [2 * chunk_bytes] * 3
        reduce = plan_reduce_scatter(place, chunk_bytes, Topology.flat(3), algorithm, partial_bytes=2 * chunk_bytes)
        assert reduce.sent_bytes.tolist() == [(3 if algorithm == "dense" else 2) * chunk_bytes] * 3
        assert gather.predicted_s >= gather.bound_s > 0
        assert program(gather, 0).owned == (0,)


def test_explain_names_ranks_chunks_and_bytes() -> None:
    text = plan_all_gather(BASE, 1500, Topology.flat(3), "direct").explain()
    lines = text.splitlines()
    assert lines[0].startswith("all_gather by direct, digest ")
    assert "4 of 4 chunks, 3 ranks, 3 transfers in 1 stages, 4.50 kB" in text
    rank_rows = [line.split() for line in lines if line.strip()[:1].isdigit() and ">" not in line]
    assert ["0", "2", "2", "3", "4.50", "kB", "0", "B", "0", "B"] in rank_rows
    assert ["1", "1", "3", "0", "0", "B", "3.00", "kB", "0", "B"] in rank_rows
    chunk_rows = [line for line in lines if ">" in line]
    assert any(line.split()[0] == "0" and "0: 0 > 1" in line and "0: 0 > 2" in line for line in chunk_rows)
    ring = plan_reduce_scatter(BASE, 1500, Topology.flat(3), "dense").explain()
    assert "1: 2 > 0 (sum)" in ring


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_explain_of_a_large_plan_stays_short(algorithm: str) -> None:
    place = Placement.even(256, 128).replicate(dict.fromkeys(range(256), range(128)))
    plan = plan_all_gather(place, 1 << 20, Topology.flat(128), algorithm)
    begin = time.process_time()
    lines = plan.explain().splitlines()
    assert len(lines) < 100 and max(map(len, lines)) < 200
    assert "... and 96 more" in "\n".join(lines)
    assert time.process_time() - begin < 5, "linear in the number of transfers"


def test_repr_is_a_line() -> None:
    text = repr(plan_all_gather(BASE, 1500, Topology.flat(3), "direct"))
    assert text.startswith("Plan(all_gather, direct, 4 of 4 chunks, 3 transfers, 4500 bytes, digest=")

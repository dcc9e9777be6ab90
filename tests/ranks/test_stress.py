"""Random legal sequences of operations against the oracle, and what is left after very many."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import sparsecoll as sc
from sparsecoll import reference

WORLD_SIZE = 4
GATHERED = ["float32", "bfloat16", "float64", "int8", "int64", "bool"]
REDUCED = ["float32", "bfloat16", "float16", "float64", "int32", "int64"]


def fresh_seed() -> int:
    """Another one in every run; pytest shows it with a failure, and returning it from here replays that."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed = {seed}")
    return seed


def random_placement(rng: random.Random, world_size: int) -> sc.Placement:
    num_chunks = rng.choice([0, 1, 3, 8, 13])
    owners = np.array([rng.randrange(world_size) for _ in range(num_chunks)], np.int64)
    density = rng.choice([0.0, 0.3, 1.0])
    mask = np.array([[rng.random() < density for _ in range(world_size)] for _ in owners], bool)
    mask = mask.reshape(num_chunks, world_size)
    mask[np.arange(num_chunks), owners] = True
    return sc.Placement(owners, mask)


def values(operation: int, rank: int, chunk: int, size: int) -> np.ndarray:
    """0 and 1 in an irregular pattern: exact in every dtype, and so are sums of a few."""
    return (np.arange(size) * 7 + operation * 3 + rank * 5 + chunk * 11) % 17 < 8


def as_rows(rows: list[np.ndarray], dtype: str, framework: str, form: str, size: int) -> Any:
    """Rows in one of the forms that a collective takes."""
    if form == "list":
        made = [torch.from_numpy(row).to(getattr(torch, dtype)) for row in rows]
        return [each.numpy() for each in made] if framework == "numpy" else made
    stacked = torch.from_numpy(np.array(rows, bool).reshape(len(rows), size)).to(getattr(torch, dtype))
    return stacked.numpy() if framework == "numpy" else stacked


def as_floats(result: Any) -> list[list[float]]:
    return [torch.as_tensor(row).to(torch.float64).flatten().tolist() for row in result]


@dataclass(frozen=True)
class Step:
    """One operation, the same on all ranks.

    Attributes:
        issue: ``group, async_op`` → result or Work.
        expected: rows by rank.
    """

    name: str
    issue: Callable[[sc.Group, bool], Any]
    expected: list[list[list[float]]]
    async_op: bool


def sparse_step(rng: random.Random, number: int, world_size: int, *, may_be_async: bool = True) -> Step:
    place = random_placement(rng, world_size)
    gathers = rng.random() < 0.5
    dtype = rng.choice(GATHERED if gathers else REDUCED)
    framework = "torch" if dtype == "bfloat16" else rng.choice(["torch", "numpy"])
    form = rng.choice(["tensor", "tensor", "list"])
    size, algorithm = rng.choice([0, 1, 5, 64, 1000]), rng.choice(["direct", "dense", "auto"])
    every = range(place.num_chunks)
    chunks = sorted(rng.sample(every, rng.randint(0, len(every)))) if rng.random() < 0.3 else None
    subset = every if chunks is None else chunks
    op = rng.choice(["sum", "mean"]) if "float" in dtype else "sum"

    def row(rank: int, chunk: int) -> np.ndarray:
        return values(number, rank, chunk, size + (chunk % 3 if form == "list" else 0))

    def mine(rank: int) -> list[int]:
        side = place.owned_by(rank) if gathers else place.held_by(rank)
        return [int(chunk) for chunk in side if chunk in subset]

    inputs = [[row(rank, chunk) for chunk in mine(rank)] for rank in range(world_size)]
    if gathers:
        outputs = reference.all_gather(inputs, place, chunks)
    else:
        outputs = reference.reduce_scatter(
            [[each.astype(float) for each in rows] for rows in inputs], place, chunks, op
        )
    if op == "mean":
        exact = getattr(torch, dtype)
        expected = [[torch.from_numpy(each).to(exact).double().tolist() for each in rows] for rows in outputs]
    else:
        expected = [[each.astype(float).tolist() for each in rows] for rows in outputs]

    def issue(group: sc.Group, async_op: bool) -> Any:
        given = as_rows(inputs[group.rank], dtype, framework, form, size)
        common: dict[str, Any] = {"chunks": chunks, "algorithm": algorithm, "group": group, "async_op": async_op}
        if gathers:
            return sc.sparse_all_gather(given, place, **common)
        return sc.sparse_reduce_scatter(given, place, op=op, **common)

    kind = "all_gather" if gathers else f"reduce_scatter {op}"
    name = f"#{number} {kind} {algorithm} {framework} {dtype} {form} of {size}, {place}, chunks={chunks}"
    return Step(name, issue, expected, may_be_async and rng.random() < 0.5)


def all_to_all_step(rng: random.Random, number: int, world_size: int) -> Step:
    counts = [[rng.choice([0, 0, 1, 2, 30]) for _ in range(world_size)] for _ in range(world_size)]
    dtype, width = rng.choice(["float32", "bfloat16", "int64"]), rng.choice([0, 1, 17])
    says_counts = rng.random() < 0.5
    totals = [sum(row) for row in counts]
    xs = [values(number, rank, 0, total * width).reshape(total, width) for rank, total in enumerate(totals)]
    expected = [each.astype(float).tolist() for each in reference.all_to_all(xs, counts)]

    def issue(group: sc.Group, async_op: bool) -> Any:
        x = torch.from_numpy(xs[group.rank]).to(getattr(torch, dtype))
        received = [counts[src][group.rank] for src in range(world_size)] if says_counts else None
        return sc.all_to_all(x, counts[group.rank], received, group=group, async_op=async_op)

    return Step(f"#{number} all_to_all {dtype} {counts}", issue, expected, rng.random() < 0.5)


def run_steps(group: sc.Group, steps: list[Step], rng: random.Random) -> None:
    """Issues all steps in order; async ones are waited for later, in an order of this rank's own."""
    in_flight: list[tuple[Step, sc.Work]] = []

    def check(step: Step, result: Any) -> None:
        assert as_floats(result) == step.expected[group.rank], f"{step.name} {group.place_of_error}"

    for step in steps:
        issued = step.issue(group, step.async_op)
        if step.async_op:
            in_flight.append((step, issued))
        else:
            check(step, issued)
        while in_flight and rng.random() < 0.4:
            waited, work = in_flight.pop(rng.randrange(len(in_flight)))
            check(waited, work.result(timeout_s=30.0))
    for step, work in in_flight:
        check(step, work.result(timeout_s=30.0))


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "unchecked"])
def test_random_legal_sequences(checked: bool) -> None:
    seed = fresh_seed()
    rng = random.Random(seed)
    steps = [(all_to_all_step if rng.random() < 0.3 else sparse_step)(rng, number, WORLD_SIZE) for number in range(300)]
    topology = sc.Topology((0, 0, 1, 1)) if rng.random() < 0.5 else None

    def main(group: sc.Group) -> None:
        run_steps(group, steps, random.Random(seed + group.rank))

    sc.run_local(main, WORLD_SIZE, checked=checked, topology=topology)


@pytest.mark.parametrize("world_size", [2, 5])
def test_random_placements(world_size: int) -> None:
    """Three hundred blocking collectives, each with a placement of its own."""
    rng = random.Random(fresh_seed())
    steps = [sparse_step(rng, number, world_size, may_be_async=False) for number in range(300)]
    sc.run_local(lambda group: run_steps(group, steps, rng), world_size)


def test_nothing_is_left_after_a_thousand_calls() -> None:
    """Threads and staging memory stay as they are after the first few, and closing gives the threads back."""
    place = sc.Placement.even(6, 3).replicate({0: [1, 2], 4: [0]})
    before = set(threading.enumerate())

    def main(group: sc.Group) -> None:
        held = np.ones((len(place.held_by(group.rank)), 33), np.float32)

        def once(async_op: bool) -> None:
            gathered = sc.sparse_all_gather(held[:2], place, algorithm="dense", async_op=async_op)
            reduced = sc.sparse_reduce_scatter(held, place, algorithm="dense", async_op=async_op)
            moved = sc.all_to_all(held[:3], [1, 1, 1], async_op=async_op)
            if async_op:
                for work in (gathered, reduced, moved):
                    work.wait()

        for number in range(6):
            once(bool(number % 2))
        group.barrier()
        num_threads, reserved_bytes = threading.active_count(), group.arenas.reserved_bytes
        plan = sc.plan_reduce_scatter(place, 33 * 4, group.topology, "dense")
        assert 0 < reserved_bytes < 4 * plan.staging_bytes[group.rank] + 4096
        group.barrier()
        for number in range(333):
            once(number % 8 == 0)
        assert group.arenas.reserved_bytes == reserved_bytes
        group.barrier()
        assert threading.active_count() == num_threads
        group.barrier()

    sc.run_local(main, 3)
    # A rank's thread has told its result before it ends.
    for thread in set(threading.enumerate()) - before:
        thread.join(10.0)
    assert set(threading.enumerate()) <= before

"""What ``python -m bench gpu`` does without a GPU: contests on emulated kernels, data sets, the record, issuing."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench.__main__ as bench
import sparsecoll as sc
from bench.gpu import case
from bench.gpu.clock import Call, medians_s
from bench.gpu.contests import Rig, contests
from bench.gpu.issue import NUM_EXPERTS, collectives, measure, summarize
from sparsecoll.cuda import Kernels
from tests.emulation.kernels import EmulatedLauncher
from tests.emulation.world import device_of, run_emulated

SIZE = 1 << 15
KERNELS = {
    *("permute_rows", "combine", "combine_backward", "pack", "sort_by_expert"),
    *("sum_replicas[2]", "sum_replicas[4]", "sum_replicas[8]"),
}


class FixedClock:
    """A device on which the n-th data set takes n + 1 units, and to which the host is never late."""

    def __init__(self, unit_s: float = 1e-2) -> None:
        self.unit_s = unit_s
        self.samples: list[tuple[Call, list[int], float]] = []

    def time_s(self, call: Call, numbers: Sequence[int], pause_s: float) -> tuple[float, float]:
        self.samples.append((call, list(numbers), pause_s))
        for number in numbers:
            call(number)
        return sum(number + 1 for number in numbers) * self.unit_s, 1e-5 * len(numbers)


@pytest.fixture(scope="module")
def rig() -> Rig:
    return Rig(Kernels(EmulatedLauncher()), "cpu", 0, cold_bytes=1 << 16)


def test_every_kernel_is_right_beside_every_rival(rig: Rig) -> None:
    results, left_out = case.compete(contests(rig, SIZE, 0), FixedClock(), 1e9, 60.0)
    assert left_out == 0
    assert {result.kernel for result in results} == KERNELS
    assert {result.dtype for result in results if result.kernel == "combine"} == {"float32", "bfloat16"}
    for result in results:
        assert result.right, result
        assert result.time_us > 0 and result.x_over_torch > 0
        assert (result.of_copy is None) == (result.kernel == "sort_by_expert")


class Idle(EmulatedLauncher):
    """Launches nothing."""

    def launch(self, *_: object) -> None:
        pass


def test_a_kernel_that_does_nothing_is_wrong(rig: Rig) -> None:
    idle = rig._replace(kernels=Kernels(Idle()))
    for make in contests(idle, SIZE, 0):
        contest = make()
        for n in range(contest.num_sets):
            contest.ours(n)
        assert not contest.is_right(0), contest.kernel


def test_rivals_give_what_ours_give(rig: Rig) -> None:
    """An expression that computes something else would make the comparison worthless."""
    for make in contests(rig, SIZE, 0):
        contest = make()
        contest.ours(0)
        returned = [found for rival in contest.rivals.values() if (found := rival(0)) is not None]
        if contest.dtype == "bfloat16":  # where torch rounds more often than we do
            continue
        assert contest.is_right(0), f"{contest.kernel}: a rival has written something else"
        for found in returned[1:]:
            torch.testing.assert_close(found, returned[0])


def test_bytes_are_read_and_written(rig: Rig) -> None:
    moved = {(c.kernel, c.dtype): c.moved_bytes for c in (make() for make in contests(rig, SIZE, 0))}
    assert moved["sum_replicas[4]", "bfloat16"] == 5 * SIZE
    assert moved["pack", "float32"] == SIZE * 3 // 2
    assert moved["permute_rows", "float32"] == 2 * SIZE + 4 * 8  # rows of 8 kB
    assert moved["combine", "float32"] == SIZE + SIZE // 2 + 4 * (8 + 4)
    assert moved["combine_backward", "float32"] == 2 * SIZE + SIZE // 2 + 4 * (8 + 4 + 4)


def test_data_sets_go_round_and_contestants_keep_apart(rig: Rig) -> None:
    clock, touched = FixedClock(1e-6), {"a": [], "b": []}  # type: ignore[var-annotated]
    calls: dict[str, Call] = {"a": lambda n: touched["a"].append(n), "b": lambda n: touched["b"].append(n)}
    medians_s(calls, 100, clock)
    assert (touched["a"][0], touched["b"][0]) == (0, 50)
    for numbers in touched.values():
        assert all(later == (earlier + 1) % 100 for earlier, later in itertools.pairwise(numbers))
    longest = max(len(numbers) for _, numbers, _ in clock.samples)
    assert [pause_s for _, numbers, pause_s in clock.samples if len(numbers) < longest] == [0.0] * 4
    assert {round(pause_s, 9) for _, numbers, pause_s in clock.samples if len(numbers) == longest} == {1.5e-4 * 1.5}


def test_what_does_not_fit_the_budget_is_left_out(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    results, left_out = case.compete(contests(rig, SIZE, 0), FixedClock(), 1e9, -1.0)
    assert results == [] and left_out == 14
    assert "14 contests left out" in capsys.readouterr().out


def test_summary_quotes_the_worst_and_only_large_sizes_for_bandwidth() -> None:
    row = case.Result("pack", "float32", 1 << 30, 1.0, 1.0, 0.9, "to", 2.0, 2.0, True)
    small = replace(row, size=SIZE, of_copy=0.1, x_over_torch=0.5)
    assert case.summarize([row, small, replace(row, size=1 << 28, of_copy=0.8)]) == {
        "pack_over_torch_min": 0.5,
        "pack_of_copy_min": 0.8,
    }


def test_without_a_gpu_it_says_so_and_succeeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "record.json"
    if case._reason_to_skip() is None:
        pytest.skip("there is a GPU")
    assert bench.main(["gpu", "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert record["case"] == "gpu" and record["skipped"] in capsys.readouterr().out
    assert record.keys() == {"case", "skipped"}


def test_issuing_moves_one_piece_of_every_expert() -> None:
    def main(group: sc.Group) -> None:
        calls = collectives(group)
        before = group.stats()
        times_s = measure(group, calls, device_of(group).fake.drain, num_timed=2, num_warm=1)
        moved = group.stats().since(before)
        assert {name: len(values) for name, values in times_s.items()} == dict.fromkeys(calls, 2)
        # Of each call of the three, half of the experts to the other rank; an all-to-all sends it one message.
        assert moved.sent_messages == 3 * (2 * NUM_EXPERTS // 2 + 1)
        assert all(0 < found["median_us"] <= found["p90_us"] for found in summarize(times_s).values())

    run_emulated(main, 2, checked=False)

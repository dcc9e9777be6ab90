"""``python -m bench memory``: what it counts, that it finds growth, and that it tells when it has miscounted."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bench.__main__ as bench
from bench.footprint import growth, training
from bench.footprint.ledger import Ledger
from bench.footprint.optimizer import MasterAdamW

SMALL = ["--ranks", "4", "--layers", "3", "--experts", "8", "--most", "3", "--width", "16", "--hidden", "64", "-n", "2"]


def test_ledger_counts_storages_from_allocation_to_death() -> None:
    staging = [0]
    with Ledger(lambda: staging[0]) as ledger:
        first = torch.empty(1000)
        assert ledger.now().num_bytes == 4000
        view = first[10:20].view(2, 5)
        view.add_(1)
        first.mul_(2)
        assert ledger.now().num_bytes == 4000, "views and changes in place bring nothing"
        del first
        assert ledger.now().num_bytes == 4000, "a view keeps all of it"
        del view
        assert ledger.now().num_bytes == 0
        assert ledger.peak.num_bytes == 4000
        ledger.start_window()
        staging[0] = 70
        pair = torch.zeros(6, dtype=torch.int16).split(4)
        (entry,) = ledger.peak.entries
        assert (ledger.peak.num_bytes, ledger.peak.staging_bytes, entry.num_bytes) == (82, 70, 12)
        assert entry.place.startswith("tests/process/test_bench_memory.py:")
        ledger.mark("pair", pair)
        assert entry.kind == "pair", "also of a peak that has been"


def test_ledger_counts_what_backward_allocates_and_frees() -> None:
    weight = torch.ones(256, requires_grad=True)
    with Ledger(lambda: 0) as ledger:
        y = (weight * 2).exp()
        assert ledger.now().num_bytes == 1024, "the product is not needed any more"
        loss = y.sum()
        del y
        assert ledger.now().num_bytes == 1024 + 4, "the graph keeps it"
        loss.backward()
        del loss
        assert ledger.now().num_bytes == 1024, "the gradient"
        assert ledger.peak.num_bytes >= 2 * 1024 + 4


def test_ledger_counts_its_own_thread_and_deaths_on_any() -> None:
    handed: list[Tensor] = []
    with Ledger(lambda: 0) as ledger:
        handed.append(torch.empty(100))

        def other() -> None:
            handed.append(torch.empty(5000))
            del handed[0]

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert ledger.now().num_bytes == 0 and ledger.peak.num_bytes == 400


@settings(deadline=None, max_examples=50)
@given(st.lists(st.one_of(st.integers(1, 1000), st.integers(-5, -1)), max_size=40))
def test_ledger_equals_a_sum_over_what_is_held(actions: list[int]) -> None:
    """Positive numbers allocate, negative ones drop one of those that are held."""
    held: list[Tensor] = []
    peak = 0
    with Ledger(lambda: 0) as ledger:
        for action in actions:
            if action > 0:
                held.append(torch.empty(action, dtype=torch.uint8))
            elif held:
                del held[action % len(held)]
            total = sum(each.nbytes for each in held)
            peak = max(peak, total)
            assert ledger.now().num_bytes == total
    assert ledger.peak.num_bytes == peak


def test_master_weights_train_as_adamw_does() -> None:
    """In float32 to rounding; in bfloat16 the parameter is the rounded master copy, and all takes 8 times its bytes."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(300, 70, generator=generator)  # more than one piece
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    narrow = torch.nn.Parameter(start.bfloat16())
    optimizers = [
        MasterAdamW([ours], lr=1e-2),
        torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.01),
        MasterAdamW([narrow], lr=1e-2),
    ]
    for _ in range(5):
        grad = torch.randn(start.shape, generator=generator)
        for param, optimizer in zip((ours, theirs, narrow), optimizers, strict=True):
            param.grad = grad.to(param.dtype)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    state = optimizers[2].state[narrow]
    assert torch.equal(narrow, state["master"].bfloat16())
    assert (state["master"] - theirs).abs().max() < 1e-2
    tensors = [narrow, narrow.grad, *(value for value in state.values() if isinstance(value, Tensor))]
    assert sum(each.nbytes for each in tensors) == 8 * narrow.nbytes


def test_table_and_record(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "record.json"
    assert bench.main(["memory", *SMALL, "-w", "2", "--steps", "20", "--json", str(file)]) == 0
    out, record = capsys.readouterr().out, json.loads(file.read_text())
    lines = [line.split() for line in out.splitlines() if not line.startswith("#")]
    assert [line[0] for line in lines] == ["ep", "default", "remat"]
    assert (record["case"], record["passed"], record["world_size"]) == ("memory", True, 4)
    assert record["summary"].keys() == {"default_over_ep", "remat_over_ep", "growth_bytes_20_steps"}
    ep, default, remat = record["results"]
    for row, line in zip((ep, default, remat), lines, strict=True):
        assert row["peak_bytes"] == sum(row["kinds"].values()) == int(line[2])
        assert row["kinds"]["optimizer"] == 6 * row["kinds"]["parameters"]
    assert ep["kinds"]["replicas"] == 0 and ep["kinds"]["gradients"] == ep["kinds"]["parameters"]
    assert 1 < record["summary"]["remat_over_ep"] < record["summary"]["default_over_ep"]
    # At the default's peak nearly all layers have replicas: at least the three busiest, less those that the rank owns.
    expert_bytes = 3 * 16 * 64 * 2
    assert default["kinds"]["replicas"] >= 3 * expert_bytes > 0


def test_bytes_that_nobody_reports_are_wrong(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(training, "_POOL", "elsewhere")
    assert bench.main(["memory", *SMALL, "-w", "1", "--steps", "20"]) == 1
    out = capsys.readouterr().out
    assert "WRONG" in out and "# FAILED" in out


def test_nothing_grows() -> None:
    found = growth.measure_growth(60)
    assert found.right and found.growth_bytes == 0 and found.begin_bytes > 0


def test_growth_is_found(monkeypatch: Any) -> None:
    """Four bytes in each step, on one of the ranks."""
    kept: list[Tensor] = []
    right = training.tokens_of

    def leak(sizes: Any, step: int, rank: int) -> Tensor:
        if rank == 1:
            kept.append(torch.zeros(1))
        return right(sizes, step, rank)

    monkeypatch.setattr(training, "tokens_of", leak)
    assert growth.measure_growth(60).growth_bytes == 4 * 54


@pytest.mark.parametrize("arguments", [["--backend", "mpi"], ["--rank", "4"]])
def test_refuses_unknown_flags(arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(["memory", *arguments])
    assert "unrecognized arguments" in capsys.readouterr().err

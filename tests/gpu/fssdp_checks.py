"""FSSDP on a GPU against one process on that GPU: the checks of `tests.fssdp_checks` with models and batches there."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import sparsecoll as sc
from tests import fssdp_checks, reshard_checks
from tests.fssdp_checks import Case, Run, Scattered, Sharded, accumulate, check_script, notes_of_one_process

__all__ = ["CHECKS"]

_TOY, _BATCH_OF = fssdp_checks.Toy, fssdp_checks.batch_of


def on_device(check: Callable[[sc.Group], object]) -> Callable[[sc.Group], None]:
    """The same check, in whose module models and batches are made on the group's device."""

    def run(group: sc.Group) -> None:
        fssdp_checks.Toy = lambda *arguments, **more: _TOY(*arguments, **more).to(group.device)
        fssdp_checks.batch_of = lambda *arguments: _BATCH_OF(*arguments).to(group.device)
        try:
            check(group)
        finally:
            fssdp_checks.Toy, fssdp_checks.batch_of = _TOY, _BATCH_OF

    return run


def _replicas_here_and_there(group: sc.Group) -> None:
    case = Case(balancer=Scattered(), num_experts=6, shared_hidden_dim=3, twice=True)
    check_script(group, case, accumulate)
    check_script(group, replace(case, rows_per_expert=3, replicates=True), accumulate)


def _once(run: Run) -> None:
    run.loss(0).backward()
    run.update()


def _bfloat16(group: sc.Group) -> None:
    """The grouped products of 16-bit floats. The router's biases decide the routing, which rounding must not."""
    case = Case(
        num_experts=4,
        dim=32,
        hidden_dim=16,
        tokens=(24, 0, 9),
        biases=((0, 8.0), (3, 4.0)),
        balancer=Scattered(),
        dtype=torch.bfloat16,
    )
    for each in (case, replace(case, rows_per_expert=24, replicates=True)):
        run = Sharded(each, group)
        _once(run)
        expected = notes_of_one_process(each, _once, group.world_size)
        fssdp_checks.assert_notes_equal(run, expected, rtol=0.05, atol=0.02)


def _steps(group: sc.Group) -> None:
    """What is measured with events on streams comes out as times."""
    run = Sharded(Case(num_experts=6), group)
    fssdp_checks.train(run)
    report = run.model.step_report()
    assert report.step_s > report.exposed_s >= 0 and report.hidden_s >= 0 and report.gathered_bytes > 0
    assert all(cost.token_s > 0 and cost.hidden_s > 0 for cost in run.model.costs().values())
    with tempfile.TemporaryDirectory() as folder:
        run.model.trace_step(Path(folder, "step.json"))


parity = on_device(fssdp_checks.check_parity)
options = on_device(fssdp_checks.check_options)
moves = on_device(reshard_checks.check_moves)
capacity = on_device(fssdp_checks.check_capacity)
reported_bytes = on_device(fssdp_checks.check_bytes)
state_dict = on_device(fssdp_checks.check_state_dict)
disagreement = on_device(fssdp_checks.check_disagreement)
replicas_here_and_there = on_device(_replicas_here_and_there)
bfloat16 = on_device(_bfloat16)
steps = on_device(_steps)

CHECKS = [
    f"{__name__}:{name}"
    for name in (
        "parity",
        "options",
        "moves",
        "capacity",
        "reported_bytes",
        "state_dict",
        "disagreement",
        "replicas_here_and_there",
        "bfloat16",
        "steps",
    )
]

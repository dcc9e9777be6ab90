"""The wrapper over operations that are put on streams: what it computes with has arrived, on emulated devices."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import sparsecoll as sc
from tests.emulation.world import device_of, run_emulated
from tests.fssdp_checks import (
    Case,
    Scattered,
    Sharded,
    accumulate,
    batch_of,
    check_bytes,
    check_capacity,
    check_disagreement,
    check_options,
    check_parity,
    check_script,
    check_state_dict,
    train,
)


def check_replicas_here_and_there(group: sc.Group) -> None:
    case = Case(balancer=Scattered(), num_experts=6, shared_hidden_dim=3, twice=True)
    check_script(group, case, accumulate)
    check_script(group, replace(case, rows_per_expert=3, replicates=True), accumulate)


CHECKS: list[Callable[[sc.Group], None]] = [
    check_parity,
    check_options,
    check_capacity,
    check_bytes,
    check_state_dict,
    check_disagreement,
    check_replicas_here_and_there,
]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_check(check: Callable[[sc.Group], None], world_size: int) -> None:
    run_emulated(check, world_size, timeout_s=30.0, seed=world_size)


def test_ranks_on_two_nodes() -> None:
    run_emulated(check_parity, 4, checked=False, topology=sc.Topology((0, 0, 1, 1)))


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "unchecked"])
def test_a_step_of_fixed_capacity_can_be_captured(checked: bool) -> None:
    """What has run before allocates nothing that a capture forbids, asks no host, and goes to captured streams only.

    Emulated devices do not capture torch's own operations, so nothing is said about values.
    """
    case = Case(rows_per_expert=3, replicates=True, shared_hidden_dim=3, dtype=torch.float32)

    def main(group: sc.Group) -> None:
        device, run = device_of(group), Sharded(case, group)
        train(run)
        device.fake.drain()
        while group.transport._in_flight:  # type: ignore[attr-defined]
            time.sleep(0.01)  # a watcher's question would spoil the capture
        group.barrier()
        batch, before = batch_of(case, 0, group.rank), group.stats()
        device.fake.current = stream = device.new_stream(0).ptr
        with device.fake.capture(stream) as graph:
            run.model(batch).backward()
            run.model.clip_grad_norm_(1.0)
        moved = group.stats().since(before)
        assert graph and moved.sent_messages > 0 and (moved.control_bytes, moved.control_messages) == (0, 0)

    run_emulated(main, 2, checked=checked)

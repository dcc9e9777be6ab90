"""The wrapper over operations that are put on streams: what it computes with has arrived, on emulated devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

import sparsecoll as sc
from tests.emulation.world import run_emulated
from tests.fssdp_checks import (
    Case,
    Scattered,
    accumulate,
    check_bytes,
    check_capacity,
    check_disagreement,
    check_parity,
    check_script,
    check_state_dict,
)


def check_replicas_here_and_there(group: sc.Group) -> None:
    case = Case(balancer=Scattered(), num_experts=6, shared_hidden_dim=3, twice=True)
    check_script(group, case, accumulate)
    check_script(group, replace(case, rows_per_expert=3, replicates=True), accumulate)


CHECKS: list[Callable[[sc.Group], None]] = [
    check_parity,
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

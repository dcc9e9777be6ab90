"""Balancers by name, or as objects of a user's own; costs that make no sense."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sparsecoll as sc
from sparsecoll.balance import BALANCERS, Balance, Balancer, Costs, Hecate, NoReplicas, find_balancer

COSTS: dict[str, Any] = {
    "topology": sc.Topology.flat(2),
    "expert_bytes": 100,
    "token_bytes": 10,
    "bytes_per_s": 1e3,
    "token_s": 0.25,
    "hidden_s": 0.35,
}


def test_find_balancer() -> None:
    assert find_balancer("hecate") == Hecate() and find_balancer("none") == NoReplicas()
    assert all(isinstance(find_balancer(name), Balancer) for name in BALANCERS)
    mine = Hecate(most=1)
    assert find_balancer(mine) is mine


@pytest.mark.parametrize("wrong", ["fair", "", None, 3, object(), Hecate, Hecate.balance], ids=str)
def test_find_balancer_refuses(wrong: Any) -> None:
    with pytest.raises(sc.InvalidArgument, match=r"hecate, .*none or an object with exact and balance"):
        find_balancer(wrong)


def test_exact_is_yes_or_no() -> None:
    class Vague:
        exact = "sometimes"

        def balance(self, loads: Any, base: Any, costs: Any) -> Any:
            return Balance(base)

    with pytest.raises(sc.InvalidArgument, match="exact to be True or False, got 'sometimes'"):
        find_balancer(Vague())  # type: ignore[arg-type]


def test_no_replicas() -> None:
    base = sc.Placement.even(4, 2)
    answer = NoReplicas().balance(np.full((2, 4), 9), base, Costs(**COSTS))
    assert answer.place == base and answer.quotas is None


def test_costs_by_hand() -> None:
    costs = Costs(**COSTS)
    assert costs.copy_s == 0.1 and costs.overlap_degree == 3
    computed, sent, received = np.array([4, 2]), np.array([0, 1]), np.array([3, 0])
    # Three times four assignments of 0.25 s, and four times three tokens of 10 bytes.
    assert costs.layer_s(computed, sent, received) == pytest.approx(3.0 + 0.12)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("expert_bytes", 0),
        ("token_bytes", -1),
        ("bytes_per_s", 0.0),
        ("bytes_per_s", float("nan")),
        ("token_s", -1.0),
        ("hidden_s", float("nan")),
        ("spare_experts", -1),
    ],
)
def test_costs_refuse(name: str, value: Any) -> None:
    with pytest.raises(sc.InvalidArgument, match=f"expected {name} >=? 0"):
        Costs(**{**COSTS, name: value})

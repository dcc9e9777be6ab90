"""Layers on ranks, what copying and computing costs there, and the routings that their balancers meet.

Legend: ``W`` ranks, ``E`` experts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

import sparsecoll as sc
from bench.step.traces import Trace
from sparsecoll.balance import Balance, Costs, Loads, predicted_s

__all__ = ["SETTINGS", "Setting", "drawn", "recorded"]

_TOP_K = 2
_EXPONENTS = {"zipf08": 0.8, "zipf12": 1.2}


@dataclass(frozen=True)
class Setting:
    """One layer on some ranks, owners even.

    Attributes:
        tokens: of a rank in a forward.
        draws: the routings beside the recorded ones.
        replays: whether recorded routings fit.
    """

    name: str
    num_experts: int
    tokens: int
    costs: Costs
    draws: tuple[str, ...]
    replays: bool = True

    @cached_property
    def base(self) -> sc.Placement:
        return sc.Placement.even(self.num_experts, self.costs.topology.world_size)

    @cached_property
    def balanced(self) -> Loads:
        """``[W, E]``: every expert gets the same number of assignments from every rank."""
        return np.full(self.base.holders.T.shape, self.tokens * _TOP_K // self.num_experts, np.int64)

    @cached_property
    def ideal_s(self) -> float:
        """The layer under plain expert parallelism, balanced."""
        return predicted_s(self.balanced, Balance(self.base), self.costs)

    def describe(self) -> dict[str, Any]:
        """For the record."""
        costs = asdict(self.costs)
        nodes = costs.pop("topology")["node_of"]
        return {
            "name": self.name,
            "node_of": list(nodes),
            "num_experts": self.num_experts,
            "top_k": _TOP_K,
            "tokens": self.tokens,
            "costs": costs,
            "overlap_degree": self.costs.overlap_degree,
            "ideal_s": self.ideal_s,
        }


# An expert of 2048 x 1408 x 3 parameters in bfloat16, which computes an assignment at 200 TFLOP/s, with as many FLOP as
# it has bytes. Attention over 16,384 such tokens, in sequences of 4,096, takes 4 ms.
_EXPERT_BYTES = 17_301_504
_TOKEN_S = _EXPERT_BYTES / 2e14
_ATTENTION_S = 4e-3

SETTINGS = (
    # Of the order that FSSDP measures between two ranks of this machine over MPI, where nothing hides: experts of
    # 256 x 512 x 3 in float32.
    Setting(
        "cpu2",
        32,
        2048,
        Costs(sc.Topology.flat(2), expert_bytes=1_572_864, token_bytes=1024, bytes_per_s=5e8, token_s=4e-5),
        ("zipf08", "zipf12", "balanced"),
    ),
    # A100s on two nodes, each with a 200 Gbit/s adapter.
    Setting(
        "gpu8",
        32,
        16384,
        Costs(sc.Topology((0, 0, 0, 0, 1, 1, 1, 1)), _EXPERT_BYTES, 4096, 2.5e10, _TOKEN_S, _ATTENTION_S),
        ("zipf08", "zipf12", "balanced"),
    ),
    # A rack that shares NVLink, with room for 16 copies on each.
    Setting(
        "gpu64",
        256,
        16384,
        Costs(sc.Topology.flat(64), _EXPERT_BYTES, 4096, 3.5e11, _TOKEN_S, _ATTENTION_S, spare_experts=16),
        ("zipf08", "zipf12"),
        replays=False,
    ),
)


def recorded(setting: Setting, trace: Trace, layer: int) -> list[Loads]:
    """Loads ``[W, E]`` of each recorded step: ranks share its tokens, and each token stands for several if need be."""
    num_steps, _, num_tokens, _ = trace.expert_ids.shape
    ranks = range(setting.base.world_size)
    share = num_tokens // len(ranks)

    def counts(step: int, rank: int) -> Loads:
        ids = trace.at(step, layer, rank, share)
        return np.bincount(ids.ravel(), minlength=setting.num_experts) * (setting.tokens // share)

    return [np.array([counts(step, rank) for rank in ranks]) for step in range(num_steps)]


def drawn(setting: Setting, routing: str, num_forwards: int, seed: int) -> list[Loads]:
    """Loads ``[W, E]``; with Zipf's law, the first ranks own the hot experts."""
    if routing == "balanced":
        return [setting.balanced] * num_forwards
    world_size, num_experts = setting.balanced.shape
    shares = np.arange(1, num_experts + 1) ** -_EXPONENTS[routing]
    random = np.random.default_rng([seed, world_size, *routing.encode()])
    assignments = setting.tokens * _TOP_K
    return [random.multinomial(assignments, shares / shares.sum(), size=world_size) for _ in range(num_forwards)]

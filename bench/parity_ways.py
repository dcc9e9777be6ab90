"""The ways to wrap and run a model that parity is shown for, and what tells that a way has really been gone.

Balancers that weigh costs would leave a model as small as this alone, so they are told that copies are cheap and tokens
dear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import sparsecoll as sc
from bench.busiest import Busiest
from sparsecoll.balance import BALANCERS, Costs

__all__ = ["WAYS", "Traces", "Way", "find_ways"]

_BUSIEST = Busiest(most=3)
_OFTEN = 2


class Traces(NamedTuple):
    """What a training has left behind beside its results.

    Attributes:
        sent_bytes: by all ranks, for each step.
        sparse_bytes: of that, gathers and reductions of replicas; of all steps together.
        most_hot: the most experts of a layer that had replicas in a step.
        num_moves: how often experts moved to other owners.
    """

    sent_bytes: list[float]
    sparse_bytes: float
    most_hot: int
    num_moves: int


@dataclass(frozen=True)
class Way:
    """One way.

    Attributes:
        options: of `sparsecoll.FSSDP`, beside the costs.
        reentrant: which of torch's activation checkpointing every block runs under, or None for none.
        reshard_every: steps after which experts may move to other owners; 0 for never.
        spare_experts: replicas for which a rank is told to have memory; where there is room for many, owners matter
            little.
        rival: a way that does the same and sends less, for it computes or gathers something once less; None for none.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    reentrant: bool | None = None
    reshard_every: int = 0
    spare_experts: int = 1 << 30
    rival: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Of `sparsecoll.FSSDP`."""
        return {"balancer": _BUSIEST, **self.options}

    def costs(self, group: sc.Group) -> Costs:
        """Of any layer: cheap copies, dear tokens."""
        return Costs(
            group.topology,
            expert_bytes=1000,
            token_bytes=100,
            bytes_per_s=1e12,
            token_s=1e-3,
            hidden_s=1e-3,
            spare_experts=self.spare_experts,
        )

    def is_gone(self, traces: Mapping[str, Traces]) -> bool:
        """Whether a training on several ranks went this way, or left what is special about it untouched.

        Args:
            traces: by the way's name, of this one and its rival.
        """
        mine = traces[self.name]
        signs = [(mine.sparse_bytes > 0) == (self.arguments["balancer"] != "none")]
        if self.options.get("calibrate"):
            signs.append(mine.most_hot > _BUSIEST.most)
        if self.reshard_every:
            signs.append(mine.num_moves > 0)
        if self.rival is not None:
            rival = traces[self.rival].sent_bytes[: len(mine.sent_bytes)]
            signs.append(sum(mine.sent_bytes) > sum(rival))
        return all(signs)


def _ways() -> list[Way]:
    remat, calibrate = {"rematerialize": True}, {"calibrate": True}
    again, slices = {**remat, **calibrate}, {"sharding": "slices"}
    return [
        Way("plain"),
        *(Way(name, {"balancer": name}) for name in BALANCERS),
        *(Way(name, {"predictor": name}) for name in ("last", "decaying")),
        Way("calibrate", calibrate),
        Way("spread_quota", {"spread": "quota"}),
        Way("rematerialize", remat, rival="plain"),
        Way("calibrate+rematerialize", again, rival="calibrate"),
        Way("slices", slices),
        Way("slices+rematerialize", {**slices, **remat}, rival="slices"),
        Way("reshard", reshard_every=_OFTEN),
        Way("reshard+none", {"balancer": "none"}, reshard_every=_OFTEN),
        Way("reshard+hecate", {"balancer": "hecate"}, reshard_every=_OFTEN, spare_experts=1),
        Way("reshard+rematerialize", remat, reshard_every=_OFTEN, rival="reshard"),
        Way("checkpoint", reentrant=False, rival="plain"),
        Way("checkpoint+rematerialize", remat, reentrant=False, rival="checkpoint"),
        Way("checkpoint+calibrate", calibrate, reentrant=False, rival="calibrate"),
        Way("checkpoint+calibrate+rematerialize", again, reentrant=False, rival="checkpoint+calibrate"),
        # These keep no replicas from forward to backward in any case, not even those of the last layer.
        Way("reentrant", reentrant=True, rival="checkpoint"),
        Way("reentrant+rematerialize", remat, reentrant=True, rival="checkpoint+rematerialize"),
        Way("reentrant+calibrate", calibrate, reentrant=True, rival="checkpoint+calibrate"),
        Way("reentrant+calibrate+rematerialize", again, reentrant=True, rival="checkpoint+calibrate+rematerialize"),
        Way("all", {**again, "spread": "quota", "predictor": "last"}, reentrant=False, reshard_every=_OFTEN),
    ]


WAYS = {way.name: way for way in _ways()}


def find_ways(names: Sequence[str]) -> list[Way]:
    """By name, after their rivals and the plain way, each once."""
    found = {"plain": WAYS["plain"]}
    for name in names:
        chain = [WAYS[name]]
        while chain[-1].rival is not None:
            chain.append(WAYS[chain[-1].rival])
        found |= {way.name: way for way in reversed(chain)}
    return list(found.values())

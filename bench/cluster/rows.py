"""A row of the table: one contestant on one scene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.cluster.contestants import Contestant, Ours
from bench.cluster.placements import Scene, cross_bytes

__all__ = ["Row"]

_MICRO = 1e6
_GIGA = 1e9


@dataclass(frozen=True)
class Row:
    """What all ranks have seen of one contestant on one scene. Times are in seconds.

    Attributes:
        pattern: ``hot`` or ``random``; ``number`` counts the placements of a pattern.
        collective: ``ag`` or ``rs``.
        algorithm: the contestant's name.
        detail: what the name does not say: what ``auto`` has chosen, or the calls of a baseline.
        times_s: of the timed iterations, each the maximum over ranks.
        bound_s: what no schedule beats on the emulated links.
        size_bytes: of all chunks.
        useful_bytes: max over ranks of payload that must arrive (all-gather) or leave (reduce-scatter).
        sent_bytes, received_bytes: ``[world_size]``, payload of one run as the library counted it; None for baselines.
        must_cross_bytes: payload that has to cross between hosts.
        cross_bytes: payload that the plan sends from host to host; None for baselines.
        wire_bytes: of one run, over all hosts' links, as the interfaces counted: with acknowledgements, most headers
            and the barriers around the run. The largest of the timed iterations.
        num_wrong: elements, over all ranks and runs.
    """

    pattern: str
    number: int
    collective: str
    algorithm: str
    detail: str
    times_s: tuple[float, ...]
    bound_s: float
    size_bytes: int
    useful_bytes: int
    sent_bytes: tuple[int, ...] | None
    received_bytes: tuple[int, ...] | None
    must_cross_bytes: int
    cross_bytes: int | None
    wire_bytes: int
    num_wrong: int
    predicted_s: float | None
    plan_digest: str | None

    @classmethod
    def of(
        cls,
        scene: Scene,
        collective: str,
        contestant: Contestant,
        bound_s: float,
        host_of: Sequence[int],
        seen: NDArray[np.float64],
    ) -> Row:
        """Puts together what `bench.cluster.rank` has gathered.

        Args:
            seen: ``[executions, world_size, 5]``: seconds, wrong elements, bytes sent, received, on the host's link.
                The first execution is not timed, unless it is the only one.
        """
        timed = seen[1:] if len(seen) > 1 else seen
        ours = contestant if isinstance(contestant, Ours) else None
        place, sizes = scene.place, np.asarray(scene.chunk_bytes, np.int64)
        foreign = place.holders.copy()
        foreign[np.arange(place.num_chunks), place.owners] = False
        return cls(
            pattern=scene.pattern,
            number=scene.number,
            collective=collective,
            algorithm=contestant.name,
            detail=contestant.detail,
            times_s=tuple(timed[:, :, 0].max(axis=1).tolist()),
            bound_s=bound_s,
            size_bytes=sum(scene.chunk_bytes),
            useful_bytes=int((foreign.T @ sizes).max()),
            sent_bytes=tuple(map(int, timed[-1, :, 2])) if ours else None,
            received_bytes=tuple(map(int, timed[-1, :, 3])) if ours else None,
            must_cross_bytes=cross_bytes(scene, host_of),
            cross_bytes=ours.cross_bytes(host_of) if ours else None,
            wire_bytes=int(timed[:, :, 4].sum(axis=1).max()),
            num_wrong=int(seen[:, :, 1].sum()),
            predicted_s=ours.plan.predicted_s if ours else None,
            plan_digest=ours.plan.digest if ours else None,
        )

    @property
    def time_s(self) -> float:
        """The median over iterations."""
        return float(np.median(self.times_s))

    @property
    def over_bound(self) -> float:
        return self.time_s / self.bound_s

    def record(self) -> dict[str, Any]:
        """As JSON has it, with nccl-tests' names where it has any."""
        wire = None if self.sent_bytes is None else max(*self.sent_bytes, *(self.received_bytes or ()))
        return {
            "experiment_name": f"cluster_{self.pattern}_{self.collective}",
            "pattern": self.pattern,
            "placement": self.number,
            "collective": {"ag": "all_gather", "rs": "reduce_scatter"}[self.collective],
            "algorithm": self.algorithm,
            "detail": self.detail,
            "backend": "torch",
            "size": self.size_bytes,
            "count": self.size_bytes // 4,
            "type": "float",
            "redop": "none" if self.collective == "ag" else "sum",
            "root": -1,
            "out_of_place": {
                "time": self.time_s * _MICRO,
                "alg_bw": self.size_bytes / self.time_s / _GIGA,
                "bus_bw": None if wire is None else wire / self.time_s / _GIGA,
                "nwrong": self.num_wrong,
            },
            "in_place": None,
            "actual_iterations": len(self.times_s),
            "times_us": [time_s * _MICRO for time_s in self.times_s],
            "min_us": min(self.times_s) * _MICRO,
            "max_us": max(self.times_s) * _MICRO,
            "bound_us": self.bound_s * _MICRO,
            "time_over_bound": self.over_bound,
            "predicted_us": None if self.predicted_s is None else self.predicted_s * _MICRO,
            "plan_digest": self.plan_digest,
            "useful_bytes": self.useful_bytes,
            "wire_bytes": wire,
            "sent_bytes": self.sent_bytes,
            "received_bytes": self.received_bytes,
            "must_cross_bytes": self.must_cross_bytes,
            "cross_bytes": self.cross_bytes,
            "interface_bytes": self.wire_bytes,
        }

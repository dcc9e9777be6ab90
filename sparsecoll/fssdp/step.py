"""A step of one rank in figures: how long, how much of it was communication, how even, how large."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

from sparsecoll.errors import InvalidArgument
from sparsecoll.fssdp.reports import LayerLoad, MemoryReport
from sparsecoll.fssdp.timeline import Event, StepEvents

__all__ = ["LayerStep", "StepRecord"]


@dataclass(frozen=True)
class LayerStep:
    """One layer's part of a `StepRecord`.

    Attributes:
        imbalance_before: busiest rank over mean rank, in rows, had every expert computed at its owner.
        imbalance_after: the same as it was computed, with replicas.
        hot: number of experts that had replicas.
        exposed_s: for which compute waited for this layer's sparse collectives.
    """

    imbalance_before: float
    imbalance_after: float
    hot: int
    exposed_s: float


@dataclass(frozen=True)
class StepRecord:
    """A forward and the backward that followed it, on one rank.

    Times are those of `StepEvents`, and each moment counts once, however many spans it lies in. A sparse collective is
    in flight from its issue to the end of the wait for it, so that ``exposed_s + hidden_s`` is the time for which at
    least one was. What was hidden may have lain under an all-to-all as well as under compute, and may have begun before
    the step; and where everything had arrived before the wait, it is longer than the bytes took.

    Attributes:
        step: its number, from 0.
        step_s: from the begin of forward to the end of backward; without one, to where the next forward began.
        exposed_s: for which this rank waited for sparse collectives.
        hidden_s: for which at least one was in flight, and this rank did not wait for any.
        dispatch_s: in all-to-alls of tokens, which nothing hides.
        counts_s: in the exchange of loads, waiting for slower ranks included.
        gathered_bytes: sent by this rank in sparse all-gathers.
        reduced_bytes: in sparse reduce-scatters.
        dispatched_bytes: in all-to-alls.
        hot: number of experts that had replicas, over all layers.
        layers: by the layer's name.
        memory: bytes at the end of the step.
    """

    step: int
    step_s: float
    exposed_s: float
    hidden_s: float
    dispatch_s: float
    counts_s: float
    gathered_bytes: int
    reduced_bytes: int
    dispatched_bytes: int
    hot: int
    layers: dict[str, LayerStep]
    memory: MemoryReport

    @classmethod
    def from_step(cls, events: StepEvents, loads: Mapping[str, LayerLoad], memory: MemoryReport) -> StepRecord:
        """Adds up what was recorded of a step; ``loads`` and ``memory`` are those of its end."""
        waits = events.of("wait")
        exposed_s = _covered_s(waits)
        layers = {
            fqn: LayerStep(
                load.imbalance_before,
                load.imbalance_after,
                len(load.hot),
                _covered_s(event for event in waits if event.fqn == fqn),
            )
            for fqn, load in loads.items()
        }
        return cls(
            step=events.number,
            step_s=events.length_ns / 1e9,
            exposed_s=exposed_s,
            hidden_s=_covered_s(events.of("wait", "flight")) - exposed_s,
            dispatch_s=_covered_s(events.of("dispatch")),
            counts_s=_covered_s(events.of("counts")),
            gathered_bytes=sum(load.gathered.sent_bytes for load in loads.values()),
            reduced_bytes=sum(load.reduced.sent_bytes for load in loads.values()),
            dispatched_bytes=sum(load.dispatch_bytes for load in loads.values()),
            hot=sum(layer.hot for layer in layers.values()),
            layers=layers,
            memory=memory,
        )

    @property
    def hidden_fraction(self) -> float:
        """Of the time in which sparse collectives were in flight; 1 where there were none."""
        flight_s = self.exposed_s + self.hidden_s
        return self.hidden_s / flight_s if flight_s else 1.0

    def scalars(self) -> Iterator[tuple[str, float]]:
        """Names and values of all figures, those of layers as ``imbalance_after/<fqn>``; without the step's number."""
        for name, value in (*vars(self).items(), *vars(self.memory).items()):
            if isinstance(value, (int, float)) and name != "step":
                yield name, value
        yield "hidden_fraction", self.hidden_fraction
        for fqn, layer in self.layers.items():
            for name, value in vars(layer).items():
                yield f"{name}/{fqn}", value

    def to_json(self) -> str:
        """One line, without its end."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> StepRecord:
        """The record that `to_json` wrote.

        Raises:
            InvalidArgument: it is not such a line.
        """
        try:
            fields = json.loads(line)
            fields["layers"] = {fqn: LayerStep(**layer) for fqn, layer in fields["layers"].items()}
            fields["memory"] = MemoryReport(**fields["memory"])
            return cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            text = f"StepRecord.from_json: expected a line of StepRecord.to_json, got {line[:80]!r}"
            raise InvalidArgument(f"{text}: {error}") from error


def _covered_s(events: Iterable[Event]) -> float:
    """The time that lies in at least one of them."""
    covered, until = 0, None
    for begin, end in sorted((event.begin_ns, event.end_ns) for event in events):
        start = begin if until is None else max(begin, until)
        covered += max(0, end - start)
        until = end if until is None else max(end, until)
    return covered / 1e9

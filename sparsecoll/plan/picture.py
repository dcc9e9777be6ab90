"""A Plan as an HTML page: what travels over each direction of each link, when, and where the bounds are.

The page needs nothing else: no network, no libraries. Its drawing stands without JavaScript, which only adds what
appears under the mouse.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, NamedTuple

from sparsecoll.errors import InvalidArgument
from sparsecoll.plan.bars import Bar, bars_of
from sparsecoll.plan.costs import costs_of
from sparsecoll.plan.explain import bytes_text, explain, summary, time_text
from sparsecoll.plan.lanes import Lane, lanes_of

if TYPE_CHECKING:
    from sparsecoll.plan.plan import Plan

__all__ = ["picture", "save_picture"]

# Units of the drawing, pixels where the page is as wide as it.
_LEFT, _WIDTH, _RIGHT = 130, 1000, 44
_TOP, _HEADING, _AXIS = 62, 20, 18

_MOST_BARS = 60_000
_MOST_NAMED = 24


def save_picture(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Writes the page of `picture`.

    Raises:
        InvalidArgument: the file cannot be written; names the path.
    """
    try:
        Path(path).write_text(picture(plan), encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise InvalidArgument(f"Plan.show: expected a writable path, got {path}: {error}") from error


def picture(plan: Plan) -> str:
    """The page: figures, a lane for each direction of each link with a bar for each piece, and the bounds as lines."""
    pieces, lanes = lanes_of(plan)
    drawing = _Drawing.of(plan, lanes)
    bars, least = bars_of(pieces, lanes, drawing.ticks_per_unit, _MOST_BARS)
    chunks = sorted(set(pieces.chunk.tolist()))
    template = Template(Path(__file__).with_name("picture.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=f"{plan.op} by {plan.algorithm}",
        summary=f"{summary(plan)}. Digest {plan.digest[:8]}.",
        figures="".join(_figures(plan)),
        legend="".join(_legend(plan, chunks)),
        colours="\n".join(_colours(chunks)),
        height=drawing.lane_height,
        drawing="\n".join(_svg(plan, drawing, bars)) if chunks else "<p>Nothing travels.</p>",
        note=_note(bars, least / drawing.ticks_per_unit),
        text=escape(explain(plan)),
        links=escape(plan.topology.table()),
        data=_data(plan, drawing, bars),
    )


class _Drawing(NamedTuple):
    """Where things are.

    Attributes:
        lanes: in the order in which they stand; ``tops`` of each.
        lane_height: of each.
        labels: ``(y, class, text)``, to the left of the lanes.
        bottom: below the last lane.
        span_s: seconds across the lanes.
        ticks_per_unit: ticks of the plan's timeline in a unit of width.
    """

    lanes: list[Lane]
    tops: list[float]
    lane_height: int
    labels: list[tuple[float, str, str]]
    bottom: float
    span_s: float
    ticks_per_unit: float

    @classmethod
    def of(cls, plan: Plan, lanes: list[Lane]) -> _Drawing:
        span_s = 1.03 * max(plan.predicted_s, plan.bound_s) or 1.0
        height = 14 if len(lanes) <= 48 else 9 if len(lanes) <= 96 else 5
        node_of, num_nodes = plan.topology.node_of, plan.topology.num_nodes
        has_headings = 1 < num_nodes < plan.place.world_size
        nodes = [lane.number if lane.level == "node" else node_of[lane.number] for lane in lanes]
        # Ranks of a node stand together, above what they share. Sorting keeps the order of the lanes of a link.
        lanes.sort(key=lambda lane: (nodes[lane.number], lane.level == "node", lane.number))
        return cls(lanes, [], height, [], 0.0, span_s, 1.0)

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

# Units of the drawing, which are pixels where the page is as wide as the drawing.
_LEFT, _WIDTH, _RIGHT = 130, 1000, 44
_TOP, _AXIS = 58, 18

_MOST_BARS = 60_000
_MOST_NAMED = 24


def save_picture(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Writes the page of `picture`.

    Raises:
        InvalidArgument: the file cannot be written; names the path.
    """
    text = picture(plan)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise InvalidArgument(f"Plan.show: expected a writable path, got {path}: {error}") from error


def picture(plan: Plan) -> str:
    """The page: figures, a lane for each direction of each link with a bar for each piece, and the bounds as lines."""
    pieces, lanes = lanes_of(plan)
    rows = _rows(plan, lanes)
    axis = _Axis.of(plan)
    bars, least = bars_of(pieces, [row.lane for row in rows], axis.ticks_per_unit, _MOST_BARS)
    chunks = sorted(set(pieces.chunk.tolist()))
    template = Template(Path(__file__).with_name("picture.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=f"{plan.op} by {plan.algorithm}",
        summary=f"{summary(plan)}. Digest {plan.digest[:8]}.",
        figures="".join(_figures(plan)),
        legend="".join(_legend(plan, chunks)),
        colours="\n".join(_colours(chunks)),
        height=_lane_height(len(rows)),
        drawing="\n".join(_svg(plan, rows, bars, axis)) if chunks else "<p>Nothing travels.</p>",
        note=_note(plan, bars, least / axis.ticks_per_unit, leaves_out=len(rows) < len(lanes)),
        text=escape(explain(plan)),
        links=escape(plan.topology.table()),
        data=_data(plan, bars, axis),
    )


class _Axis(NamedTuple):
    """Time, from left to right.

    Attributes:
        span_s: seconds across the lanes.
        tick_s: seconds of a tick of the plan's timeline.
    """

    span_s: float
    tick_s: float

    @classmethod
    def of(cls, plan: Plan) -> _Axis:
        return cls(1.03 * max(plan.predicted_s, plan.bound_s) or 1.0, costs_of(plan.topology).tick_s)

    @property
    def ticks_per_unit(self) -> float:
        return self.span_s / self.tick_s / _WIDTH

    def x(self, seconds: float) -> float:
        return seconds / self.span_s * _WIDTH

    def marks(self) -> list[float]:
        """Seconds of about ten round times."""
        raw = self.span_s / 10
        power = 10.0 ** math.floor(math.log10(raw))
        step = power * min((each for each in (1, 2, 5, 10) if each * power >= raw), default=10)
        return [number * step for number in range(int(self.span_s / step) + 1)]


class _Row(NamedTuple):
    """A lane and where it stands.

    Attributes:
        top: distance of its upper edge from that of the drawing.
        heading: of the node that begins here, or empty.
        name: of the rank or node that begins here, or empty.
        side: which of its links, and which direction.
    """

    lane: Lane
    top: float
    heading: str
    name: str
    side: str


def _rows(plan: Plan, lanes: list[Lane]) -> list[_Row]:
    """Lanes from top to bottom; the ranks of a node stand together, above what they share.

    A link that nobody uses is left out where its rank uses another one: most ranks of a node only talk to their own.
    """
    node_of, num_nodes = plan.topology.node_of, plan.topology.num_nodes
    has_headings = 1 < num_nodes < plan.place.world_size
    has_levels = len({lane.level for lane in lanes} - {"node"}) > 1
    top = float(_TOP)
    used = {(lane.level, lane.number) for lane in lanes if len(lane.piece)}
    idle = set(range(plan.place.world_size)) - {number for level, number in used if level != "node"}
    shown = [
        each for each in lanes if (each.level, each.number) in used or (each.level != "node" and each.number in idle)
    ]
    height = _lane_height(len(shown))
    rows: list[_Row] = []
    last_node, last_name = -1, ""

    def place_of(lane: Lane) -> tuple[int, bool, int]:
        shared = lane.level == "node"
        return (lane.number if shared else node_of[lane.number]), shared, lane.number

    for lane in sorted(shown, key=place_of):  # keeps the order of the lanes of a rank
        node, shared, number = place_of(lane)
        name = f"node {number}, all" if shared else f"rank {number}"
        heading = f"node {node}" if has_headings and node != last_node else ""
        top += 32 if heading else height / 2 if name != last_name else 1
        side = ("out" if lane.outgoing else "in") if not has_levels or shared else _side(lane)
        rows.append(_Row(lane, top, heading, name if name != last_name else "", side))
        top += height
        last_node, last_name = node, name
    return rows


def _side(lane: Lane) -> str:
    return f"{lane.level} {'out' if lane.outgoing else 'in'}"


def _lane_height(num_lanes: int) -> int:
    return 14 if num_lanes <= 48 else 9 if num_lanes <= 128 else 5


def _svg(plan: Plan, rows: list[_Row], bars: list[list[Bar]], axis: _Axis) -> Iterator[str]:
    height = _lane_height(len(rows))
    bottom = rows[-1].top + height + 6
    yield (
        f'<svg viewBox="0 0 {_LEFT + _WIDTH + _RIGHT} {bottom + _AXIS + 4:.0f}" role="img" '
        'aria-label="time from left to right, a lane for each direction of each link">'
    )
    yield f'<path class="track" d="{"".join(f"M{_LEFT} {row.top:g}h{_WIDTH}v{height}h-{_WIDTH}z" for row in rows)}"/>'
    yield from _grid(plan, axis, bottom)
    for number, (row, those) in enumerate(zip(rows, bars, strict=True)):
        yield from _labels(plan, row, height)
        yield f'<g class="bar" data-lane="{number}" transform="translate({_LEFT} {row.top:g})">'
        yield f'<rect width="{_WIDTH}" height="{height}"/>'
        yield from _paths(those, height, axis)
        yield "</g>"
    yield from _lines(plan, axis, bottom)
    yield "</svg>"


def _labels(plan: Plan, row: _Row, height: int) -> Iterator[str]:
    """What stands left of a lane, and right of it how much of the predicted time it is busy."""
    small = min(height, 10)
    base = row.top + height / 2 + small * 0.36
    if row.heading:
        yield f'<text class="heading" x="0" y="{row.top - 8:g}">{row.heading}</text>'
    if row.name:
        size = 12 if height > 5 else 9
        yield f'<text x="0" y="{row.top + height / 2 + size * 0.36:g}" font-size="{size}">{row.name}</text>'
    if height > 5:
        yield f'<text class="side" x="{_LEFT - 6}" y="{base:g}" text-anchor="end" font-size="{small}">{row.side}</text>'
        busy = f"{row.lane.busy / max(plan.timeline.finish, 1):.0%}"
        yield f'<text class="side" x="{_LEFT + _WIDTH + 6}" y="{base:g}" font-size="{small}">{busy}</text>'


def _paths(bars: list[Bar], height: int, axis: _Axis) -> Iterator[str]:
    """The bars of a lane; those of one colour are one path, so that large plans stay small pages."""
    paths: dict[tuple[int, int], list[str]] = {}
    for bar in bars:
        x, end = axis.x(bar.begin * axis.tick_s), axis.x(bar.end * axis.tick_s)
        width = max(end - x - (0.5 if end - x > 2.5 else 0), 0.3)  # neighbours stay apart where there is room
        paths.setdefault(bar.most, []).append(f"M{x:.1f} {height / 2:g}h{width:.1f}")
    for (chunk, forwarded), moves in sorted(paths.items()):
        yield f'<path class="c{chunk}{" pale" if forwarded else ""}" d="{"".join(moves)}"/>'


def _grid(plan: Plan, axis: _Axis, bottom: float) -> Iterator[str]:
    if plan.bound_s:
        x, width = _LEFT + axis.x(plan.bound_s), max(axis.x(plan.predicted_s - plan.bound_s), 0)
        yield f'<rect class="over" x="{x:.1f}" y="{_TOP}" width="{width:.1f}" height="{bottom - _TOP:g}"/>'
    marks = axis.marks()
    unit, scale = next((unit, scale) for unit, scale in _UNITS if marks[-1] * scale < 1000 or unit == "s")
    for seconds in marks:
        x = _LEFT + axis.x(seconds)
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom:g}"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{bottom + 12:g}" text-anchor="middle">{seconds * scale:g}</text>'
    yield f'<text class="tick" x="{_LEFT + _WIDTH + 6}" y="{bottom + 12:g}">{unit}</text>'


_UNITS = (("us", 1e6), ("ms", 1e3), ("s", 1.0))


def _lines(plan: Plan, axis: _Axis, bottom: float) -> Iterator[str]:
    """Bounds and the predicted end, each with its name in a row of its own."""
    lines = [("predicted", plan.predicted_s, "#c2410c", "5 3"), ("bound", plan.bound_s, "#1f2430", "none")]
    lines.append(("universal bound", plan.universal_bound_s, "#1f2430", "1.5 2.5"))
    if not plan.bound_s:
        lines = lines[:1]
    elif plan.bound_s <= plan.universal_bound_s * (1 + 1e-6):
        lines[1:] = [("bound = universal bound", *lines[1][1:])]
    for number, (name, seconds, colour, dashes) in enumerate(lines):
        x, y = _LEFT + axis.x(seconds), 14 + 16 * number
        anchor, shift = ("end", -5) if x > _LEFT + _WIDTH / 2 else ("start", 5)
        yield (
            f'<path class="mark" data-line="{name}" stroke="{colour}" stroke-dasharray="{dashes}" '
            f'd="M{x:.1f} {y - 9}V{bottom:g}"/>'
        )
        yield (
            f'<text x="{x + shift:.1f}" y="{y}" text-anchor="{anchor}" style="fill:{colour}">'
            f"{name} {time_text(seconds)}</text>"
        )


def _figures(plan: Plan) -> Iterator[str]:
    yield _figure("predicted", time_text(plan.predicted_s), "")
    if plan.bound_s:
        for name, bound in (("bound", plan.bound_s), ("universal bound", plan.universal_bound_s)):
            yield _figure(name, time_text(bound), f"predicted is {plan.predicted_s / bound:.3f} times it")
    yield _figure("staging", bytes_text(int(plan.staging_bytes.max())), "on the rank that needs most")


def _figure(name: str, value: str, remark: str) -> str:
    return f"<div><dt>{name}</dt><dd>{value} <small>{remark}</small></dd></div>"


def _kinds(plan: Plan) -> tuple[str, str]:
    """What `Bar.forwarded` means."""
    if plan.op == "all_gather":
        return "first hop, from the owner", "forwarded by a relay"
    return "a rank's own contribution", "a sum that a relay made"


def _legend(plan: Plan, chunks: list[int]) -> Iterator[str]:
    for number, chunk in enumerate(chunks[:_MOST_NAMED]):
        swatch = f'<i style="background:{_colour(number)}"></i>'
        yield f'<li data-chunk="{chunk}">{swatch}chunk {chunk}, {bytes_text(plan.chunk_bytes[chunk])}</li>'
    if len(chunks) > _MOST_NAMED:
        yield f"<li>and {len(chunks) - _MOST_NAMED} more</li>"
    if chunks:
        full, pale = _kinds(plan)
        yield f'<li><i style="background:#5b6270"></i>full: {full}</li>'
        yield f'<li><i style="background:#5b6270;opacity:.5"></i>pale: {pale}</li>'


def _colours(chunks: list[int]) -> Iterator[str]:
    for number, chunk in enumerate(chunks):
        yield f".c{chunk} {{ stroke: {_colour(number)}; }}"


def _colour(number: int) -> str:
    """Neighbours are far apart on the circle of hues, and repetitions differ in lightness."""
    return f"oklch({(0.62, 0.74, 0.52)[number % 3]} 0.14 {(250 + number * 137.508) % 360:.0f})"


def _note(plan: Plan, bars: list[list[Bar]], least: float, *, leaves_out: bool) -> str:
    num_bars, num_pieces = sum(map(len, bars)), sum(bar.num_pieces for row in bars for bar in row)
    notes = [
        "Each lane is one direction of a link; the number behind it is the share of the predicted time in which it is "
        "busy. Times are those of the plan if links are all that takes time. What arrives is drawn when it is there, a "
        "latency after it has left."
    ]
    if plan.played is not plan.transfers and len(plan.transfers):
        parts = int(plan.played["pieces"][0])
        notes.append(f"Messages that are posted together share their links; each is drawn in {parts} parts.")
    if leaves_out:
        notes.append("Idle links of ranks that use another one are left out.")
    if num_bars < num_pieces:
        notes.append(
            f"Neighbours narrower than {least:g} px are one bar, in the colour of most of it: {num_bars:,} bars stand "
            f"for {num_pieces:,}."
        )
    return " ".join(notes)


def _data(plan: Plan, bars: list[list[Bar]], axis: _Axis) -> str:
    """What appears under the mouse."""

    def us(ticks: int) -> float:
        return round(ticks * axis.tick_s * 1e6, 3)

    lanes = [[[us(bar.begin), us(bar.end), *bar[2:8]] for bar in those] for those in bars]
    record = {"span_us": axis.span_s * 1e6, "width": _WIDTH, "kinds": _kinds(plan), "lanes": lanes}
    return json.dumps(record, separators=(",", ":"))

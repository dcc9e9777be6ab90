"""What is drawn on a lane: pieces, or neighbours as one where they are too narrow to be told apart."""

from __future__ import annotations

from typing import NamedTuple

from sparsecoll.plan.lanes import Lane, Pieces

__all__ = ["Bar", "bars_of"]


class Bar(NamedTuple):
    """Neighbouring pieces on a lane, mostly one.

    Attributes:
        begin, end: ticks.
        chunk, src, dst: those of all its pieces, or -1 where they differ.
        forwarded: 0 or 1, or -1 where they differ.
        bytes: of all of them.
        num_pieces: how many they are.
        most: the chunk, and whether it is forwarded, that most of the bytes are of.
    """

    begin: int
    end: int
    chunk: int
    src: int
    dst: int
    forwarded: int
    bytes: int
    num_pieces: int
    most: tuple[int, int]


def bars_of(pieces: Pieces, lanes: list[Lane], least: float, most_bars: int) -> tuple[list[list[Bar]], float]:
    """The bars of each lane, and the width in ticks below which neighbours are one.

    Args:
        least: this width; doubled until there are at most ``most_bars`` bars, or one on each lane.
        most_bars: how many there may be on all lanes together.
    """
    busy = [lane for lane in lanes if len(lane.piece)]
    longest = max((lane.end[-1] - lane.begin[0] for lane in busy), default=0)
    groups = [_groups(lane, least) for lane in lanes]
    while sum(map(len, groups)) > most_bars and least <= longest:
        least *= 2
        groups = [_groups(lane, least) for lane in lanes]
    columns = [each.tolist() for each in (pieces.chunk, pieces.src, pieces.dst, pieces.forwarded.astype(int))]
    sizes = pieces.bytes.tolist()
    return [_lane_bars(lane, cuts, columns, sizes) for lane, cuts in zip(lanes, groups, strict=True)], least


def _groups(lane: Lane, least: float) -> list[tuple[int, int]]:
    """First and last piece of each bar: a piece joins the bar before it while it, bar and gap are below ``least``."""
    begin, end = lane.begin.tolist(), lane.end.tolist()
    groups: list[tuple[int, int]] = []
    for piece in range(len(begin)):
        first = groups[-1][0] if groups else 0
        if (
            groups
            and max(end[piece] - begin[piece], begin[piece] - end[piece - 1], end[piece - 1] - begin[first]) < least
        ):
            groups[-1] = first, piece
        else:
            groups.append((piece, piece))
    return groups


def _lane_bars(lane: Lane, groups: list[tuple[int, int]], columns: list[list[int]], sizes: list[int]) -> list[Bar]:
    piece, begin, end = lane.piece.tolist(), lane.begin.tolist(), lane.end.tolist()
    chunk, src, dst, forwarded = columns
    bars = []

    def same(column: list[int], these: list[int]) -> int:
        return column[these[0]] if len({column[each] for each in these}) == 1 else -1

    for first, last in groups:
        these = piece[first : last + 1]
        amounts: dict[tuple[int, int], int] = {}
        for each in these:
            kind = chunk[each], forwarded[each]
            amounts[kind] = amounts.get(kind, 0) + sizes[each]
        bars.append(
            Bar(
                begin=begin[first],
                end=end[last],
                chunk=same(chunk, these),
                src=same(src, these),
                dst=same(dst, these),
                forwarded=same(forwarded, these),
                bytes=sum(amounts.values()),
                num_pieces=len(these),
                most=max(amounts, key=amounts.__getitem__),
            )
        )
    return bars

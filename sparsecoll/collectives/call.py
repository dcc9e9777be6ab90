"""One call of a sparse collective: check, agree, plan, move."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from sparsecoll.collectives.agreement import agree, agreed_error, digest_of
from sparsecoll.collectives.buffers import DeviceRows, read_buffers, spots_of
from sparsecoll.collectives.rows import (
    Layout,
    Rows,
    Shape,
    allocate,
    itemsize_of,
    layout_of,
    read_rows,
    segment_bytes,
)
from sparsecoll.collectives.shapes import describe_rows, exchange_rows
from sparsecoll.collectives.sides import Side, sides
from sparsecoll.errors import InvalidArgument, SparsecollError
from sparsecoll.executor import (
    Recipe,
    all_gather_steps,
    gather_recipe,
    reduce_recipe,
    reduce_scatter_steps,
    run_recipe,
)
from sparsecoll.group import Group
from sparsecoll.native import REDUCIBLE, accumulation_itemsize
from sparsecoll.placement import Placement
from sparsecoll.plan import Plan, plan_all_gather, plan_reduce_scatter
from sparsecoll.topology import Topology
from sparsecoll.transport.base import HostTransport, Operation
from sparsecoll.transport.stream import Issue, StreamTransport

__all__ = ["Call", "CallSteps", "finish"]

CallSteps = Generator[bool | Issue, None, Any]
"""Yields once, when its first messages are posted, as `sparsecoll.executor.Steps` does, or when all has been put on a
stream; returns the call's result."""

# Sizes of the segments of each chunk that takes part, ascending by chunk.
SegmentBytes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Call:
    """The arguments that are equal on all ranks, and the steps of a sparse collective.

    Attributes:
        name: public name of the collective.
        mean: divide sums by the number of holders.
        problem: an argument that is wrong before the others are looked at.
        trusted: ranks have agreed on all arguments already, in an exchange of the caller's.
    """

    name: str
    place: Placement
    chunks: tuple[int, ...] | None
    plan: Plan | None
    algorithm: str
    mean: bool
    problem: Exception | None = None
    trusted: bool = False

    @property
    def gathers(self) -> bool:
        return self.name == "sparse_all_gather"

    def run(self, group: Group, operation: Operation, value: Any, out: Any) -> Any:
        """Checks, agrees, plans, moves."""
        return finish(self.steps(group, operation, value, out))

    def steps(self, group: Group, operation: Operation, value: Any, out: Any, *, detached: bool = False) -> CallSteps:
        """The same as a generator, which returns the result; see `sparsecoll.executor`.

        Args:
            detached: the caller may drop its tensors between the two halves.
        """
        prepared: _Prepared | None = None
        problem: Exception | None = None
        try:
            prepared = self._prepare(group, value, out)
        except (SparsecollError, TypeError, ValueError) as error:
            problem = _as_invalid(self.name, error, group)
        rows = b""
        if prepared is not None and prepared.layout.form == "list":
            rows = describe_rows(prepared.layout, prepared.source, prepared.destination, value)
        told = [digest_of(rows)] if rows else [b""]
        if group.world_size > 1 and group.checked and not self.trusted:
            digest = b"" if prepared is None else prepared.digest
            describe = lambda: prepared.description if prepared else {}  # noqa: E731
            told = agree(group, operation, digest, describe, problem=problem, payload=told[0] if rows else b"")
        elif rows:
            told = group.transport.exchange(told[0], operation)
        if problem is not None:
            raise agreed_error(problem) if group.world_size == 1 else problem
        assert prepared is not None
        if rows:
            prepared = self._with_shapes(group, operation, prepared, value, rows, told)
        if isinstance(group.transport, StreamTransport):
            return (yield from self._move_on_stream(group.transport, operation, prepared, out, detached))
        return (yield from self._move(group, operation, prepared, out))

    def _prepare(self, group: Group, value: Any, out: Any) -> _Prepared:
        """Everything that can be known without talking to other ranks."""
        if self.problem is not None:
            raise self.problem
        if not isinstance(self.place, Placement):
            raise InvalidArgument(f"expected a Placement, got {type(self.place).__name__}")
        if self.place.world_size != group.world_size:
            raise InvalidArgument(
                f"expected a placement of {group.world_size} ranks (as the group), got {self.place.world_size}"
            )
        if self.plan is not None and not isinstance(self.plan, Plan):
            raise InvalidArgument(f"expected plan to be a Plan, got {type(self.plan).__name__}")
        if not isinstance(self.algorithm, str):
            raise InvalidArgument(f"expected algorithm to be a name, got {self.algorithm!r}")
        subset, owned, held = sides(self.place, self.chunks, group.rank)
        given, wanted = (owned, held) if self.gathers else (held, owned)
        name = "shard" if self.gathers else "held"
        layout = layout_of(name, value, group.device)
        if not self.gathers:
            _check_reducible(layout, self.mean)
        read = read_buffers if group.is_stream_ordered else read_rows
        source = read(name, value, given, writable=False)
        destination = None
        if out is not None:
            _check_same_layout(layout, layout_of("out", out, group.device))
            destination = read("out", out, wanted, writable=True)
        schedule = None
        if layout.shapes is not None:
            sizes = (segment_bytes(layout.shapes, layout.itemsizes),) * len(subset)
            schedule = _schedule(self, subset, sizes, layout, group.topology)
        return _Prepared(self, layout, subset, given, wanted, source, destination, schedule)

    def _with_shapes(
        self, group: Group, operation: Operation, prepared: _Prepared, value: list[Any], rows: bytes, told: list[bytes]
    ) -> _Prepared:
        """Ranks tell each other the shapes of a list's rows, which a receiver cannot know.

        Args:
            rows: what this rank has to tell.
            told: digests of what all ranks have to tell; what has been told once need not be again.
        """
        key = (prepared.digest, *told)
        known = group.recall(key)
        found = known or exchange_rows(group, operation, rows)
        if not value:  # an empty list has no framework of its own to give results in
            prepared = prepared._replace(layout=prepared.layout._replace(framework=found.framework))
        layout = prepared.layout._replace(dtypes=found.dtypes, in_tuples=found.in_tuples)
        prepared = prepared._replace(layout=layout, shapes=found.shapes)
        problem: Exception | None = None
        try:
            sizes = tuple(segment_bytes(found.shapes.get(chunk, ()), layout.itemsizes) for chunk in prepared.subset)
            schedule = _schedule(self, prepared.subset, sizes, layout, group.topology)
            prepared = prepared._replace(schedule=schedule)
            _check_out_sizes(prepared)
        except SparsecollError as error:
            problem = _as_invalid(self.name, error, group)
        if known is None:
            # ``out`` is each rank's own, so whether it fits is known only now and must be agreed on.
            agree(group, operation, digest_of("shapes"), dict, problem=problem)
            group.remember(key, found)
        return prepared

    def _move(self, group: Group, operation: Operation, prepared: _Prepared, out: Any) -> CallSteps:
        assert prepared.schedule is not None and isinstance(group.transport, HostTransport)
        plan, sizes = prepared.schedule.plan, prepared.schedule.sizes
        destination = prepared.destination
        if destination is None:
            out = prepared.allocate(group.device)
            destination = read_rows("out", out, prepared.wanted, writable=True)
        assert isinstance(prepared.source, Rows) and isinstance(destination, Rows)
        arguments = (plan, group.transport, prepared.source.segments, destination.segments, sizes)
        arena = group.arenas.borrow()
        if self.gathers:
            yield from all_gather_steps(*arguments, operation, arena)
        else:
            yield from reduce_scatter_steps(*arguments, prepared.layout.dtypes, self.mean, operation, arena)
        group.arenas.give_back(arena)
        return out

    def _move_on_stream(
        self, transport: StreamTransport, operation: Operation, prepared: _Prepared, out: Any, detached: bool
    ) -> CallSteps:
        """Issues everything at once; the result is ready to the stream that is current when the steps end."""
        assert prepared.schedule is not None
        source, destination = prepared.source, prepared.destination
        if destination is None:
            out = prepared.allocate(transport.device)
            destination = read_buffers("out", out, prepared.wanted, writable=True)
        assert isinstance(source, DeviceRows) and isinstance(destination, DeviceRows)
        framework = prepared.layout.framework
        tensors = (*source.tensors, *destination.tensors) if detached else ()
        recipe = prepared.recipe(source, destination, transport.rank)
        buffers = (*source.buffers, *destination.buffers)
        issue = run_recipe(recipe, transport, buffers, operation, framework, tensors)
        yield issue
        issue.join()
        return out


def finish(steps: CallSteps) -> Any:
    """Runs a call to its end and gives its result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


class _Prepared(NamedTuple):
    """A sound call. ``schedule`` and ``shapes`` come later for lists, from all ranks together."""

    call: Call
    layout: Layout
    subset: tuple[int, ...]
    given: Side
    wanted: Side
    source: Rows | DeviceRows
    destination: Rows | DeviceRows | None
    schedule: _Schedule | None = None
    shapes: Mapping[int, list[Shape]] = MappingProxyType({})

    def allocate(self, device: str) -> Any:
        """New rows for the result."""
        shapes, wanted = self.shapes, self.wanted.subset
        return allocate(self.layout, len(wanted), lambda row: shapes[wanted[row]], device)

    def recipe(self, source: DeviceRows, destination: DeviceRows, rank: int) -> Recipe:
        """This rank's part of the schedule, remembered with it."""
        assert self.schedule is not None
        plan, sizes, _, recipes = self.schedule
        key = (rank, source.takes_all, destination.takes_all, len(source.buffers), len(destination.buffers))
        if key not in recipes:
            spots = spots_of(self.layout, self.given, source, sizes, 0)
            to = spots_of(self.layout, self.wanted, destination, sizes, len(source.buffers))
            staging = len(source.buffers) + len(destination.buffers)
            if self.call.gathers:
                recipes[key] = gather_recipe(plan, rank, spots, to, sizes, staging)
            else:
                recipes[key] = reduce_recipe(plan, rank, spots, to, sizes, self.layout.dtypes, self.call.mean, staging)
        return recipes[key]

    @property
    def digest(self) -> bytes:
        if self.schedule is not None:
            return self.schedule.digest
        plan = self.call.plan.digest if self.call.plan is not None else None
        return digest_of(self.call.name, self.call.mean, self.layout.agreed, self.call.place.digest, self.subset, plan)

    @property
    def description(self) -> dict[str, Any]:
        plan = self.schedule.plan if self.schedule is not None else self.call.plan
        return {
            "form": self.layout.form,
            "dtype": list(self.layout.dtypes) if self.layout.form != "list" else None,
            "chunk_shape": self.layout.shapes,
            "op": "mean" if self.call.mean else "sum",
            "world_size": self.call.place.world_size,
            "owners": self.call.place.owners.tolist(),
            "holders": [np.flatnonzero(row).tolist() for row in self.call.place.holders],
            "chunks": list(self.subset),
            "algorithm": plan.algorithm if plan else self.call.algorithm,
            "plan": plan.digest if plan else None,
        }


class _Schedule(NamedTuple):
    """What a call moves.

    Attributes:
        plan: the transfers.
        sizes: of each chunk's segments.
        digest: of all that must be equal.
        recipes: that have been made for it so far, by rank and by which rows the caller passes.
    """

    plan: Plan
    sizes: dict[int, tuple[int, ...]]
    digest: bytes
    recipes: dict[tuple[int, bool, bool, int, int], Recipe]


_scheduling = threading.Lock()


def _schedule(
    call: Call, subset: tuple[int, ...], sizes: SegmentBytes, layout: Layout, topology: Topology
) -> _Schedule:
    """Remembered, for training repeats its calls; the Plan is the user's own or a new one."""
    # Threads as ranks ask at the same time, and must get the same one: what a rank has added to it is there next time.
    with _scheduling:
        return _new_schedule(call, subset, sizes, layout, topology)


@lru_cache(maxsize=512)
def _new_schedule(
    call: Call, subset: tuple[int, ...], sizes: SegmentBytes, layout: Layout, topology: Topology
) -> _Schedule:
    made = _make_plan(call.name, call.place, subset, sizes, layout.dtypes, topology, call.algorithm)
    # Planners remember what they made, so the plan of a caller who plans ahead usually is this very one.
    if call.plan is not None and call.plan is not made:
        _check_plan(call.plan, made)
    plan = call.plan or made
    # A plan's digest covers Placement, chunks and sizes.
    digest = digest_of(call.name, call.mean, layout.agreed, plan.digest)
    return _Schedule(plan, dict(zip(subset, sizes, strict=True)), digest, {})


def _make_plan(
    name: str,
    place: Placement,
    subset: tuple[int, ...],
    sizes: SegmentBytes,
    dtypes: tuple[str, ...],
    topology: Topology,
    algorithm: str,
) -> Plan:
    chunk_bytes = [0] * place.num_chunks
    partial_bytes = [0] * place.num_chunks
    for chunk, segments in zip(subset, sizes, strict=True):
        chunk_bytes[chunk] = sum(segments)
    if name == "sparse_all_gather":
        return plan_all_gather(place, chunk_bytes, topology, algorithm, chunks=subset)
    itemsizes = [itemsize_of(dtype) for dtype in dtypes]
    widths = [accumulation_itemsize(dtype) // size for dtype, size in zip(dtypes, itemsizes, strict=True)]
    for chunk, segments in zip(subset, sizes, strict=True):
        partial_bytes[chunk] = sum(size * width for size, width in zip(segments, widths, strict=False))
    return plan_reduce_scatter(
        place,
        chunk_bytes,
        topology,
        algorithm,
        chunks=subset,
        partial_bytes=partial_bytes,
        divisible=len(set(widths)) <= 1 and all(_is_aligned(segments, itemsizes) for segments in sizes),
    )


def _is_aligned(segments: tuple[int, ...], itemsizes: list[int]) -> bool:
    """Whether every segment begins at a multiple of its elements' size, so that cuts fall between elements."""
    offsets = accumulate(segments, initial=0)
    return all(offset % itemsize == 0 for offset, itemsize in zip(offsets, itemsizes, strict=False))


def _check_plan(plan: Plan, expected: Plan) -> None:
    """Whether a user's plan is one for this call; its algorithm and transfers are its own."""
    for name in ("op", "place", "chunks"):
        if getattr(plan, name) != getattr(expected, name):
            raise InvalidArgument(
                f"expected a plan with {name} {getattr(expected, name)}, got one with {getattr(plan, name)}"
            )
    for name in ("chunk_bytes", "partial_bytes"):
        for chunk in plan.chunks:
            wanted, found = getattr(expected, name)[chunk], getattr(plan, name)[chunk]
            if wanted != found:
                raise InvalidArgument(f"expected a plan with {name} {wanted} for chunk {chunk}, got {found}")


def _check_out_sizes(prepared: _Prepared) -> None:
    if prepared.destination is None or prepared.schedule is None:
        return
    for chunk, segments in prepared.destination.segments.items():
        found = tuple(segment.nbytes for segment in segments)
        expected = prepared.schedule.sizes[chunk]
        if found != expected:
            raise InvalidArgument(f"out: expected {expected} bytes for chunk {chunk}, got {found}")


def _as_invalid(name: str, error: Exception, group: Group) -> Exception:
    text = str(error).removeprefix(f"{name}: ")
    return InvalidArgument(f"{name}: {text} {group.place_of_error}")


def _check_reducible(layout: Layout, mean: bool) -> None:
    for dtype in layout.dtypes:
        if dtype not in REDUCIBLE:
            raise InvalidArgument(f"held: expected dtypes {', '.join(sorted(REDUCIBLE))}, got {dtype}")
        if mean and "float" not in dtype:
            raise InvalidArgument(f"held: expected floats for op mean, got {dtype}")


def _check_same_layout(layout: Layout, out: Layout) -> None:
    if layout.form != out.form:
        raise InvalidArgument(f"out: expected a {layout.form} (as the input), got a {out.form}")
    if layout.dtypes and out.dtypes and (layout.dtypes, layout.in_tuples) != (out.dtypes, out.in_tuples):
        raise InvalidArgument(f"out: expected dtypes {layout.dtypes} (as the input), got {out.dtypes}")
    if layout.shapes != out.shapes:
        raise InvalidArgument(f"out: expected rows of shapes {layout.shapes} (as the input), got {out.shapes}")

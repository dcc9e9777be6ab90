"""SparseAllGather and SparseReduceScatter (Hecate, section 3.1): only chunks with holders travel."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sparsecoll.collectives.agreement import agree, agreed_error, digest_of
from sparsecoll.collectives.rows import (
    Layout,
    Rows,
    Shape,
    allocate,
    itemsize_of,
    layout_of,
    read_rows,
    row_shapes,
    segment_bytes,
    wants_gradient,
)
from sparsecoll.errors import CollectiveMismatch, InvalidArgument, SparsecollError
from sparsecoll.executor import run_all_gather, run_reduce_scatter
from sparsecoll.group import Group, resolve_group
from sparsecoll.native import REDUCIBLE, accumulation_itemsize
from sparsecoll.placement import Placement
from sparsecoll.plan import Plan, chunk_subset, plan_all_gather, plan_reduce_scatter
from sparsecoll.transport.base import Operation

__all__ = ["Call", "issue", "sparse_all_gather", "sparse_reduce_scatter"]


def sparse_all_gather(
    shard: Any,
    place: Placement,
    *,
    chunks: Iterable[int] | None = None,
    group: Any = None,
    plan: Plan | None = None,
    algorithm: str = "auto",
    out: Any = None,
    async_op: bool = False,
    timeout_s: float | None = None,
) -> Any:
    """Materializes on every rank the chunks that it holds in ``place`` (Hecate, section 3.1, spAG).

    Differentiable in torch when blocking and without ``out``; the backward is `sparse_reduce_scatter`.

    Collective: all ranks call it in the same order with equal ``place``, ``chunks``, ``plan`` and ``algorithm``.
    Stream: CPU tensors only; the result is there when the call or ``Work.wait`` returns.
    Memory: ``shard`` must not change until done; allocates the result, unless ``out`` is given, and keeps
    ``plan.staging_bytes`` for later calls.

    Args:
        shard: the chunks that this rank owns, ascending: a tensor ``[num_owned, *chunk_shape]``, a tuple of such
            tensors whose rows belong together, or a list with one tensor (or tuple of tensors) for each chunk, whose
            sizes may differ. torch tensors or NumPy arrays of any plain element type. With ``chunks``, either all
            owned rows, of which the others are not touched, or only those in ``chunks``.
        place: owners and holders of all chunks.
        chunks: ascending numbers of the chunks that take part; all by default.
        group: a Group, torch ProcessGroup, one-dimensional DeviceMesh or mpi4py communicator; None is the default.
        plan: from `plan_all_gather`, with the same ``place``, ``chunks`` and sizes; made here by default.
        algorithm: for the plan made here.
        out: receives the held chunks, in the form and dtype of ``shard``: ``[num_held, *chunk_shape]``.
        async_op: return a `Work` at once.
        timeout_s: the group's by default; may differ between ranks.

    Returns:
        The held chunks, ascending, in the form of ``shard``; or a `Work` whose ``result()`` they are.

    Raises:
        InvalidArgument: this rank's arguments are unsound; nothing has been sent.
        CollectiveMismatch: another rank's are, or ranks disagree (in checked mode); nothing has been sent.
        CollectiveTimeout, PeerFailure, TransportError: the group is unusable afterwards.
    """
    call = Call("sparse_all_gather", place, chunks, plan, algorithm, False)
    return issue(call, shard, out, group, async_op, timeout_s)


def sparse_reduce_scatter(
    held: Any,
    place: Placement,
    *,
    chunks: Iterable[int] | None = None,
    op: str = "sum",
    group: Any = None,
    plan: Plan | None = None,
    algorithm: str = "auto",
    out: Any = None,
    async_op: bool = False,
    timeout_s: float | None = None,
) -> Any:
    """Gives every owner the sum, or mean, over all holders of its chunks (Hecate, section 3.1, spRS).

    The mirror of `sparse_all_gather`: collective, stream, memory, forms and errors are as there, with held chunks in
    and owned chunks out. For one Plan the order of summation is fixed and the result is bitwise equal from run to run
    and on every transport. 16-bit floats travel as they are and are summed in float32; sums that a relay passes on
    travel in float32.

    Args:
        held: the chunks that this rank holds, ascending; float16, bfloat16, float32, float64 or integers.
        op: ``sum``, or ``mean`` over the chunk's holders (floats only).
        out: receives the owned chunks; may be rows of ``held``.
    """
    problem = None if op in ("sum", "mean") else InvalidArgument(f"expected op sum or mean, got {op!r}")
    call = Call("sparse_reduce_scatter", place, chunks, plan, algorithm, op == "mean", problem)
    return issue(call, held, out, group, async_op, timeout_s)


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
    chunks: Iterable[int] | None
    plan: Plan | None
    algorithm: str
    mean: bool
    problem: Exception | None = None
    trusted: bool = False

    def settled(self) -> Call:
        """The same with ``chunks`` listed once, for a user may pass an iterator."""
        if self.chunks is None:
            return self
        try:
            return replace(self, chunks=tuple(self.chunks))
        except TypeError as error:
            return replace(self, chunks=None, problem=self.problem or InvalidArgument(f"chunks: {error}"))

    @property
    def gathers(self) -> bool:
        return self.name == "sparse_all_gather"

    def run(self, group: Group, operation: Operation, value: Any, out: Any) -> Any:
        """Checks, agrees, plans, moves."""
        prepared: _Prepared | None = None
        problem: Exception | None = None
        try:
            prepared = self._prepare(group, value, out)
        except (SparsecollError, TypeError, ValueError) as error:
            problem = _as_invalid(self.name, error, group)
        if group.world_size > 1 and group.checked and not self.trusted:
            digest = b"" if prepared is None else prepared.digest
            agree(group, operation, digest, lambda: prepared.description if prepared else {}, problem=problem)
        if problem is not None:
            raise agreed_error(problem) if group.world_size == 1 else problem
        assert prepared is not None
        if prepared.layout.form == "list":
            prepared = self._with_shapes(group, operation, prepared, value, out)
        return self._move(group, operation, prepared, value, out)

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
        subset = chunk_subset(self.place, self.chunks)
        taking_part = set(subset)
        owned, held = self.place.owned_by(group.rank).tolist(), self.place.held_by(group.rank).tolist()
        sides = [[side, [chunk for chunk in side if chunk in taking_part]] for side in (owned, held)]
        given, wanted = sides if self.gathers else reversed(sides)
        names = ("shard", "out") if self.gathers else ("held", "out")
        layout = layout_of(names[0], value)
        if not self.gathers:
            _check_reducible(layout, self.mean)
        source = read_rows(names[0], value, given, writable=False)
        destination = None
        if out is not None:
            _check_same_layout(layout, layout_of("out", out))
            destination = read_rows("out", out, wanted, writable=True)
        plan = self.plan
        sizes = None
        if layout.form != "list":
            assert layout.shapes is not None
            sizes = dict.fromkeys(subset, segment_bytes(layout.shapes, layout.itemsizes))
            plan = self._plan(group, layout, sizes, subset)
        return _Prepared(self, layout, subset, tuple(wanted[1]), source, destination, sizes, plan)

    def _plan(self, group: Group, layout: Layout, sizes: dict[int, tuple[int, ...]], subset: tuple[int, ...]) -> Plan:
        chunk_bytes = [sum(sizes[chunk]) if chunk in sizes else 0 for chunk in range(self.place.num_chunks)]
        partial = chunk_bytes
        if self.gathers:
            plan = self.plan or plan_all_gather(self.place, chunk_bytes, group.topology, self.algorithm, chunks=subset)
        else:
            widths = [accumulation_itemsize(dtype) // itemsize_of(dtype) for dtype in layout.dtypes]
            partial = [
                sum(size * width for size, width in zip(sizes[chunk], widths, strict=True)) if chunk in sizes else 0
                for chunk in range(self.place.num_chunks)
            ]
            plan = self.plan or plan_reduce_scatter(
                self.place, chunk_bytes, group.topology, self.algorithm, chunks=subset, partial_bytes=partial
            )
        if self.plan is not None:
            self._check_plan(plan, chunk_bytes, chunk_bytes if self.gathers else partial, subset)
        return plan

    def _check_plan(
        self, plan: Plan, chunk_bytes: Sequence[int], partial_bytes: Sequence[int], subset: tuple[int, ...]
    ) -> None:
        op = self.name.removeprefix("sparse_")
        if plan.op != op:
            raise InvalidArgument(f"expected a plan of op {op}, got {plan.op}")
        if plan.place != self.place:
            raise InvalidArgument(f"expected a plan for {self.place}, got one for {plan.place}")
        if plan.chunks != subset:
            raise InvalidArgument(f"expected a plan for chunks {list(subset)}, got one for {list(plan.chunks)}")
        for chunk in subset:
            if plan.chunk_bytes[chunk] != chunk_bytes[chunk]:
                raise InvalidArgument(
                    f"expected a plan with {chunk_bytes[chunk]} bytes in chunk {chunk}, got {plan.chunk_bytes[chunk]}"
                )
            if plan.partial_bytes[chunk] != partial_bytes[chunk]:
                raise InvalidArgument(
                    f"expected a plan with partial_bytes {partial_bytes[chunk]} for chunk {chunk}, got "
                    f"{plan.partial_bytes[chunk]}"
                )

    def _with_shapes(
        self, group: Group, operation: Operation, prepared: _Prepared, value: list[Any], out: list[Any] | None
    ) -> _Prepared:
        """Ranks tell each other the shapes of a list's rows, which a receiver cannot know."""
        mine = {chunk: i for i, chunk in enumerate(prepared.source.chunks)}
        shapes = row_shapes(value)
        text = json.dumps(
            {
                "dtypes": prepared.layout.dtypes,
                "in_tuples": prepared.layout.in_tuples if value else None,
                "framework": prepared.layout.framework,
                "shapes": {chunk: shapes[mine[chunk]] for chunk in prepared.source.segments},
            }
        ).encode()
        length = struct.Struct("<I")
        lengths = [length.unpack(each)[0] for each in group.transport.exchange(length.pack(len(text)), operation)]
        texts = group.transport.exchange(text.ljust(max(lengths), b"\0"), operation)
        merged: dict[int, list[Shape]] = {}
        layout = prepared.layout
        reported = [(rank, json.loads(each[: lengths[rank]])) for rank, each in enumerate(texts)]
        speakers = [(rank, each) for rank, each in reported if each["in_tuples"] is not None]
        if not speakers:
            return replace(prepared, layout=layout, sizes={}, plan=self._plan(group, layout, {}, prepared.subset))
        first_rank, first = speakers[0]
        # A rank with an empty list has no framework of its own to give results in.
        framework = layout.framework if value else first["framework"]
        layout = Layout("list", framework, tuple(first["dtypes"]), None, first["in_tuples"])
        for rank, each in speakers:
            for key in ("dtypes", "in_tuples"):
                if each[key] != first[key]:
                    raise agreed_error(
                        CollectiveMismatch(
                            f"{operation}: expected rows with equal {key} on all ranks, got {first[key]} on rank "
                            f"{first_rank} and {each[key]} on rank {rank} {group.place_of_error}"
                        )
                    )
            for chunk, found in each["shapes"].items():
                row = [tuple(shape) for shape in found]
                if merged.setdefault(int(chunk), row) != row:
                    raise agreed_error(
                        CollectiveMismatch(
                            f"{operation}: expected one shape of chunk {chunk} on all ranks, got {merged[int(chunk)]} "
                            f"and {row} on rank {rank} {group.place_of_error}"
                        )
                    )
        sizes = {chunk: segment_bytes(row, layout.itemsizes) for chunk, row in merged.items()}
        problem: Exception | None = None
        plan: Plan | None = None
        try:
            plan = self._plan(group, layout, sizes, prepared.subset)
            self._check_out_shapes(prepared, sizes)
        except SparsecollError as error:
            problem = _as_invalid(self.name, error, group)
        # ``out`` is each rank's own, so whether it fits is known only now and must be agreed on.
        agree(group, operation, digest_of("shapes"), dict, problem=problem)
        assert plan is not None
        return replace(prepared, layout=layout, sizes=sizes, plan=plan, shapes=merged)

    def _check_out_shapes(self, prepared: _Prepared, sizes: dict[int, tuple[int, ...]]) -> None:
        if prepared.destination is None:
            return
        for chunk, segments in prepared.destination.segments.items():
            found = tuple(segment.nbytes for segment in segments)
            if found != sizes[chunk]:
                raise InvalidArgument(f"out: expected {sizes[chunk]} bytes for chunk {chunk}, got {found}")

    def _move(self, group: Group, operation: Operation, prepared: _Prepared, value: Any, out: Any) -> Any:
        assert prepared.plan is not None and prepared.sizes is not None
        destination = prepared.destination
        if destination is None:
            shapes = prepared.shapes
            out = allocate(prepared.layout, len(prepared.wanted), lambda i: shapes[prepared.wanted[i]])
            destination = read_rows("out", out, [prepared.wanted], writable=True)
        arguments = (prepared.plan, group.transport, prepared.source.segments, destination.segments, prepared.sizes)
        if self.gathers:
            run_all_gather(*arguments, operation, group.arena)
        else:
            run_reduce_scatter(*arguments, prepared.layout.dtypes, self.mean, operation, group.arena)
        return out


@dataclass(frozen=True)
class _Prepared:
    """A sound call. ``sizes``, ``plan`` and ``shapes`` come later for lists, from all ranks together."""

    call: Call
    layout: Layout
    subset: tuple[int, ...]
    wanted: tuple[int, ...]
    source: Rows
    destination: Rows | None
    sizes: dict[int, tuple[int, ...]] | None
    plan: Plan | None
    shapes: dict[int, list[Shape]] = field(default_factory=dict)

    @property
    def digest(self) -> bytes:
        plan = self.plan.digest if self.plan is not None else None
        return digest_of(self.call.name, self.call.mean, self.layout.agreed, self.call.place.digest, self.subset, plan)

    @property
    def description(self) -> dict[str, Any]:
        return {
            "form": self.layout.form,
            "dtype": list(self.layout.dtypes) if self.layout.form != "list" else None,
            "chunk_shape": self.layout.shapes,
            "op": "mean" if self.call.mean else "sum",
            "world_size": self.call.place.world_size,
            "owners": self.call.place.owners.tolist(),
            "holders": [np.flatnonzero(row).tolist() for row in self.call.place.holders],
            "chunks": list(self.subset),
            "algorithm": self.plan.algorithm if self.plan else self.call.algorithm,
            "plan": self.plan.digest if self.plan else None,
        }


def issue(call: Call, value: Any, out: Any, group: Any, async_op: bool, timeout_s: float | None = None) -> Any:
    """Runs or starts ``call`` as the next operation of ``group``."""
    resolved = resolve_group(group)
    call = call.settled()
    if out is None and not async_op and wants_gradient(value):
        from sparsecoll.collectives.autograd import differentiable

        return differentiable(call, value, resolved, timeout_s)
    operation = resolved.operation(call.name, timeout_s)
    body: Callable[[], Any] = lambda: call.run(resolved, operation, value, out)  # noqa: E731
    return resolved.start(operation, body, value, out) if async_op else resolved.run(operation, body)


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

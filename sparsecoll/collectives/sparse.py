"""SparseAllGather and SparseReduceScatter (Hecate, section 3.1): only chunks with holders travel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from sparsecoll.collectives.call import Call
from sparsecoll.collectives.issued import IssuedWork
from sparsecoll.collectives.rows import wants_gradient
from sparsecoll.errors import InvalidArgument
from sparsecoll.group import resolve_group
from sparsecoll.placement import Placement
from sparsecoll.plan import Plan

__all__ = ["issue", "sparse_all_gather", "sparse_reduce_scatter"]


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
    Stream: on the CPU the result is there when the call or ``Work.wait`` returns. On a GPU the operation comes after
    what is in the caller's current stream, and its result is ready to the stream that is current when the call or
    ``Work.wait`` returns; the host waits for nothing, except in checked mode and for lists, whose shapes ranks exchange
    the first time.
    Memory: ``shard`` must not change until done; allocates the result, unless ``out`` is given, and keeps
    ``plan.staging_bytes`` for later calls.

    Args:
        shard: the chunks that this rank owns, ascending: a tensor ``[num_owned, *chunk_shape]``, a tuple of such
            tensors whose rows belong together, or a list with one tensor (or tuple of tensors) for each chunk, whose
            sizes may differ. torch tensors, NumPy or CuPy arrays of any plain element type, on the group's device.
            With ``chunks``, either all owned rows, of which the others are not touched, or only those in ``chunks``.
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
    call = _call("sparse_all_gather", place, chunks, plan, algorithm, "sum")
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
    call = _call("sparse_reduce_scatter", place, chunks, plan, algorithm, op)
    return issue(call, held, out, group, async_op, timeout_s)


def _call(
    name: str, place: Placement, chunks: Iterable[int] | None, plan: Plan | None, algorithm: str, op: str
) -> Call:
    """What is wrong already is kept in the call, to be raised on all ranks together."""
    problem = None if op in ("sum", "mean") else InvalidArgument(f"expected op sum or mean, got {op!r}")
    listed = None
    try:
        listed = None if chunks is None else tuple(chunks)
    except TypeError as error:
        problem = InvalidArgument(f"chunks: {error}")
    return Call(name, place, listed, plan, algorithm, op == "mean", problem)


def issue(call: Call, value: Any, out: Any, group: Any, async_op: bool, timeout_s: float | None = None) -> Any:
    """Runs or starts ``call`` as the next operation of ``group``."""
    resolved = resolve_group(group)
    if out is None and not async_op and wants_gradient(value):
        from sparsecoll.collectives.autograd import differentiable

        return differentiable(call, value, resolved, timeout_s)
    operation = resolved.operation(call.name, timeout_s)
    if async_op and resolved.is_stream_ordered:
        return IssuedWork(resolved, operation, call.steps(resolved, operation, value, out, detached=True))
    body: Callable[[], Any] = lambda: call.run(resolved, operation, value, out)  # noqa: E731
    return resolved.start(operation, body, value, out) if async_op else resolved.run(operation, body)

"""All-to-all with uneven counts: every rank sends each other rank a run of its rows, and nothing is padded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecoll.collectives.agreement import agree, agreed_error, digest_of
from sparsecoll.collectives.buffers import buffer_of
from sparsecoll.collectives.call import CallSteps, finish
from sparsecoll.collectives.issued import IssuedWork
from sparsecoll.collectives.rows import Layout, allocate, contiguous, layout_of, view_of, wants_gradient
from sparsecoll.errors import CollectiveMismatch, InvalidArgument, SparsecollError
from sparsecoll.group import Group, resolve_group
from sparsecoll.transport.base import HostTransport, Message, Operation
from sparsecoll.transport.stream import Issue, Round, Slot, StreamTransport

__all__ = ["all_to_all", "all_to_all_steps", "run_all_to_all"]

_NAME = "all_to_all"


def all_to_all(
    x: Any,
    send_counts: Any,
    recv_counts: Any = None,
    *,
    group: Any = None,
    async_op: bool = False,
    timeout_s: float | None = None,
) -> Any:
    """Sends ``send_counts[r]`` consecutive rows of ``x`` to each rank r and returns the rows received, by source.

    Differentiable in torch when blocking; the backward is the all-to-all with the counts exchanged.

    Collective: all ranks call it in the same order with rows of equal shape and dtype.
    Stream: as in `sparse_all_gather`.
    Memory: ``x`` must not change until done; allocates the result and nothing else.

    Args:
        x: ``[sum(send_counts), *row_shape]``, rows for rank 0 first; a torch tensor or NumPy array.
        send_counts: ``[world_size]`` integers.
        recv_counts: ``[world_size]``, rows that each rank sends to this one. Left out, they are exchanged; given, they
            are checked against what the others send in checked mode.
        group, async_op, timeout_s: as in `sparse_all_gather`.

    Returns:
        ``[sum(recv_counts), *row_shape]``, rows from rank 0 first; or a `Work` whose ``result()`` they are.

    Raises:
        InvalidArgument, CollectiveMismatch, CollectiveTimeout, PeerFailure, TransportError: as in `sparse_all_gather`.
    """
    resolved = resolve_group(group)
    if not async_op and wants_gradient(x):
        from sparsecoll.collectives.autograd import differentiable_all_to_all

        return differentiable_all_to_all(x, send_counts, recv_counts, resolved, timeout_s)
    operation = resolved.operation(_NAME, timeout_s)
    if async_op and resolved.is_stream_ordered:
        steps = all_to_all_steps(resolved, operation, x, send_counts, recv_counts, detached=True)
        return IssuedWork(resolved, operation, steps, lambda result: result[0])
    body: Callable[[], Any] = lambda: run_all_to_all(resolved, operation, x, send_counts, recv_counts)[0]  # noqa: E731
    return resolved.start(operation, body, x) if async_op else resolved.run(operation, body)


def run_all_to_all(
    group: Group, operation: Operation, x: Any, send_counts: Any, recv_counts: Any = None, *, trusted: bool = False
) -> tuple[Any, list[int]]:
    """Checks, agrees, moves; returns the rows and the counts received.

    Args:
        trusted: both counts come from an exchange that the caller has made, so that no other is needed.
    """
    return finish(all_to_all_steps(group, operation, x, send_counts, recv_counts, trusted=trusted))


def all_to_all_steps(
    group: Group,
    operation: Operation,
    x: Any,
    send_counts: Any,
    recv_counts: Any = None,
    *,
    trusted: bool = False,
    detached: bool = False,
) -> CallSteps:
    """`run_all_to_all` as a generator with one stop, as `sparsecoll.collectives.call.Call.steps`."""
    problem: Exception | None = None
    layout: Layout | None = None
    sends: list[int] = []
    receives: list[int] | None = None
    try:
        layout = layout_of("x", x, group.device)
        if layout.form != "tensor":
            raise InvalidArgument(f"x: expected one tensor, got a {layout.form}")
        sends = _counts("send_counts", send_counts, group.world_size)
        receives = None if recv_counts is None else _counts("recv_counts", recv_counts, group.world_size)
        if sum(sends) != x.shape[0]:
            raise InvalidArgument(f"x: expected sum(send_counts) = {sum(sends)} rows, got {x.shape[0]}")
    except (SparsecollError, TypeError, ValueError) as error:
        problem = InvalidArgument(f"{_NAME}: {error} {group.place_of_error}")
    if not trusted and (group.checked or recv_counts is None) and group.world_size > 1:
        receives = _exchange_counts(group, operation, layout, sends, receives, problem)
    if problem is not None:
        raise agreed_error(problem) if group.world_size == 1 else problem
    assert layout is not None
    receives = sends if receives is None else receives
    out = allocate(layout, sum(receives), lambda _: (), group.device)
    exchange = _Exchange(group.rank, sends, receives, layout)
    if isinstance(group.transport, StreamTransport):
        issue = exchange.issue(group.transport, operation, contiguous("x", x, False), out, detached)
        yield issue
        issue.join()
    else:
        assert isinstance(group.transport, HostTransport)
        yield from exchange.move(group.transport, operation, view_of("x", x), view_of("out", out, writable=True))
    return out, receives


class _Exchange:
    """Which bytes go where."""

    def __init__(self, rank: int, send_counts: Sequence[int], recv_counts: Sequence[int], layout: Layout) -> None:
        assert layout.shapes is not None
        row_bytes = math.prod(layout.shapes[0]) * layout.itemsizes[0]
        self._rank, self._framework = rank, layout.framework
        self._send_ends = [0, *accumulate(count * row_bytes for count in send_counts)]
        self._recv_ends = [0, *accumulate(count * row_bytes for count in recv_counts)]
        # Each rank starts with its right neighbour, so that not all of them send to rank 0 at once.
        self._peers = [(rank + step) % len(send_counts) for step in range(1, len(send_counts))]

    def move(
        self, transport: HostTransport, operation: Operation, source: NDArray[np.uint8], destination: NDArray[np.uint8]
    ) -> Iterator[bool]:
        """Between views."""
        sends = [Message(peer, source[slice(*self._sent(peer))]) for peer in self._peers]
        receives = [Message(peer, destination[slice(*self._received(peer))]) for peer in reversed(self._peers)]
        requests = transport.post(sends, receives, operation)
        np.copyto(destination[slice(*self._received(self._rank))], source[slice(*self._sent(self._rank))])
        yield True
        transport.wait(requests, operation)

    def issue(self, transport: StreamTransport, operation: Operation, x: Any, out: Any, detached: bool) -> Issue:
        """Between device tensors."""
        source, destination = buffer_of(x), buffer_of(out)
        group = Round(
            tuple(_slots(1, ((peer, *self._received(peer)) for peer in reversed(self._peers)))),
            tuple(_slots(0, ((peer, *self._sent(peer)) for peer in self._peers))),
        )
        gpu = transport.gpu
        with transport.issuing(operation, self._framework) as (lane, issue):
            issue.keep = gpu.protect((x, out) if detached else (), lane, self._framework)
            begin, end = self._sent(self._rank)
            if begin < end:
                to, _ = self._received(self._rank)
                gpu.copy(destination.address + to, source.address + begin, end - begin, lane.stream)
            transport.run_round(group, (source, destination), lane)
        return issue

    def _sent(self, peer: int) -> tuple[int, int]:
        return self._send_ends[peer], self._send_ends[peer + 1]

    def _received(self, peer: int) -> tuple[int, int]:
        return self._recv_ends[peer], self._recv_ends[peer + 1]


def _slots(buffer: int, parts: Iterable[tuple[int, int, int]]) -> Iterator[Slot]:
    for peer, begin, end in parts:
        if begin < end:
            yield Slot(peer, buffer, begin, end - begin)


def _exchange_counts(
    group: Group,
    operation: Operation,
    layout: Layout | None,
    send_counts: list[int],
    recv_counts: list[int] | None,
    problem: Exception | None,
) -> list[int]:
    """Every rank learns all counts; returns what this one receives."""
    shape = layout.agreed if layout is not None else ()
    payloads = agree(
        group,
        operation,
        digest_of(_NAME, shape),
        lambda: {"dtype": list(layout.dtypes), "row_shape": layout.shapes} if layout else {},
        problem=problem,
        payload=np.array([*send_counts, *(recv_counts or [-1] * group.world_size)], "<i8").tobytes(),
    )
    counts = np.array([np.frombuffer(payload, "<i8") for payload in payloads])
    sent, expected = counts[:, : group.world_size], counts[:, group.world_size :]
    wrong = np.argwhere((expected >= 0) & (expected != sent.T))
    if len(wrong):
        dst, src = wrong[0].tolist()
        raise agreed_error(
            CollectiveMismatch(
                f"{operation}: expected recv_counts[{src}] on rank {dst} to be the {sent[src, dst]} rows that rank "
                f"{src} sends it, got {expected[dst, src]} {group.place_of_error}"
            )
        )
    return [int(count) for count in sent[:, group.rank]]


def _counts(name: str, counts: Any, world_size: int) -> list[int]:
    values = np.asarray(counts.tolist() if hasattr(counts, "tolist") else counts)
    if values.shape != (world_size,) or values.dtype.kind not in "iu":
        raise InvalidArgument(f"{name}: expected {world_size} integers, got {counts}")
    listed = [int(value) for value in values]
    if min(listed) < 0:
        raise InvalidArgument(f"{name}: expected no negative count, got {listed}")
    return listed

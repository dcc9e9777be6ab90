"""The native kernels, planner and balancers, typed and checked. The only file that imports ``_native``.

To kernels memory comes in by address, since the same ones serve NumPy arrays and tensors of any framework: the caller
keeps it alive, contiguous, and large enough; addresses need no alignment. Dtypes go by the names that NumPy and torch
use. Results depend neither on ``num_threads`` nor on the processor.

The planner and the balancers take NumPy arrays, which are contiguous; `sparsecoll.plan.compiled` speaks to the planner
in the words of plans.

Everything runs without the GIL.

``T`` tokens, ``K`` top-k, ``A`` assignments (``T * K``), ``E`` experts, ``D`` dim of a token, ``N`` rows, ``I`` hidden
dim, ``C`` chunks, ``W`` ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sparsecoll import _native
from sparsecoll._native import Links
from sparsecoll.errors import InvalidArgument

__all__ = [
    "REDUCIBLE",
    "Links",
    "accumulation_itemsize",
    "combine",
    "combine_backward",
    "divide_loads",
    "divide_work",
    "draft_transfers",
    "gelu_backward",
    "itemsize",
    "links",
    "permute_rows",
    "play_transfers",
    "relieve_ranks",
    "sort_by_expert",
    "sum_rows",
    "sum_views",
    "swiglu",
    "swiglu_backward",
]

_ITEMSIZE = {
    "float32": 4,
    "float64": 8,
    "bfloat16": 2,
    "float16": 2,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "uint8": 1,
}
_FLOATS = frozenset({"float32", "float64", "bfloat16", "float16"})
_ACTIVATION_DTYPES = frozenset({"float32", "bfloat16", "float16"})

REDUCIBLE = frozenset(_ITEMSIZE)
"""Names of the dtypes that can be summed."""


def itemsize(dtype: str) -> int:
    """Bytes of one element."""
    if dtype not in REDUCIBLE:
        raise InvalidArgument(f"native: expected dtype to be one of {', '.join(sorted(REDUCIBLE))}, got {dtype}")
    return _ITEMSIZE[dtype]


def accumulation_itemsize(dtype: str) -> int:
    """Bytes of one element of a partial sum: float32 for 16-bit floats, the dtype itself for all others."""
    return 4 if dtype in ("bfloat16", "float16") else itemsize(dtype)


def sum_rows(
    destination: int,
    destination_is_partial: bool,
    sources: Sequence[int],
    sources_are_partial: Sequence[bool],
    num_elements: int,
    dtype: str,
    divisor: int = 1,
    num_threads: int = 1,
) -> None:
    """Sums sources in the given order: ``destination[i] = (sources[0][i] + sources[1][i] + ...) / divisor``.

    Sums are kept in the accumulation dtype and rounded once, to nearest even, when they are stored. Integers wrap.

    Args:
        destination: address; may be one of ``sources`` if both have elements of one size.
        destination_is_partial: whether to store in the accumulation dtype.
        sources: addresses of ``[num_elements]``, at least one.
        sources_are_partial: for each source, whether it is in the accumulation dtype and not in ``dtype``.
        divisor: 1 for a sum, the number of contributions for a mean; 1 for integers.

    Raises:
        InvalidArgument: a rule above is broken; nothing has been written.
    """
    itemsize(dtype)
    if not sources or len(sources) != len(sources_are_partial):
        raise InvalidArgument(
            "sum_rows: expected at least one source and as many sources_are_partial, "
            f"got {len(sources)} and {len(sources_are_partial)}"
        )
    _check_divisor("sum_rows", dtype, divisor)
    _check_sizes("sum_rows", num_elements=num_elements)
    _check_threads("sum_rows", num_threads)
    if num_elements:
        _check_addresses("sum_rows", destination=destination, sources=min(sources))
    _native.sum_rows(
        destination, destination_is_partial, sources, sources_are_partial, num_elements, dtype, divisor, num_threads
    )


def sum_views(
    destination: NDArray[np.uint8],
    sources: Sequence[NDArray[np.uint8]],
    dtype: str,
    *,
    destination_is_partial: bool = False,
    sources_are_partial: Sequence[bool] | None = None,
    divisor: int = 1,
    num_threads: int = 1,
) -> None:
    """`sum_rows` on views: one-dimensional, contiguous uint8 arrays over the memory of the elements.

    Args:
        sources_are_partial: as in `sum_rows`; None means that none is.

    Raises:
        InvalidArgument: a view of the wrong kind or size, a ``destination`` that is read-only or overlaps a source
            without being equal to it, or what `sum_rows` raises.
    """
    if sources_are_partial is None:
        sources_are_partial = [False] * len(sources)
    elif len(sources_are_partial) != len(sources):
        raise InvalidArgument(f"sum_views: expected {len(sources)} sources_are_partial, got {len(sources_are_partial)}")
    element, partial = itemsize(dtype), accumulation_itemsize(dtype)
    begin = _view_address("destination", destination)
    if not destination.flags.writeable:
        raise InvalidArgument("sum_views: expected a writeable destination, got a read-only view")
    num_elements, rest = divmod(destination.nbytes, partial if destination_is_partial else element)
    if rest:
        raise InvalidArgument(f"sum_views: expected whole elements of {dtype}, got {destination.nbytes} bytes")
    addresses = []
    for source, is_partial in zip(sources, sources_are_partial, strict=True):
        address = _view_address("sources", source)
        expected = num_elements * (partial if is_partial else element)
        if source.nbytes != expected:
            raise InvalidArgument(f"sum_views: expected sources of {expected} bytes, got {source.nbytes}")
        overlaps = address < begin + destination.nbytes and begin < address + source.nbytes
        if overlaps and (address, source.nbytes) != (begin, destination.nbytes):
            raise InvalidArgument("sum_views: expected a destination apart from or equal to each source, got overlap")
        addresses.append(address)
    sum_rows(begin, destination_is_partial, addresses, sources_are_partial, num_elements, dtype, divisor, num_threads)


def sort_by_expert(expert_ids: int, num_assignments: int, num_experts: int, order: int, counts: int) -> None:
    """Sorts assignments by expert, stably, in linear time.

    Args:
        expert_ids: address of int64 ``[A]``, each in 0..E-1.
        order: address of int64 ``[A]`` to fill: ``order[j]`` is the j-th assignment in expert order.
        counts: address of int64 ``[E]`` to fill: assignments of each expert.

    Raises:
        InvalidArgument: an id is out of range (``order`` and ``counts`` are garbage then).
    """
    _check_sizes("sort_by_expert", num_assignments=num_assignments, num_experts=num_experts)
    if num_assignments:
        _check_addresses("sort_by_expert", expert_ids=expert_ids, order=order)
    if num_experts:
        _check_addresses("sort_by_expert", counts=counts)
    wrong = _native.sort_by_expert(expert_ids, num_assignments, num_experts, order, counts)
    if wrong >= 0:
        raise InvalidArgument(
            f"sort_by_expert: expected expert ids in 0..{num_experts - 1}, got another one for assignment {wrong}"
        )


def permute_rows(
    destination: int, source: int, index: int, num_rows: int, row_bytes: int, num_threads: int = 1
) -> None:
    """Gathers rows: ``destination[i] = source[index[i]]``.

    Args:
        destination: address of ``num_rows`` rows, apart from ``source``.
        source: address of rows of ``row_bytes``.
        index: address of int64 ``[num_rows]``; trusted to name rows of ``source``, repeats allowed; a negative one
            gives a row of zeros.

    Raises:
        InvalidArgument: a negative size or a null address.
    """
    _check_sizes("permute_rows", num_rows=num_rows, row_bytes=row_bytes)
    _check_threads("permute_rows", num_threads)
    if num_rows and row_bytes:
        _check_addresses("permute_rows", destination=destination, source=source, index=index)
        _native.permute_rows(destination, source, index, num_rows, row_bytes, num_threads)


def combine(
    destination: int,
    source: int,
    position: int,
    weight: int,
    num_tokens: int,
    top_k: int,
    dim: int,
    dtype: str,
    num_threads: int = 1,
) -> None:
    """Brings experts' rows back to tokens: ``destination[t] = sum over k of weight[t, k] * source[position[t, k]]``.

    Sums are kept in the accumulation dtype, in the order of k, and rounded once.

    Args:
        destination: address of ``[T, D]``, apart from ``source``.
        source: address of ``[rows, D]``.
        position: address of int64 ``[T, K]``; trusted to name rows of ``source``; a negative one contributes nothing.
        weight: address of ``[T, K]`` in ``dtype``, or 0 for weights of one.
        dtype: a float dtype.

    Raises:
        InvalidArgument: a negative size, a null address or another dtype.
    """
    _check_routing("combine", num_tokens, top_k, dim, dtype, num_threads)
    if num_tokens and dim:
        _check_addresses("combine", destination=destination)
        if top_k:
            _check_addresses("combine", source=source, position=position)
        _native.combine(destination, source, position, weight, num_tokens, top_k, dim, dtype, num_threads)


def combine_backward(
    d_source: int,
    d_weight: int,
    d_destination: int,
    source: int,
    position: int,
    weight: int,
    num_tokens: int,
    top_k: int,
    dim: int,
    dtype: str,
    num_threads: int = 1,
) -> None:
    """Gradients of `combine`, whose arguments keep their names.

    ``d_source[position[t, k]] = weight[t, k] * d_destination[t]``, and ``d_weight[t, k]`` is the dot product of
    ``d_destination[t]`` and ``source[position[t, k]]``, zero where there is no position. Rows of ``d_source`` that no
    position names stay untouched.

    Args:
        d_weight: address of ``[T, K]``, or 0 if not wanted; ``source`` may be 0 then.
        position: names each row at most once.

    Raises:
        InvalidArgument: a negative size, a null address or another dtype.
    """
    _check_routing("combine_backward", num_tokens, top_k, dim, dtype, num_threads)
    if num_tokens and top_k:
        _check_addresses("combine_backward", position=position)
        if dim:
            _check_addresses("combine_backward", d_source=d_source, d_destination=d_destination)
            if d_weight:
                _check_addresses("combine_backward", source=source)
        _native.combine_backward(
            d_source, d_weight, d_destination, source, position, weight, num_tokens, top_k, dim, dtype, num_threads
        )


def swiglu(destination: int, source: int, num_rows: int, dim: int, dtype: str, num_threads: int = 1) -> None:
    """``destination[n] = silu(gate) * up``, in one pass, in float32, rounded once when it is stored.

    Results are within a few last places of float32; a sigmoid below 1e-38 counts as zero.

    Args:
        destination: address of ``[N, I]``, apart from ``source``.
        source: address of ``[N, 2 I]``, the gate in the first half of a row.
        num_rows, dim: N and I.
        dtype: float32, bfloat16 or float16.

    Raises:
        InvalidArgument: a negative size, a null address or another dtype.
    """
    _check_activation("swiglu", dtype, num_threads, num_rows=num_rows, dim=dim)
    if num_rows and dim:
        _check_addresses("swiglu", destination=destination, source=source)
        _native.swiglu(destination, source, num_rows, dim, dtype, num_threads)


def swiglu_backward(
    d_source: int,
    activated: int,
    d_activated: int,
    source: int,
    num_rows: int,
    dim: int,
    dtype: str,
    num_threads: int = 1,
) -> None:
    """The gradient of `swiglu`, whose arguments keep their names, and its result again, in one pass.

    Args:
        d_source: address of ``[N, 2 I]`` to fill, apart from all others.
        activated: address of ``[N, I]`` to fill with the bits that `swiglu` gives; may be ``d_activated``.
        d_activated: address of the incoming gradient ``[N, I]``.

    Raises:
        InvalidArgument: a negative size, a null address or another dtype.
    """
    _check_activation("swiglu_backward", dtype, num_threads, num_rows=num_rows, dim=dim)
    if num_rows and dim:
        _check_addresses(
            "swiglu_backward", d_source=d_source, activated=activated, d_activated=d_activated, source=source
        )
        _native.swiglu_backward(d_source, activated, d_activated, source, num_rows, dim, dtype, num_threads)


def gelu_backward(
    d_source: int,
    activated: int,
    d_activated: int,
    source: int,
    num_elements: int,
    dtype: str,
    num_threads: int = 1,
) -> None:
    """The gradient of the exact gelu and its result, in one pass, in float32; a tail below 1e-38 counts as zero.

    Arguments are those of `swiglu_backward`, all of ``[num_elements]``. A forward of its own would gain nothing:
    where torch runs, that is one pass already.

    Raises:
        InvalidArgument: a negative size, a null address or another dtype.
    """
    _check_activation("gelu_backward", dtype, num_threads, num_elements=num_elements)
    if num_elements:
        _check_addresses(
            "gelu_backward", d_source=d_source, activated=activated, d_activated=d_activated, source=source
        )
        _native.gelu_backward(d_source, activated, d_activated, source, num_elements, dtype, num_threads)


def links(
    node_of: Sequence[int],
    up: Sequence[int],
    out: Sequence[int],
    node: Sequence[int],
    up_latency: int,
    out_latency: int,
) -> Links:
    """Links in the planner's own memory, to be made once for all plans; arguments as in `sparsecoll.plan.costs.Costs`.

    Raises:
        InvalidArgument: not a node and positive costs for each rank, or a number beyond 63 bits.
    """
    try:
        return Links(node_of, up, out, node, up_latency, out_latency)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"links: expected costs of ranks on nodes in at most 63 bits, got: {error}") from None


def draft_transfers(
    links: Links,
    owners: NDArray[np.int32],
    holders: NDArray[np.bool_],
    chunks: NDArray[np.int64],
    sizes: NDArray[np.int64],
    partial_sizes: NDArray[np.int64],
    *,
    gathers: bool,
    divisible: bool,
    shared_memory: bool,
    algorithm: str,
) -> tuple[str, int, NDArray[np.uint8]]:
    """Plans the transfers of a collective, as `sparsecoll.plan.algorithms.draft` does; the rules stand there.

    Args:
        owners, holders: ``[C]`` and ``[C, W]``, sound as those of a Placement.
        chunks: ascending numbers of those that move; they have bytes.
        sizes, partial_sizes: ``[C]``, bytes; what all ranks may send of them together fits 63 bits.
        algorithm: ``auto`` or a name of an algorithm.

    Returns:
        The algorithm, ticks that it is expected to take, and the bytes of the rows, read-only.

    Raises:
        InvalidArgument: arrays that do not fit each other, or an unknown algorithm.
    """
    try:
        return _native.draft(
            links, owners, holders, chunks, sizes, partial_sizes, gathers, divisible, shared_memory, algorithm
        )
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"draft_transfers: {error}") from None


def play_transfers(
    links: Links, table: NDArray[np.uint8], row_bytes: NDArray[np.int64], *, gathers: bool
) -> tuple[int, NDArray[np.int32], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """When the pieces of transfers arrive, as `sparsecoll.plan.simulate.simulate` says, with the fields of its result.

    Args:
        table: bytes of the rows.
        row_bytes: of each row, on the wire.

    Raises:
        InvalidArgument: rows that do not fit the links, ``row_bytes`` or each other, or a time beyond 63 bits of ticks.
    """
    try:
        return _native.simulate(links, table, row_bytes, gathers)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgument(f"play_transfers: {error}") from None


def divide_work(
    work: Sequence[int],
    base: Sequence[int],
    allowed: Sequence[Sequence[int]],
    cost: Sequence[int],
    floor: int = 0,
    home: Sequence[int] = (),
    pool_of: Sequence[int] = (),
    pool_cost: Sequence[int] = (),
) -> tuple[int, list[list[tuple[int, int]]]]:
    """`sparsecoll.plan.division.divide`, to be held against it; empty sequences for its None. Arguments are trusted.

    Raises:
        InvalidArgument: work that nobody may do.
    """
    try:
        return _native.divide(work, base, allowed, cost, floor, home, pool_of, pool_cost)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"divide_work: {error}") from None


def relieve_ranks(
    loads: NDArray[np.int64], owners: NDArray[np.int32], holders: NDArray[np.bool_], most: int, min_tokens: int
) -> list[tuple[int, int, int, NDArray[np.int64]]]:
    """`sparsecoll.balance.relief.relieve_ranks`; the rules stand there, and the fields of its results.

    Args:
        loads: ``[W, E]``, at least 0.
        owners, holders: ``[E]`` and ``[E, W]``, sound as those of a Placement.

    Raises:
        InvalidArgument: arrays that do not fit each other.
    """
    try:
        found = _native.relieve_ranks(loads, owners, holders, most, min_tokens)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"relieve_ranks: {error}") from None
    return [(level, traffic, copies, moves.reshape(-1, 3)) for level, traffic, copies, moves in found]


def divide_loads(
    loads: NDArray[np.int64], owners: NDArray[np.int32], holders: NDArray[np.bool_], node_of: NDArray[np.int32]
) -> NDArray[np.int64]:
    """`sparsecoll.balance.divide.divide_loads`: quotas ``[E, W]``; the rules stand there.

    Args:
        loads: ``[W, E]``, at least 0.
        owners, holders: ``[E]`` and ``[E, W]``, sound as those of a Placement.
        node_of: ``[W]``.

    Raises:
        InvalidArgument: arrays that do not fit each other.
    """
    try:
        quotas = _native.divide_loads(loads, owners, holders, node_of)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"divide_loads: {error}") from None
    return quotas.reshape(holders.shape)


def _view_address(name: str, view: NDArray[np.uint8]) -> int:
    if view.dtype != np.uint8 or view.ndim != 1 or not view.flags.c_contiguous:
        raise InvalidArgument(
            f"sum_views: expected {name} to be one-dimensional contiguous uint8, "
            f"got {view.dtype} of shape {list(view.shape)} and strides {list(view.strides)}"
        )
    return view.ctypes.data


def _check_divisor(operation: str, dtype: str, divisor: int) -> None:
    if divisor < 1 or (divisor != 1 and dtype not in _FLOATS):
        raise InvalidArgument(f"{operation}: expected divisor >= 1, and 1 for integers, got {divisor} for {dtype}")


def _check_routing(operation: str, num_tokens: int, top_k: int, dim: int, dtype: str, num_threads: int) -> None:
    if dtype not in _FLOATS:
        raise InvalidArgument(f"{operation}: expected dtype to be one of {', '.join(sorted(_FLOATS))}, got {dtype}")
    _check_sizes(operation, num_tokens=num_tokens, top_k=top_k, dim=dim)
    _check_threads(operation, num_threads)


def _check_activation(operation: str, dtype: str, num_threads: int, **sizes: int) -> None:
    if dtype not in _ACTIVATION_DTYPES:
        known = ", ".join(sorted(_ACTIVATION_DTYPES))
        raise InvalidArgument(f"{operation}: expected dtype to be one of {known}, got {dtype}")
    _check_sizes(operation, **sizes)
    _check_threads(operation, num_threads)


def _check_sizes(operation: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 0:
            raise InvalidArgument(f"{operation}: expected {name} >= 0, got {size}")


def _check_threads(operation: str, num_threads: int) -> None:
    if num_threads < 1:
        raise InvalidArgument(f"{operation}: expected num_threads >= 1, got {num_threads}")


def _check_addresses(operation: str, **addresses: int) -> None:
    for name, address in addresses.items():
        if not address:
            raise InvalidArgument(f"{operation}: expected an address for {name}, got 0")

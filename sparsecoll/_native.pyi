from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

class Links:
    def __init__(
        self,
        node_of: Sequence[int],
        up: Sequence[int],
        out: Sequence[int],
        node: Sequence[int],
        up_latency: int,
        out_latency: int,
        /,
    ) -> None: ...

def sum_rows(
    destination: int,
    destination_is_partial: bool,
    sources: Sequence[int],
    sources_are_partial: Sequence[bool],
    num_elements: int,
    dtype: str,
    divisor: int,
    num_threads: int,
    /,
) -> None: ...
def sort_by_expert(expert_ids: int, num_assignments: int, num_experts: int, order: int, counts: int, /) -> int: ...
def permute_rows(
    destination: int, source: int, index: int, num_rows: int, row_bytes: int, num_threads: int, /
) -> None: ...
def combine(
    destination: int,
    source: int,
    position: int,
    weight: int,
    num_tokens: int,
    top_k: int,
    dim: int,
    dtype: str,
    num_threads: int,
    /,
) -> None: ...
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
    num_threads: int,
    /,
) -> None: ...
def swiglu(destination: int, source: int, num_rows: int, dim: int, dtype: str, num_threads: int, /) -> None: ...
def swiglu_backward(
    d_source: int,
    activated: int,
    d_activated: int,
    source: int,
    num_rows: int,
    dim: int,
    dtype: str,
    num_threads: int,
    /,
) -> None: ...
def gelu_backward(
    d_source: int,
    activated: int,
    d_activated: int,
    source: int,
    num_elements: int,
    dtype: str,
    num_threads: int,
    /,
) -> None: ...
def draft(
    links: Links,
    owners: NDArray[np.int32],
    holders: NDArray[np.bool_],
    chunks: NDArray[np.int64],
    sizes: NDArray[np.int64],
    partial_sizes: NDArray[np.int64],
    gathers: bool,
    divisible: bool,
    shared_memory: bool,
    algorithm: str,
    /,
) -> tuple[str, int, NDArray[np.uint8]]: ...
def simulate(
    links: Links, table: NDArray[np.uint8], row_bytes: NDArray[np.int64], gathers: bool, /
) -> tuple[int, NDArray[np.int32], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]: ...
def divide(
    work: Sequence[int],
    base: Sequence[int],
    allowed: Sequence[Sequence[int]],
    cost: Sequence[int],
    floor: int,
    home: Sequence[int],
    pool_of: Sequence[int],
    pool_cost: Sequence[int],
    /,
) -> tuple[int, list[list[tuple[int, int]]]]: ...
def relieve_ranks(
    loads: NDArray[np.int64], owners: NDArray[np.int32], holders: NDArray[np.bool_], most: int, min_tokens: int, /
) -> list[tuple[int, int, int, NDArray[np.int64]]]: ...
def divide_loads(
    loads: NDArray[np.int64],
    owners: NDArray[np.int32],
    holders: NDArray[np.bool_],
    node_of: NDArray[np.int32],
    /,
) -> NDArray[np.int64]: ...

from collections.abc import Sequence

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

"""The native kernels beside the torch expression that a user would write instead, on one thread.

Each row gives the median time of both, and ``x_over_torch`` = torch's time / ours: above 1, ours is faster. Results are
checked in the same run. Sizes are the bytes of one source (sum_rows), of the expert ids (sort_by_expert), of the rows
moved (permute_rows), of the experts' rows (combine and its backward), and of the pre-activations (activations).

``T`` tokens, ``K`` top-k, ``A`` assignments (``T * K``), ``D`` dim, ``N`` rows, ``I`` hidden dim.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sparsecoll import native

__all__ = ["run"]

_DIM, _HIDDEN_DIM, _TOP_K, _NUM_EXPERTS = 1024, 512, 2, 64
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class _Contest(NamedTuple):
    """One kernel at one size: what to time, and whether ours is right after it has run."""

    name: str
    moved_bytes: int
    ours: Callable[[], object]
    rivals: Mapping[str, Callable[[], object]]
    is_right: Callable[[], bool]


@dataclass(frozen=True)
class _Result:
    """One row. ``torch`` names the expression that was fastest; times are medians."""

    kernel: str
    dtype: str
    size: int
    time_us: float
    torch: str
    torch_time_us: float
    x_over_torch: float
    bytes_per_s: float
    right: bool


def run(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Measures every kernel, prints the table, and writes ``--json``.

    Args:
        arguments: command line without the case's name.

    Returns:
        The record, as in the JSON file.
    """
    options = _parser().parse_args(list(arguments))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results = list(_measure(options))
    finally:
        torch.set_num_threads(num_threads)
    record = {
        "case": "kernels",
        "command": " ".join(["python -m bench kernels", *arguments]),
        "passed": all(result.right for result in results),
        "summary": _summary(results),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "seed": options.seed,
        "results": [asdict(result) for result in results],
    }
    for name, value in record["summary"].items():
        print(f"# {name}: {value:.3f}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return record


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench kernels", description=__doc__.splitlines()[0])
    parser.add_argument("-b", "--minbytes", type=_bytes, default="64K", help="smallest size (K, M, G are binary)")
    parser.add_argument("-e", "--maxbytes", type=_bytes, default="64M", help="largest size")
    parser.add_argument("-f", "--stepfactor", type=int, default=4, help="factor between sizes")
    parser.add_argument("-n", "--iters", type=int, default=50, help="most timed iterations; large sizes take fewer")
    parser.add_argument("-o", "--op", default="all", help="one kernel by name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-J", "--json", type=Path, help="file for the record")
    return parser


def _bytes(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1].upper()] if text[-1].upper() in units else int(text)


def _measure(options: argparse.Namespace) -> Iterator[_Result]:
    print("# native kernels against torch, one thread, medians; x_over_torch = torch time / our time")
    print(f"# {'kernel':<18}{'type':>9}{'size':>10}{'us':>10}{'GB/s':>7}  {'torch':<16}{'us':>10}{'x':>7}  right")
    size = options.minbytes
    while size <= options.maxbytes:
        for dtype in _DTYPES:
            for make in _KERNELS:
                if options.op not in ("all", make.__name__.removeprefix("_")):
                    continue
                if make is _sort_by_expert and dtype != "float32":
                    continue  # ids are int64 whatever the tokens are
                for contest in make(size, dtype, torch.Generator().manual_seed(options.seed)):
                    result = _time(contest, "int64" if make is _sort_by_expert else dtype, size, options)
                    print(
                        f"  {result.kernel:<18}{result.dtype:>9}{size:>10}{result.time_us:>10.1f}"
                        f"{result.bytes_per_s / 1e9:>7.1f}  {result.torch:<16}{result.torch_time_us:>10.1f}"
                        f"{result.x_over_torch:>7.2f}  {'OK' if result.right else 'WRONG'}",
                        flush=True,
                    )
                    yield result
        size *= options.stepfactor


def _time(contest: _Contest, dtype: str, size: int, options: argparse.Namespace) -> _Result:
    """Times all contestants in turn, so that a slow moment of the machine hits each alike.

    Each runs untimed just before, so that it finds the caches as it left them itself, not as its rivals did.
    """
    contestants = {"ours": contest.ours, **contest.rivals}
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    num_iterations = max(5, min(options.iters, (256 << 20) // contest.moved_bytes))
    for _ in range(num_iterations):
        for name, call in contestants.items():
            call()
            begin_s = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - begin_s)
    contest.ours()
    medians = {name: statistics.median(values) for name, values in samples.items()}
    ours_s = medians.pop("ours")
    rival = min(medians, key=medians.__getitem__)
    return _Result(
        kernel=contest.name,
        dtype=dtype,
        size=size,
        time_us=ours_s * 1e6,
        torch=rival,
        torch_time_us=medians[rival] * 1e6,
        x_over_torch=medians[rival] / ours_s,
        bytes_per_s=contest.moved_bytes / ours_s,
        right=contest.is_right(),
    )


def _summary(results: Sequence[_Result]) -> dict[str, float]:
    ratios: dict[str, list[float]] = {}
    for result in results:
        ratios.setdefault(result.kernel.split("[")[0], []).append(result.x_over_torch)
    summary = {}
    for kernel, values in ratios.items():
        summary[f"{kernel}_over_torch"] = math.exp(statistics.fmean(map(math.log, values)))
        summary[f"{kernel}_over_torch_min"] = min(values)
    return summary


def _sum_rows(size: int, dtype: str, generator: torch.Generator) -> Iterator[_Contest]:
    for num_sources in (2, 4, 8):
        yield _sum_of(num_sources, size, dtype, generator)


def _sum_of(num_sources: int, size: int, dtype: str, generator: torch.Generator) -> _Contest:
    torch_dtype = _DTYPES[dtype]
    num_elements = size // torch_dtype.itemsize
    sources = [torch.randn(num_elements, generator=generator).to(torch_dtype) for _ in range(num_sources)]
    out = torch.empty_like(sources[0])
    addresses, partial = [source.data_ptr() for source in sources], [False] * num_sources

    def ours() -> None:
        native.sum_rows(out.data_ptr(), False, addresses, partial, num_elements, dtype)

    def loop() -> None:
        torch.add(sources[0], sources[1], out=out)
        for source in sources[2:]:
            out.add_(source)

    def stack() -> None:
        torch.sum(torch.stack(sources), 0, out=out)

    def is_right() -> bool:
        expected = sources[0].float()
        for source in sources[1:]:
            expected = expected + source
        return torch.equal(out, expected.to(torch_dtype))

    moved_bytes = size * (num_sources + 1)
    return _Contest(f"sum_rows[{num_sources}]", moved_bytes, ours, {"add_ loop": loop, "stack.sum(0)": stack}, is_right)


def _sort_by_expert(size: int, dtype: str, generator: torch.Generator) -> Iterator[_Contest]:
    ids = torch.randint(_NUM_EXPERTS, (size // 8,), generator=generator)
    order, counts = torch.empty_like(ids), torch.empty(_NUM_EXPERTS, dtype=torch.int64)

    def ours() -> None:
        native.sort_by_expert(ids.data_ptr(), len(ids), _NUM_EXPERTS, order.data_ptr(), counts.data_ptr())

    def theirs() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.argsort(ids, stable=True), torch.bincount(ids, minlength=_NUM_EXPERTS)

    def is_right() -> bool:
        return all(torch.equal(a, b) for a, b in zip((order, counts), theirs(), strict=True))

    yield _Contest("sort_by_expert", 2 * size, ours, {"argsort+bincount": theirs}, is_right)


def _permute_rows(size: int, dtype: str, generator: torch.Generator) -> Iterator[_Contest]:
    source, index, _, _ = _routed(size, dtype, generator)
    out = torch.empty_like(source)
    row_bytes = source.stride(0) * source.itemsize

    def ours() -> None:
        native.permute_rows(out.data_ptr(), source.data_ptr(), index.data_ptr(), len(index), row_bytes)

    def theirs() -> torch.Tensor:
        return torch.index_select(source, 0, index, out=out)

    yield _Contest("permute_rows", 2 * size, ours, {"index_select": theirs}, lambda: torch.equal(out, source[index]))


def _combine(size: int, dtype: str, generator: torch.Generator) -> Iterator[_Contest]:
    source, position, weight, num_tokens = _routed(size, dtype, generator)
    out = torch.empty(num_tokens, _DIM, dtype=source.dtype)

    def ours() -> None:
        native.combine(
            out.data_ptr(), source.data_ptr(), position.data_ptr(), weight.data_ptr(), num_tokens, _TOP_K, _DIM, dtype
        )

    def is_right() -> bool:
        expected = torch.zeros(num_tokens, _DIM)
        for k in range(_TOP_K):
            expected += weight.float()[k::_TOP_K, None] * source.float()[position[k::_TOP_K]]
        return torch.equal(out, expected.to(source.dtype))

    rivals = {"select*w .sum(1)": lambda: _combine_in_torch(source, position, weight)}
    yield _Contest("combine", size + out.nbytes, ours, rivals, is_right)


def _combine_backward(size: int, dtype: str, generator: torch.Generator) -> Iterator[_Contest]:
    source, position, weight, num_tokens = _routed(size, dtype, generator)
    d_out = torch.randn(num_tokens, _DIM, generator=generator).to(source.dtype)
    d_source, d_weight = torch.empty_like(source), torch.empty_like(weight)
    inputs = source.requires_grad_(), weight.requires_grad_()
    output = _combine_in_torch(source, position, weight)

    def ours() -> None:
        native.combine_backward(
            d_source.data_ptr(),
            d_weight.data_ptr(),
            d_out.data_ptr(),
            source.data_ptr(),
            position.data_ptr(),
            weight.data_ptr(),
            num_tokens,
            _TOP_K,
            _DIM,
            dtype,
        )

    def theirs() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(output, inputs, d_out, retain_graph=True)

    @torch.no_grad()
    def is_right() -> bool:
        spread = d_out.double().repeat_interleave(_TOP_K, 0)
        products = spread * source.double()[position]
        expected = products.sum(1)
        # Half a last place of the result, and what float32 sums may lose on the way.
        allowed = torch.finfo(source.dtype).eps / 2 * expected.abs() + 1e-6 * products.abs().sum(1)
        near = ((d_weight.double() - expected).abs() <= allowed).all()
        moved = torch.empty_like(d_source)
        moved[position] = (spread.float() * weight.float()[:, None]).to(source.dtype)
        return bool(near) and torch.equal(d_source, moved)

    yield _Contest("combine_backward", 2 * size + d_out.nbytes, ours, {"autograd": theirs}, is_right)


def _swiglu(size: int, dtype: str, generator: torch.Generator) -> Iterator[_Contest]:
    h, out, _ = _hidden(2, size, dtype, generator)

    def ours() -> None:
        native.swiglu(out.data_ptr(), h.data_ptr(), len(h), _HIDDEN_DIM, dtype)

    def is_right() -> bool:
        return _is_near(out, _swiglu_in_torch(h.double()))

    yield _Contest("swiglu", h.nbytes + out.nbytes, ours, {"silu.mul_": lambda: _swiglu_in_torch(h)}, is_right)


def _swiglu_backward(size: int, dtype: str, generator: torch.Generator) -> Iterator[_Contest]:
    """Both ways also give the activation again, which the second matrix's gradient wants."""
    h, out, d_out = _hidden(2, size, dtype, generator)
    dh = torch.empty_like(h)

    def ours() -> None:
        native.swiglu_backward(
            dh.data_ptr(), out.data_ptr(), d_out.data_ptr(), h.data_ptr(), len(h), _HIDDEN_DIM, dtype
        )

    def theirs() -> torch.Tensor:
        (gate, up), (d_gate, d_up) = h.chunk(2, dim=-1), torch.empty_like(h).chunk(2, dim=-1)
        activated = F.silu(gate)
        torch.mul(d_out, activated, out=d_up)
        torch.ops.aten.silu_backward.grad_input(d_out * up, gate, grad_input=d_gate)
        return activated.mul_(up)

    def is_right() -> bool:
        return _are_gradients(dh, out, d_out, h, _swiglu_in_torch)

    yield _Contest("swiglu_backward", 2 * (h.nbytes + out.nbytes), ours, {"silu_backward": theirs}, is_right)


def _gelu_backward(size: int, dtype: str, generator: torch.Generator) -> Iterator[_Contest]:
    """As for swiglu."""
    h, out, d_out = _hidden(1, size, dtype, generator)
    dh = torch.empty_like(h)

    def ours() -> None:
        native.gelu_backward(dh.data_ptr(), out.data_ptr(), d_out.data_ptr(), h.data_ptr(), h.numel(), dtype)

    def theirs() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.aten.gelu_backward(d_out, h), F.gelu(h)

    def is_right() -> bool:
        return _are_gradients(dh, out, d_out, h, F.gelu)

    yield _Contest("gelu_backward", 4 * h.nbytes, ours, {"gelu_backward": theirs}, is_right)


def _swiglu_in_torch(h: torch.Tensor) -> torch.Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _hidden(
    width: int, size: int, dtype: str, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pre-activations ``[N, width * I]``, memory ``[N, I]``, and a gradient like it."""
    torch_dtype = _DTYPES[dtype]
    num_rows = size // (width * _HIDDEN_DIM * torch_dtype.itemsize)
    h = torch.randn(num_rows, width * _HIDDEN_DIM, generator=generator).to(torch_dtype)
    d_out = torch.randn(num_rows, _HIDDEN_DIM, generator=generator).to(torch_dtype)
    return h, torch.empty_like(d_out), d_out


def _are_gradients(
    dh: torch.Tensor,
    activated: torch.Tensor,
    d_activated: torch.Tensor,
    h: torch.Tensor,
    activate: Callable[[torch.Tensor], torch.Tensor],
) -> bool:
    exact = h.double().requires_grad_()
    expected = activate(exact)
    (d_exact,) = torch.autograd.grad(expected, exact, d_activated.double())
    return _is_near(dh, d_exact) and _is_near(activated, expected.detach())


def _is_near(value: torch.Tensor, expected: torch.Tensor) -> bool:
    """Half a last place of the result, and what float32 may lose on the way."""
    allowed = torch.finfo(value.dtype).eps / 2 * expected.abs() + 1e-6 * (1 + expected.abs())
    return bool(((value.double() - expected).abs() <= allowed).all())


def _combine_in_torch(source: torch.Tensor, position: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (source.index_select(0, position) * weight[:, None]).view(-1, _TOP_K, _DIM).sum(1)


def _routed(size: int, dtype: str, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Experts' rows ``[A, D]``, where each assignment's row is ``[A]``, weights ``[A]``, and T."""
    torch_dtype = _DTYPES[dtype]
    num_tokens = size // (_TOP_K * _DIM * torch_dtype.itemsize)
    num_assignments = num_tokens * _TOP_K
    source = torch.randn(num_assignments, _DIM, generator=generator).to(torch_dtype)
    # Sorted by expert, as dispatch leaves them: neighbours in the source come from tokens far apart, in order.
    expert_ids = torch.randint(_NUM_EXPERTS, (num_assignments,), generator=generator)
    position = torch.argsort(torch.argsort(expert_ids, stable=True))
    weight = torch.rand(num_assignments, generator=generator).to(torch_dtype)
    return source, position, weight, num_tokens


_KERNELS = (
    _sum_rows,
    _sort_by_expert,
    _permute_rows,
    _combine,
    _combine_backward,
    _swiglu,
    _swiglu_backward,
    _gelu_backward,
)


if __name__ == "__main__":
    sys.exit(0 if run(sys.argv[1:])["passed"] else 1)

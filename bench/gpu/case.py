"""``python -m bench gpu``: copy bandwidth, every CUDA kernel beside torch's, and what it costs the host to issue.

Kernel times are the device's, without launches. ``of copy`` is the share of the device's copy bandwidth, measured in
the same run, that the bytes read and written make; ``x_over_torch`` is the time of the fastest torch expression over
ours. Each part has a budget of time; what does not fit is named and left out. Times decide nothing about success.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import sparsecoll as sc
from bench import machine
from bench.gpu.clock import Clock, DeviceClock, medians_s
from bench.gpu.contests import Contest, Rig, contests
from bench.gpu.issue import NUM_RANKS
from bench.report import write_record
from sparsecoll.cuda import kernels_for

__all__ = ["Result", "compete", "run", "summarize"]

_KERNELS_BUDGET_S, _ISSUE_BUDGET_S = 270.0, 120.0
_COPY_BYTES = (256 << 20, 1 << 30, 4 << 30)
_SIZES = tuple(1 << bits for bits in range(16, 31, 2))
_LARGE_BYTES = 256 << 20
_WANTED_OF_COPY, _WANTED_OVER_TORCH, _WANTED_ISSUE_US = 0.85, 1.0, 100.0
_SEED = 0


@dataclass(frozen=True)
class Result:
    """One kernel at one size.

    Attributes:
        of_copy: share of the copy bandwidth; None where moving bytes is not all the work.
        torch: the expression that was fastest.
    """

    kernel: str
    dtype: str
    size: int
    time_us: float
    gb_per_s: float
    of_copy: float | None
    torch: str
    torch_time_us: float
    x_over_torch: float
    right: bool


def run(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Measures, prints the tables and writes ``--json``; without a GPU says so.

    Args:
        arguments: command line without the case's name.

    Returns:
        The record, as in the JSON file, with ``passed``.
    """
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__.splitlines()[0])
    parser.add_argument("-J", "--json", type=Path, help="file for the record")
    options = parser.parse_args(list(arguments))
    reason = _reason_to_skip()
    if reason is not None:
        print(f"# gpu: skipped, {reason}")
        skipped = {"case": "gpu", "skipped": reason}
        if options.json:
            write_record(skipped, options.json)
        return {**skipped, "passed": True}
    record = _measure(" ".join(["python -m bench gpu", *arguments]))
    if options.json:
        write_record(record, options.json)
    return record


def _reason_to_skip() -> str | None:
    if not torch.cuda.is_available():
        return f"as torch {torch.__version__} sees no GPU"
    if kernels_for(torch.cuda.current_device()) is None:
        return 'as there is no CuPy that sees the GPU, try pip install "sparsecoll[cuda13]"'
    return None


def _measure(command: str) -> dict[str, Any]:
    started = _now()
    found = {**machine.describe(), **machine.describe_gpu()}
    print(f"# sparsecoll {sc.__version__}, commit {machine.commit() or 'unknown'}")
    print(f"# {found['device']}, driver {found['driver']}, NCCL {found['nccl']}, torch {found['torch']}")
    device = torch.device("cuda", torch.cuda.current_device())
    kernels = kernels_for(device.index)
    assert kernels is not None
    rig = Rig(kernels, str(device), torch.cuda.current_stream().cuda_stream, 4 * found["l2_cache_bytes"])
    clock = DeviceClock()
    copies = _copies(rig, clock)
    copy_bytes_per_s = max(copies.values())
    _print_head()
    results, left_out = compete(_all_contests(rig), clock, copy_bytes_per_s, _KERNELS_BUDGET_S)
    torch.cuda.empty_cache()
    issue, errors = _issue()
    summary = {"copy_gb_per_s": copy_bytes_per_s / 1e9, **summarize(results)}
    for name, times in issue.get("calls", {}).items():
        summary[f"issue_{name}_median_us"] = times["median_us"]
    for name, value in summary.items():
        print(f"# {name}: {value:.3f}")
    for each in _short_of_wishes(results, issue):
        print(f"# short of what is wanted: {each}")
    return {
        "case": "gpu",
        "command": command,
        "passed": all(result.right for result in results) and not errors,
        "summary": summary,
        "version": sc.__version__,
        "commit": machine.commit(),
        "seed": _SEED,
        "machine": found,
        "start_time": started,
        "end_time": _now(),
        "copy_bytes_per_s": {str(size): value for size, value in copies.items()},
        "results": [asdict(result) for result in results],
        "left_out": left_out,
        "issue": issue,
        "short_of_wishes": _short_of_wishes(results, issue),
        "errors": errors,
    }


def _copies(rig: Rig, clock: Clock) -> dict[int, float]:
    """Bytes read and written in a second by a copy of each size, between buffers that are in no cache."""
    rates = {}
    for size in _COPY_BYTES:
        buffers = [torch.ones(size, dtype=torch.uint8, device=rig.device) for _ in range(4)]
        copy = lambda n, buffers=buffers: buffers[n + 2].copy_(buffers[n])  # noqa: E731
        rates[size] = 2 * size / medians_s({"copy": copy}, 2, clock)["copy"]
        print(f"# device copy of {size} bytes: {rates[size] / 1e9:.0f} GB/s read and written", flush=True)
    return rates


def _all_contests(rig: Rig) -> Iterator[Callable[[], Contest]]:
    for size in _SIZES:
        yield from contests(rig, size, _SEED)


def compete(
    makers: Iterator[Callable[[], Contest]], clock: Clock, copy_bytes_per_s: float, budget_s: float
) -> tuple[list[Result], int]:
    """Runs contests and prints a row for each, for as long as the budget lasts.

    Returns:
        The results, and how many contests there was no time for.
    """
    deadline_s = time.monotonic() + budget_s
    results: list[Result] = []
    for make in makers:
        if time.monotonic() > deadline_s:
            left_out = 1 + sum(1 for _ in makers)
            print(f"# {left_out} contests left out, as {budget_s:.0f} s have passed")
            return results, left_out
        results.append(_result(make(), clock, copy_bytes_per_s))
        _print_row(results[-1])
    return results, 0


def _result(contest: Contest, clock: Clock, copy_bytes_per_s: float) -> Result:
    times_s = medians_s({"ours": contest.ours, **contest.rivals}, contest.num_sets, clock)
    # The last set, which rivals have written to as well, and the first.
    right = True
    for number in (contest.num_sets - 1, 0):
        contest.ours(number)
        right = contest.is_right(number) and right
    ours_s = times_s.pop("ours")
    rival = min(times_s, key=times_s.__getitem__)
    rate = contest.moved_bytes / ours_s
    return Result(
        kernel=contest.kernel,
        dtype=contest.dtype,
        size=contest.size,
        time_us=ours_s * 1e6,
        gb_per_s=rate / 1e9,
        of_copy=rate / copy_bytes_per_s if contest.is_memory_bound else None,
        torch=rival,
        torch_time_us=times_s[rival] * 1e6,
        x_over_torch=times_s[rival] / ours_s,
        right=right,
    )


def _print_head() -> None:
    print("# x_over_torch = torch's time / ours; times are the device's, medians; of copy: share of the copy bandwidth")
    print(
        f"# {'kernel':<17}{'type':>9}{'size':>11}{'us':>10}{'GB/s':>8}{'of copy':>8}  {'torch':<21}{'us':>10}"
        f"{'x_over_torch':>13}  right"
    )


def _print_row(result: Result) -> None:
    share = "-" if result.of_copy is None else f"{result.of_copy:.2f}"
    print(
        f"  {result.kernel:<17}{result.dtype:>9}{result.size:>11}{result.time_us:>10.1f}{result.gb_per_s:>8.0f}"
        f"{share:>8}  {result.torch:<21}{result.torch_time_us:>10.1f}{result.x_over_torch:>13.2f}  "
        f"{'OK' if result.right else 'WRONG'}",
        flush=True,
    )


def _issue() -> tuple[dict[str, Any], list[str]]:
    """Host times, from ranks in processes of their own."""
    with tempfile.TemporaryDirectory(prefix="sparsecoll-bench-") as folder:
        path = Path(folder, "issue.json")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}"]
        process = subprocess.Popen(
            [sys.executable, *launcher, "-m", "bench.gpu.issue", str(path)],
            cwd=Path(__file__).resolve().parents[2],
            env={"OMP_NUM_THREADS": "1", **os.environ},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            status: int | str = process.wait(_ISSUE_BUDGET_S)
        except subprocess.TimeoutExpired:
            status = f"none within {_ISSUE_BUDGET_S:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status != 0 or not path.exists():
            return {}, [f"issue: {NUM_RANKS} ranks ended with status {status}"]
        found: dict[str, Any] = json.loads(path.read_text())
    for name, times in found["calls"].items():
        print(f"# host time of {name}: median {times['median_us']:.1f} us, p90 {times['p90_us']:.1f} us")
    return found, []


def summarize(results: Sequence[Result]) -> dict[str, float]:
    """For each kernel the worst ratio to torch, and the worst share of the copy bandwidth at large sizes."""
    summary = {}
    for kernel in dict.fromkeys(result.kernel for result in results):
        rows = [result for result in results if result.kernel == kernel]
        summary[f"{kernel}_over_torch_min"] = min(row.x_over_torch for row in rows)
        shares = [row.of_copy for row in rows if row.of_copy is not None and row.size >= _LARGE_BYTES]
        if shares:
            summary[f"{kernel}_of_copy_min"] = min(shares)
    return summary


def _short_of_wishes(results: Sequence[Result], issue: dict[str, Any]) -> list[str]:
    """Rows that are kept though they lose."""
    short = []
    for row in results:
        place = f"{row.kernel} {row.dtype} {row.size}"
        if row.x_over_torch < _WANTED_OVER_TORCH:
            short.append(f"{place}: {row.x_over_torch:.2f} of {row.torch}'s speed")
        if row.of_copy is not None and row.size >= _LARGE_BYTES and row.of_copy < _WANTED_OF_COPY:
            short.append(f"{place}: {row.of_copy:.2f} of the copy bandwidth")
    gather = issue.get("calls", {}).get("sparse_all_gather")
    if gather is not None and gather["median_us"] > _WANTED_ISSUE_US:
        short.append(f"issuing a sparse all-gather: {gather['median_us']:.0f} us")
    return short


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

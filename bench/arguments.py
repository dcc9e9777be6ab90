"""The flags of the collective cases: nccl-tests' letters, and long ones of our own."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["DTYPES", "LAUNCHED", "Options", "parse"]

# What follows this flag was added by `bench.launch`, and is not what a person gave.
LAUNCHED = "--launched"

# Names as in nccl-tests; NumPy has no bfloat16.
DTYPES = {
    "int8": "int8",
    "uint8": "uint8",
    "int32": "int32",
    "int64": "int64",
    "half": "float16",
    "float": "float32",
    "double": "float64",
}
_BACKENDS = {"local": "local", "torch": "torch", "gloo": "torch", "mpi": "mpi", "nccl": "nccl"}
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

# Flags of nccl-tests and of our other cases that somebody may try here.
_REFUSED = {
    ("-m", "--agg_iters"): "every operation is timed on its own",
    ("-N", "--run_cycles"): "repeat the command instead",
    ("-r", "--root"): "no collective here has a root",
    ("-z", "--blocking"): "every operation is waited for and every iteration begins with a barrier",
    ("-K", "--per_iter_skip"): "the first sample is always dropped; use -w for more warm-up",
    ("-C", "--report_cputime"): "times are wall-clock times",
    ("-S", "--report_timestamps"): "the JSON has start and end",
    ("-G", "--cudagraph"): "every operation is issued on its own",
    ("-M", "--memory"): "the JSON has peak_staging_bytes of every row",
    ("-u", "--unalign"): "buffers are aligned as NumPy and CuPy align them",
    ("-t", "--nthreads"): "use --ranks with --backend local for threads as ranks",
    ("-g", "--ngpus"): "a rank has one GPU",
    ("-p", "--parallel_init"): "ranks start in parallel anyway",
    ("-R", "--local_register"): "the back ends here register nothing",
    ("-D", "--device_implementation"): "the back ends here have no device kernels",
    ("-V", "--device_cta_count"): "the back ends here have no device kernels",
    ("--split",): "the group is all ranks",
    ("--trace",): "use --matrix or --skew",
    ("--overlap",): "operations are blocking here",
    ("--drop-warmup",): "it belongs to routing traces",
    ("--cluster",): "links are those that the ranks have",
    ("--hosts",): "start the ranks with mpirun or torchrun for other hosts",
    ("--rate",): "links are those that the ranks have",
    ("--ranks-per-host",): "start the ranks with mpirun or torchrun for other hosts",
}


@dataclass(frozen=True)
class Options:
    """What a person asked for.

    Attributes:
        case: name of the collective.
        arguments: the command line as given, without the case.
        sizes: bytes of the whole array, ascending.
        step: ``("step_factor", 2)`` or ``("step_bytes", n)``, for the record.
        average: how one number comes from those of all ranks: 0 rank 0's, 1 average, 2 min, 3 max.
        backends: to start ranks over, in this order; empty for what the launcher or the default gives.
        ranks: to start; None for what the launcher has started, or two.
        matrix: file with the bytes from each rank to each other one.
        launched: this process is one of the ranks that this program has started.
    """

    case: str
    arguments: tuple[str, ...]
    sizes: tuple[int, ...]
    step: tuple[str, int]
    iterations: int
    warmup: int
    checks: int
    ops: tuple[str, ...]
    dtypes: tuple[str, ...]
    average: int
    per_iteration: bool
    latency: bool
    output: Path | None
    timeout_s: float
    backends: tuple[str, ...]
    ranks: int | None
    algorithm: str
    density: float
    skew: str
    matrix: Path | None
    summary: bool
    num_chunks: int
    seed: int
    launched: bool

    @property
    def command(self) -> str:
        return " ".join(["python -m bench", self.case, *self.arguments])

    @property
    def num_steps(self) -> int:
        """Iterations of every kind; one sample after the warm-up is dropped."""
        return self.warmup + 1 + self.iterations


def parse(case: str, ops: Sequence[str], skews: Sequence[str], is_sparse: bool, arguments: Sequence[str]) -> Options:
    """Reads the command line of a collective case, or ends the program with a message that names the flag.

    Args:
        ops: reductions that the case knows; none leaves ``-o`` out.
        skews: values of ``--skew``, the default first.
        is_sparse: whether the case moves hot chunks, rather than traffic between ranks.
    """
    parser = _parser(case, ops, skews, is_sparse)
    found = parser.parse_args(list(arguments))
    if found.matrix is not None:
        for flag in ("minbytes", "maxbytes", "stepbytes", "stepfactor", "skew", "chunks"):
            if getattr(found, flag) is not None:
                parser.error(f"--matrix: expected no --{flag} beside it, as the file says what travels")
    if found.stepbytes is not None and found.stepfactor is not None:
        parser.error("-i: expected either -i or -f, got both")
    smallest = 32 << 20 if found.minbytes is None else found.minbytes
    largest = max(32 << 20, smallest) if found.maxbytes is None else found.maxbytes
    if smallest > largest:
        parser.error(f"-b: expected at most -e ({largest} bytes), got {smallest}")
    if found.stepfactor is not None:
        step = ("step_factor", found.stepfactor)
    else:
        step = ("step_bytes", 1 << 20 if found.stepbytes is None else found.stepbytes)
    return Options(
        case=case,
        arguments=_as_given(arguments),
        sizes=_sizes(smallest, largest, step),
        step=step,
        iterations=found.iters,
        warmup=found.warmup_iters,
        checks=min(found.check, found.iters),
        ops=tuple(ops) if found.op == "all" else (found.op,),
        dtypes=tuple(DTYPES) if found.datatype == "all" else (found.datatype,),
        average=found.average,
        per_iteration=bool(found.per_iter_timing),
        latency=found.latency,
        output=found.json,
        timeout_s=found.timeout,
        backends=found.backend,
        ranks=found.ranks,
        algorithm=found.algorithm,
        density=found.density,
        skew=found.skew or skews[0],
        matrix=found.matrix,
        summary=found.summary,
        num_chunks=found.chunks or 64,
        seed=found.seed,
        launched=found.launched,
    )


def _parser(case: str, ops: Sequence[str], skews: Sequence[str], is_sparse: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m bench {case}",
        description="Runs under mpirun or torchrun, or starts --ranks itself over each --backend.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-b", "--minbytes", type=_bytes, metavar="SIZE", help="smallest size (K, M, G are binary); default 32M")
    add("-e", "--maxbytes", type=_bytes, metavar="SIZE", help="largest size; default 32M")
    add("-i", "--stepbytes", type=_bytes, metavar="SIZE", help="increment between sizes; default 1M")
    add("-f", "--stepfactor", type=_at_least(2), metavar="N", help="factor between sizes instead")
    add("-n", "--iters", type=_at_least(1), default=20, metavar="N", help="timed iterations")
    add("-w", "--warmup_iters", type=_at_least(0), default=5, metavar="N", help="untimed iterations before them")
    add("-c", "--check", type=_at_least(0), default=1, metavar="N", help="checked iterations, 0 for none")
    add("-d", "--datatype", choices=[*DTYPES, "all"], default="float")
    add("-a", "--average", type=int, choices=range(4), default=3, help="0 rank 0's, 1 average, 2 min, 3 max over ranks")
    add("-I", "--per_iter_timing", type=int, choices=range(2), nargs="?", const=1, default=0, help="single iterations")
    add("-T", "--timeout", type=_positive, default=300.0, metavar="S", help="seconds for each row of the table")
    add("-J", "--json", "--output_file", type=Path, metavar="FILE", help="record in JSON")
    add("--backend", type=_backends, default=(), metavar="LIST", help="of local, torch (or gloo), mpi, nccl")
    add("--ranks", type=_at_least(1), metavar="N", help="ranks to start; default 2")
    add("--seed", type=int, default=0, help="which chunks or ranks are hot")
    add("--latency", action="store_true", help="the OSU benchmarks' view instead of the table")
    if ops:
        add("-o", "--op", choices=[*ops, "all"], default=ops[0])
    if is_sparse:
        add("--chunks", type=_at_least(1), metavar="N", help="that the array is cut in; default 64")
        add("--density", type=_fraction, default=0.125, help="share of the chunks that are hot")
        add("--skew", choices=skews, help="owners of the hot chunks: all alike (default) or one")
        add("--algorithm", default="auto", help="of the plan: auto, direct or dense")
        parser.set_defaults(matrix=None, summary=False)
    else:
        add("--chunks", type=_at_least(1), metavar="N", help="experts on all ranks, for --skew; default 64")
        add("--skew", choices=skews, help="default uniform")
        add("--matrix", type=Path, metavar="FILE", help="bytes from rank (row) to rank (column)")
        add("--summary", action="store_true", help="a line for each rank")
        parser.set_defaults(density=1.0, algorithm="direct")
    # Ranks that this program has started must not start others, whatever their environment looks like.
    add(LAUNCHED, action="store_true", help=argparse.SUPPRESS)
    refused: dict[tuple[str, ...], str] = dict(_REFUSED)
    if not ops:
        refused[("-o", "--op")] = "nothing is reduced"
        parser.set_defaults(op="none")
    if is_sparse:
        refused |= {("--matrix",): "it belongs to all_to_all", ("--summary",): "it belongs to all_to_all"}
    else:
        refused |= {("--density",): "use --skew or --matrix", ("--algorithm",): "there is one"}
    for names, reason in refused.items():
        add(*names, action=_Refuse, nargs="?", reason=reason, help=argparse.SUPPRESS)
    return parser


class _Refuse(argparse.Action):
    """A flag that exists elsewhere, and why not here."""

    def __init__(self, *, reason: str, **more: Any) -> None:
        super().__init__(**{**more, "default": argparse.SUPPRESS})
        self._reason = reason

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.error(f"{'/'.join(self.option_strings)} is not offered here: {self._reason}")


def _as_given(arguments: Sequence[str]) -> tuple[str, ...]:
    listed = list(arguments)
    return tuple(listed[: listed.index(LAUNCHED)] if LAUNCHED in listed else listed)


def _sizes(smallest: int, largest: int, step: tuple[str, int]) -> tuple[int, ...]:
    kind, amount = step
    sizes = [smallest]
    while (following := sizes[-1] * amount if kind == "step_factor" else sizes[-1] + amount) <= largest:
        sizes.append(following)
    return tuple(sizes)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)", text.upper())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected bytes such as 4096, 4K, 64M or 1G, got {text!r}")
    return int(match[1]) * _UNITS[match[2]]


def _at_least(smallest: int) -> Any:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {smallest}, got {text!r}")
        return int(text)

    return number


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def _fraction(text: str) -> float:
    value = _positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"expected a share of at most 1, got {text!r}")
    return value


def _backends(text: str) -> tuple[str, ...]:
    names = text.split(",")
    for name in names:
        if name not in _BACKENDS:
            raise argparse.ArgumentTypeError(f"back end {name!r} is unknown; expected a list of {', '.join(_BACKENDS)}")
    return tuple(dict.fromkeys(_BACKENDS[name] for name in names))

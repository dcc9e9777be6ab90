"""Starts the ranks of a case over each back end that was asked for, and puts their records together."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sparsecoll as sc
from bench.arguments import LAUNCHED, Options
from bench.report import merge_records, write_record

__all__ = ["run_all", "run_ranks"]

_DEFAULT_RANKS = 2
_GRACE_S = 10.0
_NEEDS = {"local": "sparsecoll", "torch": "torch", "mpi": "mpi4py", "nccl": "cupy"}
_EXTRAS = {"nccl": "cuda13"}


def run_all(options: Options, run_rank: Callable[[sc.Group], dict[str, Any]]) -> dict[str, Any]:
    """Runs the case over one back end after the other; a missing one is reported and counts as failed.

    Args:
        run_rank: measures on one rank and returns the record, for threads as ranks.
    """
    backends = options.backends or ("local",)
    records, errors = {}, []
    for backend in backends:
        try:
            records[backend] = _run(backend, options, run_rank)
        except sc.BackendUnavailable as error:
            errors.append(f"back end {backend} is not available: {error}")
        except _JobFailed as error:
            errors.append(f"back end {backend} failed: {error}")
        else:
            continue
        print(f"# {errors[-1]}", flush=True)
    record = merge_records(options, records, errors)
    if options.output is not None:
        write_record(record, options.output)
    return record


def run_ranks(backend: str, ranks: int, arguments: Sequence[str]) -> int:
    """Runs ``python -m bench <arguments>`` on ``ranks`` processes over a back end and returns the exit status."""
    command = [*_starter(backend, ranks), "-m", "bench", *arguments]
    # Ranks that share the machine would otherwise each use all of its cores.
    environ = {"OMP_NUM_THREADS": "1", **os.environ}
    sys.stdout.flush()
    return _wait(subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL))


class _JobFailed(Exception):
    """Ranks in processes of their own have ended without a record; they have said why."""


def _run(backend: str, options: Options, run_rank: Callable[[sc.Group], dict[str, Any]]) -> dict[str, Any]:
    ranks = options.ranks or _DEFAULT_RANKS
    if importlib.util.find_spec(_NEEDS[backend]) is None:
        extra = _EXTRAS.get(backend, backend)
        raise sc.BackendUnavailable(f'expected {_NEEDS[backend]}, try pip install "sparsecoll[{extra}]"')
    if backend == "local":
        num_rows = len(options.sizes) * len(options.ops) * len(options.dtypes)
        return sc.run_local(run_rank, ranks, timeout_s=options.timeout_s * (num_rows + 1))[0]
    with tempfile.TemporaryDirectory(prefix="sparsecoll-bench-") as folder:
        output = Path(folder, "record.json")
        arguments = [options.case, *options.arguments, LAUNCHED, "--backend", backend, "--ranks", str(ranks)]
        status = run_ranks(backend, ranks, [*arguments, "--json", str(output)])
        if not output.exists():
            raise _JobFailed(f"{ranks} ranks ended with status {status}")
        record: dict[str, Any] = json.loads(output.read_text())
        return record


def _starter(backend: str, ranks: int) -> list[str]:
    if backend in ("torch", "nccl"):
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise sc.BackendUnavailable('expected mpirun on the PATH, try pip install "sparsecoll[mpi]"')
    return [found, "-n", str(ranks), sys.executable]


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Waits for a launcher, and does not leave it behind if this process has to end."""
    with _terminable():
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                # Ctrl-C has reached the launcher too; it gets a while to end its ranks.
                process.terminate()
                try:
                    process.wait(_GRACE_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Makes SIGTERM an exception, so that what was started is ended too."""

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)

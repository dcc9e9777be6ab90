"""One rank that `tests.harness` has started: ``python -m tests.worker FOLDER [RANK]``."""

from __future__ import annotations

import faulthandler
import importlib
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from sparsecoll.transport.base import HostTransport, Transport

__all__ = [
    "STACKS_SIGNAL",
    "CheckResults",
    "Folder",
    "Job",
    "Outcome",
    "on_device",
    "open_transport",
    "resolve",
    "run_checks",
]

CheckResults = dict[tuple[str, int], str | None]

# Not SIGUSR1, which MPICH takes for itself.
STACKS_SIGNAL = signal.SIGUSR2

_MPI_RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK")
_START_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Job:
    """What every rank does.

    Attributes:
        backend: ``gloo``; ``mpi``; ``nccl``, which meets over Gloo; or ``torch-nccl``, torch's own process group.
    """

    target: str
    arguments: tuple[Any, ...]
    world_size: int
    backend: str
    timeout_s: float


@dataclass
class Outcome:
    """What became of a rank.

    Attributes:
        ended_s: seconds since the epoch.
        exit_code: of the process, negative for a signal; of the whole job under MPI. None when it had to be killed.
        stacks: of all its threads, when it did not end in time.
    """

    rank: int
    value: Any = None
    exception: BaseException | None = None
    traceback: str = ""
    ended_s: float = field(default_factory=time.time)
    exit_code: int | None = None
    stacks: str = ""

    @property
    def is_good(self) -> bool:
        return not self.traceback and self.exit_code == 0


class Folder:
    """The files through which a job and its ranks speak."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rendezvous = path / "rendezvous"

    def write_job(self, job: Job) -> None:
        (self.path / "job").write_bytes(pickle.dumps(job))

    def read_job(self) -> Job:
        job: Job = pickle.loads((self.path / "job").read_bytes())
        return job

    def write_outcome(self, outcome: Outcome) -> None:
        scratch = self.path / f"outcome.{outcome.rank}.part"
        scratch.write_bytes(_pickle(outcome))
        scratch.rename(self._outcome(outcome.rank))

    def read_outcome(self, rank: int) -> Outcome | None:
        path = self._outcome(rank)
        outcome: Outcome | None = pickle.loads(path.read_bytes()) if path.exists() else None
        return outcome

    def has_all_outcomes(self, world_size: int) -> bool:
        return all(self._outcome(rank).exists() for rank in range(world_size))

    def stacks(self, rank: int) -> Path:
        return self.path / f"stacks.{rank}"

    def output(self, rank: int | str) -> Path:
        return self.path / f"output.{rank}"

    def shared_memory(self, rank: int) -> Path:
        return self.path / f"shared_memory.{rank}"

    def pid(self, rank: int) -> Path:
        return self.path / f"pid.{rank}"

    def _outcome(self, rank: int) -> Path:
        return self.path / f"outcome.{rank}"


def _pickle(outcome: Outcome) -> bytes:
    try:
        data = pickle.dumps(outcome)
        pickle.loads(data)  # exceptions with arguments of their own pickle well and then fail to load
    except Exception as exc:
        outcome.traceback += f"\n(could not be pickled: {exc})"
        outcome.value = outcome.exception = None
        data = pickle.dumps(outcome)
    return data


def open_transport(job: Job, num_ranks: int | None = None) -> Transport | None:
    """A new transport over the last ``num_ranks`` ranks, by default all; None on the others. Collective over all.

    The last, so that the ranks of a smaller group are not those of the job.
    """
    begin = job.world_size - (num_ranks or job.world_size)
    if job.backend == "mpi":
        from mpi4py import MPI

        from sparsecoll.transport.mpi import MpiTransport

        comm = None
        if begin:
            comm = MPI.COMM_WORLD.Split(0 if MPI.COMM_WORLD.rank >= begin else MPI.UNDEFINED)
            if comm == MPI.COMM_NULL:
                return None
        return MpiTransport(comm, timeout_s=job.timeout_s)

    import torch.distributed as dist

    from sparsecoll.transport.torch import TorchTransport, own_group

    if not begin:
        return on_device(TorchTransport(own_group(job.timeout_s), owned=True), job.backend)
    group = dist.new_group(list(range(begin, job.world_size)), backend="gloo")
    dist.barrier()  # a rank that is through with its group would break it for those that still connect
    return on_device(TorchTransport(group, owned=True), job.backend) if dist.get_rank() >= begin else None


def on_device(control: HostTransport, backend: str, timeout_s: float = _START_TIMEOUT_S) -> Transport:
    """The transport of a back end's device memory, which meets over ``control``; that itself for ``gloo``.

    Collective. Ranks take devices in turn, and the calling thread's current device is the rank's from here on.
    """
    if backend == "gloo":
        return control
    import torch
    import torch.distributed as dist

    from sparsecoll.cuda.device import cuda_device, num_devices

    gpu = cuda_device(dist.get_rank() % num_devices())
    torch.cuda.set_device(gpu.index)
    gpu.use()
    if backend == "nccl":
        from sparsecoll.transport.nccl import NcclTransport, find_library

        return NcclTransport(control, gpu, find_library(), timeout_s=timeout_s)
    from sparsecoll.transport.torch_stream import TorchStreamTransport

    group = dist.new_group(backend="nccl", timeout=timedelta(seconds=timeout_s))
    assert isinstance(group, dist.ProcessGroup)
    return TorchStreamTransport(control, group, gpu)


def _note_shared_memory(folder: Folder, rank: int) -> None:
    """Tells the harness what MPICH leaves in /dev/shm when a rank is killed."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split()[-1] for line in maps if "/dev/shm/mpich" in line}
    folder.shared_memory(rank).write_text("\n".join(sorted(paths)))


def run_checks(job: Job) -> CheckResults:
    """Runs each check on a transport of its own, so that one may fail or break its transport and the next go on."""
    results: CheckResults = {}
    checks, world_sizes = job.arguments
    for world_size in world_sizes:
        for check in checks:
            transport = open_transport(job, world_size)
            if transport is None:
                continue
            try:
                resolve(check)(transport)
                results[check, world_size] = None
            except Exception as exc:
                results[check, world_size] = traceback.format_exc()
                transport.abort(f"{type(exc).__name__}: {exc}")
            finally:
                transport.close()
    return results


def resolve(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def _run(job: Job) -> Any:
    if job.target == "run_checks":
        return run_checks(job)
    transport = open_transport(job)
    assert transport is not None
    try:
        return resolve(job.target)(transport, *job.arguments)
    except BaseException as exc:
        transport.abort(f"{type(exc).__name__}: {exc}")
        raise
    finally:
        transport.close()


def main() -> None:
    folder = Folder(Path(sys.argv[1]))
    rank = int(
        sys.argv[2] if len(sys.argv) > 2 else next(os.environ[name] for name in _MPI_RANKS if name in os.environ)
    )
    faulthandler.register(STACKS_SIGNAL, folder.stacks(rank).open("w"), all_threads=True)
    folder.pid(rank).write_text(str(os.getpid()))
    job = folder.read_job()
    outcome = Outcome(rank)
    try:
        if job.backend != "mpi":
            _init_gloo(folder, rank, job)
        else:
            importlib.import_module("mpi4py.MPI")
            _note_shared_memory(folder, rank)
        outcome.value = _run(job)
    except BaseException as exc:  # whatever ends a rank is its outcome
        outcome.exception, outcome.traceback = exc, traceback.format_exc()
    outcome.ended_s = time.time()
    folder.write_outcome(outcome)
    if outcome.exception is not None and job.backend == "mpi":
        _end_mpi_job(folder, job.world_size)
    if job.backend != "mpi":
        import torch.distributed as dist

        if dist.is_initialized():  # torch left to itself now and then aborts when Python ends
            dist.destroy_process_group()
    sys.exit(outcome.exception is not None)


def _init_gloo(folder: Folder, rank: int, job: Job) -> None:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder.rendezvous}",
        rank=rank,
        world_size=job.world_size,
        timeout=timedelta(seconds=job.timeout_s),
    )


def _end_mpi_job(folder: Folder, world_size: int) -> None:
    """The others would wait for this rank in MPI's finalization; they get a while to tell their own outcome."""
    from mpi4py import MPI

    deadline_s = time.monotonic() + 3.0
    while time.monotonic() < deadline_s and not folder.has_all_outcomes(world_size):
        time.sleep(0.02)
    MPI.COMM_WORLD.Abort(1)


if __name__ == "__main__":
    # Not as __main__, or what is pickled here could not be found by the harness.
    importlib.import_module("tests.worker").main()

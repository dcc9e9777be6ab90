"""The only reader of environment variables.

An argument wins over the environment, and the environment over the default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from sparsecoll.errors import InvalidArgument

__all__ = ["Config", "Launcher"]

_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


@dataclass(frozen=True)
class Config:
    """Settings of a process.

    Attributes:
        timeout_s: ``SPARSECOLL_TIMEOUT_S``, how long a collective may take before it raises.
        checked: ``SPARSECOLL_CHECKED``, whether every call starts with an exchange of digests; None where nothing
            is said.
    """

    timeout_s: float = 300.0
    checked: bool | None = None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Config:
        """Reads ``SPARSECOLL_*``; unknown names and unreadable values raise `InvalidArgument`."""
        environ = os.environ if environ is None else environ
        config = cls()
        for name, text in environ.items():
            if not name.startswith("SPARSECOLL_"):
                continue
            if name == "SPARSECOLL_TIMEOUT_S":
                config = cls(_positive_float(name, text), config.checked)
            elif name == "SPARSECOLL_CHECKED":
                config = cls(config.timeout_s, _boolean(name, text))
            else:
                raise InvalidArgument(f"config: expected SPARSECOLL_TIMEOUT_S or SPARSECOLL_CHECKED, got {name}")
        return config


@dataclass(frozen=True)
class Launcher:
    """What started this process, and where it says that this rank sits. None where it says nothing.

    Attributes:
        name: ``mpirun``, ``torchrun`` or ``alone``.
        node: its name or number for the node.
        rank: its number of the rank, in the whole job.
        local_rank: number of the rank among those of its node.
        local_size: number of ranks on the node.
    """

    name: str
    node: str | None = None
    rank: int | None = None
    local_rank: int | None = None
    local_size: int | None = None

    # Hydra (MPICH, Intel MPI), PRRTE and Open MPI, and Slurm's PMIx plug-in each leave one of these.
    _MPI = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK")
    _TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    # Node, rank, local rank, local size; a name that no launcher sets stands for what it does not say.
    _SEATS = (
        ("torchrun", ("GROUP_RANK", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")),
        ("mpirun", ("PMI_HOSTNAME", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")),  # Hydra
        ("mpirun", ("", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")),
        ("mpirun", ("", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE")),
    )
    # Slurm's own, for programs that srun starts; it is asked last, as mpirun may have been started under it.
    _SLURM = ("SLURM_NODEID", "SLURM_PROCID", "SLURM_LOCALID", "")

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Launcher:
        environ = os.environ if environ is None else environ
        if any(name in environ for name in cls._MPI):
            launcher = "mpirun"
        elif all(name in environ for name in cls._TORCHRUN):
            launcher = "torchrun"
        else:
            launcher = "alone"
        for name, (node, rank, local_rank, local_size) in (*cls._SEATS, (launcher, cls._SLURM)):
            if name == launcher and (node in environ or local_rank in environ):
                numbers = (_number(environ.get(each)) for each in (rank, local_rank, local_size))
                return cls(launcher, environ.get(node) or None, *numbers)
        return cls(launcher)


def _number(text: str | None) -> int | None:
    """A count; None for anything else, as launchers' variables are not ours to refuse."""
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 10 else None


def _positive_float(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise InvalidArgument(f"config: expected {name} to be a positive number, got {text!r}")
    return value


def _boolean(name: str, text: str) -> bool:
    if text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE
    raise InvalidArgument(f"config: expected {name} to be 0 or 1, got {text!r}")

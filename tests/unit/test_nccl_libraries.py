"""NCCL through nccl4py, as far as its face goes: nonblocking communicators, and what becomes of errors."""

from __future__ import annotations

import enum
import time
from typing import Any

import pytest

from sparsecoll.transport.nccl import Nccl4pyLibrary


class Result(enum.IntEnum):
    Success = 0
    RemoteError = 6
    InProgress = 7


class NCCLError(Exception):
    pass


class Bindings:
    """What ``nccl.bindings.nccl`` has; a communicator is the list of what it will answer next."""

    Result, NCCLError = Result, NCCLError

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    class Config:
        blocking = -(2**31)
        ptr = 77

    def get_unique_id(self) -> bytes:
        return bytes(range(128))

    def comm_init_rank_scalable(self, *arguments: Any) -> list[Result]:
        self.calls.append(("init", *arguments))
        return [Result.InProgress, Result.InProgress]

    def comm_get_async_error(self, comm: list[Result]) -> int:
        return comm.pop(0) if comm else Result.Success

    def group_start(self) -> None:
        self.calls.append(("start",))

    group_end = group_start

    def send(self, *arguments: Any) -> None:
        self.calls.append(("send", *arguments))

    def recv(self, *arguments: Any) -> None:
        self.calls.append(("recv", *arguments))


def test_calls_have_the_arguments_of_the_bindings() -> None:
    bindings = Bindings()
    library = Nccl4pyLibrary(bindings)
    assert library.unique_id() == bytes(range(128))
    comm = library.connect(4, bytes(128), 3)
    library.send(comm)(1000, 64, 1, 2, 5)
    library.recv(comm)(2000, 32, 1, 0, 5)
    assert bindings.calls == [
        ("init", 4, 3, 1, bytearray(128), 77),
        ("send", 1000, 64, 1, 2, comm, 5),
        ("recv", 2000, 32, 1, 0, comm, 5),
    ]


def test_what_is_in_progress_is_waited_for() -> None:
    library = Nccl4pyLibrary(Bindings())
    comm = [Result.InProgress] * 3
    assert library.problem(comm) is None
    library.settle(comm, time.monotonic() + 5.0)
    assert not comm


def test_what_stays_in_progress_is_a_timeout_and_an_error_is_named() -> None:
    library = Nccl4pyLibrary(Bindings())
    with pytest.raises(TimeoutError):
        library.settle([Result.InProgress] * 10**6, time.monotonic() + 0.01)
    with pytest.raises(RuntimeError, match="RemoteError"):
        library.settle([Result.InProgress, Result.RemoteError, Result.RemoteError], time.monotonic() + 5.0)
    assert "RemoteError" in (library.problem([Result.RemoteError]) or "")
    assert NCCLError in library.errors


def test_the_real_bindings_have_that_face() -> None:
    bindings = pytest.importorskip("nccl.bindings.nccl")
    for name in ("get_unique_id", "comm_init_rank_scalable", "comm_get_async_error", "comm_abort", "comm_destroy"):
        assert hasattr(bindings, name)
    for name in ("send", "recv", "all_gather", "group_start", "group_end", "NCCLError", "Result"):
        assert hasattr(bindings, name)
    config = bindings.Config()
    config.blocking = 0
    assert config.blocking == 0 and config.ptr

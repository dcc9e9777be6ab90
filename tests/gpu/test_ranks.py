"""Everything that ranks do on GPUs, several of them on one where there are not enough: one start for all checks.

Ranks on one GPU are different hosts to NCCL, whose messages then go through sockets: right or wrong, never fast.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.gpu import conformance, fssdp_checks, graph_checks, stream_checks
from tests.gpu.machine import num_gpus, reason_to_skip

# The first test of a start waits for all of its checks.
pytestmark = pytest.mark.timeout(600)

CHECKS = [*conformance.CHECKS, *stream_checks.CHECKS, *fssdp_checks.CHECKS, *graph_checks.CHECKS]
STARTS = [("nccl", 2, check) for check in CHECKS]
STARTS += [("nccl", 4, check) for check in CHECKS]
STARTS += [("torch-nccl", 2, check) for check in [*conformance.CHECKS, *fssdp_checks.CHECKS[:1]]]


def name_of(value: object) -> str | None:
    """Of a check, without its folder."""
    return value.removeprefix("tests.gpu.") if isinstance(value, str) else None


@pytest.mark.parametrize(("backend", "world_size", "check"), STARTS, ids=name_of)
def test_check(backend: str, world_size: int, check: str, failure_of: Callable[[str, int, str], str | None]) -> None:
    failure = failure_of(backend, world_size, check)
    assert failure is None, failure


@pytest.mark.skipif(num_gpus() < 2, reason=str(reason_to_skip(2)))
@pytest.mark.parametrize(
    ("backend", "world_size", "check"), [("nccl", min(8, num_gpus()), each) for each in CHECKS], ids=name_of
)
def test_one_rank_per_gpu(
    backend: str, world_size: int, check: str, failure_of: Callable[[str, int, str], str | None]
) -> None:
    """Over NVLink, where there is some."""
    failure = failure_of(backend, world_size, check)
    assert failure is None, failure

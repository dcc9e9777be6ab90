"""Kernel checks under compute-sanitizer, where it works: no access outside of memory, no race in shared memory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ERROR = 9
LIMIT_S = 75
pytestmark = pytest.mark.timeout(2 * LIMIT_S + 30)

PLANTED = """
import cupy
write = cupy.RawKernel('extern "C" __global__ void f(int* x) { x[1 << 20] = 1; }', "f")
write((1,), (1,), (cupy.zeros(1, "i4"),))
cupy.cuda.runtime.deviceSynchronize()
"""
SUBSETS = {
    "memcheck": [
        *("test_permute_rows[16-0]", "test_permute_rows[4096-0]", "test_permute_rows[4097-5]"),
        *("test_combine[bfloat16]", "test_combine_backward[float32]"),
        *("test_sum_replicas[bfloat16]", "test_sum_replicas[int8]", "test_pack[float32-bfloat16]"),
        *("test_pack[uint8-uint8]", "test_sort_by_expert[16384-352]", "test_sort_by_expert[300000-64]"),
    ],
    "racecheck": [
        "test_combine_backward[bfloat16]",
        "test_sort_by_expert[16384-352]",
        "test_sort_by_expert[300000-64]",
    ],
}


def sanitize(tool: str, *arguments: str) -> tuple[int | None, str]:
    """Exit status, None if it did not end in time, and output of Python under the tool."""
    command = ["compute-sanitizer", "--error-exitcode", str(ERROR), "--tool", tool, sys.executable, *arguments]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        # torch hands out parts of large blocks, within which no access is wrong; without it every tensor is its own.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]
    return process.returncode, output


@cache
def reason_to_skip() -> str | None:
    """Why the tool cannot be trusted here: it must find a write that is wrong on purpose."""
    if shutil.which("compute-sanitizer") is None:
        return "needs compute-sanitizer, which is not on the PATH"
    status, output = sanitize("memcheck", "-c", PLANTED)
    if status == ERROR:
        return None
    said = output.strip().splitlines()[-1:] or ["nothing"]
    return f"needs a compute-sanitizer that works, exit status {status}: {said[0]}"


@pytest.mark.parametrize("tool", SUBSETS)
def test_kernels_touch_their_own_memory_only(tool: str) -> None:
    if (reason := reason_to_skip()) is not None:
        pytest.skip(reason)
    tests: Sequence[str] = [f"tests/gpu/test_kernels.py::{name}" for name in SUBSETS[tool]]
    status, output = sanitize(tool, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "timeout=0", *tests)
    if status is None:
        pytest.skip(f"not through within {LIMIT_S} s")
    assert f"{len(tests)} passed" in output, output
    assert status == 0, output

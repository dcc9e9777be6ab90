"""Every example runs as its first lines say, and prints what a reader is to see."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LIMIT_S = 50.0
LAUNCHERS = {
    "alone": [sys.executable],
    "mpirun": [str(BIN / "mpirun"), "-n", "2", sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
}


def output_of(launcher: str, script: str, *arguments: str, exit_status: int = 0) -> str:
    """What the example writes to stdout; it must end in time, and leaves no process behind if it does not."""
    command = [*LAUNCHERS[launcher], str(ROOT / "examples" / script), *arguments]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    process = subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher then ends what it has started, in whatever session that lives
        try:
            process.communicate(timeout=5.0)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == exit_status, f"{output}\n{errors}"
    return output


def lines_of(output: str) -> list[str]:
    """What the ranks said; torchrun unbuffers them, so a line of one can come before the line end of another."""
    return sorted(each.strip() for each in re.split(r"(?=rank \d+ (?:owns|sent))", output) if each.startswith("rank "))


COLLECTIVES = {
    "all_gather.py": [
        "rank 0 owns chunks [0, 1], sent 0 bytes, holds rows [[0, 1, 2], [10, 11, 12], [30, 31, 32]]",
        "rank 1 owns chunks [2, 3], sent 24 bytes, holds rows [[20, 21, 22], [30, 31, 32]]",
    ],
    "reduce_scatter.py": [
        "rank 0 sent 12 bytes, owns chunks [0, 1] with sums [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]",
        "rank 1 sent 0 bytes, owns chunks [2, 3] with sums [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]",
    ],
    "all_to_all.py": [
        "rank 0 sent [1, 2] tokens, received from ranks [0, 1]",
        "rank 1 sent [1, 2] tokens, received from ranks [0, 0, 1, 1]",
    ],
}


@pytest.mark.parametrize("script", COLLECTIVES)
def test_collective_under_mpirun(script: str) -> None:
    assert lines_of(output_of("mpirun", script)) == COLLECTIVES[script]


def test_collective_under_torchrun() -> None:
    assert lines_of(output_of("torchrun", "all_to_all.py")) == COLLECTIVES["all_to_all.py"]


def test_collective_alone() -> None:
    rows = "[[0, 1, 2], [10, 11, 12], [20, 21, 22], [30, 31, 32]]"
    assert lines_of(output_of("alone", "all_gather.py")) == [
        f"rank 0 owns chunks [0, 1, 2, 3], sent 0 bytes, holds rows {rows}"
    ]


def test_wrap_your_model() -> None:
    output = output_of("mpirun", "wrap_your_model.py")
    losses = [float(loss) for loss in re.findall(r"^step +\d+: loss ([\d.]+)$", output, re.MULTILINE)]
    assert len(losses) == 6 and losses[-1] < 0.1 * losses[0], output
    tokens = re.search(r"^tokens of each expert: \[([\d, ]+)\]; copied to all ranks: \[.*\]$", output, re.MULTILINE)
    assert tokens and sum(map(int, tokens[1].split(", "))) == 2 * 256 * 2, output
    memory = re.search(r"^bytes on rank 0: parameters (\d+), optimizer (\d+)$", output, re.MULTILINE)
    assert memory and int(memory[2]) > 2 * int(memory[1]), output
    assert int(memory[1]) == 4 * (32 * 17 + 16 * 33 + 32 * 8 + 4 * 3 * 32 * 64), output


def test_train_moe_lm(tmp_path: Path) -> None:
    """Three steps are too few to pass, and it says so. That training passes is for ``make train`` to show."""
    arguments = ["--steps", "3", "--batch", "4", "--out", str(tmp_path)]
    output = output_of("mpirun", "train_moe_lm.py", *arguments, exit_status=1)
    assert output.rstrip().endswith("FAILED"), output
    losses = {
        name: re.findall(rf"^step +\d/3 +{name} +loss ([\d.]+)", output, re.MULTILINE)
        for name in ("FSSDP", "expert parallelism")
    }
    assert len(losses["FSSDP"]) == 3 and losses["FSSDP"] == losses["expert parallelism"], output
    record = json.loads((tmp_path / "summary.json").read_text())
    assert record["config"]["world_size"] == 2 and record["passed"] is False
    assert record["summary"]["last_loss"] < record["summary"]["first_loss"]
    assert 0 < record["summary"]["sparse_bytes"] < record["summary"]["dense_bytes"]
    assert (tmp_path / "report.png").stat().st_size > 0

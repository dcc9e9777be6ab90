"""``python -m sparsecoll.probe`` under each launcher: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import sparsecoll as sc

ROOT = Path(__file__).resolve().parents[2]
MPIRUN = str(Path(sys.executable).parent / "mpirun")
LIMIT_S = 50.0
LAUNCHERS = {
    "mpirun": [MPIRUN, "-n", "2", sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "two nodes": [MPIRUN, "-launcher", "fork", "-hosts", "a:1,b:1", "-n", "2", sys.executable],
}
USE = """
import sys, sparsecoll as sc
with sc.init_group(topology=sys.argv[1]) as group:
    same = group.topology == sc.Topology.load(sys.argv[1])
    sys.exit(0 if same and group.mean(group.rank) == 0.5 else 1)
"""


def ended(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs to the end; a timeout takes everything that was started with it."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # the launcher then ends what it has started
            process.communicate(timeout=10)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_shows_saves_and_can_be_used(launcher: str, tmp_path: Path) -> None:
    file = tmp_path / "topology.json"
    command = ["-m", "sparsecoll.probe", "--duration-s", "0.2", "--out", str(file)]
    run = ended(*LAUNCHERS[launcher], *command)
    assert run.returncode == 0, run.stderr
    topology = sc.Topology.load(file)
    assert topology.node_of == ((0, 1) if launcher == "two nodes" else (0, 0)), "as the launcher says"
    shown, written = run.stdout.rstrip().rsplit("\n", 1)
    assert shown == topology.table(), "by one rank only"
    assert written.startswith(f"written to {file}")
    script = tmp_path / "use.py"
    script.write_text(USE)
    used = ended(*LAUNCHERS[launcher], str(script), str(file))
    assert used.returncode == 0, used.stderr


def test_alone_there_are_no_links() -> None:
    run = ended(sys.executable, "-m", "sparsecoll.probe")
    assert (run.returncode, run.stdout, run.stderr) == (0, "1 rank on 1 node\n", "")


def test_misuse_ends_all_ranks_with_status_2(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere" / "topology.json"
    for arguments, message in (
        (["--out", str(nowhere), "--duration-s", "0.1"], f"expected a writable path, got {nowhere}"),
        (["--duration-s", "0"], "expected duration_s > 0, got 0.0"),
        (["--backend", "smoke"], "invalid choice: 'smoke'"),
    ):
        run = ended(*LAUNCHERS["mpirun"], "-m", "sparsecoll.probe", *arguments)
        assert run.returncode == 2, run.stderr
        assert message in run.stderr
        assert "Traceback" not in run.stderr

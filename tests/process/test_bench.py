"""``python -m bench`` for the three collectives and parity, under launchers: the table, the record, how it fails."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bench.__main__ as bench
import sparsecoll as sc
from bench import traffic
from bench.busiest import Busiest
from bench.collectives.all_gather import AllGatherTrial
from bench.parity_ways import WAYS, find_ways
from sparsecoll.balance import BALANCERS, Balance

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["-b", "4K", "-e", "16K", "-f", "4", "-n", "2"]
LAUNCHERS = {
    "local": [sys.executable],
    "mpi": [str(Path(sys.executable).parent / "mpirun"), "-n", "2", sys.executable],
    "torch": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
}
COLUMNS = "size count type useful wire density time algbw busbw bound eff xdense #wrong"
TOP_LEVEL = (
    "case command passed summary version start_time args env nccl_version config devices results "
    "out_of_bounds average_bus_bandwidth errors end_time commit seed world_size nodes link machine"
)
RESULT = (
    "size count type redop root out_of_place in_place actual_iterations experiment_name backend algorithm "
    "useful_bytes wire_bytes density bound_us dense_time_us peak_staging_bytes plan_digest"
)


def start(launcher: list[str], *arguments: str, timeout_s: float = 50) -> subprocess.CompletedProcess[str]:
    """Runs to the end; a timeout takes everything that was started with it."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*launcher, *arguments],
        cwd=ROOT,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=10)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def table(output: str) -> list[dict[str, str]]:
    """The rows by the names in the header; every other line is a comment."""
    lines = output.splitlines()
    header = next(line for line in lines if re.match(r"# +size ", line)).lstrip("#").split()
    return [dict(zip(header, line.split(), strict=True)) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("backend", LAUNCHERS)
@pytest.mark.parametrize("case", ["all_gather", "reduce_scatter", "all_to_all"])
def test_table_and_record(case: str, backend: str, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    ended = start(LAUNCHERS[backend], "-m", "bench", case, *SMALL, "--json", str(file))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = table(ended.stdout)
    assert [" ".join(row) for row in rows] == [COLUMNS] * 2
    assert [row["size"] for row in rows] == ["4096", "16384"]
    assert {row["#wrong"] for row in rows} == {"0"}
    record = json.loads(file.read_text())
    assert record.keys() >= set(TOP_LEVEL.split())
    assert (record["case"], record["passed"], record["world_size"], record["errors"]) == (case, True, 2, [])
    assert len(record["devices"]) == 2
    for row, result in zip(rows, record["results"], strict=True):
        assert result.keys() >= set(RESULT.split())
        assert result["backend"] == backend
        assert result["out_of_place"].keys() == {"time", "alg_bw", "bus_bw", "nwrong"}
        # One eighth of 64 chunks, half of them foreign; an all-to-all sends one half to the other rank.
        expected = result["size"] // 2 if case == "all_to_all" else result["size"] // 8 // 2
        assert result["wire_bytes"] == result["useful_bytes"] == int(row["wire"]) == expected
    ratio = "library_over_ours" if case == "all_to_all" else "dense_over_sparse"
    has_library = (case, backend) != ("all_to_all", "local")
    assert record["summary"].keys() == ({ratio, "time_over_copy"} if has_library else {"time_over_copy"})


def test_starts_ranks_over_each_back_end(tmp_path: Path) -> None:
    """Three ranks, shares of unequal size, integers; one record, whose command can be run again."""
    file = tmp_path / "record.json"
    arguments = ["reduce_scatter", "-b", "4K", "-e", "4K", "-n", "2", "-d", "int8", "--chunks", "7", "--density", "0.6"]
    arguments += ["--ranks", "3", "--backend", "mpi,local", "--json", str(file)]
    ended = start([sys.executable], "-m", "bench", *arguments)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    record = json.loads(file.read_text())
    assert record["command"] == " ".join(["python -m bench", *arguments])
    assert [result["backend"] for result in record["results"]] == ["mpi", "local"]
    first, second = record["results"]
    for name in ("size", "count", "useful_bytes", "wire_bytes", "density", "plan_digest"):
        assert first[name] == second[name]
    assert record["summary"]["mpi_time_over_copy"] == record["summary"]["time_over_copy"]


def test_missing_back_end_is_reported(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "mpi4py" else object())
    file = tmp_path / "record.json"
    status = bench.main(["all_gather", *SMALL, "--backend", "mpi,local", "--json", str(file)])
    assert status == 1
    assert "# back end mpi is not available" in capsys.readouterr().out
    record = json.loads(file.read_text())
    assert not record["passed"] and len(record["results"]) == 2 and "mpi" in record["errors"][0]


def test_wrong_data_fails(monkeypatch: Any, capsys: Any) -> None:
    right = AllGatherTrial.run

    def wrong(self: AllGatherTrial, step: int) -> None:
        right(self, step)
        if self.group.rank == 1:
            self.outputs["ours"][2, 1:4] += 1

    monkeypatch.setattr(AllGatherTrial, "run", wrong)
    assert bench.main(["all_gather", *SMALL]) == 1
    out = capsys.readouterr().out
    assert [row["#wrong"] for row in table(out)] == ["3", "3"]
    assert "# Out of bounds values : 6 FAILED" in out


def test_stale_output_counts_as_wrong(monkeypatch: Any, capsys: Any) -> None:
    """A collective that does nothing leaves poison, all of it wrong."""
    monkeypatch.setattr(AllGatherTrial, "run", lambda self, step: None)
    assert bench.main(["all_gather", "-b", "4K", "-e", "4K", "-n", "1", "--density", "1"]) == 1
    assert table(capsys.readouterr().out)[0]["#wrong"] == "2048"


def test_a_rank_that_raises_ends_the_job() -> None:
    # MPICH leaves its segment of shared memory when a job is aborted, so the rank that ends it takes it away.
    program = (
        "import pathlib, re\n"
        "import bench.__main__ as bench\n"
        "from bench.collectives.all_gather import AllGatherTrial as Trial\n"
        "right = Trial.run\n"
        "def run(self, step):\n"
        "    if self.group.rank == 1 and step == 2:\n"
        "        maps = pathlib.Path('/proc/self/maps').read_text()\n"
        "        for path in set(re.findall(r'/dev/shm/mpich_shm_\\w+', maps)): pathlib.Path(path).unlink()\n"
        "        raise KeyError('on purpose')\n"
        "    right(self, step)\n"
        "Trial.run = run\n"
        "bench._run()\n"
    )
    ended = start(LAUNCHERS["mpi"], "-c", program, "all_gather", *SMALL, timeout_s=20)
    assert ended.returncode != 0
    assert "KeyError: 'on purpose'" in ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["all_gather", "-m", "3"], "-m/--agg_iters is not offered here"),
        (["all_gather", "--matrix", "file"], "belongs to all_to_all"),
        (["all_to_all", "--density", "0.5"], "--density is not offered here"),
        (["all_to_all", "--matrix", "file", "-b", "4K"], "expected no --minbytes beside it"),
        (["reduce_scatter", "-b", "4X"], "expected bytes"),
        (["reduce_scatter", "--backend", "ucx"], "back end 'ucx' is unknown"),
    ],
)
def test_refuses_flags_by_name(arguments: list[str], reason: str, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert reason in capsys.readouterr().err


def test_views(capsys: Any) -> None:
    assert bench.main(["all_gather", *SMALL, "-I", "-c", "0"]) == 0
    rows = table(capsys.readouterr().out)
    assert " ".join(rows[0]) == f"{COLUMNS} i_min i_max i_p99 i_cv%" and rows[0]["#wrong"] == "N/A"
    assert bench.main(["all_gather", *SMALL, "--latency"]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines() if not line.startswith("#")]
    assert [(line[0], line[-1]) for line in lines] == [("4096", "Pass"), ("16384", "Pass")]


@pytest.mark.parametrize("skew", traffic.SKEWS)
def test_drawn_traffic(skew: str) -> None:
    matrix = traffic.draw_traffic(skew, 1 << 20, 64, 4, seed=3)
    assert matrix.shape == (4, 4) and (matrix >= 0).all() and (matrix % 16 == 0).all()
    sent, received = matrix.sum(axis=1), matrix.sum(axis=0)
    busy = sent[sent > 0]
    assert (busy > (1 << 20) - 4 * 16).all() and (busy <= 1 << 20).all()
    assert len(busy) == (3 if skew == "silent_rank" else 4)
    assert np.count_nonzero(received) == (3 if skew == "deaf_rank" else 4)
    largest = received.max() / received.sum()
    low, high = {"hot_rank": (0.49, 0.51), "hot_expert": (0.4, 0.5), "zipf": (0.26, 0.9)}.get(skew, (0.24, 0.34))
    assert low < largest < high


def test_matrix_file(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "matrix"
    file.write_text("0 1000 7\n32 160 0\n1 2 3\n")
    assert bench.main(["all_to_all", "--matrix", str(file), "-n", "2", "--summary"]) == 0
    out = capsys.readouterr().out
    (row,) = table(out)
    assert (row["size"], row["wire"], row["#wrong"]) == ("1152", "992", "0")
    assert re.search(r"#\s+0\s+992\s+32 ", out) and re.search(r"#\s+1\s+192\s+1152 ", out)


PARITY = ["parity", "--backend", "local", "--ranks", "2", "--steps", "4"]


def test_parity_goes_every_way() -> None:
    """Every balancer, and every option alone; what another way is held against comes with it."""
    assert set(BALANCERS) <= WAYS.keys()
    options = [(way.options, way.reentrant, way.reshard_every > 0) for way in WAYS.values()]
    for option in ({"calibrate": True}, {"rematerialize": True}, {"spread": "quota"}, {"sharding": "slices"}):
        assert (option, None, False) in options
    for option in ({}, {"calibrate": True}, {"rematerialize": True}):
        assert (option, True, False) in options and (option, False, False) in options
    assert ({}, None, True) in options
    ways = find_ways(["reentrant+calibrate", "none"])
    assert [way.name for way in ways] == ["plain", "calibrate", "checkpoint+calibrate", "reentrant+calibrate", "none"]


def test_parity_over_threads(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "record.json"
    assert bench.main([*PARITY, "--ways", "reshard+none,checkpoint+rematerialize", "--json", str(file)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    record = json.loads(file.read_text())
    rows = record["results"]
    names = ["plain", "reshard+none", "checkpoint", "checkpoint+rematerialize"]
    assert [row["way"] for row in rows] == [line[2] for line in lines] == [*names, *names, "plain", "plain"]
    assert {line[-1] for line in lines} == {"ok"}
    assert record["summary"].keys() == {"max_loss_rel_diff_fp32", "max_loss_rel_diff_fp64", "max_param_rel_diff_fp64"}
    plain, moved, again, gathered_again = rows[:4]
    assert (plain["dtype"], plain["optimizer"], plain["steps"]) == ("float64", "AdamW", 4)
    assert moved["sparse_bytes"] == 0 < moved["num_moves"]
    assert plain["sparse_bytes"] > 0 and 0 < again["sent_bytes"] < gathered_again["sent_bytes"]


def test_parity_over_processes(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    arguments = ["parity", "--backend", "mpi", "--ranks", "2", "--steps", "4", "--ways", "hecate"]
    ended = start([sys.executable], "-m", "bench", *arguments, "--json", str(file))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    record = json.loads(file.read_text())
    assert {(row["backend"], row["way"]) for row in record["results"]} == {("mpi", "plain"), ("mpi", "hecate")}


def test_parity_that_proves_nothing_fails(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(Busiest, "balance", lambda self, loads, base, costs: Balance(base))
    assert bench.main([*PARITY, "--ways", "none"]) == 1
    ends = {tuple(line.split()[index] for index in (2, -1)) for line in capsys.readouterr().out.splitlines()[1:5]}
    assert ends == {("plain", "UNPROVED"), ("none", "ok")}


def test_parity_of_other_gradients_fails(monkeypatch: Any, capsys: Any) -> None:
    right = sc.FSSDPModule.clip_grad_norm_

    def too_large(self: sc.FSSDPModule, max_norm: float) -> Any:
        norm = right(self, max_norm)
        for param in self.parameters():
            if param.grad is not None:
                param.grad *= 1.001
        return norm

    monkeypatch.setattr(sc.FSSDPModule, "clip_grad_norm_", too_large)
    assert bench.main([*PARITY, "--ways", "plain"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_parity_refuses_unknown_ways(capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(["parity", "--ways", "plain,sideways"])
    assert "got sideways" in capsys.readouterr().err

"""``python -m bench step``: short runs over Gloo, MPI and emulated hosts, and what they record."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.step.traces import Trace, save_trace

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--tokens", "32", "--width", "16", "--hidden", "24", "--experts", "8", "--every", "2"]

_LIMIT_S = 100
pytestmark = pytest.mark.timeout(_LIMIT_S + 20)


def _lacking() -> str | None:
    """Why this machine cannot emulate hosts."""
    if os.geteuid() != 0:
        return "root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"iproute2's {tool}"
    may_unshare = subprocess.run(["ip", "netns", "add", f"test-{os.getpid()}"], capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "delete", f"test-{os.getpid()}"], capture_output=True)
    return None if may_unshare else "the right to make network namespaces"


LACKING = _lacking()
needs_hosts = pytest.mark.skipif(LACKING is not None, reason=f"emulated hosts need {LACKING}")


def run(folder: Path, *arguments: str) -> tuple[int, str, dict[str, Any]]:
    """Status, output and record; a timeout takes everything that was started with it."""
    file = folder / "record.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", "step", *TINY, "-n", "2", "-w", "2", *arguments, "--json", str(file)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(timeout=_LIMIT_S)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=10)
    return process.returncode, out, json.loads(file.read_text()) if file.exists() else {}


def by_contest(record: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in record["results"]:
        found.setdefault((row["backend"], row["part"], row["routing"]), {})[row["contestant"]] = row
    return found


def test_gloo_and_everything(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).random((2, 2, 64, 8)).argsort(axis=-1)[..., :2].astype(np.uint8)
    save_trace(Trace(ids, 8, "a test's routing"), tmp_path / "routing.npz")
    status, out, record = run(
        tmp_path,
        *("--backend", "gloo", "--length", "8", "--routings", "recorded", "--trace", str(tmp_path / "routing.npz")),
        *("--balancers", "hecate,none,slices"),
    )
    assert status == 0, out
    assert (record["case"], record["passed"], record["errors"], record["world_size"]) == ("step", True, [], 2)
    contests = by_contest(record)
    assert list(contests) == [("torch", part, "recorded") for part in ("block", "step")]
    for (_, part, _), rows in contests.items():
        assert list(rows) == ["ep", "ideal", "hecate", "none", "slices", "fsdp2", "ddp"]
        for name, row in rows.items():
            assert len(row["times_s"]) == (1 if name in ("slices", "fsdp2", "ddp") else 2)
            compared = {"outputs", "gradients"} | ({"inputs"} if part == "block" else set())
            assert row["differences"].keys() == (set() if name in ("ep", "ideal") else compared)
            assert row["right"] and all(value < 1e-5 for value in row["differences"].values())
        assert rows["none"]["sparse_bytes"] == 0 and rows["none"]["hidden_fraction"] is None
        assert rows["slices"]["sparse_bytes"] > 0 and rows["slices"]["alone_s"] > 0
    names = {name.removeprefix("recorded_step_") for name in record["summary"] if name.startswith("recorded_step_")}
    assert names >= {"ep_over_fssdp", "fsdp2_over_fssdp", "ddp_over_fssdp", "fssdp_over_ideal", "slices_over_ideal"}
    assert record["best"].keys() == {"recorded_block", "recorded_step"}
    assert "a test's routing" in out and "# OK" in out
    assert (tmp_path / "record.png").read_bytes().startswith(b"\x89PNG")


def test_mpi_has_no_rivals_of_torchs_own(tmp_path: Path) -> None:
    status, out, record = run(
        tmp_path, "--backend", "mpi", "--length", "8", "--routings", "balanced", "--balancers", "quota"
    )
    assert status == 0, out
    for part, rows in zip(("block", "step"), by_contest(record).values(), strict=True):
        assert list(rows) == ["ep", "ideal", "quota"] and rows["quota"]["differences"]["gradients"] < 1e-5
        assert rows["quota"]["imbalance"] == 1
        assert record["summary"].keys() >= {
            f"mpi_balanced_{part}_ep_over_fssdp",
            f"mpi_balanced_{part}_quota_over_ideal",
        }


@needs_hosts
def test_hosts_choose_a_length(tmp_path: Path) -> None:
    arguments = ["--cluster", "--hosts", "2", "--rate", "400mbit", "--routings", "zipf12", "--balancers", "hecate"]
    status, out, record = run(tmp_path, *arguments)
    assert status == 0, out
    assert record["passed"] and record["dropped_packets"] == 0
    choice = record["choice"]
    assert choice["length"] >= 256 and choice["tokens"] % choice["length"] == 0
    assert choice["attention_s"] > choice["gather_s"] > 0
    assert f"length {choice['length']} (chosen)" in out
    (rows,) = by_contest(record).values()
    assert list(rows) == ["ep", "ideal", "hecate", "fsdp2", "ddp"]
    assert record["summary"].keys() >= {"zipf12_step_ep_over_fssdp", "zipf12_step_fsdp2_over_fssdp"}
    if rows["hecate"]["sparse_bytes"]:
        assert record["summary"].keys() >= {"hidden_fraction", "exposed_s"}

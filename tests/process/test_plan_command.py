"""``python -m sparsecoll.plan``: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sparsecoll as sc
from sparsecoll.plan.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


def ended(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sparsecoll.plan", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)


def test_explains_the_plan_of_a_hot_owner() -> None:
    run = ended("--ranks", "6", "--chunks", "4", "--chunk-bytes", "64K", "--owner", "2", "--algorithm", "direct")
    assert run.returncode == 0 and not run.stderr
    place = sc.Placement([2] * 4, np.ones((4, 6), bool))
    assert run.stdout == sc.plan_all_gather(place, 65536, sc.Topology.flat(6), "direct").explain() + "\n"


def test_writes_the_picture_and_the_trace(tmp_path: Path) -> None:
    page, trace = tmp_path / "plan.html", tmp_path / "plan.json"
    run = ended("--show", str(page), "--trace", str(trace), "--ranks", "4", "--op", "reduce_scatter")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        f"written to {page}, for a browser",
        f"written to {trace}, for ui.perfetto.dev or chrome://tracing",
    ]
    assert "<h1>reduce_scatter by " in page.read_text()
    assert json.loads(trace.read_text())["otherData"]["op"] == "reduce_scatter"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(arguments)
    return capsys.readouterr().out


def test_owners_holders_and_nodes_are_those_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """Each against the plan made by hand."""
    cases = {
        ("--ranks", "4"): sc.plan_all_gather(
            sc.Placement.even(8, 4).replicate(dict.fromkeys(range(8), range(4))), 1 << 20, sc.Topology.flat(4)
        ),
        ("--ranks", "3", "--chunks", "11", "--owners", "zipf", "--chunk-bytes", "2m"): sc.plan_all_gather(
            sc.Placement([0] * 6 + [1] * 3 + [2] * 2, np.ones((11, 3), bool)), 2 << 20, sc.Topology.flat(3)
        ),
        ("--ranks", "5", "--ranks-per-node", "2", "--owner", "4", "--algorithm", "hierarchical"): sc.plan_all_gather(
            sc.Placement([4] * 8, np.ones((8, 5), bool)), 1 << 20, sc.Topology((0, 0, 1, 1, 2)), "hierarchical"
        ),
        ("--holders", "random", "--density", "0"): sc.plan_all_gather(
            sc.Placement.even(8, 8), 1 << 20, sc.Topology.flat(8)
        ),
    }
    for arguments, plan in cases.items():
        assert printed(capsys, *arguments) == plan.explain() + "\n", arguments


def test_random_holders_follow_the_seed_and_the_density(capsys: pytest.CaptureFixture[str]) -> None:
    many = ("--holders", "random", "--chunks", "100", "--ranks", "10")
    texts = [printed(capsys, *many, *rest) for rest in ((), ("--seed", "0"), ("--seed", "1"), ("--density", "0.9"))]
    assert texts[0] == texts[1] and len(set(texts)) == 3
    holds = [sum(int(line.split()[2]) for line in text.splitlines()[5:15]) for text in texts]
    assert 250 <= holds[0] <= 400 and 850 <= holds[3] <= 950, "a quarter, and owners; nine in ten"


def test_topology_comes_from_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    topology = sc.Topology((0, 0, 1), sc.Link(3e9, 1e-6), sc.Link(1e8, 1e-5), sc.Link(2e8, 1e-5))
    topology.save(tmp_path / "topology.json")
    place = sc.Placement.even(8, 3).replicate(dict.fromkeys(range(8), range(3)))
    expected = sc.plan_all_gather(place, 1 << 20, topology).explain() + "\n"
    file = str(tmp_path / "topology.json")
    assert printed(capsys, "--topology", file) == printed(capsys, "--topology", file, "--ranks", "3") == expected
    with pytest.raises(sc.InvalidArgument, match=r"--ranks: expected 3 \(as --topology\), got 4"):
        main(["--topology", file, "--ranks", "4"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--owner", "8"], r"^plan: Placement: expected owners in 0\.\.7, got 8 for chunk 0$"),
        (["--topology", "/none/such.json"], r"^plan: Topology.load: expected a readable file at /none/such.json"),
        (["--show", "/none/such.html"], r"^plan: Plan.show: expected a writable path, got /none/such.html"),
        (["--ranks", "0"], r"argument --ranks: expected a number of at least 1, got '0'$"),
    ],
)
def test_misuse_ends_with_two_and_a_plain_message(arguments: list[str], message: str) -> None:
    run = ended(*arguments)
    assert run.returncode == 2 and not run.stdout
    assert "Traceback" not in run.stderr
    assert re.search(message, run.stderr.strip().splitlines()[-1]), run.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chunk-bytes", "1X"], "argument --chunk-bytes: expected bytes such as 4096, 64K or 1M, got '1X'"),
        (["--chunks", "-1"], "argument --chunks: expected a number of at least 1, got '-1'"),
        (["--density", "2", "--holders", "random"], "argument --density: expected a number from 0 to 1, got '2'"),
        (["--seed", "x", "--holders", "random"], "argument --seed: expected a number of at least 0, got 'x'"),
        (["--density", "0.5"], "--density and --seed: expected --holders random with them"),
        (["--seed", "0"], "--density and --seed: expected --holders random with them"),
        (["--owner", "0", "--owners", "zipf"], "argument --owners: not allowed with argument --owner"),
        (["--topology", "t", "--ranks-per-node", "2"], "argument --ranks-per-node: not allowed with"),
        (["--algorithm", "magic"], "argument --algorithm: invalid choice: 'magic'"),
    ],
)
def test_flags_that_do_not_fit_are_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_sizes_that_no_plan_can_count_are_refused() -> None:
    with pytest.raises(sc.InvalidArgument, match="63 bits"):
        main(["--chunk-bytes", "9999999999G"])

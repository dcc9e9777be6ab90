"""``python -m bench cluster``: a short run, and that nothing is left of the hosts however a run ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.cluster.hosts import Hosts, remove_leftovers
from bench.cluster.launch import RankFailed, run_ranks

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--hosts", "2", "--ranks-per-host", "2", "--rate", "400mbit", "--chunks", "4", "--chunk-bytes", "20000"]
TOP_LEVEL = (
    "case command passed summary version start_time args env nccl_version config devices results "
    "out_of_bounds average_bus_bandwidth errors end_time commit seed world_size nodes link machine"
)
ALGORITHMS = {"auto", "direct", "relay", "hierarchical", "dense"}


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


def _namespaces(pid: int) -> list[str]:
    """Of the run that is, or was, process ``pid``."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith(f"sparsecoll-{pid}-")]


def _ranks(pid: int) -> list[int]:
    """Processes that the run has started as ranks."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if b"--launched" in words and str(pid).encode() in words:
            found.append(int(path.parent.name))
    return found


def _start(*arguments: str, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bench", "cluster", *arguments],
        cwd=ROOT,
        env={**os.environ, **environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _await_ranks(process: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + 30
    while len(_ranks(process.pid)) < 4 and process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert len(_ranks(process.pid)) == 4


@pytest.fixture
def interfaces() -> Iterator[None]:
    """Nothing shows among the machine's own interfaces, during and after."""
    before = os.listdir("/sys/class/net")
    yield
    assert os.listdir("/sys/class/net") == before


@needs_hosts
@pytest.mark.usefixtures("interfaces")
@pytest.mark.timeout(120)
def test_short_run(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    process = _start(*SHORT, "-n", "1", "--json", str(file))
    try:
        out, err = process.communicate(timeout=110)
    finally:
        process.terminate()
    assert process.returncode == 0, out + err
    assert _namespaces(process.pid) == []
    record = json.loads(file.read_text())
    assert record.keys() >= set(TOP_LEVEL.split())
    assert (record["case"], record["passed"], record["errors"]) == ("cluster", True, [])
    assert (record["world_size"], record["nodes"], record["dropped_packets"]) == (4, 2, 0)
    rows = [line.split() for line in out.splitlines() if not line.startswith("#")]
    assert len(rows) == len(record["results"])
    assert {row[-1] for row in rows} == {"0"}
    for pattern in ("hot", "random"):
        for short, name, baseline in (("ag", "all_gather", "broadcast"), ("rs", "reduce_scatter", "reduce")):
            key = f"{pattern}_{short}"
            assert {f"{key}_{part}" for part in ("over_bound", "direct_over_ours", "broadcast_over_ours")} | {
                f"{key}_{part}_bytes" for part in ("cross", "must_cross", "wire")
            } <= record["summary"].keys()
            results = [row for row in record["results"] if (row["pattern"], row["collective"]) == (pattern, name)]
            found = {row["algorithm"] for row in results}
            assert found == ALGORITHMS | {baseline, "send_recv", "torch_dense"}
            for row in results:
                # What has crossed was on the wire, with headers on top.
                crossed = row["must_cross_bytes"] if row["cross_bytes"] is None else row["cross_bytes"]
                assert row["must_cross_bytes"] <= crossed <= row["interface_bytes"]
                if row["sent_bytes"] is not None:
                    assert sum(row["sent_bytes"]) == sum(row["received_bytes"]) >= crossed


@needs_hosts
@pytest.mark.usefixtures("interfaces")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_leaves_nothing(number: signal.Signals, status: int) -> None:
    """Ctrl-C between rows of the table, or being terminated while ranks start."""
    process = _start(*SHORT, "--chunk-bytes", "1000000", "-n", "1")
    try:
        assert process.stdout is not None
        if number == signal.SIGINT:
            line = next(line for line in process.stdout if not line.startswith("#"))
            assert line.split()[0] == "hot"
        else:
            _await_ranks(process)
        assert len(_namespaces(process.pid)) == 3
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == status, out + err
    assert _namespaces(process.pid) == [] and _ranks(process.pid) == []


@needs_hosts
@pytest.mark.usefixtures("interfaces")
def test_killed_run_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    """Ranks end with their launcher even so; names of living processes are left alone."""
    process = _start(*SHORT, "-n", "1000", TMPDIR=str(tmp_path))
    try:
        _await_ranks(process)
        remove_leftovers()
        assert len(_namespaces(process.pid)) == 3
    finally:
        process.kill()
        process.communicate()
    remove_leftovers()
    assert _namespaces(process.pid) == []
    deadline_s = time.monotonic() + 20
    while _ranks(process.pid) and time.monotonic() < deadline_s:  # those that had yet to ask to end with it
        time.sleep(0.05)
    assert _ranks(process.pid) == []


@needs_hosts
@pytest.mark.usefixtures("interfaces")
def test_failing_rank_ends_the_others(tmp_path: Path) -> None:
    program = "import os, sys, time\nif os.environ['RANK'] == '2':\n    sys.exit('on purpose')\ntime.sleep(50)\n"
    expected = r"rank 2 on host 1 ended with status 1:\non purpose"
    with pytest.raises(RankFailed, match=expected), Hosts(2, 100_000_000) as hosts:
        run_ranks(hosts, 2, ["-c", program], tmp_path)
    assert _namespaces(os.getpid()) == []


@needs_hosts
def test_links_are_limited_in_both_directions() -> None:
    with Hosts(3, 200_000_000) as hosts:
        queues = []
        for name in _namespaces(os.getpid()):
            shown = subprocess.run(["tc", "-n", name, "-j", "qdisc", "show"], capture_output=True, check=True).stdout
            queues += [each for each in json.loads(shown) if each["kind"] == "tbf"]
        assert len(queues) == 2 * 3
        assert {each["options"]["rate"] for each in queues} == {200_000_000 / 8}
        # A rank's own host is reached over lo, the others over the link.
        for host, device in ((0, "lo"), (1, "eth0"), (2, "eth0")):
            route = subprocess.run(
                hosts.command(0, ["ip", "route", "get", hosts.address(host)]),
                capture_output=True,
                text=True,
                check=True,
            )
            assert f" dev {device} " in route.stdout
    assert _namespaces(os.getpid()) == []


def test_says_what_it_needs(tmp_path: Path) -> None:
    process = _start(*SHORT, PATH=str(tmp_path))
    out, err = process.communicate(timeout=30)
    assert process.returncode == 2, out + err
    for word in ("root", "iproute2's ip and tc", "no ip on the PATH", "no tc on the PATH"):
        assert word in err
    assert out == ""

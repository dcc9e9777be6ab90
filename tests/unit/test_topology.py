"""Ranks on nodes and their links: how they are given, read from a launcher, saved and shown."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsecoll import InvalidArgument, Link, Topology
from sparsecoll.config import Launcher
from sparsecoll.topology import Seat

FAST, SLOW = Link(10e9, 1e-6), Link(1e9, 1e-5)


def test_flat_is_one_node() -> None:
    topology = Topology.flat(5)
    assert topology.node_of == (0,) * 5
    assert (topology.world_size, topology.num_nodes) == (5, 1)
    assert topology.link(0, 4) == topology.scale_up


def test_hosts_become_nodes_in_order_of_appearance() -> None:
    topology = Topology.from_hosts(["b", "a", "b", "c", "a"])
    assert topology.node_of == (0, 1, 0, 2, 1)
    assert topology.num_nodes == 3


def test_a_link_depends_on_whether_nodes_are_equal() -> None:
    topology = Topology((0, 1, 0), scale_up=FAST, scale_out=SLOW)
    assert [[topology.link(src, dst) for dst in range(3)] for src in range(3)] == [
        [FAST, SLOW, FAST],
        [SLOW, FAST, SLOW],
        [FAST, SLOW, FAST],
    ]


def test_ranks_and_nodes_may_have_links_of_their_own() -> None:
    topology = Topology((0, 0, 1), scale_up=(FAST, SLOW, FAST), scale_out=(SLOW, SLOW, FAST), node_link=(FAST, SLOW))
    assert [topology.scale_up_of(rank) for rank in range(3)] == [FAST, SLOW, FAST]
    assert [topology.scale_out_of(rank) for rank in range(3)] == [SLOW, SLOW, FAST]
    assert [topology.node_link_of(node) for node in range(2)] == [FAST, SLOW]
    assert topology.link(0, 1) == SLOW
    assert topology.link(0, 2) == topology.link(2, 0) == SLOW, "the slowest link on the way"
    assert Topology((0, 1), scale_out=(SLOW, SLOW)) == Topology((0, 1), scale_out=SLOW)
    assert Topology((0, 1)).node_link_of(0) is None


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: Topology(()), "at least one rank"),
        (lambda: Topology.from_hosts([]), "at least one rank"),
        (lambda: Topology((0, 2)), r"without gaps, got \[0, 2\]"),
        (lambda: Topology((1, 1)), r"from 0 without gaps, got \[1\]"),
        (lambda: Topology((-1, 0)), r"from 0 without gaps, got \[-1, 0\]"),
        (lambda: Topology.flat(0), "world_size >= 1, got 0"),
        (lambda: Topology.flat(-3), "world_size >= 1, got -3"),
        (lambda: Topology((0, 1), scale_up=(FAST,)), "scale_up to be a Link or 2 Links, got 1"),
        (lambda: Topology((0, 0), node_link=(FAST, FAST)), "node_link to be a Link or 1 Links, got 2"),
        (lambda: Topology((0, 0), scale_out=7), "scale_out to be a Link or 2 Links, got 7"),
        (lambda: Link(0.0, 0.0), "positive bandwidth"),
        (lambda: Link(-1.0, 0.0), "positive bandwidth"),
        (lambda: Link(math.nan, 0.0), "positive bandwidth"),
        (lambda: Link(1.0, -1e-9), "latency of at least 0"),
        (lambda: Link(1.0, math.nan), "latency of at least 0"),
    ],
)
def test_unsound_ones_are_refused(make: Callable[[], object], rule: str) -> None:
    with pytest.raises(InvalidArgument, match=rule):
        make()


def test_equal_by_content_and_frozen() -> None:
    assert Topology((0, 0, 1), FAST, SLOW) == Topology((0, 0, 1), FAST, SLOW)
    assert hash(Topology((0, 0, 1))) == hash(Topology((0, 0, 1)))
    assert len({Topology((0, 0)), Topology((0, 1)), Topology((0, 0), FAST), Topology((0, 0), FAST, SLOW)}) == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        Topology.flat(2).node_of = (0,)  # type: ignore[misc]


def test_a_list_of_nodes_is_as_good_as_a_tuple() -> None:
    """Planning keeps plans by topology, so it must be hashable however it was written."""
    written = Topology([0, 0, 1])  # type: ignore[arg-type]
    assert written == Topology((0, 0, 1))
    assert hash(written) == hash(Topology((0, 0, 1)))


MANY = [
    Topology.flat(1),
    Topology.flat(2, FAST),
    Topology((0, 1, 0, 2), FAST, SLOW),
    Topology((0, 0, 1, 1), (FAST, SLOW, FAST, SLOW), (SLOW, SLOW, FAST, FAST), (FAST, SLOW)),
    Topology((0, 1), scale_out=Link(1 / 3, math.pi), node_link=Link(math.inf, 0)),
    Topology(tuple(rank // 8 for rank in range(64)), scale_out=tuple(Link(1e9 + rank, 1e-5) for rank in range(64))),
]


def test_the_hash_stays_at_home() -> None:
    """It is kept, and may differ in another process: copies make their own."""
    for topology in MANY:
        assert hash(topology) == hash(topology)
        for same in (pickle.loads(pickle.dumps(topology)), copy.deepcopy(topology), dataclasses.replace(topology)):
            assert same == topology and hash(same) == hash(topology) and same.digest == topology.digest
            assert same is not topology


def test_the_digest_tells_topologies_apart() -> None:
    assert len({topology.digest for topology in MANY}) == len(MANY)
    assert Topology((0, 1), Link(1, 0)).digest == Topology((0, 1), Link(1.0, 0.0)).digest, "as they are equal"
    assert bytes.fromhex(MANY[0].digest) and len(MANY[0].digest) == 32


# --- files


@pytest.mark.parametrize("topology", MANY, ids=lambda topology: topology.digest[:6])
def test_a_file_brings_back_the_same(topology: Topology, tmp_path: Path) -> None:
    path = tmp_path / "topology.json"
    path.write_text("an older one")
    topology.save(path)
    assert Topology.load(path) == topology == Topology.load(str(path))
    assert [each.name for each in tmp_path.iterdir()] == ["topology.json"], "nothing beside it"


def test_the_file_is_json_with_a_version_and_plain_names(tmp_path: Path) -> None:
    Topology((0, 0, 1), FAST, (SLOW, SLOW, FAST)).save(tmp_path / "t.json")
    slow, fast = ({"bandwidth_bytes_per_s": rate, "latency_s": wait} for rate, wait in ((1e9, 1e-5), (10e9, 1e-6)))
    assert json.loads((tmp_path / "t.json").read_text()) == {
        "sparsecoll_topology": 1,
        "node_of": [0, 0, 1],
        "scale_up": fast,
        "scale_out": [slow, slow, fast],
        "node_link": None,
        "shared_memory": False,
        "in_rounds": False,
    }


def test_a_file_written_by_hand_may_leave_links_out(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text('{"sparsecoll_topology": 1, "node_of": [0, 1]}')
    assert Topology.load(path) == Topology((0, 1))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "Expecting value"),
        ("[1, 2]", "sparsecoll_topology: 1"),
        ('{"node_of": [0]}', "sparsecoll_topology: 1"),
        ('{"sparsecoll_topology": 2, "node_of": [0]}', "sparsecoll_topology: 1"),
        ('{"sparsecoll_topology": 1}', "expected node_of"),
        ('{"sparsecoll_topology": 1, "node_of": [0], "scale-up": null}', "got sparsecoll_topology, node_of, scale-up"),
        ('{"sparsecoll_topology": 1, "node_of": 3}', "list of node numbers, got 3"),
        ('{"sparsecoll_topology": 1, "node_of": [0, 1.0]}', "list of node numbers"),
        ('{"sparsecoll_topology": 1, "node_of": [0, 2]}', "without gaps"),
        ('{"sparsecoll_topology": 1, "node_of": [0], "scale_up": null}', "scale_up to be a Link"),
        ('{"sparsecoll_topology": 1, "node_of": [0], "scale_up": {"latency_s": 1}}', "expected a link with"),
        ('{"sparsecoll_topology": 1, "node_of": [0], "scale_out": [7]}', "expected a link with .* got 7"),
        (
            '{"sparsecoll_topology": 1, "node_of": [0], "scale_up": {"latency_s": 0, "bandwidth_bytes_per_s": "8"}}',
            "two numbers",
        ),
        (
            '{"sparsecoll_topology": 1, "node_of": [0], "scale_up": {"latency_s": 0, "bandwidth_bytes_per_s": 0}}',
            "positive bandwidth",
        ),
    ],
)
def test_unsound_files_are_refused_by_name(text: str, rule: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(InvalidArgument, match=rule) as caught:
        Topology.load(path)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing.json", tmp_path, tmp_path / "bytes.json"):
        with pytest.raises(InvalidArgument, match=r"Topology\.load") as caught:
            Topology.load(path)
        assert str(path) in str(caught.value)
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "nowhere" / "t.json", tmp_path / "folder"):
        with pytest.raises(InvalidArgument, match=r"Topology\.save: expected a writable path") as caught:
            Topology.flat(2).save(path)
        assert str(path) in str(caught.value)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bytes.json", "folder"], "no half-written file"


# --- tables


def test_the_table_of_two_ranks() -> None:
    assert Topology.flat(2, Link(8e9, 2e-6)).table().splitlines() == [
        "2 ranks on 1 node",
        "link        bandwidth    latency  of",
        "scale-up    8.00 GB/s    2.00 us  every rank",
    ]
    assert Topology.flat(1).table() == "1 rank on 1 node", "nobody to talk to"


def test_the_table_shows_equal_links_once() -> None:
    nodes = tuple(rank // 8 for rank in range(64))
    assert Topology(nodes, FAST, SLOW).table().splitlines() == [
        "64 ranks on 8 nodes, 8 on each, in order",
        "link        bandwidth    latency  of",
        "scale-up    10.0 GB/s    1.00 us  every rank",
        "scale-out   1.00 GB/s    10.0 us  every rank",
        "node                -          -  none is shared",
    ]
    slow_rail = tuple(Link(400e6, 150e-6) if rank % 8 in (3, 4, 7) else SLOW for rank in range(16))
    assert Topology(nodes[:16], FAST, slow_rail, (FAST, SLOW)).table().splitlines()[3:] == [
        "scale-out   1.00 GB/s    10.0 us  ranks 0-2, 5-6, 8-10, 13-14",
        "scale-out    400 MB/s     150 us  ranks 3-4, 7, 11-12, 15",
        "node        10.0 GB/s    1.00 us  node 0",
        "node        1.00 GB/s    10.0 us  node 1",
    ]


@pytest.mark.parametrize(
    ("node_of", "nodes"),
    [
        ((0, 1, 0, 1, 1), ["node 0: ranks 0, 2", "node 1: ranks 1, 3-4"]),
        ((0, 0, 0, 1, 1), ["node 0: ranks 0-2", "node 1: ranks 3-4"]),
        ((1, 1, 0, 0), ["node 0: ranks 2-3", "node 1: ranks 0-1"]),
    ],
)
def test_the_table_lists_nodes_that_differ(node_of: tuple[int, ...], nodes: list[str]) -> None:
    assert Topology(node_of).table().splitlines()[:3] == [f"{len(node_of)} ranks on 2 nodes", *nodes]


# --- launchers


def seats_of(hosts: list[str], environs: list[dict[str, str]]) -> list[Seat]:
    """The seats of ranks with these host names and environments."""
    seats = []
    for host, environ in zip(hosts, environs, strict=True):
        found = Launcher.from_environment(environ)
        seats.append(Seat(host, found.node, found.rank, found.local_rank, found.local_size))
    return seats


def torchrun(rank: int, node: int, local_rank: int, local_size: int) -> dict[str, str]:
    return {
        "RANK": f"{rank}",
        "WORLD_SIZE": "9",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
        "GROUP_RANK": f"{node}",
        "LOCAL_RANK": f"{local_rank}",
        "LOCAL_WORLD_SIZE": f"{local_size}",
    }


def hydra(rank: int, local_rank: int, local_size: int, host: str | None = None) -> dict[str, str]:
    named = {} if host is None else {"PMI_HOSTNAME": host}
    return {"PMI_RANK": f"{rank}", "MPI_LOCALRANKID": f"{local_rank}", "MPI_LOCALNRANKS": f"{local_size}", **named}


def open_mpi(rank: int, local_rank: int, local_size: int) -> dict[str, str]:
    names = ("RANK", "LOCAL_RANK", "LOCAL_SIZE")
    values = (rank, local_rank, local_size)
    return {f"OMPI_COMM_WORLD_{name}": f"{value}" for name, value in zip(names, values, strict=True)}


def slurm(rank: int, node: int, local_rank: int) -> dict[str, str]:
    return {
        "PMIX_RANK": f"{rank}",
        "SLURM_PROCID": f"{rank}",
        "SLURM_NODEID": f"{node}",
        "SLURM_LOCALID": f"{local_rank}",
    }


SAME = ["box"] * 4
LAUNCHED: dict[str, tuple[list[str], list[dict[str, str]], tuple[int, ...]]] = {
    "nothing said: host names": (["b", "a", "b", "c"], [{}] * 4, (0, 1, 0, 2)),
    "threads of one process": (SAME, [hydra(0, 0, 1)] * 4, (0, 0, 0, 0)),
    "torchrun, one node": (SAME, [torchrun(rank, 0, rank, 4) for rank in range(4)], (0, 0, 0, 0)),
    "torchrun, two agents with one host name": (
        SAME,
        [torchrun(rank, rank // 2, rank % 2, 2) for rank in range(4)],
        (0, 0, 1, 1),
    ),
    "torchrun, agents of unequal size": (
        SAME,
        [torchrun(0, 0, 0, 1), *(torchrun(rank, 1, rank - 1, 3) for rank in (1, 2, 3))],
        (0, 1, 1, 1),
    ),
    "torchrun, some ranks of the job, in another order": (
        SAME,
        [torchrun(7, 1, 3, 4), torchrun(0, 0, 0, 4), torchrun(4, 1, 0, 4), torchrun(3, 0, 3, 4)],
        (0, 1, 0, 1),
    ),
    "torchrun says one node, hosts are two": (
        ["a", "a", "b", "b"],
        [torchrun(rank, 0, rank % 2, 2) for rank in range(4)],
        (0, 0, 1, 1),
    ),
    "hydra, one node": (SAME, [hydra(rank, rank, 4, "box") for rank in range(4)], (0, 0, 0, 0)),
    "hydra, named nodes dealt in turn": (
        SAME,
        [hydra(rank, rank // 2, 2, "ab"[rank % 2]) for rank in range(4)],
        (0, 1, 0, 1),
    ),
    "hydra, only numbers, blocks": (SAME, [hydra(rank, rank % 2, 2) for rank in range(4)], (0, 0, 1, 1)),
    "hydra, only numbers, dealt in turn": (SAME, [hydra(rank, rank // 2, 2) for rank in range(4)], (0, 1, 0, 1)),
    "hydra, only numbers, group in another order": (
        SAME,
        [hydra(rank, rank % 2, 2) for rank in (3, 1, 0, 2)],
        (0, 1, 1, 0),
    ),
    "hydra, only numbers, unequal nodes": (
        SAME,
        [hydra(0, 0, 1), hydra(1, 0, 3), hydra(2, 1, 3), hydra(3, 2, 3)],
        (0, 1, 1, 1),
    ),
    "hydra, some ranks of the job: host names": (SAME, [hydra(rank, rank % 4, 4) for rank in (0, 1, 4, 5)], (0,) * 4),
    "hydra says it on some ranks only: host names": (SAME, [hydra(0, 0, 2), hydra(1, 1, 2), {}, {}], (0,) * 4),
    "hydra, a number that is none: host names": (
        SAME,
        [*(hydra(rank, rank % 2, 2) for rank in range(3)), {**hydra(3, 1, 2), "MPI_LOCALRANKID": "?"}],
        (0,) * 4,
    ),
    "Open MPI": (SAME, [open_mpi(rank, rank % 2, 2) for rank in range(4)], (0, 0, 1, 1)),
    "Slurm": (SAME, [slurm(rank, rank // 2, rank % 2) for rank in range(4)], (0, 0, 1, 1)),
    "Open MPI started in a batch job of Slurm": (
        ["a", "a", "b", "b"],
        [{**open_mpi(rank, rank % 2, 2), "SLURM_NODEID": "0", "SLURM_PROCID": "0"} for rank in range(4)],
        (0, 0, 1, 1),
    ),
}


@pytest.mark.parametrize("case", LAUNCHED)
def test_nodes_from_the_launcher(case: str) -> None:
    hosts, environs, node_of = LAUNCHED[case]
    assert Topology.from_seats(seats_of(hosts, environs)) == Topology(node_of)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Launcher("alone")),
        ({"SLURM_NODEID": "3", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}, Launcher("alone", "3", 5, 1)),
        (torchrun(5, 2, 1, 2), Launcher("torchrun", "2", 5, 1, 2)),
        ({**torchrun(5, 2, 1, 2), **hydra(0, 0, 1, "n0")}, Launcher("mpirun", "n0", 0, 0, 1)),
        ({"PMI_RANK": "1"}, Launcher("mpirun")),
        ({**hydra(1, 1, 2), "MPI_LOCALNRANKS": "-2"}, Launcher("mpirun", None, 1, 1, None)),
    ],
)
def test_what_a_launcher_says(environ: dict[str, str], expected: Any) -> None:
    assert Launcher.from_environment(environ) == expected

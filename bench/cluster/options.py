"""The flags of the case, and what follows from them on every process alike."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import sparsecoll as sc
from bench.cluster.hosts import MOST_HOSTS
from bench.cluster.placements import Scene, hot_scene, random_scenes
from bench.cluster.rate import link_of, parse_rate, topology_of

__all__ = ["LAUNCHED", "Options", "parse"]

# What follows this flag was added for a rank, and is not what a person gave.
LAUNCHED = "--launched"


@dataclass(frozen=True)
class Options:
    """What a person asked for.

    Attributes:
        arguments: the command line as given, without the case.
        rate_bits_per_s: of every host's link, in each direction.
        num_chunks: of the hot pattern; random ones have half as many again.
        launcher: the process that started this rank; None in the process that a person started.
    """

    arguments: tuple[str, ...]
    num_hosts: int
    rate_bits_per_s: int
    ranks_per_host: int
    num_chunks: int
    chunk_bytes: int
    iterations: int
    seed: int
    timeout_s: float
    output: Path | None
    launcher: int | None

    @property
    def command(self) -> str:
        return " ".join(["python -m bench cluster", *self.arguments])

    @property
    def world_size(self) -> int:
        return self.num_hosts * self.ranks_per_host

    @property
    def link(self) -> sc.Link:
        """A host's link as payload sees it."""
        return link_of(self.rate_bits_per_s)

    @property
    def topology(self) -> sc.Topology:
        """Ranks of a host next to each other, sharing the host's link."""
        return topology_of(self.num_hosts, self.ranks_per_host, self.rate_bits_per_s)

    @property
    def scenes(self) -> list[Scene]:
        """In the order in which they are measured."""
        hot = hot_scene(self.world_size, self.num_chunks, self.chunk_bytes)
        return [hot, *random_scenes(self.world_size, self.num_chunks, self.chunk_bytes, self.seed)]


def parse(arguments: Sequence[str]) -> Options:
    """Reads the command line, or ends the program with a message that names the flag."""
    parser = _parser()
    found = parser.parse_args(list(arguments))
    try:
        rate = parse_rate(found.rate)
    except sc.InvalidArgument as error:
        parser.error(str(error))
    listed = list(arguments)
    return Options(
        arguments=tuple(listed[: listed.index(LAUNCHED)] if LAUNCHED in listed else listed),
        num_hosts=found.hosts,
        rate_bits_per_s=rate,
        ranks_per_host=found.ranks_per_host,
        num_chunks=found.chunks,
        chunk_bytes=found.chunk_bytes,
        iterations=found.iters,
        seed=found.seed,
        timeout_s=found.timeout,
        output=found.json,
        launcher=found.launched,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench cluster",
        allow_abbrev=False,
        description="Makes hosts with rate-limited links on this machine (Linux network namespaces; needs root and "
        "iproute2), runs every algorithm and what a user of torch.distributed would write over them, and removes them.",
    )
    add = parser.add_argument
    add("--hosts", type=_between(2, MOST_HOSTS), default=4, metavar="N", help="default 4")
    add("--rate", default="400mbit", metavar="R", help="of each link, each direction, as tc writes it; default 400mbit")
    add("--ranks-per-host", type=_between(1, 64), default=1, metavar="K", help="they share the host's link; default 1")
    add("--chunks", type=_between(1, 1024), default=8, metavar="N", help="with one hot owner; default 8")
    add("--chunk-bytes", type=_between(8, 1 << 30), default=1_000_000, metavar="SIZE", help="default 1000000")
    add("-n", "--iters", type=_between(1, 1000), default=5, metavar="N", help="timed iterations after one untimed")
    add("--seed", type=int, default=0, help="of random placements")
    add("-T", "--timeout", type=_seconds, default=60.0, metavar="S", help="for each single run; default 60")
    add("-J", "--json", "--output_file", type=Path, metavar="FILE", help="record in JSON")
    add(LAUNCHED, type=int, help=argparse.SUPPRESS)
    return parser


def _between(smallest: int, largest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or not smallest <= int(text) <= largest:
            raise argparse.ArgumentTypeError(f"expected a whole number from {smallest} to {largest}, got {text!r}")
        return int(text)

    return number


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")
    return value

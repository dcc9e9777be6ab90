"""``python -m sparsecoll.plan --show plan.html --ranks 8 --owner 0``: plans one collective and shows the Plan.

Ends with 0, or 2 when misused.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparsecoll.errors import InvalidArgument
from sparsecoll.placement import Placement
from sparsecoll.plan import ALGORITHMS, Plan, plan_all_gather, plan_reduce_scatter
from sparsecoll.topology import Topology

_PLANNERS = {"all_gather": plan_all_gather, "reduce_scatter": plan_reduce_scatter}
_RANKS, _DENSITY, _SEED = 8, 0.25, 0


def main(arguments: Sequence[str]) -> None:
    """Explains the plan, or writes what was asked for and says where.

    Raises:
        SystemExit: misuse, with status 2, after a message.
        InvalidArgument: what the flags ask for cannot be planned, read or written.
    """
    options = _options(arguments)
    plan = _plan(options)
    if options.show is None and options.trace is None:
        print(plan.explain())
    if options.show is not None:
        plan.show(options.show)
        print(f"written to {options.show}, for a browser")
    if options.trace is not None:
        plan.trace(options.trace)
        print(f"written to {options.trace}, for ui.perfetto.dev or chrome://tracing")


def _plan(options: argparse.Namespace) -> Plan:
    topology = _topology(options)
    world_size = topology.world_size
    owners = _owners(options, world_size)
    density = 1.0
    if options.holders == "random":
        density = _DENSITY if options.density is None else options.density
    random = np.random.default_rng(_SEED if options.seed is None else options.seed)
    drawn = random.random((options.chunks, world_size)) < density
    holders = drawn | (owners[:, None] == np.arange(world_size))
    place = Placement(owners, holders)
    return _PLANNERS[options.op](place, options.chunk_bytes, topology, options.algorithm)


def _topology(options: argparse.Namespace) -> Topology:
    if options.topology is not None:
        topology = Topology.load(options.topology)
        if options.ranks not in (None, topology.world_size):
            raise InvalidArgument(f"--ranks: expected {topology.world_size} (as --topology), got {options.ranks}")
        return topology
    ranks = range(_RANKS if options.ranks is None else options.ranks)
    return Topology(tuple(rank // (options.ranks_per_node or len(ranks)) for rank in ranks))


def _owners(options: argparse.Namespace, world_size: int) -> NDArray[np.int64]:
    """``[num_chunks]``, ascending."""
    if options.owner is not None:
        return np.full(options.chunks, options.owner)
    if options.owners == "even":
        return Placement.even(options.chunks, world_size).owners.astype(np.int64)
    shares = np.cumsum(1.0 / np.arange(1, world_size + 1))
    return np.searchsorted(shares / shares[-1], (np.arange(options.chunks) + 0.5) / options.chunks)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m sparsecoll.plan",
        description="Plans one collective and shows the plan: as text, or with --show and --trace as files.",
    )
    parser.add_argument("--show", type=Path, metavar="FILE", help="write an HTML page with the timeline of each link")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a Chrome trace, for ui.perfetto.dev")
    parser.add_argument("--op", choices=_PLANNERS, default="all_gather")
    parser.add_argument("--algorithm", choices=("auto", *ALGORITHMS), default="auto")
    parser.add_argument("--ranks", type=_positive, metavar="N", help=f"default {_RANKS}, or those of --topology")
    links = parser.add_mutually_exclusive_group()
    links.add_argument("--ranks-per-node", type=_positive, metavar="K", help="default: all on one node")
    links.add_argument("--topology", type=Path, metavar="FILE", help="what sparsecoll.probe or Topology.save wrote")
    parser.add_argument("--chunks", type=_positive, default=8, metavar="N", help="default 8")
    parser.add_argument("--chunk-bytes", type=_size, default="1M", metavar="SIZE", help="of each; K, M, G are binary")
    owners = parser.add_mutually_exclusive_group()
    owners.add_argument("--owner", type=int, metavar="RANK", help="one rank owns all chunks")
    owners.add_argument(
        "--owners",
        choices=("even", "zipf"),
        default="even",
        help="equal shares (default), or shares that fall as 1/(rank + 1)",
    )
    parser.add_argument("--holders", choices=("all", "random"), default="all", help="who is to have each chunk")
    parser.add_argument("--density", type=_share, metavar="D", help=f"share of random holders, default {_DENSITY}")
    parser.add_argument("--seed", type=_natural, metavar="S", help=f"of random holders, default {_SEED}")
    options = parser.parse_args(arguments)
    if options.holders == "all" and (options.density, options.seed) != (None, None):
        parser.error("--density and --seed: expected --holders random with them")
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return share


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+)([KMG]?)", text.upper())
    if found is None:
        raise argparse.ArgumentTypeError(f"expected bytes such as 4096, 64K or 1M, got {text!r}")
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]]


def _run() -> None:
    try:
        main(sys.argv[1:])
    except InvalidArgument as error:
        print(f"plan: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    _run()

"""The flags of the case, and what follows from them on every process alike."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import sparsecoll as sc
from bench.cluster.hosts import MOST_HOSTS
from bench.cluster.rate import parse_rate
from bench.step.draws import ROUTINGS
from bench.step.sizes import Sizes
from sparsecoll.balance import BALANCERS

__all__ = ["DDP", "EP", "FSDP2", "IDEAL", "LAUNCHED", "PARTS", "SLICES", "Options", "parse"]

_ABOUT = (
    "A training step of one model by every way to train it: FSSDP with each balancer, expert parallelism by hand, "
    "FSDP2, DDP, and the ideal. They take turns, and results are compared in the same run."
)

# What follows this flag was added for a rank, and is not what a person gave.
LAUNCHED = "--launched"

PARTS = ("block", "step")
EP, IDEAL, SLICES, FSDP2, DDP = "ep", "ideal", "slices", "fsdp2", "ddp"
_SLOW = (SLICES, FSDP2, DDP)

RECORDED = Path(__file__).resolve().parents[1] / "data" / "routing.npz"

_BACKENDS = {"gloo": "torch", "torch": "torch", "mpi": "mpi"}


class _Usual(NamedTuple):
    """What is measured if nobody says otherwise."""

    backend: tuple[str, ...]
    parts: tuple[str, ...]
    routings: tuple[str, ...]
    balancers: tuple[str, ...]
    iters: int


_HERE = _Usual(("gloo", "mpi"), PARTS, ROUTINGS, (*BALANCERS, SLICES), 5)
_CLUSTER = _Usual(("gloo",), ("step",), ("zipf12", "recorded"), ("hecate", "none"), 4)


@dataclass(frozen=True)
class Options:
    """What a person asked for.

    Attributes:
        arguments: the command line as given, without the case.
        backends: of ``torch`` (Gloo) and ``mpi``, one after the other.
        balancers: of FSSDP; ``slices`` stands for the default one with every expert cut evenly over all ranks.
        every: FSDP2, DDP and slices, which move most, take part in every so-many-th iteration.
        trace: what ``recorded`` replays.
        fssdp: further options of `sparsecoll.FSSDP`.
        recorded_to: a routing is to be recorded into this file, and nothing measured.
        train_steps: before that.
        rate_bits_per_s: on a cluster, of every host's link, in each direction; None without one.
        chooses_length: the length of sequences is for the ranks to choose.
        timeout_s: for any single step.
        launcher: the process that started this rank; None in the process that a person started.
    """

    arguments: tuple[str, ...]
    backends: tuple[str, ...]
    ranks: int
    parts: tuple[str, ...]
    routings: tuple[str, ...]
    balancers: tuple[str, ...]
    sizes: Sizes
    iterations: int
    warmup: int
    every: int
    seed: int
    trace: Path
    fssdp: dict[str, Any]
    recorded_to: Path | None
    train_steps: int
    output: Path | None
    rate_bits_per_s: int | None
    chooses_length: bool
    timeout_s: float
    launcher: int | None

    @property
    def on_cluster(self) -> bool:
        """Whether each rank has a host of its own, with a limited link."""
        return self.rate_bits_per_s is not None

    @property
    def command(self) -> str:
        return " ".join(["python -m bench step", *self.arguments])

    def contestants(self, backend: str) -> tuple[str, ...]:
        """In the order in which they take turns; torch's own need torch's process groups."""
        torchs_own = (FSDP2, DDP) if backend == "torch" else ()
        return (EP, IDEAL, *self.balancers, *torchs_own)

    def takes_turn(self, contestant: str, iteration: int) -> bool:
        """Whether a contestant takes part in an iteration; all of them do in the last."""
        last = self.warmup + self.iterations - 1
        return contestant not in _SLOW or (last - iteration) % self.every == 0


def parse(arguments: Sequence[str]) -> Options:
    """Reads the command line, or ends the program with a message that names the flag."""
    parser = _parser()
    found = parser.parse_args(list(arguments))
    sizes = Sizes(
        layers=found.layers,
        experts=found.experts,
        top_k=found.top_k,
        width=found.width,
        hidden=found.hidden,
        tokens=found.tokens,
        length=found.length or Sizes.length,
    )
    ranks = found.hosts if found.cluster else found.ranks
    chooses_length = found.cluster and found.length is None
    if not chooses_length and sizes.tokens % sizes.length:
        parser.error(f"--tokens: expected a multiple of --length {sizes.length}, got {sizes.tokens}")
    if sizes.experts % ranks:
        parser.error(f"--experts: expected a multiple of {ranks} ranks, got {sizes.experts}")
    if sizes.top_k > sizes.experts:
        parser.error(f"--top-k: expected at most --experts {sizes.experts}, got {sizes.top_k}")
    try:
        rate = parse_rate(found.rate) if found.cluster else None
    except sc.InvalidArgument as error:
        parser.error(str(error))
    if found.cluster and "mpi" in (found.backend or ()):
        parser.error("--backend: expected gloo with --cluster, got mpi")
    usual = _CLUSTER if found.cluster else _HERE
    listed = list(arguments)
    return Options(
        arguments=tuple(listed[: listed.index(LAUNCHED)] if LAUNCHED in listed else listed),
        backends=tuple(dict.fromkeys(_BACKENDS[each] for each in found.backend or usual.backend)),
        ranks=ranks,
        parts=found.parts or usual.parts,
        routings=found.routings or usual.routings,
        balancers=found.balancers or usual.balancers,
        sizes=sizes,
        iterations=found.iters or usual.iters,
        warmup=found.warmup_iters,
        every=found.every,
        seed=found.seed,
        trace=found.trace,
        fssdp={
            "rematerialize": {"no": False, "yes": True}.get(found.rematerialize, found.rematerialize),
            "calibrate": found.calibrate,
            "spread": found.spread,
            "predictor": found.predictor,
        },
        recorded_to=found.record,
        train_steps=found.train_steps,
        output=found.json,
        rate_bits_per_s=rate,
        chooses_length=chooses_length,
        timeout_s=found.timeout,
        launcher=found.launched,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench step", allow_abbrev=False, description=_ABOUT)
    add, sizes = parser.add_argument, Sizes()

    def usual(name: str) -> str:
        here, there = (",".join(getattr(each, name)) for each in (_HERE, _CLUSTER))
        return f"{here}, on a cluster {there}"

    add("--backend", type=_some_of(_BACKENDS), metavar="LIST", help=f"default {usual('backend')}")
    add("--ranks", type=_between(1, 64), default=2, metavar="N", help="default 2")
    add("--parts", type=_some_of(PARTS), metavar="LIST", help=f"default {usual('parts')}")
    add("--routings", type=_some_of(ROUTINGS), metavar="LIST", help=f"default {usual('routings')}")
    add("--balancers", type=_some_of(_HERE.balancers), metavar="LIST", help=f"default {usual('balancers')}")
    add("--layers", type=_between(1, 64), default=sizes.layers, metavar="N", help=f"default {sizes.layers}")
    add("--experts", type=_between(1, 255), default=sizes.experts, metavar="N", help=f"default {sizes.experts}")
    add("--top-k", type=_between(1, 255), default=sizes.top_k, metavar="N", help=f"default {sizes.top_k}")
    add("--width", type=_between(8, 1 << 16), default=sizes.width, metavar="N", help=f"default {sizes.width}")
    add("--hidden", type=_between(1, 1 << 16), default=sizes.hidden, metavar="N", help=f"default {sizes.hidden}")
    add("--tokens", type=_between(1, 1 << 20), default=sizes.tokens, metavar="N", help="on each rank; default 2048")
    add("--length", type=_between(1, 1 << 20), metavar="N", help="of a sequence; default 256, on a cluster what hides")
    add(
        "-n",
        "--iters",
        type=_between(1, 10000),
        metavar="N",
        help=f"timed iterations; default {_HERE.iters}, on a cluster {_CLUSTER.iters}",
    )
    add("-w", "--warmup_iters", type=_between(0, 10000), default=2, metavar="N", help="untimed ones before; default 2")
    add(
        "--every",
        type=_between(1, 10000),
        default=4,
        metavar="N",
        help="FSDP2, DDP and slices run in every N-th iteration",
    )
    add("--seed", type=_between(0, 1 << 31), default=0, metavar="N", help="of weights, tokens and routing")
    add("--trace", type=Path, default=RECORDED, metavar="FILE", help="what the routing `recorded` replays")
    add("--record", type=Path, metavar="FILE", help="train a model and record its routing into FILE, to be replayed")
    add("--train-steps", type=_between(1, 1 << 20), default=240, metavar="N", help="before --record; default 240")
    add("--rematerialize", choices=["no", "yes", "auto"], default="no", help="of FSSDP; default no")
    add("--calibrate", action="store_true", help="of FSSDP")
    add("--spread", choices=["nearest", "quota"], default="nearest", help="of FSSDP; default nearest")
    add("--predictor", choices=["mean", "last", "decaying"], default="mean", help="of FSSDP; default mean")
    add("-J", "--json", type=Path, metavar="FILE", help="record in JSON, and a bar chart beside it")
    add("--cluster", action="store_true", help="a rank on each of some emulated hosts with slow links")
    add("--hosts", type=_between(2, MOST_HOSTS), default=4, metavar="N", help="of a cluster; default 4")
    add("--rate", default="1gbit", metavar="R", help="of each host's link, each direction; default 1gbit")
    add("-T", "--timeout", type=_between(1, 3600), default=120, metavar="S", help="for any single step; default 120")
    add(LAUNCHED, type=int, help=argparse.SUPPRESS)
    return parser


def _some_of(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    def names(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(text.split(",")))
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"expected a list of {', '.join(known)}, got {name!r}")
        return found

    return names


def _between(smallest: int, largest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or not smallest <= int(text) <= largest:
            raise argparse.ArgumentTypeError(f"expected a whole number from {smallest} to {largest}, got {text!r}")
        return int(text)

    return number

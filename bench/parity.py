"""``python -m bench parity``: training with FSSDP against one process that computes the same mean of losses.

The model has everything that the gradient rule speaks of: attention, two MoE layers (SwiGLU with a shared expert and
an auxiliary loss; GELU), experts that do not divide evenly over ranks, ranks with different numbers of tokens and
steps in which a rank has none. Routers prefer a few experts of the first rank. Training goes every way that there is:
each balancer and predictor, calibration, quotas, re-materialization, slices, re-sharding and activation checkpointing,
alone and together (`bench.parity_ways`); a run fails too if what is special about its way did not take part.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparsecoll as sc
from bench.launch import run_ranks
from bench.machine import commit, describe
from bench.parity_ways import WAYS, Traces, Way, find_ways
from bench.report import write_record
from sparsecoll.moe import MoELayer, auxiliary_loss

_VOCABULARY, _WIDTH, _LENGTH, _NUM_EXPERTS = 22, 12, 6, 7  # slices: 2, 3 or 4 ranks divide the width
_TOLERANCES = {"float64": 1e-9, "float32": 1e-5}
_OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, 0.05, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, 3e-3),
}
_PREFERENCE = 0.3
_MOST_SEQUENCES = 8
_LIMIT_S = 600.0
_COMBINATIONS = [("float64", "AdamW"), ("float32", "SGD"), ("float64", "SGD"), ("float32", "AdamW")]
_FOR_ALL_WAYS = _COMBINATIONS[:2]


class Model(nn.Module):
    """A small transformer whose feed-forwards are mixtures of experts.

    Attributes:
        reentrant: which activation checkpointing its blocks run under; None for none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reentrant: bool | None = None
        self.tokens = nn.Embedding(_VOCABULARY, _WIDTH)
        self.attention = nn.ModuleList(nn.MultiheadAttention(_WIDTH, 2, batch_first=True) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(_WIDTH) for _ in range(4))
        self.moe = nn.ModuleList(
            [
                MoELayer(_WIDTH, 24, _NUM_EXPERTS, 2, shared_hidden_dim=8, aux_loss_coef=0.01),
                MoELayer(_WIDTH, 24, _NUM_EXPERTS, 3, activation="gelu"),
            ]
        )
        self.head = nn.Linear(_WIDTH, _VOCABULARY)
        with torch.no_grad():
            for norm, moe in zip(self.norms[1::2], self.moe, strict=True):
                norm.bias.fill_(_PREFERENCE)
                moe.router.weight[:2] += _PREFERENCE

    def forward(self, ids: Tensor) -> Tensor:
        """``[num_sequences, length + 1]`` to a scalar: summed loss over a fixed number of tokens."""
        x, aux_loss = self.tokens(ids[:, :-1]), torch.zeros(())
        for number in range(len(self.moe)):
            if self.reentrant is None:
                x, more = self._block(x, number)
            else:
                x, more = checkpoint(self._block, x, number, use_reentrant=self.reentrant)
            aux_loss = aux_loss + more
        logits = self.head(x).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
        return loss / (_MOST_SEQUENCES * _LENGTH) + aux_loss

    def _block(self, x: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """``[num_sequences, length, D]`` to the same, and the auxiliary loss."""
        attention, moe = self.attention[number], self.moe[number]
        mixed = self.norms[2 * number](x)
        if len(x):  # torch's attention refuses an empty batch
            x = x + attention(mixed, mixed, mixed, need_weights=False)[0]
        x = x + moe(self.norms[2 * number + 1](x))
        return x, auxiliary_loss(moe)


class _Run(NamedTuple):
    """What training has left: losses and clip norms by step, parameters by name."""

    losses: list[float]
    norms: list[float]
    parameters: dict[str, Tensor]


def batch(step: int, rank: int) -> Tensor:
    """Between no and `_MOST_SEQUENCES` sequences; in every fourth step one rank has none.

    Steps take turns with two halves of the vocabulary, so that other experts are busy than one would expect.
    """
    generator = torch.Generator().manual_seed(1000 * step + rank)
    count = int(torch.randint(1, _MOST_SEQUENCES + 1, (), generator=generator))
    if step % 4 == 2 and rank == step // 4 % 2:
        count = 0
    half = _VOCABULARY // 2
    return step % 2 * half + torch.randint(0, half, (count, _LENGTH + 1), generator=generator)


def train_alone(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, world_size: int) -> _Run:
    """One process: the mean over ranks of the losses of their batches."""
    losses, norms = [], []
    for step in range(steps):
        optimizer.zero_grad()
        each = [model(batch(step, rank)) for rank in range(world_size)]
        loss = torch.stack(each).sum() / world_size
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        losses.append(loss.item())
    return _Run(losses, norms, model.state_dict())


def train_together(
    model: sc.FSSDPModule, optimizer: torch.optim.Optimizer, steps: int, reshard_every: int, group: sc.Group
) -> tuple[_Run, Traces]:
    """One of the ranks."""
    losses, norms, sent_bytes = [], [], []
    sparse_bytes = 0.0
    most_hot = num_moves = 0
    for step in range(steps):
        before = group.stats()
        optimizer.zero_grad()
        loss = model(batch(step, group.rank))
        loss.backward()
        norms.append(float(model.clip_grad_norm_(1.0)))
        optimizer.step()
        losses.append(group.mean(loss.item()))
        loads = model.load_report().values()
        sent_bytes.append(group.world_size * group.mean(group.stats().since(before).sent_bytes))
        sparse_bytes += group.world_size * group.mean(sum(load.sparse_bytes for load in loads))
        most_hot = max(most_hot, *(len(load.hot) for load in loads))
        if reshard_every and step % reshard_every == 1:
            num_moves += model.reshard_experts(optimizer, iterations=reshard_every)
    return _Run(losses, norms, model.state_dict()), Traces(sent_bytes, sparse_bytes, most_hot, num_moves)


def make_model() -> Model:
    """The same at every call, as long as no other thread draws numbers."""
    torch.manual_seed(0)
    return Model()


def compare(group: sc.Group, start: Model, ways: Sequence[Way], num_steps: int) -> list[dict[str, Any]]:
    """Trains ``start`` all ``ways``, with all dtypes and optimizers, on this group; a row for each.

    Ways beside the plain one go half as many steps, with two of the combinations.
    """
    rows = []
    ways = [way for way in ways if _fits(way, group.world_size)]
    for dtype, optimizer in _COMBINATIONS:
        model = copy.deepcopy(start).to(getattr(torch, dtype))
        make_optimizer = _OPTIMIZERS[optimizer]
        references: dict[int, _Run] = {}
        traces: dict[str, Traces] = {}
        for way in ways if (dtype, optimizer) in _FOR_ALL_WAYS else ways[:1]:
            steps = num_steps if way is ways[0] else num_steps // 2
            if steps not in references:
                alone = copy.deepcopy(model)
                references[steps] = train_alone(alone, make_optimizer(alone.parameters()), steps, group.world_size)
            expected = references[steps]
            copied = copy.deepcopy(model)
            copied.reentrant = way.reentrant
            costs = {name: way.costs(group) for name, each in copied.named_modules() if isinstance(each, MoELayer)}
            together = sc.FSSDP(copied, group=group, costs=costs, **way.arguments)
            mine = make_optimizer(together.parameters())
            found, traces[way.name] = train_together(together, mine, steps, way.reshard_every, group)
            rows.append(
                {
                    "backend": group.backend,
                    "world_size": group.world_size,
                    "way": way.name,
                    "dtype": dtype,
                    "optimizer": optimizer,
                    "steps": steps,
                    "loss_rel_diff": _worst(expected.losses, found.losses),
                    "norm_rel_diff": _worst(expected.norms, found.norms),
                    "param_rel_diff": max(
                        _relative(expected.parameters[key], found.parameters[key]) for key in expected.parameters
                    ),
                    **traces[way.name]._asdict(),
                    "sent_bytes": sum(traces[way.name].sent_bytes),
                    "went_its_way": group.world_size == 1 or way.is_gone(traces),
                    "same_names": list(expected.parameters) == list(found.parameters),
                }
            )
    return rows


def _fits(way: Way, world_size: int) -> bool:
    """Slices have to be even, and it takes several experts on some rank to have better owners."""
    is_even = way.options.get("sharding") != "slices" or _WIDTH % world_size == 0
    return is_even and not (way.reshard_every and world_size >= _NUM_EXPERTS)


def is_right(row: dict[str, Any]) -> bool:
    """Whether a row keeps the promise; one in which what its way adds took no part would prove nothing."""
    tolerance = _TOLERANCES[row["dtype"]]
    exact = row["loss_rel_diff"] <= tolerance and row["norm_rel_diff"] <= tolerance
    if row["dtype"] == "float64":
        exact = exact and row["param_rel_diff"] <= tolerance
    return exact and row["same_names"] and row["went_its_way"]


def run(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Starts all worlds, or is one of their ranks."""
    options = _parser().parse_args(list(arguments))
    torch.set_num_threads(1)
    if options.launched:
        with sc.init_group() as group:
            rows = compare(group, make_model(), options.ways, options.steps)
            if group.rank == 0:
                write_record({"results": rows}, options.json)
        return {"passed": all(map(is_right, rows))}
    rows, errors = [], []
    print(
        f"# {'backend':>7} {'ranks':>5} {'way':>34} {'dtype':>8} {'optimizer':>9} {'loss':>9} {'norm':>9} "
        f"{'parameters':>10}"
    )
    for row in _all_rows(options, errors):
        rows.append(row)
        print(
            f"{row['backend']:>9} {row['world_size']:>5} {row['way']:>34} {row['dtype']:>8} {row['optimizer']:>9} "
            f"{row['loss_rel_diff']:>9.1e} {row['norm_rel_diff']:>9.1e} {row['param_rel_diff']:>10.1e} "
            f"{'ok' if is_right(row) else 'WRONG' if row['went_its_way'] else 'UNPROVED'}",
            flush=True,
        )
    for error in errors:
        print(f"# {error}")
    record = {
        "case": "parity",
        "command": " ".join(["python -m bench parity", *arguments]),
        "passed": bool(rows) and not errors and all(map(is_right, rows)),
        "summary": {
            "max_loss_rel_diff_fp32": _largest(rows, "float32", "loss_rel_diff"),
            "max_loss_rel_diff_fp64": _largest(rows, "float64", "loss_rel_diff"),
            "max_param_rel_diff_fp64": _largest(rows, "float64", "param_rel_diff"),
        },
        "results": rows,
        "errors": errors,
        "machine": describe(),
        "commit": commit(),
    }
    print("# " + ", ".join(f"{key} {value:.1e}" for key, value in record["summary"].items()))
    print(f"# {'OK' if record['passed'] else 'FAILED'}")
    if options.json is not None:
        write_record(record, options.json)
    return record


def _all_rows(options: argparse.Namespace, errors: list[str]) -> Iterator[dict[str, Any]]:
    for backend in options.backend:
        for ranks in options.ranks:
            try:
                yield from _rows(backend, ranks, options)
            except sc.BackendUnavailable as error:
                errors.append(f"back end {backend} is not available: {error}")
            except _JobFailed as error:
                errors.append(f"back end {backend} with {ranks} ranks {error}")


class _JobFailed(Exception):
    """Ranks have ended without a record; they have said why."""


def _rows(backend: str, ranks: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    if backend == "local":
        start = make_model()
        rank_main = partial(compare, start=start, ways=options.ways, num_steps=options.steps)
        return sc.run_local(rank_main, ranks, timeout_s=_LIMIT_S)[0]
    with tempfile.TemporaryDirectory(prefix="sparsecoll-bench-") as folder:
        output = Path(folder, "record.json")
        names = ",".join(way.name for way in options.ways)
        arguments = ["parity", "--launched", "--ways", names, "--steps", str(options.steps), "--json", str(output)]
        status = run_ranks(backend, ranks, arguments)
        if not output.exists():
            raise _JobFailed(f"ended with status {status}")
        rows: list[dict[str, Any]] = json.loads(output.read_text())["results"]
        return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench parity", allow_abbrev=False, description=__doc__)
    add = parser.add_argument
    add("--backend", type=_backends, default=["torch", "mpi"], metavar="LIST", help="of gloo, mpi and local")
    add("--ranks", type=_numbers, default=[2, 3, 4], metavar="LIST", help="world sizes; default 2,3,4")
    add("--ways", type=_ways, default=list(WAYS.values()), metavar="LIST", help=f"of {', '.join(WAYS)}; default all")
    add("--steps", type=int, default=20, metavar="N", help="optimizer steps of the plain way, twice the others'")
    add("-J", "--json", type=Path, metavar="FILE", help="record in JSON")
    add("--launched", action="store_true", help=argparse.SUPPRESS)
    return parser


def _backends(text: str) -> list[str]:
    names = {"gloo": "torch", "torch": "torch", "mpi": "mpi", "local": "local"}
    return [names[part] for part in text.split(",")]


def _ways(text: str) -> list[Way]:
    names = text.split(",")
    unknown = [name for name in names if name not in WAYS]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(WAYS)}, got {', '.join(unknown)}")
    return find_ways(names)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _worst(expected: Sequence[float], found: Sequence[float]) -> float:
    return max(abs(a - b) / max(abs(a), 1e-30) for a, b in zip(expected, found, strict=True))


def _relative(expected: Tensor, found: Tensor) -> float:
    return float((expected - found).norm() / expected.norm().clamp_min(1e-30))


def _largest(rows: Sequence[dict[str, Any]], dtype: str, key: str) -> float:
    return max((row[key] for row in rows if row["dtype"] == dtype), default=float("nan"))

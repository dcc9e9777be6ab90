"""``python -m bench parity``: training with FSSDP against one process that computes the same mean of losses.

The model has everything that the gradient rule speaks of: attention, two MoE layers (SwiGLU with a shared expert and
an auxiliary loss; GELU), experts that do not divide evenly over ranks, ranks with different numbers of tokens and
steps in which a rank has none. Experts are replicated without regard to gain, so that sparse gathers and reductions
take part in every step after the first.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import sparsecoll as sc
from bench.launch import run_ranks
from bench.machine import commit, describe
from bench.report import write_record
from sparsecoll.balance import Balance, Costs, Loads
from sparsecoll.moe import MoELayer, auxiliary_loss

_VOCABULARY, _WIDTH, _LENGTH, _NUM_EXPERTS = 23, 16, 6, 7
_TOLERANCES = {"float64": 1e-9, "float32": 1e-5}
_OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, 0.05, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, 3e-3),
}
_MOST_SEQUENCES = 5


@dataclass(frozen=True)
class _Everywhere:
    """The three busiest experts on every rank, whether that gains anything or not."""

    exact: bool = False

    def balance(self, loads: Loads, base: sc.Placement, costs: Costs) -> Balance:
        chosen = np.argsort(-loads.sum(axis=0), kind="stable")[:3].tolist()
        return Balance(base.replicate({expert: range(base.world_size) for expert in chosen}))


class Model(nn.Module):
    """A small transformer whose feed-forwards are mixtures of experts."""

    def __init__(self) -> None:
        super().__init__()
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

    def forward(self, ids: Tensor) -> Tensor:
        """``[num_sequences, length + 1]`` to a scalar: summed loss over a fixed number of tokens."""
        x = self.tokens(ids[:, :-1])
        for i, (attention, moe) in enumerate(zip(self.attention, self.moe, strict=True)):
            mixed = self.norms[2 * i](x)
            if len(ids):  # torch's attention refuses an empty batch
                x = x + attention(mixed, mixed, mixed, need_weights=False)[0]
            x = x + moe(self.norms[2 * i + 1](x))
        logits = self.head(x).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
        return loss / (_MOST_SEQUENCES * _LENGTH) + auxiliary_loss(self)


class _Run(NamedTuple):
    """What training has left: losses and clip norms by step, parameters by name, and bytes that replicas moved."""

    losses: list[float]
    norms: list[float]
    parameters: dict[str, Tensor]
    sparse_bytes: float = 0.0


def batch(step: int, rank: int) -> Tensor:
    """Between no and `_MOST_SEQUENCES` sequences; in every fourth step one rank has none."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    count = int(torch.randint(1, _MOST_SEQUENCES + 1, (), generator=generator))
    if step % 4 == 2 and rank == step // 4 % 2:
        count = 0
    return torch.randint(0, _VOCABULARY, (count, _LENGTH + 1), generator=generator)


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


def train_together(model: sc.FSSDPModule, optimizer: torch.optim.Optimizer, steps: int, group: sc.Group) -> _Run:
    """One of the ranks."""
    losses, norms = [], []
    sparse_bytes = 0.0
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(batch(step, group.rank))
        loss.backward()
        norms.append(float(model.clip_grad_norm_(1.0)))
        optimizer.step()
        losses.append(group.mean(loss.item()))
        sent = sum(load.sparse_bytes for load in model.load_report().values())
        sparse_bytes += group.mean(sent) * group.world_size
    return _Run(losses, norms, model.state_dict(), sparse_bytes)


def compare(group: sc.Group, steps: int) -> list[dict[str, Any]]:
    """All dtypes and optimizers on this group; a row for each."""
    rows = []
    for dtype in _TOLERANCES:
        for name, make_optimizer in _OPTIMIZERS.items():
            torch.manual_seed(0)
            alone = Model().to(getattr(torch, dtype))
            together = sc.FSSDP(copy.deepcopy(alone), group=group, balancer=_Everywhere())
            expected = train_alone(alone, make_optimizer(alone.parameters()), steps, group.world_size)
            before = group.stats()
            found = train_together(together, make_optimizer(together.parameters()), steps, group)
            rows.append(
                {
                    "backend": group.backend,
                    "world_size": group.world_size,
                    "dtype": dtype,
                    "optimizer": name,
                    "steps": steps,
                    "loss_rel_diff": _worst(expected.losses, found.losses),
                    "norm_rel_diff": _worst(expected.norms, found.norms),
                    "param_rel_diff": max(
                        _relative(expected.parameters[key], found.parameters[key]) for key in expected.parameters
                    ),
                    "sent_bytes": group.stats().since(before).sent_bytes,
                    "sparse_bytes": found.sparse_bytes,
                    "same_names": list(expected.parameters) == list(found.parameters),
                }
            )
    return rows


def is_right(row: dict[str, Any]) -> bool:
    """Whether a row keeps the promise; a run without replicas would prove nothing."""
    tolerance = _TOLERANCES[row["dtype"]]
    exact = row["loss_rel_diff"] <= tolerance and row["norm_rel_diff"] <= tolerance
    if row["dtype"] == "float64":
        exact = exact and row["param_rel_diff"] <= tolerance
    return exact and row["same_names"] and (row["world_size"] == 1 or row["sparse_bytes"] > 0)


def run(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Starts all worlds, or is one of their ranks."""
    options = _parser().parse_args(list(arguments))
    torch.set_num_threads(1)
    if options.launched:
        with sc.init_group() as group:
            rows = compare(group, options.steps)
            if group.rank == 0:
                write_record({"results": rows}, options.json)
        return {"passed": all(map(is_right, rows))}
    rows, errors = [], []
    print(f"# {'backend':>7} {'ranks':>5} {'dtype':>8} {'optimizer':>9} {'loss':>9} {'norm':>9} {'parameters':>10}")
    for row in _all_rows(options, errors):
        rows.append(row)
        print(
            f"{row['backend']:>9} {row['world_size']:>5} {row['dtype']:>8} {row['optimizer']:>9} "
            f"{row['loss_rel_diff']:>9.1e} {row['norm_rel_diff']:>9.1e} {row['param_rel_diff']:>10.1e} "
            f"{'ok' if is_right(row) else 'WRONG'}",
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
            with tempfile.TemporaryDirectory(prefix="sparsecoll-bench-") as folder:
                output = Path(folder, "record.json")
                arguments = ["parity", "--launched", "--steps", str(options.steps), "--json", str(output)]
                try:
                    status = run_ranks(backend, ranks, arguments)
                except sc.BackendUnavailable as error:
                    errors.append(f"back end {backend} is not available: {error}")
                    continue
                if not output.exists():
                    errors.append(f"back end {backend} with {ranks} ranks ended with status {status}")
                    continue
                yield from json.loads(output.read_text())["results"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench parity", allow_abbrev=False, description=__doc__)
    parser.add_argument("--backend", type=_backends, default=["torch", "mpi"], metavar="LIST", help="of gloo and mpi")
    parser.add_argument("--ranks", type=_numbers, default=[2, 3, 4], metavar="LIST", help="world sizes; default 2,3,4")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="optimizer steps")
    parser.add_argument("-J", "--json", type=Path, metavar="FILE", help="record in JSON")
    parser.add_argument("--launched", action="store_true", help=argparse.SUPPRESS)
    return parser


def _backends(text: str) -> list[str]:
    names = {"gloo": "torch", "torch": "torch", "mpi": "mpi"}
    return [names[part] for part in text.split(",")]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _worst(expected: Sequence[float], found: Sequence[float]) -> float:
    return max(abs(a - b) / abs(a) for a, b in zip(expected, found, strict=True))


def _relative(expected: Tensor, found: Tensor) -> float:
    return float((expected - found).norm() / expected.norm().clamp_min(1e-30))


def _largest(rows: Sequence[dict[str, Any]], dtype: str, key: str) -> float:
    return max((row[key] for row in rows if row["dtype"] == dtype), default=float("nan"))

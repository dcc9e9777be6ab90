"""Predictors: loads of past forwards → loads of the next. Pure, the same on every rank.

Legend: ``W`` ranks, ``E`` experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from sparsecoll.balance.costs import Loads
from sparsecoll.errors import InvalidArgument

__all__ = ["DecayingLoad", "LastLoad", "MeanLoad", "Predictor", "find_predictor"]


@runtime_checkable
class Predictor(Protocol):
    """Guesses the loads of a layer's next forward."""

    @property
    def window(self) -> int:
        """How many past forwards it looks at."""
        ...

    def predict(self, history: Sequence[Loads]) -> Loads:
        """The loads to be expected.

        Must be a pure function of its argument, for every rank computes it for itself.

        Args:
            history: of the last ``window`` forwards or fewer, oldest first; at least one.
        """
        ...


@dataclass(frozen=True)
class MeanLoad:
    """The mean of the last forwards, each load rounded to the nearest integer, halves up (Hecate, section 4.2).

    Attributes:
        window: forwards; Hecate takes 5.
    """

    window: int = 5

    def __post_init__(self) -> None:
        _check_window("MeanLoad", self.window)

    def predict(self, history: Sequence[Loads]) -> Loads:
        """See `Predictor.predict`."""
        recent = np.array(history[-self.window :], np.int64)
        total: Loads = recent.sum(axis=0)
        return (2 * total + len(recent)) // (2 * len(recent))


@dataclass(frozen=True)
class LastLoad:
    """The loads of the last forward."""

    @property
    def window(self) -> int:
        return 1

    def predict(self, history: Sequence[Loads]) -> Loads:
        """See `Predictor.predict`."""
        return np.array(history[-1], np.int64)


@dataclass(frozen=True)
class DecayingLoad:
    """A mean in which a forward weighs ``decay`` times what the next one does; rounded to the nearest, halves to even.

    Attributes:
        decay: above 0 and at most 1, which is the plain mean.
        window: forwards.
    """

    decay: float = 0.7
    window: int = 10

    def __post_init__(self) -> None:
        _check_window("DecayingLoad", self.window)
        if not 0 < self.decay <= 1:
            raise InvalidArgument(f"DecayingLoad: expected 0 < decay <= 1, got {self.decay}")

    def predict(self, history: Sequence[Loads]) -> Loads:
        """See `Predictor.predict`."""
        # One product and one sum at a time: IEEE arithmetic makes them the same on every rank, which powers are not.
        total, weight = np.zeros(history[-1].shape), 0.0
        for loads in history[-self.window :]:
            total = total * self.decay + loads
            weight = weight * self.decay + 1
        return np.rint(total / weight).astype(np.int64)


_BY_NAME = {"mean": MeanLoad, "last": LastLoad, "decaying": DecayingLoad}


def find_predictor(predictor: str | Predictor) -> Predictor:
    """A predictor by name, or the user's own object.

    Raises:
        InvalidArgument: an unknown name, or an object without ``predict`` and ``window``.
    """
    if isinstance(predictor, str) and predictor in _BY_NAME:
        made: Any = _BY_NAME[predictor]()
        return made
    if isinstance(predictor, (str, type)) or not isinstance(predictor, Predictor):
        names = ", ".join(sorted(_BY_NAME))
        raise InvalidArgument(f"predictor: expected {names} or an object with predict and window, got {predictor!r}")
    _check_window("predictor", predictor.window)
    return predictor


def _check_window(name: str, window: Any) -> None:
    if not isinstance(window, int) or window < 1:
        raise InvalidArgument(f"{name}: expected a window of at least 1 forward, got {window!r}")

"""What a user has chosen for a wrapped model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sparsecoll.balance import Balancer, Costs, Predictor, find_balancer, find_predictor
from sparsecoll.errors import InvalidArgument
from sparsecoll.placement import Placement

__all__ = ["Policy", "Rematerialize", "Sharding", "Spread"]

Rematerialize = bool | Literal["auto"]
Sharding = Literal["owners", "slices"]
Spread = Literal["nearest", "quota"]


@dataclass(frozen=True)
class Policy:
    """The choices of `sparsecoll.FSSDP`, checked.

    Attributes:
        fixed: Placements that never change, by the layer's name.
    """

    balancer: Balancer
    predictor: Predictor
    calibrate: bool
    spread: Spread
    rematerialize: Rematerialize
    sharding: Sharding
    costs: Mapping[str, Costs]
    fixed: Mapping[str, Placement] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        balancer: str | Balancer,
        predictor: str | Predictor,
        calibrate: bool,
        spread: str,
        rematerialize: bool | str,
        sharding: str,
        costs: Mapping[str, Costs] | None,
    ) -> Policy:
        """Finds what has a name.

        Raises:
            InvalidArgument: an unknown name, or a value of another type.
        """
        _check("calibrate", calibrate, (True, False))
        _check("spread", spread, ("nearest", "quota"))
        _check("rematerialize", rematerialize, (True, False, "auto"))
        _check("sharding", sharding, ("owners", "slices"))
        given = {} if costs is None else dict(costs)
        for name, each in given.items():
            if not isinstance(each, Costs):
                raise InvalidArgument(f"costs: expected a Costs for {name}, got {each!r}")
        found = find_balancer(balancer), find_predictor(predictor)
        return cls(*found, calibrate, spread, rematerialize, sharding, given)  # type: ignore[arg-type]

    def slices(self, world_size: int) -> int:
        """Into how many chunks an expert is cut."""
        return world_size if self.sharding == "slices" else 1


def _check(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(type(value) is type(each) and value == each for each in allowed):
        choices = ", ".join(repr(each) for each in allowed)
        raise InvalidArgument(f"{name}: expected one of {choices}, got {value!r}")

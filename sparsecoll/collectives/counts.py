"""The one exchange that an MoE layer cannot do without: all ranks learn all loads, and that they agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecoll.collectives.agreement import Description, agree
from sparsecoll.group import Group

__all__ = ["CountExchange"]


class CountExchange:
    """An exchange under way. Between its start and `result` a caller can do what depends on no other rank.

    Args:
        name: of the operation.
        digest, describe, problem: as in `sparsecoll.collectives.agreement.agree`.
        counts: int64 ``[num_experts]`` tensor on the group's device; must not change until `result` has returned.
        flag: something else that all ranks are to learn.
    """

    def __init__(
        self,
        group: Group,
        name: str,
        digest: bytes,
        describe: Callable[[], Description],
        counts: Any,
        flag: bool,
        problem: Exception | None = None,
    ) -> None:
        self._group = group
        self._operation = group.operation(name)
        self._agreed = digest, describe, problem
        self._counts, self._flag = counts, flag

    def result(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The counts ``[world_size, num_experts]`` and flags ``[world_size]`` of all ranks.

        Raises:
            InvalidArgument, CollectiveMismatch: as `agree` does; on all ranks.
        """
        digest, describe, problem = self._agreed
        payload = np.array([*self._counts.tolist(), self._flag], "<i8").tobytes()

        def run() -> list[bytes]:
            return agree(self._group, self._operation, digest, describe, problem=problem, payload=payload)

        payloads = self._group.run(self._operation, run)
        exchanged = np.array([np.frombuffer(each, "<i8") for each in payloads]).astype(np.int64)
        return exchanged[:, :-1], exchanged[:, -1] != 0

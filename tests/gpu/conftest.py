"""Tests on a GPU: skipped where there is none, and started as ranks once for each back end and world size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import pytest

from tests.gpu.machine import reason_to_skip
from tests.gpu.ranks import run_table


@pytest.fixture(autouse=True, scope="session")
def gpu() -> None:
    """Every test of this folder needs one."""
    if (reason := reason_to_skip()) is not None:
        pytest.skip(reason)


Failure = Callable[[str, int, str], str | None]


@pytest.fixture(scope="session")
def failure_of(gpu: None, request: pytest.FixtureRequest) -> Failure:
    """What went wrong in a check, or None. Ranks of a start run all the checks that this session wants of them."""
    wanted: dict[tuple[str, int], list[str]] = defaultdict(list)
    for item in request.session.items:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if params.keys() >= {"backend", "world_size", "check"}:
            wanted[params["backend"], params["world_size"]].append(params["check"])
    results: dict[tuple[str, int], dict[str, str | None]] = {}

    def find(backend: str, world_size: int, check: str) -> str | None:
        if (backend, world_size) not in results:
            names = list(dict.fromkeys(wanted[backend, world_size]))
            results[backend, world_size] = run_table(names, backend, world_size)
        return results[backend, world_size][check]

    return find

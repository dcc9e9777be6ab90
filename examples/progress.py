"""How training shows itself: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from history import History

COLUMNS = ("run", "loss", "tokens/s", "imbalance", "replicas sent")


class Progress:
    """Shows the newest figures of several runs; silent on ranks that are not ``visible``."""

    def __init__(self, num_steps: int, tokens_per_step: int, visible: bool) -> None:
        self.num_steps = num_steps
        self.tokens_per_step = tokens_per_step
        self.visible = visible
        self._stack = ExitStack()
        self._live: Any = None
        if visible and sys.stdout.isatty():
            from rich.live import Live

            self._live = self._stack.enter_context(Live(refresh_per_second=4))

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def show(self, step: int, histories: Sequence[History]) -> None:
        """Called after every step."""
        if self._live:
            self._live.update(self._table(step, histories))
        elif self.visible and ((step + 1) % max(1, self.num_steps // 10) == 0 or step == 0):
            for history in histories:
                name, *figures = self._figures(history)
                line = ", ".join(f"{column} {figure}" for column, figure in zip(COLUMNS[1:], figures, strict=True))
                print(f"step {step + 1:>4}/{self.num_steps}  {name:<18}  {line}", flush=True)

    def _figures(self, history: History) -> tuple[str, ...]:
        tokens_per_s = self.tokens_per_step / statistics.median(history.step_s[-20:])
        return (
            history.name,
            f"{history.losses[-1]:.3f}",
            f"{tokens_per_s:,.0f}",
            f"{history.imbalance[-1]:.2f}",
            f"{history.sparse_bytes[-1] / 1e6:.1f} MB",
        )

    def _table(self, step: int, histories: Sequence[History]) -> Any:
        from rich.table import Table

        table = Table(*COLUMNS, title=f"step {step + 1} of {self.num_steps}")
        for history in histories:
            table.add_row(*self._figures(history))
        return table

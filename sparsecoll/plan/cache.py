"""Plans that have been made, by what they were made from."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

from sparsecoll.plan.plan import Plan

__all__ = ["PlanCache"]


class PlanCache:
    """The plans used last; bounded in number, and in the bytes of their transfers. Threads may share it."""

    def __init__(self, max_plans: int, max_bytes: int) -> None:
        self._max_plans, self._max_bytes = max_plans, max_bytes
        self._plans: OrderedDict[Hashable, Plan] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    @property
    def num_plans(self) -> int:
        return len(self._plans)

    @property
    def num_bytes(self) -> int:
        """Of the transfers of all its plans; more than the bound only if that is one plan."""
        return self._num_bytes

    def get(self, key: Hashable, make: Callable[[], Plan]) -> Plan:
        """The plan of ``key``, from ``make`` where it is not known; equal keys get one and the same."""
        with self._lock:
            if (known := self._plans.get(key)) is not None:
                self._plans.move_to_end(key)
                return known
        made = make()  # without the lock: others need not wait, and the first of two equal ones is kept
        with self._lock:
            plan = self._plans.setdefault(key, made)
            if plan is made:
                self._num_bytes += made.transfers.nbytes
                while self._is_over:
                    _, oldest = self._plans.popitem(last=False)
                    self._num_bytes -= oldest.transfers.nbytes
            return plan

    @property
    def _is_over(self) -> bool:
        count = len(self._plans)
        return count > self._max_plans or (self._num_bytes > self._max_bytes and count > 1)

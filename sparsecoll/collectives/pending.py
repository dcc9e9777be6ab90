"""A sparse collective in two halves on the caller's own thread: messages are posted now and waited for later.

A thread of its own would move bytes as well, but on a CPU it takes the interpreter and a core from the compute that it
is to hide behind. What a back end moves by itself (Gloo's threads, a kernel that reads a peer's memory) overlaps all
the same.
"""

from __future__ import annotations

from typing import Any

from sparsecoll.collectives.call import Call, finish
from sparsecoll.group import Group
from sparsecoll.transport.base import Counters

__all__ = ["Pending"]


class Pending:
    """A call whose first messages are in flight. Every rank starts and ends its calls in the same order.

    Attributes:
        moved: what the call has sent and received so far.
    """

    def __init__(self, call: Call, value: Any, out: Any, group: Group) -> None:
        self._group = group
        self._operation = group.operation(call.name)
        self._steps = call.steps(group, self._operation, value, out)
        self._requests: list[Any] = []
        self._result: Any = None
        self._has_ended = False
        self.moved = Counters()
        group.run(self._operation, self._post)

    def result(self) -> Any:
        """Waits for the messages, does what is left, and gives what the blocking call would return."""
        if not self._has_ended:
            self._group.run(self._operation, self._end)
        return self._result

    def _post(self) -> None:
        before = self._group.stats()
        try:
            self._requests = next(self._steps)
        except StopIteration as end:
            self._result, self._has_ended = end.value, True
        self.moved = self._group.stats().since(before)

    def _end(self) -> None:
        before = self._group.stats()
        self._has_ended = True
        self._group.transport.wait(self._requests, self._operation)
        self._result = finish(self._group, self._operation, self._steps)
        later = vars(self._group.stats().since(before))
        self.moved = Counters(**{name: value + later[name] for name, value in vars(self.moved).items()})

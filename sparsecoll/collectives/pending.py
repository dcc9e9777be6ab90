"""A sparse collective in two halves: messages are posted now and waited for later.

Both halves run on the caller's own thread where no other rank waits for what this one forwards, and nothing else is on
the group's thread. A thread of its own
would move bytes as well, but on a CPU it takes the interpreter and a core from the compute that it is to hide behind;
what a back end moves by itself (Gloo's threads, a kernel that reads a peer's memory) overlaps all the same. A rank that
relays goes on at once on the group's thread, so that nobody waits until its caller has time. On a GPU the first half
issues everything, and the second lets the caller's stream wait.
"""

from __future__ import annotations

from typing import Any, Protocol

from sparsecoll.collectives.call import CallSteps, finish
from sparsecoll.group import Group
from sparsecoll.transport.base import Counters, HostTransport, Operation
from sparsecoll.work import Work

__all__ = ["Pending"]


class Steps(Protocol):
    """A collective as steps; `sparsecoll.collectives.call.Call` is one."""

    @property
    def name(self) -> str: ...

    def steps(
        self, group: Group, operation: Operation, value: Any, out: Any, *, detached: bool = False
    ) -> CallSteps: ...


class Pending:
    """A call whose first messages are in flight. Every rank starts and ends its calls in the same order.

    Attributes:
        moved: what the call has sent and received so far.
    """

    def __init__(self, call: Steps, value: Any, out: Any, group: Group) -> None:
        self._group = group
        self._operation = group.operation(call.name)
        self._steps = call.steps(group, self._operation, value, out, detached=True)
        self._result: Any = None
        self._has_ended = False
        self._work: Work | None = None
        self.moved = Counters()
        if group.is_busy:
            self._work = group.start(self._operation, self._all, value, out)
        elif not group.run(self._operation, self._post):
            self._work = group.start(self._operation, self._end, value, out)
        elif isinstance(group.transport, HostTransport):
            group.transport.keep_going()

    def result(self) -> Any:
        """Waits for the messages, does what is left, and gives what the blocking call would return."""
        if self._work is not None:
            self._work.wait()
        elif not self._has_ended:
            self._group.run(self._operation, self._end)
        return self._result

    def _post(self) -> bool:
        counters = self._group.transport.counters
        before = counters.snapshot()
        can_wait = True
        try:
            can_wait = bool(next(self._steps))
        except StopIteration as end:
            self._result, self._has_ended = end.value, True
        self.moved = counters.since(before)
        return can_wait

    def _end(self) -> None:
        counters = self._group.transport.counters
        before = counters.snapshot()
        self._has_ended = True
        self._result = finish(self._steps)
        self.moved += counters.since(before)

    def _all(self) -> None:
        self._post()
        if not self._has_ended:
            self._end()

"""The handle of an operation that has been put on a stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparsecoll.collectives.call import CallSteps, finish
from sparsecoll.errors import SparsecollError
from sparsecoll.group import Group
from sparsecoll.transport.base import Operation
from sparsecoll.transport.stream import Issue
from sparsecoll.work import Work

__all__ = ["IssuedWork"]


class IssuedWork(Work):
    """An operation in flight on the device: whoever waits for it makes a stream wait, and not the host.

    Args:
        steps: of the operation; all that is to be issued is issued here.
        result_of: what the caller wants of the steps' result.
    """

    def __init__(
        self,
        group: Group,
        operation: Operation,
        steps: CallSteps,
        result_of: Callable[[Any], Any] = lambda result: result,
    ) -> None:
        super().__init__(str(operation))
        self._group, self._operation = group, operation
        self._steps, self._result_of = steps, result_of
        self._issue: Issue | None = None
        self._failure: BaseException | None = None
        self._has_result = False
        try:
            issue = group.run(operation, lambda: next(steps))
            assert isinstance(issue, Issue)
            self._issue = issue
        except SparsecollError as error:
            self._failure = error

    def done(self) -> bool:
        """Whether the device has ended the operation, well or badly."""
        return self._issue is None or self._issue.is_done()

    def wait(self, timeout_s: float | None = None) -> None:
        """Lets the caller's current stream wait for the operation; the host goes on.

        Args:
            timeout_s: given, the host waits as well.

        Raises:
            CollectiveTimeout: ``timeout_s`` passed; the operation itself goes on and may be waited for again.
            InvalidArgument, CollectiveMismatch: what the blocking call would have raised before bytes move.
            CollectiveTimeout, PeerFailure, TransportError: the operation has failed by now.
        """
        if self._issue is None:
            assert self._failure is not None
            raise self._failure
        if timeout_s is not None:
            self._issue.wait(timeout_s)
        if not self._has_result:
            self._result = self._result_of(self._group.run(self._operation, lambda: finish(self._steps)))
            self._has_result = True
        else:
            self._issue.join()

    def exception(self) -> BaseException | None:
        """What became of the operation, or None; blocks the host until its end."""
        if self._issue is None:
            return self._failure
        try:
            self._issue.wait()
        except SparsecollError as error:
            return error
        return None

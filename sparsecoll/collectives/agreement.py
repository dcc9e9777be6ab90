"""The exchange with which a checked operation starts.

Every rank says whether its own arguments are sound and sends a digest of what must be equal. A bad argument or a
difference anywhere then raises on all ranks, at the same point and before payload moves, and the group stays usable.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparsecoll.errors import CollectiveMismatch, SparsecollError
from sparsecoll.group import Group
from sparsecoll.transport.base import Operation

__all__ = ["Description", "agree", "agreed_error", "check_headers", "digest_of", "header"]

_HEADER = struct.Struct("<?16sQI")  # sound, digest, number of the operation, length of the payload
_LENGTH = struct.Struct("<I")

Description = Mapping[str, Any]


def digest_of(*parts: Any) -> bytes:
    """16 bytes that are equal where the parts are."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def agree(
    group: Group,
    operation: Operation,
    digest: bytes,
    describe: Callable[[], Description],
    *,
    problem: Exception | None = None,
    payload: bytes = b"",
) -> list[bytes]:
    """Exchanges digests and payloads.

    Args:
        digest: `digest_of` everything that must be equal on all ranks; ignored with a ``problem``.
        describe: the same as named values, asked for only where ranks differ.
        problem: what is wrong with this rank's arguments.
        payload: small, of equal length on all ranks that agree.

    Returns:
        The payloads of all ranks, in rank order.

    Raises:
        InvalidArgument: ``problem``, on the rank that has it.
        CollectiveMismatch: on all other ranks, or on all where digests differ.
    """
    record = header(operation, digest, problem, len(payload))
    if len(record) + len(payload) <= group.record_bytes:
        record += payload
    records = group.transport.exchange(record.ljust(group.record_bytes, b"\0"), operation)
    check_headers(group, operation, records, describe, problem)
    if len(record) == _HEADER.size + len(payload):
        return [each[_HEADER.size : _HEADER.size + len(payload)] for each in records]
    return group.transport.exchange(payload, operation)


def header(operation: Operation, digest: bytes, problem: Exception | None, payload_bytes: int) -> bytes:
    """What a record of `agree` begins with: whether this rank is sound, and the digest of what must be equal."""
    return _HEADER.pack(problem is None, b"" if problem else digest, operation.sequence, payload_bytes)


def check_headers(
    group: Group,
    operation: Operation,
    records: Sequence[bytes],
    describe: Callable[[], Description],
    problem: Exception | None,
) -> None:
    """Raises on all ranks, as `agree` does, unless the headers of all records are equal and sound."""
    headers = [_HEADER.unpack_from(each) for each in records]
    if all(each == headers[0] and each[0] for each in headers):
        return
    details = _exchange_details(group, operation, problem, describe)
    raise agreed_error(problem) if problem is not None else agreed_error(_difference(group, operation, details))


def agreed_error(error: Exception) -> Exception:
    """Marks an error that all ranks raise at the same point, so that the group stays usable."""
    error.agreed = True  # type: ignore[attr-defined]
    return error


def _exchange_details(
    group: Group, operation: Operation, problem: Exception | None, describe: Callable[[], Description]
) -> list[dict[str, Any]]:
    mine: dict[str, Any] = {"operation": operation.name, "number": operation.sequence}
    mine |= {"problem": f"{type(problem).__name__}: {problem}"} if problem is not None else describe()
    text = json.dumps(mine, default=str).encode()
    lengths = [_LENGTH.unpack(each)[0] for each in group.transport.exchange(_LENGTH.pack(len(text)), operation)]
    texts = group.transport.exchange(text.ljust(max(lengths), b"\0"), operation)
    distinct = {each: json.loads(each.rstrip(b"\0")) for each in set(texts)}
    return [distinct[each] for each in texts]


def _difference(group: Group, operation: Operation, details: Sequence[dict[str, Any]]) -> SparsecollError:
    problems = [f"rank {rank}: {each['problem']}" for rank, each in enumerate(details) if "problem" in each]
    if problems:
        return CollectiveMismatch(
            f"{operation}: expected sound arguments on all ranks, got {'; '.join(problems)} {group.place_of_error}"
        )
    for key in details[0] | details[-1]:
        values = [each.get(key) for each in details]
        for rank, value in enumerate(values):
            if value != values[0]:
                where, first, other = _first_difference(values[0], value)
                return CollectiveMismatch(
                    f"{operation}: expected equal {key}{where} on all ranks, got {first} on rank 0 and {other} on "
                    f"rank {rank} {group.place_of_error}"
                )
    return CollectiveMismatch(f"{operation}: expected equal arguments on all ranks {group.place_of_error}")


def _first_difference(first: Any, other: Any) -> tuple[str, Any, Any]:
    if isinstance(first, list) and isinstance(other, list) and len(first) == len(other):
        for index, (a, b) in enumerate(zip(first, other, strict=True)):
            if a != b:
                return f"[{index}]", a, b
    return "", first, other

"""Typed errors, one class per thing that a caller can do about it.

Every message has the form ``<operation>: expected <rule>, got <value> (rank 3/8)``. All errors pickle,
so that a launcher can carry them between processes.
"""

from __future__ import annotations

__all__ = [
    "BackendUnavailable",
    "CollectiveMismatch",
    "CollectiveTimeout",
    "InvalidArgument",
    "PeerFailure",
    "SparsecollError",
    "TransportError",
]


class SparsecollError(Exception):
    """Base of every error that sparsecoll raises on purpose."""


class InvalidArgument(SparsecollError, ValueError):
    """An argument breaks a stated rule; nothing has been sent."""


class CollectiveMismatch(SparsecollError):
    """Ranks disagree about the operation; raised on all of them before any payload moves."""


class CollectiveTimeout(SparsecollError, TimeoutError):
    """An operation did not end in time; the group is unusable afterwards."""


class PeerFailure(SparsecollError):
    """A peer died, raised, or closed its group while this rank depended on it."""


class TransportError(SparsecollError):
    """The back end failed for a reason of its own."""


class BackendUnavailable(SparsecollError, ImportError):
    """A back end is not installed or cannot run here; the message names the extra to install."""

"""Errors: what they are, that they pickle, and that every class is public."""

from __future__ import annotations

import copy
import pickle

import pytest

import sparsecoll as sc
from sparsecoll import errors

BASES = {
    "SparsecollError": Exception,
    "InvalidArgument": ValueError,
    "CollectiveMismatch": sc.SparsecollError,
    "CollectiveTimeout": TimeoutError,
    "PeerFailure": sc.SparsecollError,
    "TransportError": sc.SparsecollError,
    "BackendUnavailable": ImportError,
}


def test_table_covers_every_error() -> None:
    assert set(BASES) == set(errors.__all__)


@pytest.mark.parametrize("name", BASES)
def test_can_be_caught_by_family_and_by_builtin(name: str) -> None:
    kind = getattr(sc, name)
    assert kind is getattr(errors, name)
    assert issubclass(kind, sc.SparsecollError) and issubclass(kind, BASES[name])


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_with_message_and_attributes(name: str, protocol: int) -> None:
    error = getattr(sc, name)("barrier #3: expected all, got one (rank 1/2)")
    error.agreed = True
    error.add_note("raised by rank 1/2")
    for twin in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error)):
        assert type(twin) is type(error)
        assert str(twin) == "barrier #3: expected all, got one (rank 1/2)"
        assert twin.agreed is True and twin.__notes__ == ["raised by rank 1/2"]


def test_families_do_not_overlap() -> None:
    """A handler for one kind never catches another."""
    kinds = [getattr(sc, name) for name in BASES if name != "SparsecollError"]
    for kind in kinds:
        assert [other for other in kinds if issubclass(kind, other)] == [kind]

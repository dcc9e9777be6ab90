"""Settings from the environment: what is read, what is refused, what wins."""

from __future__ import annotations

import dataclasses

import pytest

import sparsecoll as sc
from sparsecoll.config import Config, Launcher


def test_defaults_come_from_an_empty_environment() -> None:
    assert Config.from_environment({}) == Config() == Config(timeout_s=300.0, checked=None)


def test_other_variables_do_not_matter() -> None:
    assert Config.from_environment({"PATH": "/bin", "sparsecoll_checked": "0", "MY_SPARSECOLL_X": "1"}) == Config()


@pytest.mark.parametrize("text", ["1", "0.25", "1e3", " 7 ", "inf"])
def test_timeout_is_any_positive_number(text: str) -> None:
    assert Config.from_environment({"SPARSECOLL_TIMEOUT_S": text}) == Config(timeout_s=float(text))


@pytest.mark.parametrize("text", ["0", "-1", "nan", "", "ten", "1,5"])
def test_other_timeouts_are_refused_by_name_and_value(text: str) -> None:
    with pytest.raises(sc.InvalidArgument, match="expected SPARSECOLL_TIMEOUT_S to be a positive number") as caught:
        Config.from_environment({"SPARSECOLL_TIMEOUT_S": text})
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1", True), ("true", True), ("YES", True), ("on", True), ("0", False), ("False", False), ("no", False)],
)
def test_checked_is_a_boolean(text: str, expected: bool) -> None:
    both = {"SPARSECOLL_CHECKED": text, "SPARSECOLL_TIMEOUT_S": "5"}
    assert Config.from_environment(both) == Config(timeout_s=5.0, checked=expected)
    assert Config.from_environment(dict(reversed(both.items()))) == Config(timeout_s=5.0, checked=expected)


@pytest.mark.parametrize("text", ["", "2", "maybe", "-1"])
def test_other_booleans_are_refused(text: str) -> None:
    with pytest.raises(sc.InvalidArgument, match="SPARSECOLL_CHECKED to be 0 or 1"):
        Config.from_environment({"SPARSECOLL_CHECKED": text})


def test_misspelt_names_are_refused() -> None:
    with pytest.raises(sc.InvalidArgument, match=r"got SPARSECOLL_TIMEOUT$"):
        Config.from_environment({"SPARSECOLL_TIMEOUT": "3"})


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().timeout_s = 1.0  # type: ignore[misc]


def test_reads_the_process_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECOLL_TIMEOUT_S", "12")
    assert Config.from_environment().timeout_s == 12.0
    monkeypatch.setenv("PMI_RANK", "0")
    assert Launcher.from_environment().name == "mpirun"


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "alone"),
        (TORCHRUN, "torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "alone"),
        ({"PMI_RANK": "0"}, "mpirun"),
        ({"OMPI_COMM_WORLD_RANK": "3"}, "mpirun"),
        ({"PMIX_RANK": "1"}, "mpirun"),
        ({"MV2_COMM_WORLD_RANK": "1"}, "mpirun"),
        ({**TORCHRUN, "PMI_RANK": "0"}, "mpirun"),
    ],
)
def test_launcher(environ: dict[str, str], expected: str) -> None:
    assert Launcher.from_environment(environ).name == expected

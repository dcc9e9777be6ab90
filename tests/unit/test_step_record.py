"""Records of steps: what they add up, and where they are written."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecoll import BackendUnavailable, InvalidArgument
from sparsecoll.fssdp.reports import LayerLoad, MemoryReport
from sparsecoll.fssdp.step import LayerStep, StepRecord
from sparsecoll.fssdp.step_writer import JsonLinesWriter, TensorBoardWriter
from sparsecoll.fssdp.timeline import Event, StepEvents
from sparsecoll.transport.base import Counters

# Whatever fields a report has, each with a number of its own.
MEMORY = MemoryReport(**{field.name: 100 + n for n, field in enumerate(dataclasses.fields(MemoryReport))})


def load(fqn: str, factor: int, hot: tuple[int, ...]) -> LayerLoad:
    return LayerLoad(
        fqn,
        8,
        imbalance_before=2.5 * factor,
        imbalance_after=1.25 * factor,
        hot=hot,
        gathered=Counters(sent_bytes=100 * factor, received_bytes=7),
        reduced=Counters(sent_bytes=10 * factor, received_bytes=7),
        dispatch_bytes=factor,
    )


LOADS = {"a": load("a", 1, (3, 5)), "b": load("b", 2, (0,))}


def step(*events: tuple[str, str, int, int], length_ns: int = 1000) -> StepEvents:
    return StepEvents(4, 0, length_ns, tuple(Event("x", fqn, kind, begin, end) for kind, fqn, begin, end in events))


def record(*events: tuple[str, str, int, int]) -> StepRecord:
    return StepRecord.from_step(step(*events), LOADS, MEMORY)


def test_a_record_says_what_was_exposed_and_what_was_hidden() -> None:
    made = record(
        ("issue", "a", 90, 100),
        ("wait", "a", 300, 350),
        ("flight", "a", 100, 350),
        ("compute", "a", 0, 1000),
        ("wait", "b", 600, 620),
        ("flight", "b", 500, 620),
        ("dispatch", "a", 360, 400),
        ("dispatch", "b", 700, 800),
        ("counts", "a", 400, 430),
    )
    assert made == StepRecord(
        step=4,
        step_s=1000e-9,
        exposed_s=70e-9,
        hidden_s=pytest.approx(300e-9),
        dispatch_s=140e-9,
        counts_s=30e-9,
        gathered_bytes=300,
        reduced_bytes=30,
        dispatched_bytes=3,
        hot=3,
        layers={"a": LayerStep(2.5, 1.25, 2, 50e-9), "b": LayerStep(5.0, 2.5, 1, 20e-9)},
        memory=MEMORY,
    )
    assert made.hidden_fraction == pytest.approx(300 / 370)


def test_each_moment_counts_once() -> None:
    made = record(
        ("flight", "a", 0, 100),
        ("flight", "b", 50, 150),
        ("wait", "b", 80, 100),
        ("wait", "a", 90, 100),
        ("dispatch", "a", 10, 40),
        ("dispatch", "a", 20, 30),
    )
    assert made.exposed_s == 20e-9 and made.hidden_s == pytest.approx(130e-9) and made.dispatch_s == 30e-9
    assert made.layers["a"].exposed_s == 10e-9 and made.layers["b"].exposed_s == 20e-9


def test_a_flight_longer_than_the_step_is_hidden_in_whole() -> None:
    made = record(("flight", "a", -500, 990), ("wait", "a", 980, 990))
    assert made.exposed_s == 10e-9 and made.hidden_s == pytest.approx(1480e-9)


def test_without_sparse_collectives_nothing_is_exposed() -> None:
    made = StepRecord.from_step(step(("dispatch", "a", 0, 5)), {}, MEMORY)
    assert (made.exposed_s, made.hidden_s, made.hidden_fraction) == (0.0, 0.0, 1.0)
    assert (made.hot, made.layers, made.gathered_bytes) == (0, {}, 0)


intervals = st.tuples(
    st.sampled_from(["wait", "flight"]), st.sampled_from("ab"), st.integers(-20, 60), st.integers(0, 30)
)


@given(st.lists(intervals, max_size=10))
def test_times_are_those_of_a_count_of_moments(drawn: list[tuple[str, str, int, int]]) -> None:
    made = record(*((kind, fqn, begin, begin + length) for kind, fqn, begin, length in drawn))

    def moments(*kinds: str, layers: str = "ab") -> set[int]:
        return {
            moment
            for kind, fqn, begin, length in drawn
            if kind in kinds and fqn in layers
            for moment in range(begin, begin + length)
        }

    assert made.exposed_s == len(moments("wait")) / 1e9
    assert made.hidden_s == pytest.approx(len(moments("flight") - moments("wait")) / 1e9, abs=1e-15)
    assert made.layers["b"].exposed_s == len(moments("wait", layers="b")) / 1e9


def test_json_is_one_line_and_comes_back() -> None:
    made = record(("wait", "a", 0, 3), ("flight", "a", 0, 3))
    line = made.to_json()
    assert "\n" not in line and StepRecord.from_json(line) == made
    read = json.loads(line)
    assert read["step"] == 4 and read["layers"]["b"]["imbalance_before"] == 5.0
    assert read["memory"] == dataclasses.asdict(MEMORY)


@pytest.mark.parametrize("line", ["", "[]", "{}", "3", '{"layers":{},"memory":{}}', '{"layers":3}', "{"])
def test_a_line_that_is_no_record_is_refused(line: str) -> None:
    with pytest.raises(InvalidArgument, match=r"StepRecord\.from_json: expected"):
        StepRecord.from_json(line)


def test_lines_are_appended_and_there_at_once(tmp_path: Path) -> None:
    path, made = tmp_path / "steps.jsonl", record()
    with JsonLinesWriter(path) as writer:
        writer.write(made)
        assert StepRecord.from_json(path.read_text(encoding="utf-8")) == made
    later = dataclasses.replace(made, step=5)
    with JsonLinesWriter(path) as writer:
        writer.write(later)
    writer.close()
    assert [StepRecord.from_json(line) for line in path.read_text(encoding="utf-8").splitlines()] == [made, later]


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="nowhere"):
        JsonLinesWriter(tmp_path / "nowhere" / "steps.jsonl")


class Summary:
    """Stands for torch's SummaryWriter."""

    def __init__(self, log_dir: str) -> None:
        self.log_dir = log_dir
        self.scalars: dict[tuple[str, int], float] = {}
        self.is_closed = False

    def add_scalar(self, tag: str, value: float, global_step: int) -> None:
        assert (tag, global_step) not in self.scalars and not self.is_closed
        self.scalars[tag, global_step] = value

    def close(self) -> None:
        self.is_closed = True


def test_tensorboard_gets_every_figure_under_a_tag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[Summary] = []

    def summary_writer(log_dir: str) -> Summary:
        made.append(Summary(log_dir))
        return made[0]

    module: Any = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = summary_writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with TensorBoardWriter(tmp_path) as writer:
        writer.write(record(("wait", "a", 0, 30), ("flight", "a", 0, 40)))
        assert not made[0].is_closed
    (summary,) = made
    assert summary.log_dir == str(tmp_path) and summary.is_closed
    assert {number for _, number in summary.scalars} == {4}
    values = {tag: value for (tag, _), value in summary.scalars.items()}
    assert set(values) == {
        *(f"fssdp/{field.name}" for field in dataclasses.fields(MemoryReport)),
        *(
            f"fssdp/{field.name}"
            for field in dataclasses.fields(StepRecord)
            if field.name not in ("step", "layers", "memory")
        ),
        "fssdp/hidden_fraction",
        *(f"fssdp/{field.name}/{fqn}" for field in dataclasses.fields(LayerStep) for fqn in LOADS),
    }
    assert values["fssdp/exposed_s"] == 30e-9 and values["fssdp/hidden_fraction"] == pytest.approx(0.25)
    assert values["fssdp/imbalance_after/b"] == 2.5 and values["fssdp/param_bytes"] == MEMORY.param_bytes


def test_without_tensorboard_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(BackendUnavailable, match="pip install tensorboard"):
        TensorBoardWriter(tmp_path)

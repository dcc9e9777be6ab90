"""Predictors: past loads to the next, in the same integers everywhere."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecoll import InvalidArgument
from sparsecoll.balance.costs import Loads
from sparsecoll.balance.predict import DecayingLoad, LastLoad, MeanLoad, Predictor, find_predictor

windows = st.integers(1, 5)
predictors = st.one_of(
    st.builds(MeanLoad, window=windows),
    st.just(LastLoad()),
    st.builds(DecayingLoad, decay=st.floats(0.01, 1), window=windows),
)


@st.composite
def histories(draw: st.DrawFn) -> list[Loads]:
    """Up to eight forwards of up to four ranks and five experts."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.integers(0, 5)))
    return list(random.integers(0, draw(st.sampled_from([1, 3, 100_000])), shape))


@given(histories(), predictors)
def test_predictions_are_pure_and_between_what_was(history: list[Loads], predictor: Predictor) -> None:
    shown = copy.deepcopy(history)
    predicted = predictor.predict(shown)
    assert predicted.dtype == np.int64 and predicted.shape == history[0].shape
    np.testing.assert_array_equal(shown, history)
    recent = history[-predictor.window :]
    assert (predicted >= np.min(recent, axis=0)).all() and (predicted <= np.max(recent, axis=0)).all()
    for same in (tuple(history), recent, [loads.astype(np.int32) for loads in history]):
        np.testing.assert_array_equal(predictor.predict(same), predicted)
    predicted[:] = -1
    np.testing.assert_array_equal(shown, history, err_msg="a prediction shares no memory with the past")


@given(histories(), st.integers(1, 5))
def test_mean_load_rounds_halves_up(history: list[Loads], window: int) -> None:
    recent = history[-window:]
    predicted = MeanLoad(window).predict(history)
    for place in np.ndindex(predicted.shape):
        mean = sum((Fraction(int(loads[place])) for loads in recent), Fraction(0)) / len(recent)
        assert predicted[place] == (mean + Fraction(1, 2)).__floor__()


@given(histories(), st.floats(0.1, 1))
def test_decaying_load_weighs_by_age(history: list[Loads], decay: float) -> None:
    weights = decay ** np.arange(len(history))[::-1]
    exact = np.tensordot(weights / weights.sum(), np.array(history, float), 1)
    np.testing.assert_allclose(DecayingLoad(decay, window=8).predict(history), exact, atol=0.5001)


def test_by_hand() -> None:
    history = [np.array([[8, 0]]), np.array([[4, 1]]), np.array([[1, 4]])]
    assert MeanLoad().predict(history).tolist() == [[4, 2]]
    assert MeanLoad(window=2).predict(history).tolist() == [[3, 3]]
    assert LastLoad().predict(history).tolist() == [[1, 4]]
    # (8 / 4 + 4 / 2 + 1) / (7 / 4), (1 / 2 + 4) / (7 / 4)
    assert DecayingLoad(decay=0.5).predict(history).tolist() == [[3, 3]]
    assert MeanLoad().window == 5


@pytest.mark.parametrize(
    "make",
    [
        lambda: MeanLoad(window=0),
        lambda: DecayingLoad(window=0),
        lambda: DecayingLoad(decay=0.0),
        lambda: DecayingLoad(decay=1.01),
        lambda: DecayingLoad(decay=float("nan")),
    ],
)
def test_refuses(make: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"expected (a window of at least 1|0 < decay <= 1)"):
        make()


def test_find_predictor() -> None:
    assert find_predictor("mean") == MeanLoad()
    assert find_predictor("last") == LastLoad()
    assert find_predictor("decaying") == DecayingLoad()
    mine = MeanLoad(window=2)
    assert find_predictor(mine) is mine
    bad: list[Any] = ["fair", "", None, 3, object(), MeanLoad, MeanLoad.predict]
    for each in bad:
        with pytest.raises(InvalidArgument, match="expected decaying, last, mean or an object"):
            find_predictor(each)


def test_find_predictor_refuses_a_window_of_nothing() -> None:
    class Blind:
        window = 0

        def predict(self, history: list[Loads]) -> Loads:
            return history[-1]

    with pytest.raises(InvalidArgument, match="expected a window of at least 1 forward, got 0"):
        find_predictor(Blind())  # type: ignore[arg-type]

"""What a steady step takes: turns are seen where there are some, and chance and stalls are not taken for turns."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.steady import LONGEST, turn_of

Floats = npt.NDArray[np.float64]

TURNS: list[list[float]] = [
    [3, 6],
    [2, 8],
    [3, 3, 5],
    [2, 3, 2, 4],
    [4, 2.5, 2.5, 2.5, 2.5],
    [2, 2, 2, 2, 2, 2, 2, 3.5],
]


def noise(steps: int, seed: int = 0) -> Floats:
    """The right-hand tail of a host that others use too, about 0.05."""
    return np.random.default_rng(seed).exponential(0.05, steps)


@pytest.mark.parametrize("turn", TURNS, ids=str)
@pytest.mark.parametrize("start", [0, 1])
def test_steps_that_take_turns_last_the_mean_of_a_turn(turn: list[float], start: int) -> None:
    steps = np.array([turn[(start + i) % len(turn)] for i in range(40)]) + noise(40)
    assert turn_of(steps).length == len(turn)
    assert turn_of(steps).typical(steps) == pytest.approx(np.mean(turn) + 0.035, abs=0.02)


def test_what_a_loop_does_every_so_often_is_not_in_a_steady_step() -> None:
    steps = np.array([2.0, 2.0, 2.0, 9.0] * 10)
    turn = turn_of(steps)
    assert (turn.length, turn.steady, turn.typical(steps)) == (4, (0, 1, 2), 2.0)


def test_a_stalled_step_changes_neither() -> None:
    steps = np.array([3.0, 6.0] * 20) + noise(40)
    usual = turn_of(steps).typical(steps)
    steps[[7, 18]] += 30
    assert turn_of(steps).length == 2
    assert turn_of(steps).typical(steps) == pytest.approx(usual, abs=0.02)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_no_turn_is_not_taken_for_one(seed: int) -> None:
    chance = np.random.default_rng(seed)
    for steps in (
        3 + noise(40, seed),
        3 + 0.02 * np.arange(40) + noise(40, seed),  # a context that grows
        np.where(np.arange(40) < 15, 3.0, 4.5) + noise(40, seed),  # a host whose speed has changed
        3 + 5 * (chance.random(40) < 0.05) + noise(40, seed),  # stalls
    ):
        assert turn_of(steps).length == 1
        assert turn_of(steps).typical(steps) == np.median(steps)


@given(st.lists(st.floats(1e-3, 1e4), min_size=2, max_size=60))
def test_any_steps_have_a_turn_and_a_value_among_them(steps: list[float]) -> None:
    values = np.array(steps)
    turn = turn_of(values)
    assert 1 <= turn.length <= min(LONGEST, max(1, len(steps) // 3))
    assert values.min() * (1 - 1e-12) <= turn.typical(values) <= values.max() * (1 + 1e-12)

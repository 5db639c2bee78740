"""What the shipped tile profile predicts for chains timed on an H200 that it was not fitted to, and what was measured.

All timings were taken in one session on one machine; the shapes that the profile was fitted to are kept apart.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from batchsim.tiles.policy import STREAM_SYNC
from batchsim.tiles.profile import TileProfile, load_tile_profile
from batchsim.tiles.scenario import load
from calibration.tile_points import Point, gain_errors, policy_regrets, predict, verdicts
from calibration.tile_runs import LIBRARY, Shape, Timing, read_timings, shapes_of

CALIBRATION = Path(__file__).parents[1] / "calibration"
HELD_OUT = CALIBRATION / "validation" / "tiles"


@pytest.fixture(scope="module")
def profile() -> TileProfile:
    return load_tile_profile("h200-tiles")


@pytest.fixture(scope="module")
def timings() -> list[Timing]:
    return read_timings(HELD_OUT / "h200.json")


@pytest.fixture(scope="module")
def points(timings: list[Timing], profile: TileProfile) -> list[Point]:
    return predict(timings, profile)


def test_no_shape_is_fitted_and_held_out(timings: list[Timing]) -> None:
    fitted = {timing.shape for timing in read_timings(CALIBRATION / "tile_timings.json")}
    held_out = {timing.shape for timing in timings}
    assert len(held_out) >= 30
    assert not fitted & held_out
    assert held_out == set(shapes_of(load(HELD_OUT / "points.yaml")))
    assert fitted == set(shapes_of(load(CALIBRATION / "tile_shapes.yaml")))
    assert {shape.kind for shape in held_out} == {"mlp", "gated_mlp", "attention", "conv"}


def test_outputs_were_right_wherever_they_were_checked(timings: list[Timing]) -> None:
    errors = [timing.error for timing in timings if timing.error is not None]
    assert len(errors) > 300
    assert max(errors) < 1e-2


def test_times_and_gains_are_predicted(points: list[Point]) -> None:
    assert np.median([abs(point.error) for point in points]) <= 0.05
    gains = [abs(predicted - measured) for _, predicted, measured in gain_errors(points)]
    assert np.median(gains) <= 0.02


def test_following_the_predictions_is_nearly_the_best(
    timings: list[Timing], points: list[Point], profile: TileProfile
) -> None:
    assert np.mean(np.array(policy_regrets(points, profile.margins)) <= 0.02) >= 0.8
    regrets = [verdict.regret for verdict in verdicts(timings, points, profile.margins)]
    assert np.mean(np.array(regrets) <= 0.02) >= 0.8


def test_tile_synchronisation_gains_at_fractional_waves(points: list[Point]) -> None:
    assert max(measured for _, _, measured in gain_errors(points)) >= 0.1


def test_matrix_products_as_fast_as_the_library_at_some_sizes(timings: list[Timing]) -> None:
    ahead = 0
    for rows in range(256, 2049, 256):
        mine = [timing for timing in timings if timing.shape == Shape("mlp", (rows, 12288, 6144))]
        library = next(timing.ns for timing in mine if timing.policy == LIBRARY)
        ahead += min(timing.ns for timing in mine if timing.policy != LIBRARY) < library
        assert any(timing.policy == STREAM_SYNC for timing in mine)
    assert ahead >= 3

"""Committed points of training: they can be predicted again, and are as good as promised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from batchsim.training_profile import load_training_profile
from batchsim.training_scenario import TrainingScenario
from calibration.training.points import app, choices, fitting, scenarios
from calibration.training.validate import predict_again

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "calibration" / "validation" / "training"
PATHS = sorted(FOLDER.glob("*.json"))
pytestmark = pytest.mark.skipif(not PATHS, reason="no validation points of training are committed")


@pytest.fixture(scope="module")
def points() -> dict[Path, dict[str, Any]]:
    return fitting(FOLDER)


def test_the_stored_predictions_are_made_again_to_the_last_digit(points: dict[Path, dict[str, Any]]) -> None:
    for path, point in points.items():
        again = predict_again(point, load_training_profile(point["scenario"]["profile"]))
        assert json.loads(json.dumps(again)) == point, path.stem


def test_they_are_all_that_the_lists_name() -> None:
    listed = scenarios(FOLDER / "points.yaml") | scenarios(FOLDER / "choices.yaml")
    assert {path.stem for path in PATHS} == set(listed)
    for path in PATHS:
        stored = json.loads(path.read_text(encoding="utf-8"))["scenario"]
        assert TrainingScenario.model_validate(stored) == listed[path.stem]


def test_no_fit_has_seen_their_shapes(points: dict[Path, dict[str, Any]]) -> None:
    for path, point in points.items():
        scenario = point["scenario"]
        cells = [entry["cell"] for entry in load_training_profile(scenario["profile"]).cells]
        seen = {(cell["micro_batch"], cell["sequence_length"]) for cell in cells}
        assert (scenario["micro_batch"], scenario["sequence_length"]) not in seen, path.stem


class TestPromisedAccuracy:
    """What the README says of the committed points, all of them."""

    def test_time_of_an_optimiser_step(self, points: dict[Path, dict[str, Any]]) -> None:
        errors = np.abs([error["step_ms.mean"] for point in points.values() for error in point["error"].values()])
        assert len(points) >= 16
        assert np.median(errors) <= 0.03
        assert errors.max() <= 0.08

    def test_launch_bound_ones_are_among_them(self, points: dict[Path, dict[str, Any]]) -> None:
        bound = [
            point
            for point in points.values()
            if point["predicted"].get("async", {}).get("launch_gap_fraction", 0.0) > 0.3
        ]
        assert len(bound) >= 4

    def test_the_choice_is_within_two_percent_of_the_best(self, points: dict[Path, dict[str, Any]]) -> None:
        found = choices(points.values(), least=8)
        assert len(found) >= 2
        assert all(choice.regret <= 0.02 for choice in found)


def test_the_readme_shows_what_the_table_command_prints() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    printed = CliRunner().invoke(app, ["table", str(FOLDER)]).output
    assert all(line in readme for line in printed.splitlines())

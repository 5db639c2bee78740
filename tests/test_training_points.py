"""Committed points of training: they can be predicted again, and are as good as promised."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from batchsim.training_profile import load_training_profile
from batchsim.training_scenario import TrainingScenario
from calibration.training.points import HEADER, app, choices, fitting, scenarios, stage_errors
from calibration.training.validate import predict_again

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "calibration" / "validation" / "training"
LATER = FOLDER / "later"
LISTS = {FOLDER: ("points.yaml", "choices.yaml"), LATER: ("points.yaml",)}
MEASURED = [folder for folder in LISTS if any(folder.glob("*.json"))]
pytestmark = pytest.mark.skipif(not MEASURED, reason="no validation points of training are committed")

Points = dict[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def points() -> Points:
    return {path: point for folder in MEASURED for path, point in fitting(folder).items()}


@pytest.fixture(scope="module")
def single(points: Points) -> Points:
    """Those that are no part of a choice, both schedules of each."""
    listed = {folder / f"{name}.json" for folder in LISTS for name in scenarios(folder / "points.yaml")}
    return {path: point for path, point in points.items() if path in listed}


def step_errors(points: Iterable[dict[str, Any]]) -> list[float]:
    return [abs(error["step_ms.mean"]) for point in points for error in point["error"].values()]


def test_the_stored_predictions_are_made_again_to_the_last_digit(points: Points) -> None:
    for path, point in points.items():
        again = predict_again(point, load_training_profile(point["scenario"]["profile"]))
        assert json.loads(json.dumps(again)) == point, path.stem


@pytest.mark.parametrize("folder", MEASURED, ids=lambda folder: folder.name)
def test_they_are_all_that_the_lists_name(folder: Path) -> None:
    listed = {name: each for file in LISTS[folder] for name, each in scenarios(folder / file).items()}
    paths = sorted(folder.glob("*.json"))
    assert {path.stem for path in paths} == set(listed)
    for path in paths:
        stored = json.loads(path.read_text(encoding="utf-8"))["scenario"]
        assert TrainingScenario.model_validate(stored) == listed[path.stem]


def test_no_fit_has_seen_their_shapes(points: Points) -> None:
    for path, point in points.items():
        scenario = point["scenario"]
        cells = [entry["cell"] for entry in load_training_profile(scenario["profile"]).cells]
        seen = {(cell["micro_batch"], cell["sequence_length"]) for cell in cells}
        assert (scenario["micro_batch"], scenario["sequence_length"]) not in seen, path.stem


class TestPromisedAccuracy:
    """What the README says of the committed points, all of them."""

    def test_time_of_an_optimiser_step(self, points: Points, single: Points) -> None:
        assert len(single) >= 16
        assert np.median(step_errors(single.values())) <= 0.03
        assert max(step_errors(single.values())) <= 0.08
        assert np.median(step_errors(points.values())) <= 0.03

    def test_what_was_measured_after_the_fits_had_been_settled(self, single: Points) -> None:
        later = [point for path, point in single.items() if path.parent == LATER]
        if not later:
            pytest.skip("none committed")
        assert np.median(step_errors(later)) <= 0.03
        assert max(step_errors(later)) <= 0.08

    def test_launch_bound_ones_are_among_them(self, single: Points) -> None:
        bound = [
            point
            for point in single.values()
            if point["predicted"].get("async", {}).get("launch_gap_fraction", 0.0) > 0.3
        ]
        assert len(bound) >= 4
        assert np.median(step_errors(bound)) <= 0.03
        assert max(step_errors(bound)) <= 0.08

    def test_errors_do_not_cancel_over_the_stages(self, points: Points) -> None:
        found = stage_errors(points.values())
        for stage in ("forward", "backward", "optimizer"):
            assert np.median(np.abs(found[stage])) <= 0.03, stage
        for stage in ("launch_forward", "launch_backward"):
            assert np.median(np.abs(found[stage])) <= 0.05, stage

    def test_what_prefetching_gains(self, single: Points) -> None:
        off = []
        for point in single.values():
            gains = [point[side]["async"].get("gain_over_sync") for side in ("measured", "predicted")]
            if None not in gains:
                off.append(abs(gains[0] - gains[1]))
        assert np.median(off) <= 0.015

    def test_the_choice_is_within_two_percent_of_the_best(self, points: Points) -> None:
        found = choices(points.values(), least=8)
        assert len(found) >= 2
        assert all(choice.regret <= 0.02 for choice in found)


@pytest.mark.parametrize("folder", MEASURED, ids=lambda folder: folder.name)
def test_the_readme_shows_the_summary_that_the_table_command_prints(folder: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    printed = CliRunner().invoke(app, ["table", str(folder)]).output
    above, _, _ = printed.partition(HEADER)
    assert all(line in readme for line in above.splitlines())

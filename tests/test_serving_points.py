"""The open-loop points that were executed on an H200: none is missing, and how far off the predictions are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchsim.profile import load_profile
from batchsim.scenario import Scenario
from calibration.points import read_points, stage_errors
from calibration.predict import predict_again
from calibration.serving import LATENCIES, scenarios

FOLDER = Path(__file__).parents[1] / "calibration" / "validation" / "serving"
POINTS = {path.stem: point for path, point in read_points(FOLDER).items()}
ERRORS = [error for point in POINTS.values() for error in point["error"].values()]


def median(*keys: str) -> float:
    return float(np.median(np.abs([error[key] for error in ERRORS for key in keys])) * 100)


def test_every_point_of_the_list_was_executed_on_a_gpu() -> None:
    listed = scenarios(FOLDER / "points.yaml")
    assert set(listed) == set(POINTS)
    for name, scenario in listed.items():
        point = POINTS[name]
        assert Scenario.model_validate(point["scenario"]) == scenario
        assert "H200" in point["provenance"]["measured"]["device"]
        for side in ("predicted", "measured"):
            assert set(point[side]) == set(scenario.schedules)


@pytest.mark.parametrize("name", sorted(POINTS))
def test_the_stored_prediction_is_made_again(name: str) -> None:
    point = POINTS[name]
    again = predict_again(point, load_profile(point["profile"]))
    assert json.loads(json.dumps(again["predicted"])) == point["predicted"]


def test_requests_and_tokens_are_those_that_were_executed() -> None:
    for point in POINTS.values():
        for schedule, measured in point["measured"].items():
            for count in ("requests", "output_tokens"):
                assert point["predicted"][schedule]["counts"][count] == measured["counts"][count]


def test_accuracy() -> None:
    """On points that no fit has seen; what the README says, rounded up."""
    assert median("throughput_tokens_per_s") <= 0.1
    for statistic, bound in (("mean", 3.0), ("p50", 3.0), ("p99", 4.0)):
        assert median(*(f"latency_ms.{name}.{statistic}" for name in LATENCIES)) <= bound
    assert median("latency_ms.ttft.mean") <= 4.5
    assert median("latency_ms.ttft.p99") <= 8.0


def test_no_stage_hides_behind_another() -> None:
    stages: dict[str, Any] = stage_errors(list(POINTS.values()))
    assert {"schedule", "build_inputs", "launch", "update", "prefill", "decode"} <= set(stages)
    for stage in ("prefill", "decode", "build_inputs", "schedule", "update"):
        assert abs(np.median(stages[stage])) < 1.5, stage

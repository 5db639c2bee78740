"""The points of dynamic batching that were served on an H200: none is missing, and how far off the predictions are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchsim.dynamic_scenario import DynamicScenario
from batchsim.errors import InputError
from batchsim.profile import load_profile
from calibration.points import read_points, stage_errors
from calibration.services.points import scenarios
from calibration.services.predict import predict_again

FOLDER = Path(__file__).parents[1] / "calibration" / "validation" / "dynamic"
LISTED = {name: scenarios(FOLDER / f"{name}.yaml") for name in ("points", "later")}
POINTS = {path.stem: point for path, point in read_points(FOLDER).items()}


def served(names: set[str]) -> list[dict[str, Any]]:
    return [point for name, point in POINTS.items() if name in names]


def median(points: list[dict[str, Any]], key: str) -> float:
    """Median of a figure's error over all points and schedules, %."""
    return float(np.median([abs(error[key]) for point in points for error in point["error"].values()]) * 100)


def without_rate(scenario: DynamicScenario) -> DynamicScenario:
    """The rate of arrival is a share of a capacity, by the profile as it was then."""
    workload = scenario.workload.model_copy(update={"request_rate": 1.0, "num_prompts": 1})
    return scenario.model_copy(update={"workload": workload})


def test_a_list_needs_the_profiles_of_its_models() -> None:
    with pytest.raises(InputError, match="h200-resnet-50"):
        scenarios(FOLDER / "points.yaml", FOLDER / "nowhere", "resnet")


def test_the_second_list_holds_other_points_and_rules() -> None:
    points, later = LISTED.values()
    assert not set(points) & set(later)
    seeds = [scenario.seed for scenario in (*points.values(), *later.values())]
    assert len(seeds) == len(set(seeds))
    assert {scenario.late for scenario in later.values() if scenario.queue_timeout_us} == {"drop", "serve"}
    assert {scenario.cuda_graphs for scenario in later.values()} == {True, False}


@pytest.mark.parametrize("listed", LISTED.values(), ids=LISTED)
def test_a_list_covers_what_is_to_be_shown(listed: dict[str, DynamicScenario]) -> None:
    every = listed.values()
    assert len(listed) >= 10
    assert {scenario.model for scenario in every} == {"bert-base", "resnet-50"}
    assert {schedule for scenario in every for schedule in scenario.schedules} == {"sync", "async"}
    assert len({scenario.max_queue_delay_us for scenario in every}) >= 3
    assert any(scenario.queue_timeout_us for scenario in every) and any(scenario.max_queue_size for scenario in every)
    assert any(scenario.workload.priorities and scenario.max_priority_wait_us for scenario in every)
    assert any(scenario.workload.kind == "random" for scenario in every)
    assert any(scenario.preferred_batch_sizes for scenario in every)


def test_every_listed_point_was_served_on_a_gpu_and_no_other() -> None:
    listed = LISTED["points"] | LISTED["later"]
    assert set(listed) == set(POINTS)
    for name, point in POINTS.items():
        scenario = listed[name]
        assert without_rate(DynamicScenario.model_validate(point["scenario"])) == without_rate(scenario)
        assert "H200" in point["provenance"]["measured"]["device"]
        for side in ("predicted", "measured"):
            assert set(point[side]) == set(scenario.schedules)


@pytest.mark.parametrize("name", sorted(POINTS))
def test_the_stored_prediction_is_made_again(name: str) -> None:
    point = POINTS[name]
    again = predict_again(point, load_profile(point["profile"]))
    assert json.loads(json.dumps(again["predicted"])) == point["predicted"]


def test_no_request_is_lost() -> None:
    for point in POINTS.values():
        for side in ("predicted", "measured"):
            for result in point[side].values():
                outcomes = dict(result["outcomes"])
                arrivals = outcomes.pop("arrivals")
                assert arrivals == point["scenario"]["workload"]["num_prompts"] == sum(outcomes.values())


@pytest.mark.parametrize("name", LISTED)
def test_predictions_are_near_what_was_served(name: str) -> None:
    """On points that no fit has seen, and on those alone that were chosen after the others had been looked at."""
    points = served(set(LISTED[name]))
    if not points:
        pytest.skip("none of these has been served yet")
    assert median(points, "latency_ms.e2e.p50") <= 3.0
    assert median(points, "latency_ms.e2e.p99") <= 8.0
    assert median(points, "throughput_requests_per_s") <= 2.0
    assert median(points, "batch_size.mean") <= 3.0


def test_no_stage_hides_behind_another() -> None:
    stages = stage_errors(list(POINTS.values()))
    for stage in ("forward", "build_inputs", "launch", "schedule", "update", "copy_in", "device_copy_in", "wait"):
        assert abs(np.median(stages[stage])) < 1.0, stage
        assert np.max(np.abs(stages[stage])) < 12.0, stage


def test_loads_reach_from_idle_to_almost_full() -> None:
    """Of the device, by the measurements themselves."""
    busy = [result["device_busy_fraction"] for point in POINTS.values() for result in point["measured"].values()]
    assert min(busy) < 0.5 and max(busy) > 0.98

"""Predictions to be compared with served runs: simulated at the speed that the host showed beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from batchsim.dynamic import simulate
from batchsim.dynamic_scenario import DynamicScenario
from batchsim.profile import Profile
from batchsim.result import SCHEMA_VERSION, Run, ScheduleResult, validation_json


def predict(scenario: DynamicScenario, profile: Profile, host_speed: float, *, base: Path = Path()) -> Run:
    """Simulate `scenario` on a host `host_speed` times as fast as the one that the scenario asks for.

    The run names the scenario as it was given.
    """
    here = scenario.model_copy(update={"host_speed": scenario.host_speed * host_speed})
    run = simulate(here, profile, base=base)
    return replace(run, scenario=scenario.model_dump(mode="json"))


def measured_json(measured: Run, profile: Profile) -> dict[str, Any]:
    """A point that was executed and not predicted yet: what `predict_again` takes."""
    return {
        "schema_version": SCHEMA_VERSION,
        "scenario": measured.scenario,
        "profile": profile.name,
        "measured": {schedule: result.to_json() for schedule, result in measured.results.items()},
        "provenance": {"measured": measured.provenance},
    }


def predict_again(point: Mapping[str, Any], profile: Profile, host_speed: float | None = None) -> dict[str, Any]:
    """A point as `validation_json` or `measured_json` gives it, its prediction made anew and the measurement as it was.

    `host_speed` takes the place of the speed that was measured beside the point.
    """
    facts = point["provenance"]["measured"]
    speed = facts["host_speed"] if host_speed is None else host_speed
    scenario = DynamicScenario.model_validate(point["scenario"])
    predicted = predict(scenario, profile, speed)
    results = {schedule: ScheduleResult(**result) for schedule, result in point["measured"].items()}
    return validation_json(predicted, Run("executed", predicted.scenario, results, windows={}, provenance=facts))

"""Predictions to be compared with executions: simulated at the speed that the host showed beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from batchsim.engine import simulate
from batchsim.profile import Profile
from batchsim.result import Run, ScheduleResult, validation_json
from batchsim.scenario import Scenario


def predict(
    scenario: Scenario, profile: Profile, host_speed: float, *, num_kv_blocks: int | None = None, base: Path = Path()
) -> Run:
    """Simulate `scenario` on a host `host_speed` times as fast as the one that the scenario asks for.

    The run names the scenario as it was given. `num_kv_blocks` and `base` as `simulate` takes them.
    """
    here = scenario.model_copy(update={"host_speed": scenario.host_speed * host_speed})
    run = simulate(here, profile, num_kv_blocks=num_kv_blocks, base=base)
    return replace(run, scenario=scenario.model_dump(mode="json"))


def predict_again(point: Mapping[str, Any], profile: Profile, host_speed: float | None = None) -> dict[str, Any]:
    """A validation point as `validation_json` gives it, its prediction made anew and the measurement as it was.

    `host_speed` takes the place of the speed that was measured beside the point.
    """
    facts = point["provenance"]["measured"]
    speed = facts["host_speed"] if host_speed is None else host_speed
    scenario = Scenario.model_validate(point["scenario"])
    predicted = predict(scenario, profile, speed, num_kv_blocks=facts.get("num_kv_blocks"))
    results = {schedule: ScheduleResult(**result) for schedule, result in point["measured"].items()}
    return validation_json(predicted, Run("executed", predicted.scenario, results, windows={}, provenance=facts))

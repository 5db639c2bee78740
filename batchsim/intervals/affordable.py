"""Intervals for a run that someone waits for: from as many draws as its length allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchsim.intervals.design import BLOCK
from batchsim.intervals.within import ENOUGH_STEPS, with_intervals
from batchsim.result import Run, ScheduleResult

if TYPE_CHECKING:
    from batchsim.kinds import AnyProfile, AnyScenario, Kind

DRAWS = 16
# Compiled steps that all draws together may take by default, some 20 s; and how many of those a step or a micro-batch
# takes as long as that is simulated event by event. Counted, not timed: the same on every machine.
MOST_STEPS = 5_000_000
STEP_BY_EVENT, MICRO_BATCH = 400, 300


def of_run(
    run: Run,
    scenario: AnyScenario,
    costs: AnyProfile,
    simulate: Callable[[Any, Any], Run],
    *,
    draws: int | None = None,
    progress: Callable[[float], None] | None = None,
    same_requests: bool = False,
    probed: bool = False,
) -> Run:
    """`run` with intervals as `with_intervals` makes them; by default from DRAWS, or fewer or none where that takes too
    long."""
    if draws is None:
        steps = sum(_steps(result) for result in run.results.values())
        draws = next((count for count in (DRAWS, BLOCK) if count * steps <= MOST_STEPS), 0)
        if not draws:
            told = f"no 90% intervals, as {BLOCK} simulations more would take long; --draws {BLOCK} makes them"
            results = {name: replace(result, warnings=(*result.warnings, told)) for name, result in run.results.items()}
            return replace(run, results=results)
    return with_intervals(
        run, scenario, costs, simulate, draws=draws, progress=progress, same_requests=same_requests, probed=probed
    )


def again(kind: Kind, base: Path) -> Callable[[Any, Any], Run]:
    """What simulates a scenario that is known to fit, and of which the figures alone are wanted.

    A trace's path is relative to `base`. An interrupted run is no result: KeyboardInterrupt is raised.
    """

    def simulate(scenario: Any, costs: Any) -> Run:
        options = {"watch": False} if scenario.kind == "serving" else {}
        return kind.simulate(scenario, costs, checks=False, base=base, **options).whole()

    return simulate


def _steps(result: ScheduleResult) -> int:
    if result.iterations is None:
        counts = result.counts
        share = min(ENOUGH_STEPS / counts["steps"], 1.0) if counts.get("steps") else 1.0
        return round(counts.get("micro_batches", 0) * share * MICRO_BATCH)
    one_by_one = (result.events or 0) > 3 * result.iterations
    return result.iterations * (STEP_BY_EVENT if one_by_one else 1)

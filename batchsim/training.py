"""Training scenario in, result out: runs each schedule on the simulated machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from batchsim import __version__
from batchsim.batching.accumulation import micro_batches
from batchsim.engine import Window, with_gains
from batchsim.errors import InputError, RunError, one_of
from batchsim.metrics import Metrics
from batchsim.records import Span
from batchsim.result import Run, ScheduleResult, over_replications
from batchsim.schedules.training import TRAINING_SCHEDULES
from batchsim.training_costs import TrainingCosts
from batchsim.training_machine import TrainingMachine
from batchsim.training_profile import PrecisionFit, TrainingProfile
from batchsim.training_scenario import TrainingScenario


def simulate(
    scenario: TrainingScenario,
    profile: TrainingProfile,
    *,
    progress: Callable[[float], None] | None = None,
    status: Callable[[str], None] | None = None,
    base: Path = Path(),  # noqa: ARG001  # as of every kind of scenario; this one has no other files
) -> Run:
    """Simulate every schedule of `scenario` at the costs of `profile`.

    `progress` is told the fraction done, and `status` in words at what.

    Raises:
        InputError: the profile is of another model.
        RunError: the profile lacks a precision, checkpointing or optimiser that the scenario asks for.
    """
    if profile.model != scenario.model:
        raise InputError(None, "profile", f"{profile.name}, measured for {profile.model}", f"one for {scenario.model}")
    fit = fit_of(profile, scenario)
    repeated: dict[str, list[ScheduleResult]] = {name: [] for name in scenario.schedules}
    windows: dict[str, tuple[Span, ...]] = {}
    total, done = scenario.replications * len(scenario.schedules), 0
    for number in range(scenario.replications):
        for schedule in scenario.schedules:
            if status is not None:
                status(
                    f"{schedule}: {scenario.steps:,} optimiser steps of {scenario.accumulation_steps:,} micro-batches"
                )
            found, window = _train(scenario, profile, fit, schedule, scenario.replication + number)
            repeated[schedule].append(found)
            windows.setdefault(schedule, window)
            done += 1
            if progress is not None:
                progress(done / total)
    return Run(
        source="simulated",
        scenario=scenario.model_dump(mode="json"),
        results=with_gains({name: over_replications(each) for name, each in repeated.items()}),
        windows=windows,
        provenance={"batchsim": __version__, "profile": profile.name, **profile.provenance},
    )


def fit_of(profile: TrainingProfile, scenario: TrainingScenario) -> PrecisionFit:
    """The part of a profile that a scenario asks for.

    Raises:
        RunError: it was not measured.
    """
    name, fit = profile.name, profile.precisions.get(scenario.precision)
    if fit is None:
        known = one_of(list(profile.precisions))
        raise RunError(f"profile {name} holds no costs for precision {scenario.precision}; it has {known}")
    if scenario.checkpointing not in fit.host:
        known = one_of(list(fit.host))
        raise RunError(f"profile {name} holds no costs for checkpointing {scenario.checkpointing}; it has {known}")
    if scenario.optimizer not in fit.optimizers:
        known = one_of(list(fit.optimizers))
        raise RunError(f"profile {name} holds no costs for optimizer {scenario.optimizer}; it has {known}")
    return fit


def of_training(result: ScheduleResult, scenario: TrainingScenario) -> ScheduleResult:
    """A run's metrics with the counts of training, and the time to the target where that is asked for."""
    counts = {
        "steps": scenario.steps,
        "micro_batches": scenario.steps * scenario.accumulation_steps,
        "tokens": scenario.steps * scenario.step_tokens,
    }
    stages = {stage: ms for stage, ms in result.stage_ms.items() if stage not in ("schedule", "update")}
    return replace(result, counts=counts, stage_ms=stages, to_target=to_target(result, scenario))


def to_target(result: ScheduleResult, scenario: TrainingScenario) -> dict[str, float]:
    """Optimiser steps, tokens and hours to the target loss; empty where the scenario names none."""
    if (known := scenario.critical_batch) is None:
        return {}
    steps, tokens = known.steps(scenario.step_tokens), known.tokens(scenario.step_tokens)
    return {"steps": steps, "tokens": tokens, "hours": steps * result.step_ms["mean"] / 3.6e6}


def _train(
    scenario: TrainingScenario, profile: TrainingProfile, fit: PrecisionFit, schedule: str, replication: int
) -> tuple[ScheduleResult, tuple[Span, ...]]:
    """One schedule, once, and the spans of a few micro-batches up to the middle optimiser step's end."""
    began = time.perf_counter()
    costs = TrainingCosts(
        profile,
        fit,
        checkpointing=scenario.checkpointing,
        optimizer=scenario.optimizer,
        prepare_ms_per_sequence=scenario.data.prepare_ms_per_sequence,
        host_speed=scenario.host_speed,
        jitter=scenario.jitter,
        seed=scenario.seed,
        replication=replication,
    )
    metrics, window = Metrics(), Window(window_of(scenario))

    def observe(span: Span) -> None:
        metrics(span)
        window(span)

    accumulation_steps = scenario.accumulation_steps
    machine = TrainingMachine(
        micro_batches(scenario.steps, accumulation_steps, scenario.micro_batch, scenario.sequence_length),
        costs,
        observe,
        launch_queue_depth=scenario.launch_queue_depth,
        loader=schedule == "async" and scenario.host_threads > 1,
    )
    total_ns = machine.run(TRAINING_SCHEDULES[schedule]())
    counts = {"output_tokens": scenario.steps * scenario.step_tokens}
    result = of_training(metrics.totals(total_ns).result(schedule, counts), scenario)
    warnings = tuple(f"{schedule}: {what}" for what in costs.extrapolated())
    engine_s = time.perf_counter() - began
    return replace(result, warnings=warnings, engine_s=engine_s), window.spans()


def window_of(scenario: TrainingScenario) -> int:
    """The first micro-batch of the window: a few before the middle optimiser step's end."""
    end = (scenario.steps // 2 + 1) * scenario.accumulation_steps
    return max(end - 4, 0)

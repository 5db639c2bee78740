"""Train for real, and set what was predicted beside what was measured."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from batchsim.engine import Window, with_gains
from batchsim.errors import InputError
from batchsim.metrics import Metrics
from batchsim.model import TRAINED
from batchsim.result import Run, ScheduleResult, validation_json
from batchsim.schedules.training import TRAINING_SCHEDULES
from batchsim.training import fit_of, of_training, simulate, window_of
from batchsim.training_profile import TrainingProfile
from batchsim.training_scenario import TrainingScenario
from calibration.device import prepare
from calibration.provenance import MACHINE_KEYS, QuietCore, provenance
from calibration.training.executor import Execution, TrainingExecutor, Work
from calibration.training.speed import HostSpeed, beside, between, host_speed
from calibration.training.threads import follow
from calibration.training.trainer import Trainer, build_optimizer

WARM_MICRO_BATCHES = 4
MANY = 8  # micro-batches in an optimiser step, of which one step tells the device's times well enough
STEADY = 0.05  # a host whose speed changed by less while it was at work


class Bench:
    """A trainer on a device, kept from one scenario to the next as long as it serves."""

    def __init__(self, device: str) -> None:
        prepare(device, "validate")
        self.device = device
        self._executor: TrainingExecutor | None = None
        self._built: tuple[str, str, str] | None = None

    def executor(self, scenario: TrainingScenario) -> TrainingExecutor:
        """An executor with the scenario's model, precision, optimiser and checkpointing."""
        wanted = scenario.model, scenario.precision, scenario.optimizer
        executor = self._executor
        if executor is None or self._built is None or self._built[:2] != wanted[:2]:
            executor = self._executor = None  # what it holds of the device is needed for the next
            self.free()
            trainer = Trainer(
                TRAINED[scenario.model], self.device, precision=scenario.precision, optimizer=scenario.optimizer
            )
            executor = self._executor = TrainingExecutor(trainer)
        elif self._built != wanted:
            trainer = executor.trainer
            trainer.optimizer.state.clear()
            trainer.optimizer = build_optimizer(trainer.model, scenario.optimizer)
        self._built = wanted
        executor.trainer.checkpointing = scenario.checkpointing
        return executor

    def free(self) -> None:
        """Give unused memory back to the device."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class Repeat:
    """One execution of a schedule, and the host's speed right before and right after it."""

    ran: Execution
    before: HostSpeed
    after: HostSpeed

    @property
    def change(self) -> float:
        """By how much the speed changed meanwhile, relative."""
        return abs(self.after.both / self.before.both - 1)

    def to_json(self) -> dict[str, Any]:
        step_ms = round(self.ran.total_ns / 1e6 / len(self.ran.steps_ns), 3)
        return {"step_ms": step_ms, "before": self.before.to_json(), "after": self.after.to_json()}


def counted(repeats: Sequence[Repeat]) -> Repeat:
    """The repeat that counts: of those on a steady host the one of median time; with none such the steadiest."""
    steady = [each for each in repeats if each.change <= STEADY]
    if not steady:
        return min(repeats, key=lambda each: each.change)
    steady.sort(key=lambda each: each.ran.total_ns)
    return steady[(len(steady) - 1) // 2]


def validate(
    scenario: TrainingScenario, profile: TrainingProfile, device: str, *, repeats: int = 3,
    progress: Callable[[float], None] | None = None, bench: Bench | None = None,
    base: Path = Path(),  # noqa: ARG001  # as of every kind of scenario; this one has no other files
) -> tuple[Run, Run]:  # fmt: skip
    """(predicted, measured): simulate `scenario` at the costs of `profile`, and train on `device`.

    Schedules are interleaved over `repeats`, each of the scenario's steps after some micro-batches to warm up. The
    host's speed is probed before and after each; which of them counts is said by `counted`, and the prediction is for a
    host of the speed beside that one. What the device did is told by a few more steps with events in them.

    Raises:
        InputError: the scenario asks for a loader beside the loop, which this machine has not.
        torch.OutOfMemoryError: it does not fit the device.
    """
    if scenario.host_threads > 1:
        raise InputError(None, "host_threads", f"{scenario.host_threads}", "1: this machine's loop prepares its data")
    fit_of(profile, scenario)
    bench = bench or Bench(device)
    executor = bench.executor(scenario)
    bench.free()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    took: dict[str, list[Repeat]] = {name: [] for name in scenario.schedules}
    warm = replace(work_of(scenario, 1), accumulation_steps=min(scenario.accumulation_steps, WARM_MICRO_BATCHES))
    with QuietCore(move=device == "cuda") as core:
        # Unmeasured, for the allocator to have its memory: a probe that has to ask for it takes up to three times as
        # long.
        executor.run(TRAINING_SCHEDULES[scenario.schedules[0]](), warm)
        host_speed(executor, profile, scenario)
        for number in range(repeats):
            if progress is not None:
                progress(number / repeats)
            core.settle()
            follow()
            before = host_speed(executor, profile, scenario)
            for schedule, repeated in took.items():
                # Right before, so that the device is as warm as in a long training.
                executor.run(TRAINING_SCHEDULES[schedule](), warm)
                ran = executor.run(TRAINING_SCHEDULES[schedule](), work_of(scenario, scenario.steps))
                after = host_speed(executor, profile, scenario)
                repeated.append(Repeat(ran, before, after))
                before = after
    follow()
    results, windows, speeds = {}, {}, {}
    for schedule, repeated in took.items():
        work = work_of(scenario, min(scenario.steps, 2 if scenario.accumulation_steps < MANY else 1))
        timed = executor.run(TRAINING_SCHEDULES[schedule](), work, timed=True)
        chosen = counted(repeated)
        speeds[schedule] = between(chosen.before, chosen.after)
        results[schedule] = result_of(chosen.ran, timed, schedule, scenario)
        window = Window(window_of(scenario.model_copy(update={"steps": work.steps})))
        for span in timed.spans:
            window(span)
        windows[schedule] = window.spans()
    facts = provenance(device, f"batchsim validate --device {device}") | {
        "host_speed": {schedule: speed.to_json() for schedule, speed in speeds.items()},
        "repeats": {schedule: [each.to_json() for each in repeated] for schedule, repeated in took.items()},
    }
    if device == "cuda":
        facts["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    facts["same_machine_as_profile"] = all(facts.get(key) == profile.provenance.get(key) for key in MACHINE_KEYS)
    predicted = predict(scenario, profile, facts["host_speed"])
    return predicted, Run("executed", predicted.scenario, with_gains(results), windows=windows, provenance=facts)


def predict(scenario: TrainingScenario, profile: TrainingProfile, speeds: Mapping[str, Sequence[float]]) -> Run:
    """Simulate `scenario`, each schedule on a host of the speed that is stored for it; see `HostSpeed.to_json`."""
    runs = [
        simulate(scenario.model_copy(update={"schedules": (schedule,)}), beside(profile, HostSpeed(*speeds[schedule])))
        for schedule in scenario.schedules
    ]
    return replace(
        runs[0],
        scenario=scenario.model_dump(mode="json"),
        results=with_gains({schedule: result for run in runs for schedule, result in run.results.items()}),
        windows={schedule: window for run in runs for schedule, window in run.windows.items()},
    )


def predict_again(point: Mapping[str, Any], profile: TrainingProfile, *, as_calibrated: bool = False) -> dict[str, Any]:
    """A point as `validation_json` gives it, its prediction made anew and the measurement as it was.

    With `as_calibrated` it is for the host as it was when the profile was measured, and not as beside the point.
    """
    facts = point["provenance"]["measured"]
    scenario = TrainingScenario.model_validate(point["scenario"])
    usual = dict.fromkeys(scenario.schedules, HostSpeed().to_json())
    predicted = predict(scenario, profile, usual if as_calibrated else facts["host_speed"])
    results = {schedule: ScheduleResult(**result) for schedule, result in point["measured"].items()}
    return validation_json(predicted, Run("executed", predicted.scenario, results, windows={}, provenance=facts))


def work_of(scenario: TrainingScenario, steps: int) -> Work:
    """So many optimiser steps of a scenario."""
    return Work(
        steps,
        scenario.accumulation_steps,
        scenario.micro_batch,
        scenario.sequence_length,
        scenario.data.prepare_ms_per_sequence,
    )


def result_of(ran: Execution, timed: Execution, schedule: str, scenario: TrainingScenario) -> ScheduleResult:
    """Step times and the host's stages of one run, the device's of another that was timed."""
    host, device = (_metrics(each, schedule, scenario) for each in (ran, timed))
    stages = {stage: ms for stage, ms in device.stage_ms.items() if stage not in host.stage_ms}
    return replace(
        host,
        stage_ms=dict(sorted((host.stage_ms | stages).items())),
        device_busy_fraction=device.device_busy_fraction,
        launch_gap_fraction=None,
        idle_ns=device.idle_ns,
    )


def _metrics(ran: Execution, schedule: str, scenario: TrainingScenario) -> ScheduleResult:
    metrics = Metrics()
    for span in ran.spans:
        metrics(span)
    steps = len(ran.steps_ns)
    counts = {"output_tokens": steps * scenario.step_tokens}
    result = metrics.totals(ran.total_ns).result(schedule, counts)
    return of_training(result, scenario.model_copy(update={"steps": steps}))

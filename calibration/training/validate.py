"""Train for real, and set what was predicted beside what was measured."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from batchsim.batching.accumulation import MicroBatch
from batchsim.engine import Window, with_gains
from batchsim.errors import InputError
from batchsim.metrics import Metrics
from batchsim.model import TRAINED
from batchsim.result import Run, ScheduleResult, validation_json
from batchsim.schedules.training import TRAINING_SCHEDULES
from batchsim.training import fit_of, of_training, simulate, window_of
from batchsim.training_profile import PARTS, TrainingProfile
from batchsim.training_scenario import TrainingScenario
from calibration.device import prepare
from calibration.provenance import MACHINE_KEYS, QuietCore, provenance
from calibration.training.executor import Execution, TrainingExecutor, Work
from calibration.training.threads import follow
from calibration.training.trainer import Trainer, build_optimizer

WARM_STEPS, TIMED_STEPS = 2, 2
# The micro-batches that tell the host's speed: as small as those that its costs were measured with.
PROBE = Work(2, 4, 1, 128)


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


def validate(
    scenario: TrainingScenario, profile: TrainingProfile, device: str, *, repeats: int = 3, bench: Bench | None = None
) -> tuple[Run, Run]:
    """(predicted, measured): simulate `scenario` at the costs of `profile`, and train on `device`.

    Schedules are interleaved over `repeats`, each of the scenario's steps after some to warm up; of each schedule the
    repeat that took the median time counts. What the device did is told by a few more steps with events in them. The
    profile's host costs are scaled by the median of the speeds that this host showed before and after the repeats.

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
    speeds = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    took: dict[str, list[Execution]] = {name: [] for name in scenario.schedules}
    with QuietCore(move=device == "cuda") as core:
        for number in range(repeats):
            for schedule, repeated in took.items():
                core.settle()
                follow()
                speeds.append(host_speed(executor, profile, scenario))
                # Right before, so that the device is as warm as in a long training.
                executor.run(TRAINING_SCHEDULES[schedule](), work_of(scenario, WARM_STEPS if number == 0 else 1))
                repeated.append(executor.run(TRAINING_SCHEDULES[schedule](), work_of(scenario, scenario.steps)))
                speeds.append(host_speed(executor, profile, scenario))
    follow()
    results, windows, repeats_told = {}, {}, {}
    for schedule, repeated in took.items():
        work = work_of(scenario, min(scenario.steps, TIMED_STEPS))
        timed = executor.run(TRAINING_SCHEDULES[schedule](), work, timed=True)
        repeated.sort(key=lambda each: each.total_ns)
        results[schedule] = result_of(repeated[(len(repeated) - 1) // 2], timed, schedule, scenario)
        window = Window(window_of(scenario.model_copy(update={"steps": work.steps})))
        for span in timed.spans:
            window(span)
        windows[schedule] = window.spans()
        repeats_told[schedule] = [round(each.total_ns / 1e6 / scenario.steps, 3) for each in repeated]
    # Rounded as it is stored, so that what is stored gives the same prediction again.
    speed = round(median(speeds), 4)
    facts = provenance(device, f"batchsim validate --device {device}") | {
        "host_speed": speed,
        "host_speeds": [round(each, 4) for each in speeds],
        "repeats_step_ms": repeats_told,
    }
    if device == "cuda":
        facts["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    facts["same_machine_as_profile"] = all(facts.get(key) == profile.provenance.get(key) for key in MACHINE_KEYS)
    predicted = predict(scenario, profile, speed)
    return predicted, Run("executed", predicted.scenario, with_gains(results), windows=windows, provenance=facts)


def predict(scenario: TrainingScenario, profile: TrainingProfile, host_speed: float) -> Run:
    """Simulate `scenario` on a host `host_speed` times as fast as the one that it asks for; it is told as given."""
    run = simulate(scenario.model_copy(update={"host_speed": scenario.host_speed * host_speed}), profile)
    return replace(run, scenario=scenario.model_dump(mode="json"))


def predict_again(
    point: Mapping[str, Any], profile: TrainingProfile, host_speed: float | None = None
) -> dict[str, Any]:
    """A point as `validation_json` gives it, its prediction made anew and the measurement as it was.

    `host_speed` takes the place of the speed that was measured beside the point.
    """
    facts = point["provenance"]["measured"]
    scenario = TrainingScenario.model_validate(point["scenario"])
    predicted = predict(scenario, profile, facts["host_speed"] if host_speed is None else host_speed)
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


def host_speed(executor: TrainingExecutor, profile: TrainingProfile, scenario: TrainingScenario) -> float:
    """Speed of this host at this moment, relative to the profile's, in launching small micro-batches.

    What the profile expects of the parts of such a micro-batch, over what they take here and now. It is the same
    whatever the scenario to be predicted: this measures the host, not the scenario.
    """
    if not profile.overlaps:
        return 1.0  # a launch is the computation, which says nothing of the interpreter
    found = executor.run(TRAINING_SCHEDULES["sync"](), PROBE)
    parts = fit_of(profile, scenario).host[scenario.checkpointing]
    micro = [MicroBatch(0, 0, position, PROBE.accumulation_steps, 1, 1) for position in range(2)]
    expected = took = 0.0
    for part in PARTS:
        for each in micro:
            expected += parts[part].host.at(first=each.first) * parts[part].host.mean_ratio
            took += median(found.parts_host_ns[part, each.first])
    return expected / took

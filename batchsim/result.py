"""The outcome of a run, simulated or executed: one `ScheduleResult` a schedule."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from batchsim.records import Span

SCHEMA_VERSION = 1

# Printed beside the figures; one definition for simulation and execution.
DEFINITIONS = {
    "throughput_tokens_per_s": "output tokens that requests asked for, over total_s",
    "total_s": "from the first scheduling decision to the last update, all requests present at the start",
    "step_ms": "host time between the ends of consecutive updates",
    "device_busy_fraction": "share of total_s in which a forward has begun on the device and not ended",
    "launch_gap_fraction": "share of total_s inside a forward in which the device waits for the next kernel launch",
    "host_busy_fraction": "share of total_s in which the host is not blocked waiting for the device",
    "idle_ns": "device time outside any forward, by the stage that it waited for; sums to total - busy",
    "gain_over_sync": "throughput over that of the sync schedule, minus one",
}


@dataclass(frozen=True, slots=True)
class ScheduleResult:
    """Metrics of one schedule; keys and meanings as in DEFINITIONS.

    `stage_ms` is the mean time a step spends in each host phase, in each copy, in `decode` and `prefill`
    forwards (mean over the steps of that kind); `counts` are requests, steps and tokens.
    """

    schedule: str
    throughput_tokens_per_s: float
    total_s: float
    step_ms: dict[str, float]
    device_busy_fraction: float
    launch_gap_fraction: float | None
    host_busy_fraction: float
    idle_ns: dict[str, int]
    stage_ms: dict[str, float]
    counts: dict[str, int]
    gain_over_sync: float | None = None
    warnings: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Run:
    """One scenario under one or more schedules, on one machine.

    `windows` holds, for each schedule, the spans of a steady window of a few steps, for timelines. `provenance`
    says where the costs (simulated) or the times (executed) come from: profile, device, driver, versions.
    """

    source: Literal["simulated", "executed"]
    scenario: dict[str, Any]
    results: dict[str, ScheduleResult]
    windows: dict[str, tuple[Span, ...]]
    provenance: dict[str, Any]


def figures(result: ScheduleResult) -> dict[str, float]:
    """All figures of a result in one flat dictionary; keys such as `step_ms.p50` and `stage_ms.decode`."""
    flat = {
        "throughput_tokens_per_s": result.throughput_tokens_per_s,
        "gain_over_sync": result.gain_over_sync,
        "total_s": result.total_s,
        **{f"step_ms.{key}": value for key, value in result.step_ms.items()},
        "device_busy_fraction": result.device_busy_fraction,
        "launch_gap_fraction": result.launch_gap_fraction,
        "host_busy_fraction": result.host_busy_fraction,
        **{f"stage_ms.{stage}": value for stage, value in result.stage_ms.items()},
    }
    return {key: value for key, value in flat.items() if value is not None}


def errors(predicted: ScheduleResult, measured: ScheduleResult) -> dict[str, float]:
    """Signed errors of a prediction, by the keys of `figures`; a figure that either side lacks has none.

    Shares of time and gains: predicted - measured, in percentage points. All others: predicted / measured - 1
    (none where zero was measured and something else predicted).
    """
    found = figures(predicted)
    result: dict[str, float] = {}
    for key, truth in figures(measured).items():
        if key not in found:
            continue
        if in_points(key):
            result[key] = (found[key] - truth) * 100
        elif truth:
            result[key] = found[key] / truth - 1
        elif not found[key]:
            result[key] = 0.0
    return result


def occurrence(result: ScheduleResult, stage: str) -> float:
    """The share of the run's steps that have `stage`: forwards are of one kind or the other, all else is in each."""
    prefills = result.counts["prefill_steps"] / result.counts["steps"]
    return {"prefill": prefills, "decode": 1 - prefills}.get(stage, 1.0)


def in_points(key: str) -> bool:
    """Whether the error of this figure is given in percentage points."""
    return key.endswith("_fraction") or key == "gain_over_sync"


def run_json(run: Run) -> dict[str, Any]:
    """What `batchsim run --json` prints and `result.json` holds."""
    return {
        "schema_version": SCHEMA_VERSION,
        "scenario": run.scenario,
        "profile": run.provenance["profile"],
        "schedules": _results_json(run),
        "provenance": run.provenance,
    }


def validation_json(predicted: Run, measured: Run) -> dict[str, Any]:
    """What `batchsim validate --json` prints: the same keys predicted and measured, and `errors` of each schedule."""
    return {
        "schema_version": SCHEMA_VERSION,
        "scenario": predicted.scenario,
        "profile": predicted.provenance["profile"],
        "predicted": _results_json(predicted),
        "measured": _results_json(measured),
        "error": {
            name: errors(predicted.results[name], result)
            for name, result in measured.results.items()
            if name in predicted.results
        },
        "provenance": {"predicted": predicted.provenance, "measured": measured.provenance},
    }


def _results_json(run: Run) -> dict[str, Any]:
    return {name: result.to_json() for name, result in run.results.items()}

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

"""Figures by what they have in common, and the scale on which an interval of each is symmetric."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, inf, log

from batchsim.result import in_points

_TAILS = ("p95", "p99", "p99.9")
_DEVICE = ("decode", "prefill", "forward", "backward", "optimizer")


@dataclass(frozen=True, slots=True)
class Scale:
    """`resolution` None: linear. Else logarithmic, of the value plus `resolution`, in the figure's own unit: what is
    small against that is as good as zero."""

    resolution: float | None
    least: float
    most: float

    def of(self, value: float) -> float:
        return value if self.resolution is None else log(max(value, 0.0) + self.resolution)

    def back(self, scaled: float) -> float:
        value = scaled if self.resolution is None else exp(min(scaled, 700.0)) - self.resolution
        return min(max(value, self.least), self.most)


_GAIN = Scale(None, -1.0, inf)
_SHARE = Scale(None, 0.0, 1.0)


def scale_of(key: str) -> Scale:
    """The scale of a figure of `batchsim.result.figures`."""
    if key == "gain_over_sync":
        return _GAIN
    if key.startswith("kv_use"):
        return Scale(0.002, 0.0, 1.0)
    if in_points(key):
        return _SHARE
    if key.startswith("latency_ms"):
        return Scale(0.01, 0.0, inf)
    if key.startswith(("waiting", "batch_size")):
        return Scale(0.5, 0.0, inf)
    return Scale(1e-4, 0.0, inf)


def group_of(key: str) -> str:
    """The group of a figure: those of which executions tell together how far predictions are off."""
    name, _, statistic = key.partition(".")
    statistic = statistic.partition(".")[2] if name == "latency_ms" else statistic
    tail = "_tail" if statistic in _TAILS else ""
    match name:
        case "gain_over_sync":
            return "gain"
        case "device_busy_fraction" | "launch_gap_fraction":
            return "busy"
        case "host_busy_fraction":
            return "host_busy"
        case "step_ms":
            return f"step{tail}"
        case "stage_ms":
            return _stage(key.removeprefix("stage_ms."))
        case "latency_ms":
            return _latency(key.split(".")[1]) + tail
        case "waiting" | "batch_size" | "kv_use" | "slo_attainment":
            return name
        case "to_target":
            return "step"
        case _:
            return "throughput"


def _stage(stage: str) -> str:
    if stage in _DEVICE:
        return "stage_device"
    if stage.startswith("device_copy"):
        return "stage_copies"
    return "stage_wait" if stage == "wait" else "stage_host"


def _latency(name: str) -> str:
    match name:
        case "ttft" | "tpot" | "itl" | "e2e":
            return "latency"
        case "queue":
            return "queue"
        case _:
            return "latency_parts"


def is_exact(key: str, schedule: str) -> bool:
    """Whether a figure follows from the scenario alone."""
    return key in ("to_target.steps", "to_target.tokens") or (key == "gain_over_sync" and schedule == "sync")

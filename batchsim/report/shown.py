"""Which figures are shown, under which names and in which formats."""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

from batchsim.latency import LATENCIES, QUANTILES, RequestFigures
from batchsim.result import DEFINITIONS, Run, ScheduleResult, figures, in_points


class Metric(NamedTuple):
    """A figure as it is shown: its key in `batchsim.result.figures`, its name, and its number format."""

    key: str
    label: str
    format: str


METRICS = (
    Metric("throughput_tokens_per_s", "tokens/s", ",.0f"),
    Metric("gain_over_sync", "gain over sync", "+.1%"),
    Metric("step_ms.mean", "step mean, ms", ",.3f"),
    Metric("step_ms.p50", "step p50, ms", ",.3f"),
    Metric("step_ms.p95", "step p95, ms", ",.3f"),
    Metric("step_ms.p99", "step p99, ms", ",.3f"),
    Metric("device_busy_fraction", "device busy", ".2%"),
    Metric("launch_gap_fraction", "launch gaps", ".1%"),
    Metric("host_busy_fraction", "host busy", ".1%"),
    Metric("total_s", "total, s", ",.3f"),
    Metric("to_target.steps", "steps to the target", ",.0f"),
    Metric("to_target.tokens", "tokens to the target", ",.3g"),
    Metric("to_target.hours", "hours to the target", ",.1f"),
)

REQUEST_METRICS = (
    Metric("throughput_requests_per_s", "requests/s", ",.2f"),
    Metric("goodput_requests_per_s", "goodput, requests/s", ",.2f"),
    Metric("slo_attainment", "within all SLOs", ".1%"),
    Metric("breaking_requests_per_s", "breaks at, requests/s", ",.1f"),
    Metric("batch_size.mean", "batch size mean", ",.1f"),
    Metric("batch_size.p99", "batch size p99", ",.0f"),
    Metric("waiting.mean", "waiting mean", ",.1f"),
    Metric("waiting.max", "waiting max", ",.0f"),
    Metric("kv_use.mean", "KV use mean", ".1%"),
    Metric("kv_use.max", "KV use max", ".1%"),
)

LATENCY_NAMES = dict(zip(LATENCIES, ("TTFT", "TPOT", "ITL", "E2E", "queue"), strict=True)) | {
    "host": "host",
    "copy_in": "copy in",
    "device_queue": "device queue",
    "compute": "compute",
    "copy_out": "copy out",
}
STATISTICS = ("mean", *QUANTILES)
LATENCY_METRICS = tuple(
    Metric(f"latency_ms.{name}.{statistic}", f"{label} {statistic}, ms", ",.2f")
    for name, label in LATENCY_NAMES.items()
    for statistic in STATISTICS
)
_PARTS = ("queue", "host", "copy_in", "device_queue", "compute", "copy_out")
# Of each latency, what a prediction is held to: a queue is mostly empty, and its quantiles zero.
COMPARED = tuple(
    metric
    for metric in LATENCY_METRICS
    if metric.key.endswith((".mean", ".p50", ".p99")) and not any(f".{part}." in metric.key for part in _PARTS)
)

# The latencies that a sentence has room for, and where no tokens are generated those.
_SPOKEN = (("ttft", "p50"), ("ttft", "p99"), ("tpot", "p50"))
_SPOKEN_OF_ANSWERS = (("e2e", "p50"), ("e2e", "p99"))
_OF_REQUESTS = {each.name for each in fields(RequestFigures)}


def spoken(result: ScheduleResult) -> tuple[tuple[str, str], ...]:
    """The latencies, and of each the statistic, that sentences tell of."""
    return _SPOKEN if "ttft" in result.latency_ms else _SPOKEN_OF_ANSWERS


def unit(result: ScheduleResult) -> str:
    """What `ScheduleResult.throughput` counts."""
    return "tokens/s" if result.throughput_tokens_per_s is not None else "requests/s"


def varied(run: Run) -> bool:
    """Whether requests arrive over time or differ in length: only then do their latencies tell more than the steps'."""
    if not run.served:
        # A trained model answers no requests; what was read from a file has no tables.
        return any(result.latency_ms for result in run.results.values())
    lengths = (column for table in run.served.values() for column in (table.prompt_tokens, table.output_tokens))
    return arrives(run) or any(len(column) > 0 and column.min() < column.max() for column in lengths)


def arrives(run: Run) -> bool:
    """Whether requests are known to arrive over time."""
    arrivals = [table.arrival_ns for table in run.served.values()]
    arrivals += [table.requests["arrival_ns"] for table in run.answered.values()]
    return any(len(each) > 0 and each[-1] > 0 for each in arrivals)


def compared(run: Run) -> tuple[Metric, ...]:
    """What a measured run stands beside."""
    return (*METRICS, *REQUEST_METRICS, *COMPARED) if varied(run) else METRICS


def definitions_of(run: Run) -> dict[str, str]:
    """The definitions of what results of `run` have, those of requests only if these are varied."""
    results = run.results.values()
    have = {key for result in results for key, value in result.to_json().items() if value not in (None, {})}
    if varied(run):
        have |= {f"latency_ms.{name}" for result in results for name in result.latency_ms}
    else:
        have -= _OF_REQUESTS
    return {key: text for key, text in DEFINITIONS.items() if key in have}


def shown(result: ScheduleResult) -> dict[str, float]:
    """The figures that are worth showing: all but the gain of sync over itself."""
    return {
        key: value for key, value in figures(result).items() if (key, result.schedule) != ("gain_over_sync", "sync")
    }


def stage_label(stage: str) -> str:
    """`device_copy_in` -> `copy in (device)`; host phases and forwards keep their names."""
    if stage == "no_requests":
        return "no requests"
    return f"{stage.removeprefix('device_')} (device)" if stage.startswith("device_") else stage


def error_text(key: str, error: float) -> str:
    """A signed error with its unit: `+1.2%` or `-0.3 pt`. A rounded zero has no minus sign."""
    return f"{_rounded(error, 1):+.1f} pt" if in_points(key) else f"{_rounded(error * 100, 1):+.1f}%"


def ms_text(ms: float) -> str:
    """A duration to about three digits: `8.70 ms`, `412 ms`, `12.3 s`."""
    if ms >= 10_000:
        return f"{ms / 1e3:,.1f} s"
    return f"{ms:,.{0 if ms >= 100 else 1 if ms >= 10 else 2}f} ms"


def interval_text(result: ScheduleResult, metric: Metric) -> str:
    """`[2.1, 2.6]`, a figure's 90% interval in the metric's format; without one `±0.3`, half that of the mean of
    replications; empty where it has neither."""
    if (found := result.interval_90.get(metric.key)) is not None:
        low, high = (format(each, metric.format) for each in found)
        return f"[{low}, {high}]" if low != high else ""
    width = result.interval.get(metric.key)
    return "" if width is None else f"\N{PLUS-MINUS SIGN}{width:{metric.format.removeprefix('+')}}"


def held_text(predicted: Run, measured: Run) -> str:
    """How many of the measured figures are inside their 90% intervals; empty where there are none."""
    inside = [
        low <= value <= high
        for name, result in predicted.results.items()
        if name in measured.results
        for key, value in shown(measured.results[name]).items()
        if key in result.interval_90
        for low, high in [result.interval_90[key]]
    ]
    return f"{sum(inside)} of {len(inside)} measured figures are inside their 90% intervals." if inside else ""


def _rounded(value: float, digits: int) -> float:
    return round(value, digits) + 0.0

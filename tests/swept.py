"""Results of sweeps to show: plausible, quickly made, the same every time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from batchsim.records import Span
from batchsim.result import Run, ScheduleResult, run_json
from batchsim.sweep.result import SweepResult
from tests.sample_runs import sample_runs, spans_of, window

REASON = "scenario: max_num_seqs: found 512; wanted at most 256, what the profile's device has memory for"
SCHEDULES = {"sync": 1.0, "async": 1.08}
SPEEDS = {"h200": 1.0, "h100-sxm": 0.8, "l40s": 0.25}
# Longer than a step of decoding, by so many times the first token's latency.
_LATENCIES = {"ttft": 1.0, "tpot": 0.03, "e2e": 4.0}
_STATISTICS = {"p50": 50, "p90": 90, "p95": 95, "p99": 99}
_DRAWN = np.quantile(np.random.default_rng(3).lognormal(0, 0.5, 400), np.linspace(0, 1, 101))


def swept(grid: Mapping[str, Sequence[Any]], failing: int = 0, name: str = "a sweep") -> SweepResult:
    """A grid, of which the last `failing` points failed."""
    values = list(itertools.product(*grid.values()))
    points = [point(dict(zip(grid, each, strict=True)), index) for index, each in enumerate(values)]
    for each in points[len(points) - failing :]:
        each.update(run=None, error=REASON, cdf={}, window={})
    return SweepResult(name, list(grid), points, draws=8)


def point(fields: dict[str, Any], index: int) -> dict[str, Any]:
    """A point's file."""
    run, cdf = simulated(fields)
    windows = {name: [list(span[:5]) for span in spans] for name, spans in run.windows.items()}
    head = {"schema_version": 1, "hash": f"{index:064x}", "fields": fields}
    return {**head, "run": run_json(run), "error": None, "cdf": cdf, "window": windows}


def simulated(fields: Mapping[str, Any]) -> tuple[Run, dict[str, dict[str, list[float]]]]:
    """A run and its quantiles: larger batches serve more tokens and wait longer, and so does a higher load."""
    batch = float(fields.get("max_num_seqs", 32))
    speed = SPEEDS[fields.get("hardware", "h200")] * fields.get("replicas", 1)
    results, cdf = {}, {}
    for schedule, gain in SCHEDULES.items():
        load = float(fields.get("workload.request_rate", 8.0)) / (3 * gain * speed * batch**0.5)
        wait = (20 + 3 * batch) / speed / gain * (1 + min(load, 3.0) ** 4)
        cdf[schedule] = {name: [float(each) for each in _DRAWN * wait * factor] for name, factor in _LATENCIES.items()}
        tokens = 150 * batch**0.85 * speed * gain * min(1.0, 0.4 + load)
        results[schedule] = _result(schedule, tokens, cdf[schedule], load)
    scenario = {**_sample().scenario, "slo": {"ttft_ms": 500.0}, **fields}
    provenance = _sample().provenance
    if fields.get("hardware", "h200") != "h200":
        transfer = {"source": "h200", "target": fields["hardware"], "hardware": fields["hardware"], "spread": {}}
        provenance = {**provenance, "transfer": transfer}
    return replace(_sample(), scenario=scenario, results=results, windows=_windows(), provenance=provenance), cdf


@cache
def _sample() -> Run:
    return sample_runs()[0]


@cache
def _windows() -> dict[str, tuple[Span, ...]]:
    return {schedule: window(spans_of(schedule, 40)) for schedule in SCHEDULES}


def _result(schedule: str, tokens: float, cdf: Mapping[str, Sequence[float]], load: float) -> ScheduleResult:
    latency = {name: {key: values[at] for key, at in _STATISTICS.items()} for name, values in cdf.items()}
    return replace(
        _sample().results[schedule],
        throughput_tokens_per_s=tokens,
        throughput_requests_per_s=tokens / 200,
        goodput_requests_per_s=tokens / 220 / (1 + load),
        slo_attainment=1 / (1 + load**4),
        gain_over_sync=SCHEDULES[schedule] - 1,
        latency_ms=latency,
        unstable="unstable: the queue grows" if load > 3 else None,
        interval_90={
            "throughput_tokens_per_s": (tokens * 0.94, tokens * 1.05),
            "latency_ms.ttft.p99": (latency["ttft"]["p99"] * 0.9, latency["ttft"]["p99"] * 1.2),
        },
    )

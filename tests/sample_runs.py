"""Runs to show and to check: an 8B model at batch 32, sync with idle gaps and async without.

The spans come from the real schedules, driven by a machine so plain that its times can be worked out by hand:
fixed costs, in-order streams, no latencies but those named below. Requests that arrive over time are served by a loop
as plain: whole prompts, steps whose time grows with the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from batchsim.batching.continuous import Batch
from batchsim.latency import Slo, request_figures
from batchsim.operations import (
    CopyIn,
    CopyOut,
    Forward,
    Record,
    Schedule,
    StreamWait,
    Synchronize,
)
from batchsim.records import Lane, Span
from batchsim.result import LoadCurve, LoadPoint, Run, ScheduleResult
from batchsim.schedules import SCHEDULES
from batchsim.served import Int64, Series, Served

SLO = Slo(ttft_ms=250, tpot_ms=9.5)
KV_BLOCKS = 900
STEPS = 1_024
SHOWN = 6
LAUNCH_LATENCY_NS = 15_400
WAKE_UP_NS = 7_900

HOST_NS = {
    "sync": {"schedule": 61_250, "build_inputs": 318_400, "copy_in": 14_130, "launch": 38_700, "copy_out": 9_870,
             "record": 3_310, "update": 142_600},
    "async": {"schedule": 66_180, "build_inputs": 334_900, "copy_in": 14_700, "launch": 39_250, "copy_out": 10_040,
              "record": 3_420, "stream_wait": 3_050, "update": 147_300},
}  # fmt: skip
DEVICE_NS = {"copy_in": 12_320, "decode": 6_371_000, "copy_out": 3_140}


def sample_runs() -> tuple[Run, Run]:
    """A prediction, and an execution that is a little off."""
    return _run("simulated", 1.0, 1.0), _run("executed", 1.043, 1.006)


def serving_runs() -> tuple[Run, Run]:
    """As `sample_runs`, of 600 requests that arrive over time, with the course of latencies as load grows."""
    requests = requests_at(19.0, 600)
    runs = []
    for run, host, device in zip(sample_runs(), (1.0, 1.043), (1.0, 1.006), strict=True):
        tables = {
            "sync": serve(*requests, host_ns=round(880_000 * host), device_ns=round(4_900_000 * device)),
            "async": serve(*requests, host_ns=0, device_ns=round(4_930_000 * device)),
        }
        runs.append(replace(run, results=results_of(run, tables), served=tables, slo=SLO))
    offered = (4.0, 8.0, 12.0, 16.0, 20.0, 24.0)
    points: dict[str, list[LoadPoint]] = {"sync": [], "async": []}
    for rate in offered:
        for name, host_ns in (("sync", 880_000), ("async", 0)):
            table = serve(*requests_at(rate, 200), host_ns=host_ns, device_ns=4_900_000)
            points[name].append(LoadPoint.of(rate, results_of(runs[0], {name: table})[name]))
    curve = LoadCurve({name: tuple(found) for name, found in points.items()})
    return replace(runs[0], load_curve=curve), runs[1]


def requests_at(per_s: float, count: int) -> tuple[Int64, Int64, Int64]:
    """Arrivals of a Poisson process, nanoseconds, and lengths of prompts and outputs, log-normal."""
    draws = np.random.default_rng(7)
    arrival_ns = np.cumsum(draws.exponential(1e9 / per_s, count)).astype(np.int64)
    prompts, outputs = (draws.lognormal(mean, sigma, count) for mean, sigma in ((5.6, 0.9), (4.6, 0.8)))
    return arrival_ns, np.clip(prompts, 4, 4_000).astype(np.int64), np.clip(outputs, 1, 1_200).astype(np.int64)


def serve(
    arrival_ns: Int64,
    prompts: Int64,
    outputs: Int64,
    *,
    host_ns: int,
    device_ns: int,
    max_num_seqs: int = 16,
    until_ns: int | None = None,
) -> Served:
    """First come, first served; a step takes longer by 1% for each request and 10 us for each new prompt token.

    `until_ns`: when the run is interrupted.
    """
    count = len(arrival_ns)
    started, first, finished = (np.full(count, -1, np.int64) for _ in range(3))
    generated, last = np.zeros(count, np.int64), np.zeros(count, np.int64)
    running: list[int] = []
    gaps: Counter[int] = Counter()
    sizes, moments = np.zeros(max_num_seqs + 1, np.int64), []
    now, used, admitted = 0, 0, 0
    while (admitted < count or running) and (until_ns is None or now < until_ns):
        if not running and arrival_ns[admitted] > now:
            now = int(arrival_ns[admitted])
        prompt_tokens = 0
        while admitted < count and arrival_ns[admitted] <= now and len(running) < max_num_seqs:
            need = int(prompts[admitted] + outputs[admitted]) // 16 + 1
            if used + need > KV_BLOCKS:
                break
            started[admitted], used = now, used + need
            prompt_tokens += int(prompts[admitted])
            running.append(admitted)
            admitted += 1
        waiting = int(np.searchsorted(arrival_ns, now, side="right")) - admitted
        moments.append((now, len(running), waiting, used))
        sizes[len(running)] += 1
        now += host_ns + device_ns * (100 + len(running)) // 100 + 10_000 * prompt_tokens
        for request in running:
            if generated[request]:
                gaps[now - int(last[request])] += 1
            else:
                first[request] = now
            last[request] = now
        generated[running] += 1
        ended = [request for request in running if generated[request] == outputs[request]]
        finished[ended] = now
        used -= sum(int(prompts[request] + outputs[request]) // 16 + 1 for request in ended)
        running = [request for request in running if generated[request] < outputs[request]]
    arrived = slice(int(np.searchsorted(arrival_ns, now, side="right")))
    none = np.zeros(count, np.int64)[arrived]
    kept = np.array(moments, np.int64)[:: len(moments) // 2_048 + 1]
    return Served(
        arrival_ns=arrival_ns[arrived],
        started_ns=started[arrived],
        first_token_ns=first[arrived],
        finished_ns=finished[arrived],
        prompt_tokens=prompts[arrived],
        output_tokens=outputs[arrived],
        generated=generated[arrived],
        cached_tokens=none,
        preemptions=none,
        priority=none,
        replica=none,
        itl_ns=np.array(sorted(gaps), np.int64),
        itl_count=np.array([gaps[gap] for gap in sorted(gaps)], np.int64),
        batch_sizes=sizes,
        series=Series(*kept.T),
        kv_blocks=KV_BLOCKS,
        warm_up_ns=0,
        total_ns=now,
    )


def results_of(run: Run, tables: Mapping[str, Served]) -> dict[str, ScheduleResult]:
    """Results of `run` with the figures of other requests; idle time is a guess."""
    results: dict[str, ScheduleResult] = {}
    for name, table in tables.items():
        tokens, steps = int(table.generated.sum()), int(table.batch_sizes.sum())
        base = run.results[name]
        idle_ns = dict.fromkeys(base.idle_ns, table.total_ns // 200) | {"no_requests": table.total_ns // 20}
        figures = request_figures(table, SLO, open_loop=True)
        results[name] = replace(
            base,
            throughput_tokens_per_s=tokens / table.total_ns * 1e9,
            total_s=table.total_ns / 1e9,
            device_busy_fraction=1 - sum(idle_ns.values()) / table.total_ns,
            host_busy_fraction=0.31,
            idle_ns=idle_ns,
            counts={
                **base.counts,
                "requests": len(table.arrival_ns),
                "output_tokens": tokens,
                "steps": steps,
                "preemptions": 0,
            },
            warnings=(),
            engine_s=0.0124,
            iterations=steps,
            decisions=steps // 10,
            events=steps // 20,
        ).with_requests(figures)
    if "sync" in results:
        gained = results["sync"].throughput
        results = {
            name: replace(result, gain_over_sync=result.throughput / gained - 1) for name, result in results.items()
        }
    return results


def spans_of(schedule: str, steps: int, host: float = 1.0, device: float = 1.0) -> list[Span]:
    """All spans of a run of `steps` decode steps, in which host and device take so many times their usual time."""
    host_ns = {phase: round(ns * host) for phase, ns in HOST_NS[schedule].items()}
    device_ns = {stage: round(ns * device) for stage, ns in DEVICE_NS.items()}
    spans: list[Span] = []
    free_ns = {"compute": 0, "copy_in": 0, "copy_out": 0}
    event_ns: dict[str, int] = {}
    now, decided = 0, 0
    program = SCHEDULES[schedule]()
    operation = next(program)
    while True:
        answer: Batch | None = None
        step = -1
        if isinstance(operation, Schedule):
            if decided < steps:
                answer = Batch(decided, (), 32, 0, 0, 0)
                step, decided = decided, decided + 1
        elif not isinstance(operation, Record | StreamWait):
            step = operation.batch.index
        if isinstance(operation, Synchronize):
            end = max(now, event_ns[operation.event]) + WAKE_UP_NS
        else:
            end = now + host_ns[operation.phase]
        spans.append(Span(step, "host", operation.phase, now, end))
        if isinstance(operation, Forward | CopyIn | CopyOut):
            lane: Lane = "compute" if isinstance(operation, Forward) else operation.phase  # type: ignore[assignment]
            stage = "decode" if isinstance(operation, Forward) else operation.phase
            stream = "compute" if isinstance(operation, Forward) else operation.stream
            start = max(free_ns[stream] + 900, now + LAUNCH_LATENCY_NS)
            free_ns[stream] = start + device_ns[stage]
            spans.append(Span(step, lane, stage, start, free_ns[stream]))
        elif isinstance(operation, Record):
            event_ns[operation.event] = free_ns[operation.stream]
        elif isinstance(operation, StreamWait):
            free_ns[operation.stream] = max(free_ns[operation.stream], event_ns[operation.event])
        now = end
        try:
            operation = program.send(answer)
        except StopIteration:
            return spans


def window(spans: list[Span]) -> tuple[Span, ...]:
    """The spans that overlap the time from one decision in the middle of the run to another `SHOWN` steps later."""
    decisions = [span.start_ns for span in spans if span.lane == "host" and span.stage == "schedule"]
    middle = len(decisions) // 2
    start, end = decisions[middle], decisions[middle + SHOWN]
    return tuple(span for span in spans if span.start_ns < end and span.end_ns > start)


def _run(source: str, host: float, device: float) -> Run:
    results: dict[str, ScheduleResult] = {}
    windows: dict[str, tuple[Span, ...]] = {}
    for schedule in ("sync", "async"):
        spans = spans_of(schedule, STEPS, host, device)
        windows[schedule] = window(spans)
        results[schedule] = _result(schedule, spans, results.get("sync"))
    provenance: dict[str, Any] = {"device": "NVIDIA H200", "driver": "580.95.05", "torch": "2.13.0"}
    if source == "simulated":
        provenance = {"profile": "h200_llama-3.1-8b", **provenance, "measured_on": "2026-01-30"}
    scenario = {
        "name": "async_8b_h200",
        "model": "llama-3.1-8b",
        "workload": {"kind": "fixed", "num_prompts": 32, "input_len": 256, "output_len": STEPS},
        "cuda_graphs": True,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 8192,
        "schedules": ["sync", "async"],
        "seed": 0,
    }
    return Run(source, scenario, results, windows, provenance)  # type: ignore[arg-type]


def _result(schedule: str, spans: list[Span], sync: ScheduleResult | None) -> ScheduleResult:
    total_ns = max(span.end_ns for span in spans)
    busy_ns = sum(span.duration_ns for span in spans if span.lane == "compute")
    waits_ns = sum(span.duration_ns for span in spans if span.stage == "wait")
    throughput = 32 * STEPS / (total_ns / 1e9)
    step_ms = total_ns / 1e6 / STEPS
    stages: dict[str, float] = {}
    for span in spans:
        stage = f"device_{span.stage}" if span.lane in ("copy_in", "copy_out") else span.stage
        stages[stage] = stages.get(stage, 0.0) + span.duration_ns / 1e6 / STEPS
    warnings = ("device step: context 1,280 lies outside the profile's range (64 to 1,024): extrapolated",)
    return ScheduleResult(
        schedule=schedule,
        throughput_tokens_per_s=throughput,
        total_s=total_ns / 1e9,
        step_ms={"mean": step_ms, "p50": step_ms * 0.998, "p95": step_ms * 1.021, "p99": step_ms * 1.034},
        device_busy_fraction=busy_ns / total_ns,
        launch_gap_fraction=0.0,
        host_busy_fraction=1 - waits_ns / total_ns,
        idle_ns=_idle_ns(schedule, stages, total_ns - busy_ns),
        stage_ms=stages,
        counts={"requests": 32, "steps": STEPS, "output_tokens": 32 * STEPS, "prefill_steps": 0},
        gain_over_sync=throughput / sync.throughput - 1 if sync else 0.0,
        warnings=warnings,
    )


def _idle_ns(schedule: str, stages: Mapping[str, float], idle_ns: int) -> dict[str, int]:
    """The idle time by stage: in sync what the host does between two forwards, in async what starts the run."""
    awaited = ("build_inputs", "update", "schedule", "device_copy_in") if schedule == "sync" else ("build_inputs",)
    times = STEPS if schedule == "sync" else 1
    by_stage = {stage: round(stages[stage] * 1e6 * times) for stage in awaited}
    by_stage["launch_latency"] = idle_ns - sum(by_stage.values())
    return by_stage

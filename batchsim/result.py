"""The outcome of a run, simulated or executed: one `ScheduleResult` a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from batchsim.answered import Answered
from batchsim.latency import LATENCIES, RequestFigures, Slo, intervals
from batchsim.records import Span
from batchsim.served import Served

SCHEMA_VERSION = 1

# Printed beside the figures; one definition for simulation and execution.
DEFINITIONS = {
    "throughput_tokens_per_s": "output tokens that requests asked for, or tokens trained on, over total_s",
    "total_s": "from the start of the run, at which the first request may arrive, to the last update",
    "step_ms": "host time between the ends of consecutive updates, without waiting for requests",
    "device_busy_fraction": "share of total_s in which a forward has begun on the device and not ended",
    "launch_gap_fraction": "share of total_s inside a forward in which the device waits for the next kernel launch",
    "host_busy_fraction": "share of total_s in which the host waits neither for the device nor for requests",
    "idle_ns": "device time outside forwards, by the stage that it waited for; sums to total - busy (mean of replicas)",
    "gain_over_sync": "throughput over that of the sync schedule, minus one",
    "stage_ms": "mean time of a host phase or a copy a step, and of a forward a step of its kind",
    "counts": "requests finished, steps, and tokens",
    "latency_ms": "of requests that arrived after the warm-up; quantiles are linear between order statistics",
    "latency_ms.ttft": "time to first token: from the intended arrival to the end of the update that reads it",
    "latency_ms.tpot": "time per output token of a request of n > 1: (last token - first token) / (n - 1)",
    "latency_ms.itl": "inter-token latency: every gap between a request's consecutive tokens, pooled",
    "latency_ms.e2e": "from the intended arrival to the end of the update that reads the last token",
    "latency_ms.queue": "from the intended arrival to the decision that first puts the request into a batch",
    "latency_ms.host": "what is left of e2e: the host's phases, and the latencies of launching and waking up",
    "latency_ms.copy_in": "the copy of the batch's inputs to the device",
    "latency_ms.device_queue": "the batch's inputs are on the device, which computes another batch",
    "latency_ms.compute": "the forward of the request's batch",
    "latency_ms.copy_out": "the copy of the batch's answers to the host",
    "throughput_requests_per_s": "requests that finished after the warm-up, over the time from then to the end",
    "goodput_requests_per_s": "as throughput_requests_per_s, of requests that met all their SLOs",
    "slo_attainment": "share of the finished requests, of those that latency_ms counts, that met all their SLOs",
    "outcomes": "arrivals = accepted (served in time) + refused (the queue was full) + dropped (waited too long) + "
    "served_late (waited too long, served all the same), of an interrupted run + waiting",
    "batch_size": "requests in a batch, over all steps",
    "batch_histogram": "batches, by the requests in them",
    "breaking_requests_per_s": "what is served when requests always wait; beyond it the queue only grows",
    "kv_use": "share of the KV cache's blocks in use after decisions, over time, at the moments that are kept",
    "waiting": "requests that have arrived and were never in a batch, over the time after the warm-up",
    "unstable": "said where the queue grows for as long as requests arrive, by more than chance explains",
    "partial": "said where the run was interrupted: its figures are of what had happened by then",
    "to_target": "optimiser steps, tokens and hours to the target loss by its critical batch (McCandlish et al. 2018)",
    "engine_s": "wall time that simulating this schedule took",
    "iterations": "batch steps",
    "decisions": "steps at which the batch changed: a request was admitted, finished or preempted, a chunk of a "
    "prompt ended, or an arrival woke an idle loop",
    "events": "what the event loop handled one by one",
    "interval": "half width of the 95% Student-t interval of the mean over replications, by figure",
    "interval_90": "in which a run's figure is with 90% confidence: costs are off as calibration, executions on other "
    "days and the transfer to another device tell, and requests and step times are those of another replication",
}

# What a serving loop has not, and its results therefore leave out.
OF_OTHER_KINDS = ("outcomes", "batch_histogram", "breaking_requests_per_s", "to_target", "interval_90")
_SHARES = ("gain_over_sync", "slo_attainment", "kv_use.mean", "kv_use.max")


@dataclass(frozen=True, slots=True)
class ScheduleResult:
    """Metrics of one schedule; keys and meanings as in DEFINITIONS. What was not recorded is None or empty."""

    schedule: str
    throughput_tokens_per_s: float | None
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
    latency_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    throughput_requests_per_s: float | None = None
    goodput_requests_per_s: float | None = None
    slo_attainment: float | None = None
    outcomes: dict[str, int] = field(default_factory=dict)
    batch_size: dict[str, float] = field(default_factory=dict)
    batch_histogram: dict[str, int] = field(default_factory=dict)
    breaking_requests_per_s: float | None = None
    kv_use: dict[str, float] = field(default_factory=dict)
    waiting: dict[str, float] = field(default_factory=dict)
    unstable: str | None = None
    partial: str | None = None
    to_target: dict[str, float] = field(default_factory=dict)
    engine_s: float | None = field(default=None, compare=False)
    iterations: int | None = field(default=None, compare=False)
    decisions: int | None = field(default=None, compare=False)
    events: int | None = field(default=None, compare=False)
    interval: dict[str, float] = field(default_factory=dict)
    interval_90: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def throughput(self) -> float:
        """Tokens a second, or requests where no tokens are generated: what schedules are compared by."""
        if self.throughput_tokens_per_s is not None:
            return self.throughput_tokens_per_s
        return self.throughput_requests_per_s or 0.0

    @property
    def throughput_key(self) -> str:
        """Which figure `throughput` is."""
        tokens = self.throughput_tokens_per_s is not None
        return "throughput_tokens_per_s" if tokens else "throughput_requests_per_s"

    def with_requests(self, found: RequestFigures) -> ScheduleResult:
        """This result with the figures of its requests."""
        return replace(self, **{each.name: getattr(found, each.name) for each in fields(found)})

    def to_json(self) -> dict[str, Any]:
        """What is the same for the same seed: all but `engine_s`, and but what only other kinds of scenarios have."""
        left_out = {"engine_s"} | {key for key in OF_OTHER_KINDS if not getattr(self, key)}
        return {key: value for key, value in asdict(self).items() if key not in left_out}


@dataclass(frozen=True, slots=True)
class LoadPoint:
    """What a schedule reaches when so many requests a second arrive; None where no request has such a latency."""

    offered_requests_per_s: float
    throughput_tokens_per_s: float | None
    throughput_requests_per_s: float | None
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    tpot_p50_ms: float | None
    e2e_p50_ms: float | None
    e2e_p99_ms: float | None
    unstable: bool

    @classmethod
    def of(cls, offered_requests_per_s: float, result: ScheduleResult) -> LoadPoint:
        latency = {name: result.latency_ms.get(name, {}) for name in LATENCIES}
        return cls(
            offered_requests_per_s=offered_requests_per_s,
            throughput_tokens_per_s=result.throughput_tokens_per_s,
            throughput_requests_per_s=result.throughput_requests_per_s,
            ttft_p50_ms=latency["ttft"].get("p50"),
            ttft_p99_ms=latency["ttft"].get("p99"),
            tpot_p50_ms=latency["tpot"].get("p50"),
            e2e_p50_ms=latency["e2e"].get("p50"),
            e2e_p99_ms=latency["e2e"].get("p99"),
            unstable=result.unstable is not None,
        )


@dataclass(frozen=True, slots=True)
class LoadCurve:
    """One workload at growing rates of arrival: for each schedule its points, the lowest rate first."""

    points: dict[str, tuple[LoadPoint, ...]]

    @property
    def of_tokens(self) -> bool:
        """Whether tokens are generated; else the throughput is of requests."""
        return all(point.throughput_tokens_per_s is not None for points in self.points.values() for point in points)

    def to_json(self) -> dict[str, Any]:
        return {name: [asdict(point) for point in points] for name, points in self.points.items()}


@dataclass(frozen=True, slots=True)
class Run:
    """One scenario under one or more schedules, on one machine.

    `windows` holds, for each schedule, the spans of a steady window of a few steps, for timelines. `provenance`
    says where the costs (simulated) or the times (executed) come from: profile, device, driver, versions. `served`
    holds the requests of each schedule (of several replications, the first's), `answered` those of dynamic batching,
    `slo` the objectives they were held to.
    """

    source: Literal["simulated", "executed"]
    scenario: dict[str, Any]
    results: dict[str, ScheduleResult]
    windows: dict[str, tuple[Span, ...]]
    provenance: dict[str, Any]
    served: dict[str, Served] = field(default_factory=dict)
    answered: dict[str, Answered] = field(default_factory=dict)
    slo: Slo | None = None
    load_curve: LoadCurve | None = None

    @property
    def interrupted(self) -> bool:
        """Whether its figures are of what had happened when it was interrupted."""
        return any(result.partial is not None for result in self.results.values())

    def whole(self) -> Run:
        """Itself, for callers to whom what an interrupted run has is no result.

        Raises:
            KeyboardInterrupt: it was interrupted.
        """
        if self.interrupted:
            raise KeyboardInterrupt
        return self


def figures(result: ScheduleResult) -> dict[str, float]:
    """All figures of a result in one flat dictionary; keys such as `step_ms.p50` and `stage_ms.decode`."""
    flat: dict[str, float | None] = {
        "throughput_tokens_per_s": result.throughput_tokens_per_s,
        "gain_over_sync": result.gain_over_sync,
        "total_s": result.total_s,
        **{f"step_ms.{key}": value for key, value in result.step_ms.items()},
        "device_busy_fraction": result.device_busy_fraction,
        "launch_gap_fraction": result.launch_gap_fraction,
        "host_busy_fraction": result.host_busy_fraction,
        **{f"stage_ms.{stage}": value for stage, value in result.stage_ms.items()},
        **{
            f"latency_ms.{name}.{statistic}": value
            for name, statistics in result.latency_ms.items()
            for statistic, value in statistics.items()
        },
        "throughput_requests_per_s": result.throughput_requests_per_s,
        "goodput_requests_per_s": result.goodput_requests_per_s,
        "slo_attainment": result.slo_attainment,
        "breaking_requests_per_s": result.breaking_requests_per_s,
        **{f"batch_size.{statistic}": value for statistic, value in result.batch_size.items()},
        **{f"kv_use.{statistic}": value for statistic, value in result.kv_use.items()},
        **{f"waiting.{statistic}": value for statistic, value in result.waiting.items()},
        **{f"to_target.{name}": value for name, value in result.to_target.items()},
    }
    return {key: value for key, value in flat.items() if value is not None}


def over_replications(results: Sequence[ScheduleResult]) -> ScheduleResult:
    """The first of `results`, its figures and idle time replaced by means over all, with `interval`.

    What else there is (counts, the engine's own) stays as it is in the first; warnings are of all, and it is unstable
    where most are. A figure that not all have stays as well, without an interval.
    """
    found = intervals([figures(result) for result in results])
    if not found:
        return results[0]

    def mean(prefix: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: mean(f"{prefix}.{key}", each) for key, each in value.items()}
        return found[prefix][0] if prefix in found else value

    first = results[0]
    unstable = [result.unstable for result in results if result.unstable is not None]
    means = {each.name: mean(each.name, getattr(first, each.name)) for each in fields(first)}
    stages = dict.fromkeys(stage for result in results for stage in result.idle_ns)
    means["idle_ns"] = {
        stage: round(sum(result.idle_ns.get(stage, 0) for result in results) / len(results)) for stage in stages
    }
    means["interval"] = {key: width for key, (_, width) in found.items()}
    means["warnings"] = tuple(dict.fromkeys(text for result in results for text in result.warnings))
    means["unstable"] = unstable[0] if 2 * len(unstable) > len(results) else None
    return ScheduleResult(**means)


def errors(predicted: ScheduleResult, measured: ScheduleResult) -> dict[str, float]:
    """Signed errors of a prediction, by the keys of `figures`; a figure that either side lacks has none.

    Shares and gains: predicted - measured, in percentage points. All others: predicted / measured - 1
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
    return key.endswith("_fraction") or key in _SHARES


def run_json(run: Run) -> dict[str, Any]:
    """What `batchsim run --json` prints and `result.json` holds."""
    return {
        "schema_version": SCHEMA_VERSION,
        "scenario": run.scenario,
        "profile": run.provenance["profile"],
        "schedules": _results_json(run),
        **({"load_curve": run.load_curve.to_json()} if run.load_curve is not None else {}),
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

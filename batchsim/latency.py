"""Latencies, service objectives, queues: what the table of a run's requests says, in the definitions of `result`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, sqrt

import numpy as np
import numpy.typing as npt

from batchsim.served import Int64, Served

Float64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

LATENCIES = ("ttft", "tpot", "itl", "e2e", "queue")
QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}
CONFIDENCE = 0.95

# A queue counts as growing when it is longer than chance leaves it at full load: so many standard deviations of the
# number of arrivals, and so large a share of the arrivals.
_DEVIATIONS = 2.0
_LEAST_GROWTH = 0.03
_MS = 1e6


@dataclass(frozen=True, slots=True)
class Slo:
    """Service level objectives of each request, upper bounds in ms; None: no bound. One token has no TPOT to bound.

    `queue_ms` is for dynamic batching alone, which knows neither TTFT nor TPOT.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None
    queue_ms: float | None = None


@dataclass(frozen=True, slots=True)
class RequestFigures:
    """Figures of a run's requests: the fields of `ScheduleResult` by these names, defined there.

    A statistic without a sample is left out, or None.
    """

    latency_ms: dict[str, dict[str, float]]
    throughput_requests_per_s: float | None
    goodput_requests_per_s: float | None
    slo_attainment: float | None
    batch_size: dict[str, float]
    kv_use: dict[str, float]
    waiting: dict[str, float]
    unstable: str | None


def request_figures(served: Served, slo: Slo | None = None, *, open_loop: bool = False) -> RequestFigures:
    """All figures of `served`.

    `open_loop`: requests arrive whether or not earlier ones are served, so that a queue may grow without end.
    """
    counted = after_warm_up(served)
    latencies = request_latencies(served, counted)
    latency_ms = {name: statistics(values) for name, values in latencies.items() if len(values)}
    if len(served.itl_ns):
        latency_ms["itl"] = statistics(served.itl_ns, served.itl_count)
    throughput = goodput = attainment = None
    seconds = (served.total_ns - served.warm_up_ns) / 1e9
    if seconds > 0:
        done = served.finished_ns > served.warm_up_ns
        throughput = float(np.count_nonzero(done) / seconds)
        if slo is not None:
            good = _meets(served, slo)
            goodput = float(np.count_nonzero(good & done) / seconds)
            ended = np.count_nonzero(served.finished_ns[counted] >= 0)
            attainment = np.count_nonzero(good[counted]) / ended if ended else None
    return RequestFigures(
        latency_ms={name: latency_ms[name] for name in LATENCIES if name in latency_ms},
        throughput_requests_per_s=throughput,
        goodput_requests_per_s=goodput,
        slo_attainment=attainment,
        batch_size=batch_size_figures(served.batch_sizes),
        kv_use=_kv_use(served),
        waiting=waiting_figures(served.arrival_ns, served.started_ns, served.warm_up_ns, served.total_ns),
        unstable=unstable(served.arrival_ns, served.started_ns, served.total_ns) if open_loop else None,
    )


def after_warm_up(served: Served) -> slice:
    """The requests that arrived after the warm-up."""
    return slice(int(np.searchsorted(served.arrival_ns, served.warm_up_ns)), None)


def request_latencies(served: Served, counted: slice = slice(None)) -> dict[str, Int64 | Float64]:
    """The samples, in nanoseconds, of each latency but `itl`; what has not happened has none."""
    arrival, started = served.arrival_ns[counted], served.started_ns[counted]
    first, finished = served.first_token_ns[counted], served.finished_ns[counted]
    several = (finished >= 0) & (served.generated[counted] > 1)
    return {
        "ttft": _where(first - arrival, first >= 0),
        "tpot": _where(finished - first, several) / (_where(served.generated[counted], several) - 1),
        "e2e": _where(finished - arrival, finished >= 0),
        "queue": _where(started - arrival, started >= 0),
    }


def quantiles(values: Int64 | Float64, shares: Sequence[float] | Float64, counts: Int64 | None = None) -> Float64:
    """Quantiles of `values`, each `counts` times: linear between order statistics, which is numpy's default."""
    if counts is None:
        return np.asarray(np.quantile(values, shares), np.float64)
    order = np.argsort(values)
    ends, ordered = np.cumsum(counts[order]), values[order]
    found = []
    for share in shares:
        position = share * (int(ends[-1]) - 1)
        below = floor(position)
        left, right = ordered[np.searchsorted(ends, (below, min(below + 1, int(ends[-1]) - 1)), side="right")]
        found.append(float(left) + float(right - left) * (position - below))
    return np.array(found)


def intervals(replications: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """Mean and half width of the 95% Student-t interval of each figure that all of at least two replications have."""
    if len(replications) < 2:
        return {}
    # The fastest to import of scipy's ways to it.
    from scipy.special import stdtrit

    reach = float(stdtrit(len(replications) - 1, (1 + CONFIDENCE) / 2)) / sqrt(len(replications))
    keys = [key for key in replications[0] if all(key in each for each in replications)]
    table = np.array([[each[key] for key in keys] for each in replications], np.float64)
    means, widths = table.mean(axis=0), reach * table.std(axis=0, ddof=1)
    return {key: (float(mean), float(width)) for key, mean, width in zip(keys, means, widths, strict=True)}


def _where(values: Int64, wanted: Bools) -> Int64:
    return values if wanted.all() else values[wanted]


def statistics(values_ns: Int64 | Float64, counts: Int64 | None = None) -> dict[str, float]:
    """Mean and quantiles, ms, of `values_ns`, each `counts` times."""
    if counts is None:
        mean = float(values_ns.mean())
    else:
        mean = float(np.dot(values_ns.astype(np.float64), counts.astype(np.float64))) / int(counts.sum())
    found = quantiles(values_ns, list(QUANTILES.values()), counts)
    return {"mean": mean / _MS, **{name: float(value) / _MS for name, value in zip(QUANTILES, found, strict=True)}}


def _meets(served: Served, slo: Slo) -> Bools:
    """Which requests have finished within all their objectives."""
    good: Bools = served.finished_ns >= 0
    if slo.ttft_ms is not None:
        good &= served.first_token_ns - served.arrival_ns <= slo.ttft_ms * _MS
    if slo.e2e_ms is not None:
        good &= served.finished_ns - served.arrival_ns <= slo.e2e_ms * _MS
    if slo.tpot_ms is not None:
        good &= served.finished_ns - served.first_token_ns <= slo.tpot_ms * _MS * (served.generated - 1)
    return good


def batch_size_figures(steps_of: Int64) -> dict[str, float]:
    """Mean, quantiles and maximum of batch sizes, of which `steps_of[n]` were n."""
    sizes = np.flatnonzero(steps_of)
    if not len(sizes):
        return {}
    steps = steps_of[sizes]
    p50, p90, p99 = quantiles(sizes, (0.5, 0.9, 0.99), steps)
    mean = int(np.dot(sizes, steps)) / int(steps.sum())
    return {"mean": mean, "p50": float(p50), "p90": float(p90), "p99": float(p99), "max": float(sizes[-1])}


def _kv_use(served: Served) -> dict[str, float]:
    """A moment's use lasts until the next moment; the last one's until the end of the run."""
    series = served.series
    counted = slice(max(int(np.searchsorted(series.time_ns, served.warm_up_ns, side="right")) - 1, 0), None)
    used, moments_ns = series.kv_blocks[counted], np.maximum(series.time_ns[counted], served.warm_up_ns)
    lasts_ns = np.diff(moments_ns, append=served.total_ns)
    if not served.kv_blocks or not lasts_ns.any():
        return {}
    mean = float(np.average(used, weights=lasts_ns))
    return {"mean": mean / served.kv_blocks, "max": int(used.max()) / served.kv_blocks}


def waiting_figures(arrival_ns: Int64, started_ns: Int64, first_ns: int, last_ns: int) -> dict[str, float]:
    """The number of requests that have arrived and not started (-1: never), from one moment to another."""
    if last_ns <= first_ns:
        return {}
    waited_ns = np.clip(np.where(started_ns < 0, last_ns, started_ns), first_ns, last_ns)
    waited_ns -= np.clip(arrival_ns, first_ns, last_ns)
    # It only grows at an arrival, so that its maximum is right after one, or at the start.
    moments = np.append(arrival_ns[np.searchsorted(arrival_ns, first_ns) :], first_ns)
    longest = waiting_at(arrival_ns, started_ns, moments).max()
    return {"mean": float(waited_ns.sum(dtype=np.float64)) / (last_ns - first_ns), "max": float(longest)}


def waiting_at(arrival_ns: Int64, started_ns: Int64, moments_ns: Int64) -> Int64:
    """How many requests have arrived by each moment, itself included, and not started (-1: never) by then."""
    started = started_ns[started_ns >= 0]
    if (np.diff(started) < 0).any():
        started = np.sort(started)
    arrived = np.searchsorted(arrival_ns, moments_ns, side="right")
    return np.asarray(arrived - np.searchsorted(started, moments_ns, side="right"), np.int64)


def unstable(arrival_ns: Int64, started_ns: Int64, total_ns: int) -> str | None:
    """A sentence if the queue grew for as long as requests arrived, by more than chance explains.

    At full load the queue wanders: after n arrivals by a standard deviation of about c sqrt(n), where c is the
    coefficient of variation of the times between arrivals (1 for a Poisson process). So it must be twice that when the
    last request arrives, have grown by 3% of the arrivals in the second half of the arrivals' time, and grown in
    each half of that half.
    """
    arrival = arrival_ns[: np.searchsorted(arrival_ns, total_ns, side="right")]
    if len(arrival) < 2 or arrival[-1] == arrival[0]:
        return None
    begin, end = int(arrival[0]), int(arrival[-1])
    half, later = (begin + end) // 2, (begin + 3 * end) // 4
    at_half, at_later, at_end = waiting_at(arrival, started_ns, np.array([half, later, end])).tolist()
    arrivals = len(arrival) - int(np.searchsorted(arrival, half, side="right"))
    growth = at_end - at_half
    between = np.diff(arrival)
    variation = max(float(between.std() / between.mean()), 1.0)
    if not at_half < at_later < at_end:
        return None
    if at_end <= _DEVIATIONS * variation * sqrt(len(arrival)) or growth <= _LEAST_GROWTH * arrivals:
        return None
    arriving, starting = (_rate(count / (end - half) * 1e9) for count in (arrivals, arrivals - growth))
    return (
        f"unstable: {arriving} requests/s arrive and {starting} are served; "
        f"{at_end:,} were waiting when the last one arrived, and latencies grow with the length of the run"
    )


def _rate(per_s: float) -> str:
    return f"{per_s:,.1f}" if per_s >= 1 else f"{per_s:.3g}"

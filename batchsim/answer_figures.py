"""Latencies, outcomes, objectives: what the tables of dynamic batching say, in the definitions of `result`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from batchsim.answered import DROPPED, REFUSED, Answered
from batchsim.latency import (
    RequestFigures,
    Slo,
    batch_size_figures,
    statistics,
    unstable,
    waiting_figures,
)  # fmt: skip
from batchsim.result import ScheduleResult


def with_answers(
    result: ScheduleResult, answered: Answered, slo: Slo | None, *, open_loop: bool, breaking_per_s: float | None
) -> ScheduleResult:
    """`result` with all figures of the requests.

    `open_loop`: they arrive whether or not earlier ones are served, so that the queue may grow without end;
    `breaking_per_s`: what is served when requests always wait.
    """
    requests, warm_up_ns, total_ns = answered.requests, answered.warm_up_ns, answered.total_ns
    counted = answered.after_warm_up()
    latencies = answered.latencies(counted)
    samples = len(latencies["e2e"])
    throughput = goodput = attainment = None
    seconds = (total_ns - warm_up_ns) / 1e9
    if seconds > 0:
        finished = answered.finished_ns()
        done = finished > warm_up_ns
        throughput = float(np.count_nonzero(done) / seconds)
        if slo is not None:
            good = finished >= 0
            if slo.queue_ms is not None:
                good &= requests["left_ns"] - requests["arrival_ns"] <= slo.queue_ms * 1e6
            if slo.e2e_ms is not None:
                good &= finished - requests["arrival_ns"] <= slo.e2e_ms * 1e6
            goodput = float(np.count_nonzero(good & done) / seconds)
            attainment = float(np.count_nonzero(good[counted]) / samples) if samples else None
    arrival, left = requests["arrival_ns"], requests["left_ns"]
    lost = (requests["outcome"] == REFUSED) | (requests["outcome"] == DROPPED)
    found = RequestFigures(
        latency_ms={name: statistics(values) for name, values in latencies.items()} if samples else {},
        throughput_requests_per_s=throughput,
        goodput_requests_per_s=goodput,
        slo_attainment=attainment,
        batch_size=batch_size_figures(answered.batch_sizes),
        kv_use={},
        waiting=waiting_figures(arrival, left, warm_up_ns, total_ns),
        unstable=unstable(arrival[~lost], left[~lost], total_ns) if open_loop else None,
    )
    if found.unstable is not None and breaking_per_s is not None:
        found = replace(found, unstable=f"{found.unstable}; it breaks at {breaking_per_s:,.1f} requests/s")
    sizes = answered.batch_sizes
    return replace(
        result.with_requests(found),
        outcomes=answered.outcomes,
        batch_histogram={str(size): int(sizes[size]) for size in np.flatnonzero(sizes)},
        breaking_requests_per_s=breaking_per_s,
    )

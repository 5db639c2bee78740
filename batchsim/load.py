"""What a workload's requests see as more of them arrive: throughput against latency."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from batchsim import workload
from batchsim.result import LoadCurve, LoadPoint, Run
from batchsim.workload_scenario import TraceWorkload

if TYPE_CHECKING:
    from batchsim.dynamic_scenario import DynamicScenario
    from batchsim.scenario import Scenario

    OfRequests: TypeAlias = Scenario | DynamicScenario

# Rates of arrival, as shares of the throughput when all requests are there at the start; and how many requests each.
LOADS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0, 1.1)
MOST_REQUESTS = 2000


def load_curve(
    scenario: OfRequests,
    simulate: Callable[[Any], Run],
    *,
    base: Path = Path(),
    progress: Callable[[float], None] | None = None,
) -> LoadCurve | None:
    """Every schedule of an open-loop scenario at growing constant rates of arrival; None for others.

    All schedules are run at the same rates: shares of what the fastest of them serves when all requests are there. A
    trace is replayed faster or slower instead. `simulate` runs a scenario; a trace's path is relative to `base`.
    """
    asked = scenario.workload
    if not asked.open_loop:
        return None
    # The schedule tile runs an event for every host call, which would take too long.
    names = tuple(name for name in scenario.schedules if name != "tile")
    if not names:
        return None
    update = {"replications": 1, "warm_up_s": 0.0, "level": "iteration", "schedules": names}
    once = scenario.model_copy(update=update)
    requests = workload.requests_of(asked, seed=scenario.seed, replication=scenario.replication, base=base)
    count = min(len(requests), MOST_REQUESTS)
    limits: dict[str, float | None] = {"limit": count} if isinstance(asked, TraceWorkload) else {"num_prompts": count}
    span_s = float(requests.arrival_ns[count - 1] - requests.arrival_ns[0]) / 1e9
    if span_s <= 0:
        return None

    def at(rate: float | None) -> OfRequests:
        if isinstance(asked, TraceWorkload):
            # A trace is never all there at once, but in a thousandth of the time it nearly is.
            scale = 1000.0 if rate is None else rate * span_s / (count - 1)
            change = limits | {"rate_scale": asked.rate_scale * scale}
        else:
            change = limits | {"request_rate": rate, **({"burstiness": 1.0} if rate is None else {})}
        return once.model_copy(update={"workload": asked.model_copy(update=change)})

    full = simulate(at(None) if scenario.kind == "serving" else once).results.values()
    most = max(result.breaking_requests_per_s or result.throughput_requests_per_s or 0.0 for result in full)
    points: dict[str, list[LoadPoint]] = {name: [] for name in names}
    for done, load in enumerate(LOADS):
        for name, result in simulate(at(most * load)).whole().results.items():
            points[name].append(LoadPoint.of(most * load, result))
        if progress is not None:
            progress((done + 1) / len(LOADS))
    return LoadCurve({name: tuple(found) for name, found in points.items()})

"""The batch size, delay and schedule with the lowest latency at a load, or the highest load within a bound of it.

Both are one search. `best_at(load)` finds the setting with the lowest latency at a load by coordinate descent on grids
of batch sizes and delays, from the best setting of the nearest load that has been looked at; all settings see the same
requests and the same draws. The highest load within a bound is then bisected, since more load only adds latency.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING, Any

from batchsim.errors import InputError
from batchsim.latency import intervals
from batchsim.result import Run, ScheduleResult
from batchsim.workload_scenario import TraceWorkload

if TYPE_CHECKING:
    from batchsim.dynamic_scenario import DynamicScenario
    from batchsim.profile import Profile

Simulate = Callable[["DynamicScenario"], Run]
Tell = Callable[[float], None]
Again = Callable[[Any, Any], Run]

# Requests of one trial: enough for a 99th percentile that does not hide the differences looked for.
LEAST_REQUESTS, MOST_REQUESTS = 4_000, 20_000
DELAY_SHARES = (
    0.0,
    0.05,
    0.1,
    0.2,
    0.35,
    0.5,
    0.75,
    1.0,
    1.5,
    2.0,
    3.0,
)  # of the time of a batch of the setting that serves most
FRONTIER_LOADS = (0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 0.95)  # of the highest rate that any setting serves
RESOLUTION = 0.01  # of the load that is bisected
VERIFICATIONS = 8  # runs with other seeds
LOST = 0.001  # a setting that refuses or drops a larger share of the requests does not serve the load
WARM_UP = 0.2  # of a trial's time at most, whatever the scenario's is
RETREAT, RETREATS = 0.97, 40  # of the load, where other seeds do not keep the bound, and how often at most


@dataclass(frozen=True, slots=True)
class Setting:
    """What is chosen; `max_queue_delay_us` microseconds."""

    schedule: str
    max_batch_size: int
    max_queue_delay_us: float


@dataclass(frozen=True, slots=True)
class Trial:
    """One simulated run of a setting. `latency_ms` is infinite where the queue grows or too many requests are lost."""

    setting: Setting
    requests_per_s: float
    latency_ms: float
    p50_ms: float
    p99_ms: float
    batch_size: float
    device_busy_fraction: float


@dataclass(frozen=True, slots=True)
class Verified:
    """The chosen setting with other seeds: mean and half width of the 95% interval of its latency, ms."""

    replications: int
    latency_ms: float
    half_width_ms: float


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was found: the best trial, its verification, the frontier, all trials, and the setting of the file.

    `interval_90_ms` is the 90% interval of the best trial's latency, where it was asked for: see `batchsim.intervals`.
    """

    percentile: str
    bound_ms: float | None
    best: Trial
    verified: Verified
    asked: Trial
    breaking_requests_per_s: float
    frontier: tuple[Trial, ...]
    trials: tuple[Trial, ...] = field(repr=False)
    simulations: int = 0
    interval_90_ms: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """As `batchsim tune --json` prints it; an infinite latency is null."""
        found: dict[str, Any] = _finite(asdict(self))
        return found


def tune(
    scenario: DynamicScenario, simulate: Simulate, profile: Profile | None, *, percentile: str = "p99",
    bound_ms: float | None = None, progress: Tell | None = None, again: Again | None = None,
) -> Tuning:  # fmt: skip
    """The best setting of `scenario`, by `percentile` of the latency, with batches up to the largest measured.

    Without `bound_ms` (milliseconds) that with the lowest latency at the scenario's rate of arrival, else that which
    serves the highest rate with a latency of at most `bound_ms`. With `again`, which simulates at other costs, its
    latency has an interval.

    Raises:
        InputError: without a file: requests do not arrive at a constant rate, or no load is served within the bound.
    """
    table = scenario.costs.batch_ms if scenario.costs is not None else {}
    sizes = [curve.size for curve in profile.device.decode] if profile is not None else [int(size) for size in table]
    search = _Search(scenario, simulate, max(sizes), percentile, progress)
    most = search.breaking()
    asked = search.trial(search.asked, search.rate)
    if bound_ms is None:
        if search.rate >= most:
            found = f"{search.rate:g} requests/s"
            wanted = f"less than the {most:,.1f} that the fastest setting serves, or --slo-ms to find the load"
            raise InputError(None, "workload.request_rate", found, wanted)
        best = search.best_at(search.rate)
    else:
        best = search.highest(most, bound_ms)
    # The picture: what can be had at other loads.
    for share in FRONTIER_LOADS:
        search.best_at(share * most)
    best, verified = search.verify(best, bound_ms)
    return Tuning(
        percentile=percentile, bound_ms=bound_ms, best=best, verified=verified, asked=asked,
        breaking_requests_per_s=most, frontier=_frontier(search.best.values()),
        trials=tuple(search.trials.values()), simulations=search.simulations,
        interval_90_ms=None if again is None else search.interval_ms(best, profile, again),
    )  # fmt: skip


class _Search:
    """Trials made so far, each once, and the best at each load."""

    def __init__(
        self, scenario: DynamicScenario, simulate: Simulate, largest: int, percentile: str, progress: Tell | None
    ) -> None:
        workload = scenario.workload
        rate = None if isinstance(workload, TraceWorkload) else workload.request_rate
        if isinstance(workload, TraceWorkload) or not isinstance(rate, float):
            found = "a trace" if isinstance(workload, TraceWorkload) else "no constant rate"
            raise InputError(
                None, "workload.request_rate", found, "one number: settings are compared at constant loads"
            )
        if workload.max_concurrency is not None:
            wanted = "a workload without it: clients that are held back hide how long requests wait"
            raise InputError(None, "workload.max_concurrency", f"{workload.max_concurrency:,}", wanted)
        if scenario.slo is not None and scenario.slo.queue_ms is not None:
            raise InputError(
                None, "slo.queue_ms", f"{scenario.slo.queue_ms:g}", "slo.e2e_ms, which is what tune bounds"
            )
        self.scenario, self.rate, self.percentile = scenario, rate, percentile
        self.asked = Setting(scenario.schedules[0], scenario.max_batch_size, float(scenario.max_queue_delay_us))
        self.trials: dict[tuple[Setting, float], Trial] = {}
        self.best: dict[float, Trial] = {}
        self.simulations = 0
        self._simulate, self._progress = simulate, progress
        count = min(max(workload.num_prompts, LEAST_REQUESTS), MOST_REQUESTS)
        self._workload = workload.model_copy(update={"num_prompts": count})
        self.sizes = _sizes(largest)
        self.delays_us: tuple[float, ...] = (0.0,)
        self._largest = self.sizes[-1]  # that of the setting that serves most

    def breaking(self) -> float:
        """The highest rate that any setting serves.

        Not always with the largest batches: where lengths differ, the more requests a batch has, the more are padded.
        """
        most, batch_us = 0.0, 0.0
        for schedule in self.scenario.schedules:
            for size in self.sizes:
                found = self._run(Setting(schedule, size, 0.0), self.rate, 0).breaking_requests_per_s or 0.0
                if found > most:
                    most, batch_us, self._largest = found, size / found * 1e6, size
        delays_us = {round(share * batch_us, 1) for share in DELAY_SHARES}
        if self.scenario.late == "drop" and (timeout_us := self.scenario.queue_timeout_us) is not None:
            delays_us = {min(delay, timeout_us) for delay in delays_us}  # a longer one drops all that wait for it
        self.delays_us = tuple(sorted(delays_us))
        return most

    def best_at(self, rate: float) -> Trial:
        """The setting with the lowest latency at a load, requests a second."""
        if rate in self.best:
            return self.best[rate]
        nearest = sorted(self.best, key=lambda other: abs(other - rate))[:1]
        found = []
        for schedule in self.scenario.schedules:
            size, delay = self._largest, 0.0
            for other in nearest:
                size, delay = self.best[other].setting.max_batch_size, self.best[other].setting.max_queue_delay_us
            found.append(self._descend(Setting(schedule, size, delay), rate))
        self.best[rate] = min(found, key=_merit)
        if self._progress is not None:
            self._progress(min(len(self.best) / (2 * len(FRONTIER_LOADS)), 1.0))
        return self.best[rate]

    def highest(self, most: float, bound_ms: float) -> Trial:
        """The best setting at the highest load that keeps the bound."""
        low, high, best = 0.0, most, None
        rate = 0.5 * most
        while high - low > RESOLUTION * high:
            trial = self.best_at(rate)
            if trial.latency_ms <= bound_ms:
                low, best = rate, trial
            else:
                high = rate
            if best is None and rate < 1e-3 * most:
                wanted = f"at least {trial.latency_ms:.3g}, what a request takes on an idle machine"
                raise InputError(None, "--slo-ms", f"{bound_ms:g}", wanted)
            rate = (low + high) / 2
        assert best is not None
        return best

    def trial(self, setting: Setting, rate: float, replication: int = 0) -> Trial:
        """One run; replication 0 is kept."""
        key = (setting, rate)
        if replication == 0 and key in self.trials:
            return self.trials[key]
        result = self._run(setting, rate, replication)
        latencies = result.latency_ms.get("e2e", {})
        outcomes = result.outcomes
        lost = (outcomes["refused"] + outcomes["dropped"]) / max(outcomes["arrivals"], 1)
        doomed = result.unstable is not None or not latencies or lost > LOST
        found = Trial(
            setting, rate, inf if doomed else latencies[self.percentile], latencies.get("p50", inf),
            latencies.get("p99", inf), result.batch_size.get("mean", 0.0), result.device_busy_fraction,
        )  # fmt: skip
        if replication == 0:
            self.trials[key] = found
        return found

    def verify(self, best: Trial, bound_ms: float | None) -> tuple[Trial, Verified]:
        """The chosen setting with other seeds; with a bound, that at the highest load at which these keep it, too: the
        upper end of the interval of the mean."""
        for _ in range(RETREATS):
            runs = [self.trial(best.setting, best.requests_per_s, number + 1) for number in range(VERIFICATIONS)]
            mean, width = inf, 0.0
            if all(run.latency_ms < inf for run in runs):
                mean, width = intervals([{"latency_ms": run.latency_ms} for run in runs])["latency_ms"]
            found = best, Verified(VERIFICATIONS, mean, width)
            if bound_ms is None or mean + width <= bound_ms:
                break
            best = self.best_at(best.requests_per_s * RETREAT)
        return found

    def interval_ms(self, best: Trial, profile: Profile | None, again: Again) -> tuple[float, float] | None:
        """The 90% interval of a trial's latency."""
        from batchsim.intervals import SWEEP_DRAWS, with_intervals

        chosen = self._candidate(best.setting, best.requests_per_s, 0)
        run = with_intervals(self._simulate(chosen), chosen, profile, again, draws=SWEEP_DRAWS)
        return run.results[best.setting.schedule].interval_90.get(f"latency_ms.e2e.{self.percentile}")

    def _descend(self, start: Setting, rate: float) -> Trial:
        """Improve the delay, then the batch size, and so on until neither helps."""
        best = self.trial(start, rate)
        while True:
            before = best
            delays = [Setting(start.schedule, best.setting.max_batch_size, delay) for delay in self.delays_us]
            best = self._walk(best, delays, rate)
            sizes = [Setting(start.schedule, size, best.setting.max_queue_delay_us) for size in self.sizes]
            best = self._walk(best, sizes, rate)
            if best is before:
                return best

    def _walk(self, best: Trial, line: list[Setting], rate: float) -> Trial:
        """From `best` along a line of settings, to either side, as far as it gets better."""
        at = next((i for i, setting in enumerate(line) if setting == best.setting), len(line) - 1)
        for way in (1, -1):
            i, worse = at + way, 0
            while 0 <= i < len(line) and worse < 2:  # past one worse setting, for chance makes bumps
                trial = self.trial(line[i], rate)
                if _merit(trial) < _merit(best):
                    best, worse = trial, 0
                else:
                    worse += 1
                i += way
        return best

    def _run(self, setting: Setting, rate: float, replication: int) -> ScheduleResult:
        self.simulations += 1
        return self._simulate(self._candidate(setting, rate, replication)).results[setting.schedule]

    def _candidate(self, setting: Setting, rate: float, replication: int) -> DynamicScenario:
        preferred = tuple(n for n in self.scenario.preferred_batch_sizes if n <= setting.max_batch_size)
        update = {
            "schedules": (setting.schedule,), "max_batch_size": setting.max_batch_size,
            "max_queue_delay_us": setting.max_queue_delay_us, "preferred_batch_sizes": preferred,
            "warm_up_s": min(self.scenario.warm_up_s, WARM_UP * self._workload.num_prompts / rate),
            "replications": 1, "replication": self.scenario.replication + replication,
            "workload": self._workload.model_copy(update={"request_rate": rate}),
        }  # fmt: skip
        return self.scenario.model_copy(update=update)


def _merit(trial: Trial) -> tuple[float, float, int, float]:
    """Lower is better: the latency, then among hopeless settings that with the larger batches; then less of each."""
    setting = trial.setting
    if trial.latency_ms == inf:
        return inf, trial.p50_ms, -setting.max_batch_size, setting.max_queue_delay_us
    return trial.latency_ms, 0.0, setting.max_batch_size, setting.max_queue_delay_us


def _sizes(largest: int) -> tuple[int, ...]:
    sizes, size = {1, largest}, 2
    while size < largest:
        sizes |= {size, size * 3 // 2}
        size *= 2
    return tuple(sorted(size for size in sizes if size <= largest))


def _frontier(best: Any) -> tuple[Trial, ...]:
    """Of the best trials at each load, by load, those that no other beats in load and latency both."""
    kept: list[Trial] = []
    for trial in sorted(best, key=lambda trial: -trial.requests_per_s):
        if trial.latency_ms < min((other.latency_ms for other in kept), default=inf):
            kept.append(trial)
    frontier = tuple(reversed(kept))
    assert all(a.latency_ms < b.latency_ms for a, b in pairwise(frontier))
    return frontier


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {key: _finite(each) for key, each in value.items()}
        case list() | tuple():
            return [_finite(each) for each in value]
        case float() if value == inf:
            return None
    return value

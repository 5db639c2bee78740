"""Virtual speed-ups: what a run would gain if one stage of its step got faster, verified by simulation.

A stage's time says little of what it is worth: one that runs beside a longer one gains nothing. So each is made faster
in turn, and everything is simulated again, with the same requests and the same draws (Curtsinger and Berger, "Coz:
Finding Code that Counts with Causal Profiling", SOSP 2015, find the same on real programs by slowing all else down).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchsim.explain.result import ALL, Explained, Explanation, Gain
from batchsim.explain.stages import Stage, all_faster, stages_of
from batchsim.latency import intervals
from batchsim.result import Run, ScheduleResult, figures, occurrence
from batchsim.workload_scenario import TraceWorkload

if TYPE_CHECKING:
    from batchsim.kinds import AnyProfile, AnyScenario, Kind

__all__ = ["Explained", "Explanation", "Gain", "Stage", "explain", "stages_of"]

# Latencies whose gains are told, as far as a kind of scenario has them.
LATENCIES = tuple(f"{name}.{statistic}" for name in ("ttft", "tpot", "e2e") for statistic in ("p50", "p99"))
# Where requests come at their own times, throughput is theirs, and latency is what there is to gain.
_OPEN_LOOP, _CLOSED_LOOP, _FULL_LOAD = "e2e.p50", "throughput", "throughput at full load"
# There the smallest change shifts which requests share a batch: so many replications are averaged, fewer of long runs.
_REPEATS, _LEAST_REPEATS, _REQUESTS = 8, 2, 20_000
_CHANCE = 0.25  # of a gain
_FULL_RATE, _FULL_SCALE = 1e6, 1e4


def explain(
    kind: Kind, scenario: AnyScenario, costs: AnyProfile, *, by: float = 0.1, base: Path = Path(),
    progress: Callable[[float], None] | None = None,
) -> Explanation:  # fmt: skip
    """What each schedule of `scenario` gains by each stage that gets `by` (a share) faster.

    Paths are relative to `base`. Interrupted by Ctrl-C, the stages that are done are returned, and it says so.

    Raises:
        InputError: as simulating the scenario does.
    """
    stages = stages_of(scenario, costs)
    planned: list[tuple[Stage | None, Any, Any]] = [(None, *all_faster(stages, scenario, costs, 1 + by))]
    planned += [(stage, *stage.faster(scenario, costs, 1 + by)) for stage in stages]
    bench = _Bench(kind, scenario, costs, base)
    found: list[tuple[Stage | None, _Trial]] = []
    partial = None
    try:
        for stage, changed, faster in planned:
            found.append((stage, bench.run(changed, faster)))
            if progress is not None:
                progress(len(found) / len(planned))
    except KeyboardInterrupt:
        if not found:
            raise
        partial = f"interrupted after {len(found) - 1} of {len(stages)} stages"
    return Explanation(
        name=scenario.name,
        by=by,
        scenario=bench.now.runs[0].scenario,
        provenance=bench.now.runs[0].provenance,
        schedules={name: _explained(name, bench, found) for name in bench.now.runs[0].results},
        simulations=bench.simulations,
        partial=partial,
    )


@dataclass(frozen=True, slots=True)
class _Trial:
    """Replications of a scenario, and it once with all requests there at nearly the same time, where that differs."""

    runs: list[Run]
    full: Run | None

    def results(self, name: str) -> list[ScheduleResult]:
        return [run.results[name] for run in self.runs]

    def throughput(self, name: str) -> float:
        """Of an open loop, what it serves when requests always wait."""
        if self.full is not None:
            return self.full.results[name].throughput
        result = self.runs[0].results[name]
        return result.breaking_requests_per_s or result.throughput


class _Bench:
    """Runs what is asked of it as often as the scenario needs; `now` is the scenario as it is."""

    def __init__(self, kind: Kind, scenario: AnyScenario, costs: AnyProfile, base: Path) -> None:
        self._kind, self._base, self.simulations = kind, base, 0
        self.open_loop = scenario.kind != "training" and scenario.workload.open_loop
        self._repeats = 1
        self._passes = scenario.accumulation_steps if scenario.kind == "training" else 1  # of a step
        first = self._simulate(scenario, costs, checks=True)
        if self.open_loop and not all(result.unstable for result in first.results.values()):
            requests = max(result.counts["requests"] for result in first.results.values())
            self._repeats = min(max(_REQUESTS // requests, _LEAST_REPEATS), _REPEATS)
        self.now = self.run(scenario, costs, first)

    def run(self, scenario: Any, costs: Any, first: Run | None = None) -> _Trial:
        runs = [first or self._simulate(scenario, costs)]
        for number in range(1, self._repeats):
            again = scenario.model_copy(update={"replication": scenario.replication + number * scenario.replications})
            runs.append(self._simulate(again, costs))
        full = self._simulate(_at_full_load(scenario), costs) if self.open_loop and scenario.kind == "serving" else None
        return _Trial(runs, full)

    def share(self, stage: Stage, result: ScheduleResult) -> float | None:
        """The stage's share of a mean step; None of latencies, and of waiting, whose time is not the stage's own."""
        if stage.name == "wait" or stage.side == "latency":
            return None
        often = occurrence(result, stage.name) if "prefill_steps" in result.counts else 1.0
        if stage.name in ("forward", "backward", "device_copy_in"):
            often *= self._passes
        return result.stage_ms.get(stage.name, 0.0) * often / result.step_ms["mean"]

    def _simulate(self, scenario: Any, costs: Any, *, checks: bool = False) -> Run:
        run = self._kind.simulate(scenario, costs, checks=checks, base=self._base).whole()
        self.simulations += len(run.results)
        return run


def _at_full_load(scenario: Any) -> Any:
    asked = scenario.workload
    if isinstance(asked, TraceWorkload):
        changed = asked.model_copy(update={"rate_scale": _FULL_SCALE})
    else:
        changed = asked.model_copy(update={"request_rate": _FULL_RATE, "burstiness": 1.0})
    return scenario.model_copy(update={"workload": changed, "warm_up_s": 0.0, "replications": 1})


def _explained(name: str, bench: _Bench, found: list[tuple[Stage | None, _Trial]]) -> Explained:
    now, result = bench.now, bench.now.runs[0].results[name]
    own = figures(result)
    latencies = [key for key in LATENCIES if f"latency_ms.{key}" in own]
    everything, *each = [_gain(name, stage, bench, trial, latencies) for stage, trial in found]
    measure = _CLOSED_LOOP
    if bench.open_loop and result.unstable is None and _OPEN_LOOP in latencies:
        # Close to full load latencies are chance's; what can be told there is how far away that is.
        chance = everything.half_width.get(_OPEN_LOOP, 0.0)
        measure = _OPEN_LOOP if chance < _CHANCE * everything.at(_OPEN_LOOP) else _FULL_LOAD
    # What only other schedules do is none of this one's stages.
    used = [gain for gain in each if gain.share != 0 or gain.throughput or any(gain.latency.values())]
    ordered = tuple(sorted(used, key=lambda gain: (-gain.sure(measure), -(gain.share or 0.0))))
    figures_now = {f"latency_ms.{key}": own[f"latency_ms.{key}"] for key in latencies}
    key = "throughput_at_full_load" if bench.open_loop else result.throughput_key
    return Explained(name, measure, {key: now.throughput(name), **figures_now}, ordered, everything)


def _gain(name: str, stage: Stage | None, bench: _Bench, faster: _Trial, latencies: list[str]) -> Gain:
    now = bench.now
    pairs = [
        (figures(before), figures(after)) for before, after in zip(now.results(name), faster.results(name), strict=True)
    ]
    gains = [
        {key: 1 - after[at] / before[at] for key in latencies if before.get(at := f"latency_ms.{key}") and at in after}
        for before, after in pairs
    ]
    over = intervals(gains)
    latency = {key: over[key][0] if key in over else gain for key, gain in gains[0].items()}
    throughput = faster.throughput(name) / now.throughput(name) - 1
    half = {key: width for key, (_, width) in over.items()}
    if stage is None:
        return Gain(ALL, "all", "every stage at once", throughput, latency, half)
    share = bench.share(stage, now.runs[0].results[name])
    return Gain(stage.name, stage.side, stage.text, throughput, latency, half, share)

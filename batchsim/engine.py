"""Scenario in, result out: runs each schedule of a scenario on the simulated machine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf

from batchsim import __version__
from batchsim.batching.continuous import ContinuousBatcher, Request, uniform_requests
from batchsim.costs import ProfileCosts
from batchsim.errors import InputError, RunError
from batchsim.machine import SimulatedMachine
from batchsim.metrics import Metrics
from batchsim.model import MODELS
from batchsim.profile import Profile
from batchsim.records import Observer, Span
from batchsim.result import Run, ScheduleResult
from batchsim.scenario import Scenario, check_memory
from batchsim.schedules import SCHEDULES, loop_name
from batchsim.tiles.level import TileLevel
from batchsim.tiles.profile import TileProfile, load_tile_profile, tile_profile_of

WINDOW_STEPS = 6


class Window:
    """An observer that keeps the spans of `WINDOW_STEPS` whole steps: those from `first_step` on, or else the last.

    A step lasts from the host's decision of it to the next one; the spans are all that fall into that time, even in
    part. Spans may come as `Metrics` takes them.
    """

    def __init__(self, first_step: int) -> None:
        self._end = first_step + WINDOW_STEPS
        self._decisions: deque[int] = deque(maxlen=WINDOW_STEPS + 1)
        self._spans: deque[Span] = deque()
        self._closed = False

    def __call__(self, span: Span) -> None:
        if self._closed:
            return
        spans, decisions = self._spans, self._decisions
        if span.stage == "schedule" and span.step >= 0:
            if span.step <= self._end:
                decisions.append(span.start_ns)
            # By now all that began before the end of the window is over, and has been told of.
            self._closed = span.step >= self._end + WINDOW_STEPS
            while spans and spans[0].end_ns <= decisions[0]:
                spans.popleft()
        spans.append(span)

    def spans(self) -> tuple[Span, ...]:
        """The window's spans, by start."""
        decisions = list(self._decisions)
        whole = len(decisions) > WINDOW_STEPS
        first = decisions[0] if decisions else 0
        last = decisions[-1] if whole else inf
        inside = (span for span in self._spans if span.end_ns > first and span.start_ns < last)
        return tuple(sorted(inside, key=lambda span: (span.start_ns, span.end_ns)))


def requests_of(scenario: Scenario) -> list[Request]:
    """The requests of a scenario, all present at the start."""
    workload = scenario.workload
    return list(uniform_requests(workload.num_prompts, workload.input_len, workload.output_len))


def batcher_of(scenario: Scenario, num_kv_blocks: int | None = None) -> ContinuousBatcher:
    """A fresh batcher with the requests of a scenario."""
    return ContinuousBatcher(
        requests_of(scenario),
        max_num_seqs=scenario.max_num_seqs,
        max_num_batched_tokens=scenario.max_num_batched_tokens,
        block_size=scenario.block_size,
        num_kv_blocks=num_kv_blocks,
    )


def steady_step(scenario: Scenario) -> int:
    """A step in the middle of the first generation of requests: prompts are through, none has finished."""
    workload = scenario.workload
    running = min(workload.num_prompts, scenario.max_num_seqs)
    return running * workload.input_len // scenario.max_num_batched_tokens + workload.output_len // 2


def simulate(scenario: Scenario, profile: Profile, *, progress: Callable[[float], None] | None = None) -> Run:
    """Simulate every schedule of `scenario` at the costs of `profile`.

    `progress` is told the fraction of all output tokens done.

    Raises:
        InputError: the scenario cannot run on the profile's machine.
        RunError: the profile lacks a loop that the scenario asks for.
    """
    if profile.model != scenario.model:
        raise InputError(None, "profile", f"{profile.name}, measured for {profile.model}", f"one for {scenario.model}")
    check_memory(scenario, profile.device_memory_bytes)
    tiles = tile_level_of(scenario, profile)
    results: dict[str, ScheduleResult] = {}
    windows: dict[str, tuple[Span, ...]] = {}
    for position, schedule in enumerate(scenario.schedules):
        loop = loop_name(schedule, graphs=scenario.cuda_graphs)
        if loop not in profile.loops:
            raise RunError(f"profile {profile.name} holds no costs for {loop}; it has {', '.join(profile.loops)}")
        costs = ProfileCosts(
            profile,
            schedule,
            graphs=scenario.cuda_graphs,
            host_speed=scenario.host_speed,
            jitter=scenario.jitter,
            seed=scenario.seed,
            replication=scenario.replication,
            tiles=tiles,
        )
        batcher = batcher_of(scenario)
        metrics, window = Metrics(), Window(steady_step(scenario))
        observers: list[Observer] = [metrics, window]
        if progress is not None:
            observers.append(_reporter(progress, batcher, scenario, position))
        machine = SimulatedMachine(
            batcher,
            costs,
            tell_all(observers),
            host_threads=scenario.host_threads,
            launch_queue_depth=scenario.launch_queue_depth,
        )
        total_ns = machine.run(SCHEDULES[schedule]())
        result = metrics.result(schedule, total_ns, batcher)
        warnings = costs.extrapolated()
        if schedule == "tile" and tiles is None:
            warnings.append(f"no tile profile of {profile.provenance.get('device')}; its forwards run as under async")
        elif schedule == "tile" and tiles is not None and not tiles.known:
            warnings.append(f"{tiles.profile.name} knows no MLP of {scenario.model}; its forwards run as under async")
        results[schedule] = replace(result, warnings=tuple(f"{schedule}: {what}" for what in warnings))
        windows[schedule] = window.spans()
    return Run(
        source="simulated",
        scenario=scenario.model_dump(mode="json"),
        results=with_gains(results),
        windows=windows,
        provenance={"batchsim": __version__, "profile": profile.name, **profile.provenance},
    )


def tile_level_of(scenario: Scenario, profile: Profile) -> TileLevel | None:
    """The tile level of a scenario that has the tile schedule, by the scenario's tile profile or its device's."""
    if "tile" not in scenario.schedules:
        return None
    if scenario.tile_profile is not None:
        tiles: TileProfile | None = load_tile_profile(scenario.tile_profile, key="tile_profile")
    else:
        tiles = tile_profile_of(str(profile.provenance.get("device")))
    return TileLevel(MODELS[scenario.model], tiles) if tiles is not None else None


def with_gains(results: dict[str, ScheduleResult]) -> dict[str, ScheduleResult]:
    """The results, each with its gain over the sync schedule's throughput where that is among them."""
    if "sync" not in results:
        return results
    base = results["sync"].throughput_tokens_per_s
    return {
        name: replace(result, gain_over_sync=result.throughput_tokens_per_s / base - 1)
        for name, result in results.items()
    }


def tell_all(observers: Sequence[Observer]) -> Observer:
    """One observer that tells each of `observers`."""

    def observe(span: Span) -> None:
        for observer in observers:
            observer(span)

    return observe


def _reporter(
    progress: Callable[[float], None], batcher: ContinuousBatcher, scenario: Scenario, position: int
) -> Observer:
    workload = scenario.workload
    tokens = workload.num_prompts * workload.output_len

    def observe(span: Span) -> None:
        if span.stage == "update" and span.step % 64 == 0:
            progress((position + batcher.output_tokens / tokens) / len(scenario.schedules))

    return observe

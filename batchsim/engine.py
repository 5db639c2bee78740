"""Scenario in, result out: runs each schedule of a scenario on the simulated machine."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from batchsim import __version__, workload
from batchsim.batching.continuous import ContinuousBatcher
from batchsim.costs import ProfileCosts
from batchsim.errors import InputError, RunError
from batchsim.latency import Slo, request_figures
from batchsim.model import MODELS
from batchsim.operation import Limits, operate, stream
from batchsim.profile import Profile
from batchsim.records import Span
from batchsim.result import Run, ScheduleResult, over_replications
from batchsim.scenario import Scenario, check_memory, check_requests
from batchsim.scenario import num_kv_blocks as kv_blocks_of
from batchsim.schedules import SCHEDULES, loop_name
from batchsim.schedules.async_ import async_
from batchsim.schedules.sync import sync
from batchsim.served import Served
from batchsim.tiles.level import TileLevel
from batchsim.tiles.profile import TileProfile, load_tile_profile, tile_profile_of
from batchsim.workload import Requests
from batchsim.workload_scenario import FixedWorkload

WINDOW_STEPS = 6

if TYPE_CHECKING:
    from batchsim.dynamic_scenario import DynamicScenario

    OfRequests: TypeAlias = Scenario | DynamicScenario

Tell = Callable[[int, int, int], None]  # takes requests finished, of how many, and the time, nanoseconds


class Window:
    """An observer that keeps the spans of `WINDOW_STEPS` whole steps: those from `first_step` on, or else the last;
    with `from_ns`, those from the first decision on that is no earlier.

    A step lasts from the host's decision of it to the next one; the spans are all that fall into that time, even in
    part. Spans may come as `Metrics` takes them.
    """

    def __init__(self, first_step: int, from_ns: int = 0) -> None:
        self.first_step, self.from_ns = first_step, from_ns
        self._end = None if from_ns else first_step + WINDOW_STEPS
        self._decisions: deque[int] = deque(maxlen=WINDOW_STEPS + 1)
        self._spans: deque[Span] = deque()
        self._closed = False

    def __call__(self, span: Span) -> None:
        if self._closed:
            return
        spans, decisions = self._spans, self._decisions
        if span.stage == "schedule" and span.step >= 0:
            if self._end is None and span.start_ns >= self.from_ns:
                self._end = span.step + WINDOW_STEPS
            end = span.step if self._end is None else self._end
            if span.step <= end:
                decisions.append(span.start_ns)
            # By now all that began before the end of the window is over, and has been told of.
            self._closed = span.step >= end + WINDOW_STEPS
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


def limits_of(scenario: Scenario, num_kv_blocks: int | None) -> Limits:
    """What bounds the batches of a scenario's replicas, with so many KV blocks each."""
    return Limits(
        max_num_seqs=scenario.max_num_seqs,
        max_num_batched_tokens=scenario.max_num_batched_tokens,
        block_size=scenario.block_size,
        num_kv_blocks=num_kv_blocks,
        chunked_prefill=scenario.chunked_prefill,
        reserve=scenario.preemption == "none",
        by_priority=scenario.scheduling_policy == "priority",
        prefix_caching=scenario.prefix_caching,
        replicas=scenario.replicas,
        router=scenario.router,
    )


def requests_of(scenario: OfRequests, base: Path = Path()) -> Requests:
    """The requests of a scenario; a trace's path is relative to `base`."""
    return workload.requests_of(scenario.workload, seed=scenario.seed, replication=scenario.replication, base=base)


def batcher_of(scenario: Scenario, requests: Requests, num_kv_blocks: int | None = None) -> ContinuousBatcher:
    """A fresh batcher with the requests of a scenario, for one replica."""
    limits = limits_of(scenario, num_kv_blocks)
    return limits.batcher(stream(requests, limits), requests)


def window_of(scenario: Scenario, requests: Requests) -> tuple[int, int]:
    """From which step and time on a steady window is looked for.

    Of equal requests there from the start: in the middle of the first generation, when prompts are through and none has
    finished. Else when half of the requests have arrived.
    """
    asked = scenario.workload
    if scenario.all_at_once and isinstance(asked, FixedWorkload):
        running = min(asked.num_prompts, scenario.max_num_seqs)
        return running * asked.input_len // scenario.max_num_batched_tokens + asked.output_len // 2, 0
    return 0, int(requests.arrival_ns[len(requests) // 2])


def simulate(
    scenario: Scenario,
    profile: Profile,
    *,
    progress: Callable[[float], None] | None = None,
    status: Callable[[str], None] | None = None,
    base: Path = Path(),
    num_kv_blocks: int | None = None,
    watch: bool = True,
) -> Run:
    """Simulate every schedule of `scenario` at the costs of `profile`.

    `progress` is told the fraction done, and `status` in words at what. A trace's path is relative to `base`;
    `num_kv_blocks` takes the place of what the scenario says of the KV cache's size. Without `watch` there are no spans
    of a steady window, which takes less time. Interrupted by Ctrl-C, what is done is returned and says so: at the
    iteration level also of the schedule that was running.

    Raises:
        InputError: the scenario cannot run on the profile's machine.
        RunError: the profile lacks a loop that the scenario asks for.
    """
    if profile.model != scenario.model:
        raise InputError(None, "profile", f"{profile.name}, measured for {profile.model}", f"one for {scenario.model}")
    check_memory(scenario, profile.device_memory_bytes)
    if num_kv_blocks is None:
        num_kv_blocks = kv_blocks_of(scenario, profile.device_memory_bytes)
    limits, tiles = limits_of(scenario, num_kv_blocks), tile_level_of(scenario, profile)
    repeated: dict[str, list[ScheduleResult]] = {name: [] for name in scenario.schedules}
    windows: dict[str, tuple[Span, ...]] = {}
    served: dict[str, Served] = {}
    total = len(scenario.schedules) * scenario.replications
    if status is not None:
        status("loading the compiled engine (the first time, this takes some seconds)")
    told: str | None = None
    try:
        for number in range(scenario.replications):
            repetition = scenario.model_copy(update={"replication": scenario.replication + number})
            requests = requests_of(repetition, base)
            check_requests(scenario, requests, num_kv_blocks)
            for position, schedule in enumerate(scenario.schedules):
                tell = _scaled(progress, status, number * len(scenario.schedules) + position, total, schedule)
                found = _serve(
                    repetition, profile, schedule, requests, limits, tiles, tell, watch=watch and number == 0
                )
                result = _with_requests(found, scenario, requests.dropped)
                if tell is not None:
                    tell(result.counts["requests"], len(requests), round(result.total_s * 1e9))
                repeated[schedule].append(result)
                if number == 0:
                    windows[schedule], served[schedule] = found.window, found.served
                if result.partial is not None:
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        whole = min(len(each) for each in repeated.values())
        if not any(repeated.values()):
            raise
        if scenario.replications > 1 and whole:  # the same ones of each schedule, all of them whole
            repeated = {name: each[:whole] for name, each in repeated.items()}
            told = f"interrupted after {whole} of {scenario.replications} replications"
        elif missing := [name for name, each in repeated.items() if not each]:
            told = f"interrupted before {', '.join(missing)}"
    results = {name: over_replications(each) for name, each in repeated.items() if each}
    if told is not None:
        results = {name: replace(result, partial=result.partial or told) for name, result in results.items()}
    return Run(
        source="simulated",
        scenario=scenario.model_dump(mode="json"),
        results=with_gains(results),
        windows=windows,
        provenance={"batchsim": __version__, "profile": profile.name, **profile.told},
        served=served,
        slo=slo_of(scenario),
    )


@dataclass(frozen=True, slots=True)
class _Found:
    result: ScheduleResult
    served: Served
    window: tuple[Span, ...]


def _with_requests(found: _Found, scenario: Scenario, dropped: int) -> ScheduleResult:
    """A run's result with the figures of its requests."""
    figures = request_figures(found.served, slo_of(scenario), open_loop=is_open_loop(scenario))
    result = found.result.with_requests(figures)
    warnings = list(result.warnings)
    if dropped:
        warnings.append(f"{dropped:,} requests of the trace have no tokens and were dropped")
    if scenario.warm_up_s and not result.latency_ms.get("ttft"):
        warnings.append(f"no request arrived after warm_up_s = {scenario.warm_up_s:g}: none counts in any latency")
    return replace(result, warnings=tuple(warnings))


def _serve(
    scenario: Scenario, profile: Profile, schedule: str, requests: Requests, limits: Limits, tiles: TileLevel | None,
    tell: Tell | None, *, watch: bool,
) -> _Found:  # fmt: skip
    """One schedule, once. `watch`: keep the spans of a steady window."""
    loop = loop_name(schedule, graphs=scenario.cuda_graphs)
    if loop not in profile.loops:
        raise RunError(f"profile {profile.name} holds no costs for {loop}; it has {', '.join(profile.loops)}")
    costs = [
        ProfileCosts(
            profile,
            schedule,
            graphs=scenario.cuda_graphs,
            host_speed=scenario.host_speed,
            jitter=scenario.jitter,
            seed=scenario.seed,
            replication=scenario.replication,
            replica=replica,
            tiles=tiles,
        )
        for replica in range(limits.replicas)
    ]
    window = Window(*window_of(scenario, requests))
    warm_up_ns = round(scenario.warm_up_s * 1e9)
    if scenario.level == "iteration" and _compiled(scenario, profile, schedule):
        from batchsim.iteration.engine import Iterations, load

        load()
        # A little before the window, to know what reaches into it.
        opens = (max(window.first_step - 2 * WINDOW_STEPS, 0), window.from_ns) if watch else None
        began = time.perf_counter()
        run = Iterations(
            requests, costs, limits, asynchronous=SCHEDULES[schedule] is async_, warm_up_ns=warm_up_ns, window=opens
        )
        whole = run.run(None if tell is None else lambda finished, now: tell(finished, len(requests), now))
        counts, partial = run.counts, None
        if not whole:
            partial = f"interrupted after {counts['requests']:,} of {len(requests):,} requests"
            if not counts["requests"]:
                raise KeyboardInterrupt
        result, served, work = run.totals().result(schedule, counts), run.served(), run.work
        for span in run.spans():
            window(span)
        run.note_extrapolations()
        result = replace(result, partial=partial)
    else:
        began = time.perf_counter()
        told = operate(
            requests, costs, limits, schedule, observe=window if watch else None, host_threads=scenario.host_threads,
            launch_queue_depth=scenario.launch_queue_depth, warm_up_ns=warm_up_ns, tell=tell,
        )  # fmt: skip
        result, served = told.totals.result(schedule, told.counts), told.served
        work = {"iterations": told.iterations, "decisions": told.iterations, "events": told.events}
    engine_s = time.perf_counter() - began
    warnings = [what for each in costs for what in each.extrapolated()]
    if profile.transfer is not None:
        warnings.append(profile.transfer.sentence)
    if schedule == "tile" and tiles is None:
        device = profile.transfer.target if profile.transfer is not None else profile.provenance.get("device")
        warnings.append(f"no tile profile of {device}; its forwards run as under async")
    elif schedule == "tile" and tiles is not None and not tiles.known:
        warnings.append(f"{tiles.profile.name} knows no MLP of {scenario.model}; its forwards run as under async")
    told_once = tuple(dict.fromkeys(f"{schedule}: {what}" for what in warnings))
    result = replace(
        result, engine_s=engine_s, warnings=told_once, iterations=work["iterations"], decisions=work["decisions"],
        events=work["events"],
    )  # fmt: skip
    return _Found(result, served, window.spans())


def _compiled(scenario: Scenario, profile: Profile, schedule: str) -> bool:
    """Whether the iteration level is there and knows such runs: no launch is ever held up by a full queue."""
    if find_spec("numba") is None:
        return False
    launches = profile.kernels.total(1)  # of no batch are there more
    return SCHEDULES[schedule] in (sync, async_) and 2 * (launches + 2) <= scenario.launch_queue_depth


def slo_of(scenario: OfRequests) -> Slo | None:
    """The objectives that a scenario's requests are held to."""
    return None if scenario.slo is None else Slo(**scenario.slo.model_dump())


def is_open_loop(scenario: Scenario) -> bool:
    """Whether requests arrive at times of their own, whatever becomes of those before them."""
    asked = scenario.workload
    return asked.max_concurrency is None and not scenario.all_at_once


def _scaled(
    progress: Callable[[float], None] | None, status: Callable[[str], None] | None, position: int, total: int,
    schedule: str,
) -> Tell | None:  # fmt: skip
    """What one of `total` runs tells of itself, as `progress` and `status` take it."""
    if progress is None and status is None:
        return None

    def tell(finished: int, requests: int, now_ns: int) -> None:
        if status is not None:
            status(f"{schedule}: {finished:,} of {requests:,} requests, {now_ns / 1e9:,.0f} s simulated")
        if progress is not None:
            progress((position + finished / requests) / total)

    return tell


def tile_level_of(scenario: Scenario, profile: Profile) -> TileLevel | None:
    """The tile level of a scenario that has the tile schedule, by the scenario's tile profile or its device's."""
    if "tile" not in scenario.schedules:
        return None
    if profile.transfer is not None and not profile.transfer.same_device:
        return None  # a tile profile is of one device
    if scenario.tile_profile is not None:
        tiles: TileProfile | None = load_tile_profile(scenario.tile_profile, key="tile_profile")
    else:
        tiles = tile_profile_of(str(profile.provenance.get("device")))
    return TileLevel(MODELS[scenario.model], tiles) if tiles is not None else None


def with_gains(results: dict[str, ScheduleResult]) -> dict[str, ScheduleResult]:
    """The results, each with its gain over the sync schedule's throughput where that is among them."""
    base = results["sync"].throughput if "sync" in results else 0.0
    if not base:
        return results
    return {name: replace(result, gain_over_sync=result.throughput / base - 1) for name, result in results.items()}

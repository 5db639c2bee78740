"""Dynamic batching, scenario in, result out: runs each schedule on the simulated machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from batchsim import __version__
from batchsim.answer_figures import with_answers
from batchsim.answered import Answered
from batchsim.costs import ProfileCosts
from batchsim.dynamic_operation import operate
from batchsim.dynamic_scenario import DynamicScenario, batcher_of, check_lengths
from batchsim.engine import WINDOW_STEPS, Window, requests_of, slo_of, with_gains
from batchsim.errors import InputError, RunError
from batchsim.profile import Profile
from batchsim.records import Span
from batchsim.result import Run, ScheduleResult, over_replications
from batchsim.schedules import loop_name
from batchsim.service import TableCosts
from batchsim.workload import Requests

# Batches of each instance in a run in which requests always wait, and those at its start that do not count.
_SATURATED, _STARTING = 256, 16

Costs = Sequence[ProfileCosts] | Sequence[TableCosts]
Tell = Callable[[int, int], None]  # takes requests that have left the server, and the time, nanoseconds


def simulate(
    scenario: DynamicScenario,
    profile: Profile | None,
    *,
    progress: Callable[[float], None] | None = None,
    status: Callable[[str], None] | None = None,
    base: Path = Path(),
) -> Run:
    """Simulate every schedule of `scenario` at the costs of `profile`, or of its own table.

    `progress` is told the fraction done, and `status` in words at what. A trace's path is relative to `base`.
    Interrupted by Ctrl-C, what is done is returned and says so.

    Raises:
        InputError: the scenario cannot run at the profile's costs.
        RunError: the profile lacks a loop that the scenario asks for.
    """
    if scenario.costs is None:
        if profile is None:
            raise InputError(None, "profile", "none", f"one for {scenario.model}")
        if profile.model != scenario.model:
            found = f"{profile.name}, measured for {profile.model}"
            raise InputError(None, "profile", found, f"one for {scenario.model}")
    repeated: dict[str, list[ScheduleResult]] = {name: [] for name in scenario.schedules}
    windows: dict[str, tuple[Span, ...]] = {}
    kept: dict[str, Answered] = {}
    told: str | None = None
    total, done = len(scenario.schedules) * scenario.replications, 0
    try:
        for number in range(scenario.replications):
            repetition = scenario.model_copy(update={"replication": scenario.replication + number})
            requests = requests_of(repetition, base)
            check_lengths(scenario, requests)
            for schedule in scenario.schedules:
                tell = _scaled(progress, status, done, total, len(requests), schedule)
                ran = _serve(repetition, profile, schedule, requests, tell, watch=number == 0)
                repeated[schedule].append(_result(repetition, profile, schedule, requests, ran))
                done += 1
                if progress is not None:
                    progress(done / total)
                if number == 0:
                    windows[schedule], kept[schedule] = ran.window, ran.answered
                if ran.partial is not None:
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        if not any(repeated.values()):
            raise
        whole = min(len(each) for each in repeated.values())
        if scenario.replications > 1 and whole:  # the same ones of each schedule, all of them whole
            repeated = {name: each[:whole] for name, each in repeated.items()}
            told = f"interrupted after {whole} of {scenario.replications} replications"
        elif missing := [name for name, each in repeated.items() if not each]:
            told = f"interrupted before {', '.join(missing)}"
    results = {name: over_replications(each) for name, each in repeated.items() if each}
    if told is not None:
        results = {name: replace(result, partial=result.partial or told) for name, result in results.items()}
    provenance = {"profile": "the scenario's own table"} if profile is None else {
        "profile": profile.name, **profile.told
    }  # fmt: skip
    return Run(
        source="simulated",
        scenario=scenario.model_dump(mode="json"),
        results=with_gains(results),
        windows=windows,
        provenance={"batchsim": __version__, **provenance},
        answered=kept,
        slo=slo_of(scenario),
    )


@dataclass(frozen=True, slots=True)
class _Ran:
    """One schedule, once: its result without the figures of requests, and the tables that these are made from."""

    result: ScheduleResult
    answered: Answered
    window: tuple[Span, ...]
    partial: str | None = None


def _result(
    scenario: DynamicScenario, profile: Profile | None, schedule: str, requests: Requests, ran: _Ran
) -> ScheduleResult:
    breaking = breaking_per_s(scenario, profile, schedule, requests) if scenario.workload.open_loop else None
    result = with_answers(
        ran.result, ran.answered, slo_of(scenario), open_loop=scenario.workload.open_loop, breaking_per_s=breaking
    )
    warnings = list(result.warnings)
    if requests.dropped:
        warnings.append(f"{requests.dropped:,} requests of the trace have no tokens and were dropped")
    if scenario.warm_up_s and not result.latency_ms:
        warnings.append(f"no request arrived after warm_up_s = {scenario.warm_up_s:g}: none counts in any latency")
    return replace(result, warnings=tuple(warnings), partial=ran.partial)


def _serve(
    scenario: DynamicScenario, profile: Profile | None, schedule: str, requests: Requests, tell: Tell | None = None,
    *, watch: bool = False,
) -> _Ran:  # fmt: skip
    """One schedule, once. `watch`: keep the spans of a steady window."""
    costs = _costs(scenario, profile, schedule)
    # A steady window is looked for when half of the requests have arrived.
    window = Window(0, int(requests.arrival_ns[len(requests) // 2]))
    warm_up_ns = round(scenario.warm_up_s * 1e9)
    partial = None
    if _compiled(scenario, profile, schedule):
        from batchsim.iteration.dynamic_engine import DynamicIterations, load

        load()
        began = time.perf_counter()
        opens = (max(window.first_step - 2 * WINDOW_STEPS, 0), window.from_ns) if watch else None
        run = DynamicIterations(scenario, requests, costs, schedule, window=opens)
        if not run.run(tell):
            partial = f"interrupted after {run.left:,} of {len(requests):,} requests"
            if not run.left:
                raise KeyboardInterrupt
        answered, totals, device, work = run.answered(), run.totals(), None, run.work
        for span in run.spans():
            window(span)
        run.note_extrapolations()
    else:
        began = time.perf_counter()
        told = operate(
            batcher_of(scenario, requests), costs, schedule, shared=profile is not None,
            host_threads=scenario.host_threads, launch_queue_depth=scenario.launch_queue_depth, warm_up_ns=warm_up_ns,
            observe=window if watch else None, tell=tell,
        )  # fmt: skip
        answered, totals, device = told.answered, told.totals, told.device
        work = {"iterations": told.iterations, "decisions": told.iterations, "events": told.events}
    engine_s = time.perf_counter() - began
    result = totals.result(schedule, {"requests": int(np.count_nonzero(answered.finished_ns() >= 0))})
    if device is not None:  # hosts are as many as instances, the device is one
        whole = device.result(schedule, {})
        result = replace(
            result, device_busy_fraction=whole.device_busy_fraction, launch_gap_fraction=whole.launch_gap_fraction,
            idle_ns=whole.idle_ns,
        )  # fmt: skip
    found = [what for each in costs for what in each.extrapolated()]
    if profile is not None and profile.transfer is not None:
        found.append(profile.transfer.sentence)
    warnings = dict.fromkeys(f"{schedule}: {what}" for what in found)
    result = replace(
        result, engine_s=engine_s, warnings=tuple(warnings), iterations=work["iterations"],
        decisions=work["decisions"], events=work["events"],
    )  # fmt: skip
    return _Ran(result, answered, window.spans(), partial)


def _costs(scenario: DynamicScenario, profile: Profile | None, schedule: str) -> Costs:
    """The costs of each instance."""
    if scenario.costs is not None:
        table = TableCosts(
            scenario.costs, scenario.max_batch_size, jitter=scenario.jitter, seed=scenario.seed,
            replication=scenario.replication,
        )  # fmt: skip
        return [table] * scenario.instances
    assert profile is not None
    loop = loop_name(schedule, graphs=scenario.cuda_graphs)
    if loop not in profile.loops:
        raise RunError(f"profile {profile.name} holds no costs for {loop}; it has {', '.join(profile.loops)}")
    return [
        ProfileCosts(
            profile, schedule, graphs=scenario.cuda_graphs, host_speed=scenario.host_speed, jitter=scenario.jitter,
            seed=scenario.seed, replication=scenario.replication, replica=instance,
        )
        for instance in range(scenario.instances)
    ]  # fmt: skip


def _compiled(scenario: DynamicScenario, profile: Profile | None, schedule: str) -> bool:
    """Whether the iteration level is there and knows such runs: no launch is ever held up by a full queue."""
    if scenario.level != "iteration" or find_spec("numba") is None:
        return False
    launches = 1 if profile is None else profile.kernels.total(1)  # of no batch are there more
    if 2 * (launches + 2) > scenario.launch_queue_depth:
        return False
    return scenario.instances == 1 or (profile is None and schedule == "sync")


def breaking_per_s(scenario: DynamicScenario, profile: Profile | None, schedule: str, requests: Requests) -> float:
    """Requests a second that are served when requests always wait: more than these make the queue grow, or be shed.

    Of a table that is instances * batch / its mean time; of a profile it is simulated, with all requests there at the
    start.
    """
    most = min(scenario.max_batch_size, scenario.max_queue_size or scenario.max_batch_size)
    fitting = [size for size in scenario.preferred_batch_sizes if size <= most]
    if fitting and not scenario.max_queue_delay_us:  # else the oldest has waited longer than that
        most = max(fitting)
    if profile is None:
        (table, *_) = _costs(scenario, None, schedule)
        assert isinstance(table, TableCosts)
        return scenario.instances * most / float(table.means_ns[most]) * 1e9
    unbounded = scenario.model_copy(
        update={
            "max_batch_size": most, "max_queue_delay_us": 0.0, "preferred_batch_sizes": (), "queue_timeout_us": None,
            "max_queue_size": None, "max_priority_wait_us": None, "warm_up_s": 0.0,
        }
    )  # fmt: skip
    count = _SATURATED * scenario.instances * most
    waiting = replace(
        requests, arrival_ns=np.zeros(count, np.int64), prompt_tokens=np.resize(requests.prompt_tokens, count),
        output_tokens=np.broadcast_to(np.int64(0), count), priority=np.broadcast_to(np.int64(0), count),
    )  # fmt: skip
    batches = _serve(unbounded, profile, schedule, waiting).answered.batches
    finished = np.sort(batches["finished_ns"])
    first = _STARTING * scenario.instances - 1
    served = most * (len(finished) - 1 - first)
    return served / float(finished[-1] - finished[first]) * 1e9


def _scaled(
    progress: Callable[[float], None] | None, status: Callable[[str], None] | None, position: int, total: int,
    requests: int, schedule: str,
) -> Tell | None:  # fmt: skip
    """What one of `total` runs tells of itself, as `progress` and `status` take it."""
    if progress is None and status is None:
        return None

    def tell(left: int, now_ns: int) -> None:
        if status is not None:
            status(f"{schedule}: {left:,} of {requests:,} requests, {now_ns / 1e9:,.0f} s simulated")
        if progress is not None:
            progress((position + left / requests) / total)

    return tell

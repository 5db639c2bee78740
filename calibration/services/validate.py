"""Serve scenarios of dynamic batching for real, and set what was predicted beside what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from batchsim.answer_figures import with_answers
from batchsim.answered import Answered, AnswerLog, answered
from batchsim.dynamic_scenario import DynamicScenario, batcher_of, check_lengths
from batchsim.engine import Window, requests_of, slo_of, with_gains
from batchsim.errors import InputError
from batchsim.metrics import Metrics
from batchsim.profile import Profile
from batchsim.records import Span
from batchsim.result import Run, ScheduleResult
from batchsim.schedules import SCHEDULES
from batchsim.workload import Requests
from calibration.provenance import MACHINE_KEYS, QuietCore, provenance
from calibration.services.bench import Bench, host_speed
from calibration.services.predict import predict
from calibration.services.server import Server

Progress = Callable[[float], None]
WARM_UP_BATCHES = 8


def validate(
    scenario: DynamicScenario, profile: Profile, device: str, *, repeats: int = 3, progress: Progress | None = None,
    bench: Bench | None = None, base: Path = Path(),
) -> tuple[Run, Run]:  # fmt: skip
    """(predicted, measured): serve `scenario` on `device`, and simulate it at the costs of `profile`.

    The profile's host costs are scaled by the speed that the host showed beside the measurement.
    """
    measured = execute(scenario, profile, device, repeats=repeats, progress=progress, bench=bench, base=base)
    return predict(scenario, profile, measured.provenance["host_speed"], base=base), measured


def execute(
    scenario: DynamicScenario, profile: Profile, device: str, *, repeats: int = 3, progress: Progress | None = None,
    bench: Bench | None = None, base: Path = Path(),
) -> Run:  # fmt: skip
    """Serve `scenario` on `device`; requests arrive by the clock, whatever the server does.

    Schedules are interleaved over `repeats`; of each the repeat with the median time from arrival to answer counts. The
    run's provenance holds `host_speed`, the median of the speeds that the host showed before and after the repeats. A
    trace's path is relative to `base`.

    Raises:
        InputError: a scenario that this server cannot run.
        RunError: no such device.
    """
    if scenario.instances > 1:
        raise InputError(None, "instances", f"{scenario.instances}", "1: this server is one instance")
    if scenario.model is None or scenario.model != profile.model:
        raise InputError(None, "model", f"{scenario.model}", f"{profile.model}, which the profile was measured for")
    requests = requests_of(scenario, base)
    check_lengths(scenario, requests)
    bench = bench or Bench(device)
    server = bench.server(scenario, profile, requests)
    length = server.service.length(int(np.median(requests.prompt_tokens)))
    some = _first(requests, WARM_UP_BATCHES * scenario.max_batch_size)
    for schedule in scenario.schedules:
        _serve(server, scenario, schedule, some)
    runs: dict[str, list[_Repeat]] = {name: [] for name in scenario.schedules}
    with QuietCore(move=device == "cuda") as core:
        for repeat in range(repeats):
            for position, schedule in enumerate(scenario.schedules):
                core.settle()
                before = host_speed(server, profile, schedule, graphs=scenario.cuda_graphs, length=length)
                result, window, found = _serve(server, scenario, schedule, requests)
                after = host_speed(server, profile, schedule, graphs=scenario.cuda_graphs, length=length)
                runs[schedule].append(_Repeat(result, window, found, (round(before, 4), round(after, 4))))
                if progress is not None:
                    progress((repeat + (position + 1) / len(scenario.schedules)) / repeats)
    middle = {name: sorted(repeated, key=_Repeat.mean_ms)[len(repeated) // 2] for name, repeated in runs.items()}
    # Rounded as it is stored, so that what is stored gives the same prediction again.
    speed = round(median(speed for repeated in runs.values() for run in repeated for speed in run.host_speeds), 4)
    facts = provenance(device, f"batchsim validate --device {device}") | {
        "host_speed": speed,
        "repeats": {
            name: [{"e2e_ms": run.result.latency_ms.get("e2e"), "host_speeds": run.host_speeds} for run in repeated]
            for name, repeated in runs.items()
        },
    }
    facts["same_machine_as_profile"] = all(facts.get(key) == profile.provenance.get(key) for key in MACHINE_KEYS)
    return Run(
        source="executed",
        scenario=scenario.model_dump(mode="json"),
        results=with_gains({name: run.result for name, run in middle.items()}),
        windows={name: run.window for name, run in middle.items()},
        answered={name: run.answered for name, run in middle.items()},
        slo=slo_of(scenario),
        provenance=facts,
    )


@dataclass(frozen=True, slots=True)
class _Repeat:
    result: ScheduleResult
    window: tuple[Span, ...]
    answered: Answered
    host_speeds: tuple[float, float]

    def mean_ms(self) -> float:
        return self.result.latency_ms.get("e2e", {}).get("mean", 0.0)


def _serve(
    server: Server, scenario: DynamicScenario, schedule: str, requests: Requests
) -> tuple[ScheduleResult, tuple[Span, ...], Answered]:
    """One run of one schedule: its figures, the spans of a steady window, and its tables."""
    batcher = batcher_of(scenario, requests, made=True)
    payloads = [server.payload(number, int(tokens)) for number, tokens in enumerate(requests.prompt_tokens)]
    run = server.run(SCHEDULES[schedule](), batcher, payloads)
    metrics, log = Metrics(), AnswerLog()
    window = Window(0, int(requests.arrival_ns[len(requests) // 2]))
    for batch in run.batches:
        log.scheduled(batch, 0, batcher)
    for span in run.spans:
        metrics(span)
        log(span)
        window(span)
    warm_up_ns = round(scenario.warm_up_s * 1e9)
    found = answered([log], batcher, warm_up_ns=warm_up_ns, total_ns=run.total_ns)
    result = metrics.totals(run.total_ns).result(schedule, {"requests": batcher.finished})
    result = with_answers(result, found, slo_of(scenario), open_loop=scenario.workload.open_loop, breaking_per_s=None)
    return result, window.spans(), found


def _first(requests: Requests, count: int) -> Requests:
    """The first of the requests, all there at the start, to have run everything once."""
    some = slice(0, count)
    return replace(
        requests,
        arrival_ns=np.zeros_like(requests.arrival_ns[some]),
        prompt_tokens=requests.prompt_tokens[some],
        output_tokens=requests.output_tokens[some],
        priority=requests.priority[some],
        hash_starts=requests.hash_starts[: count + 1],
        max_concurrency=None,
        closed=False,
    )

"""Replicas with a device each on cores that they share: a process each, started together, their results as one.

`python -m calibration.hardware.replicas` is one of them. Each line on its standard input is what it is to do next, and
it answers with a line: so all run at the same time what is measured, and alone what tells the host's speed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

from batchsim.engine import limits_of, requests_of
from batchsim.errors import InputError, RunError
from batchsim.metrics import Metrics, Totals
from batchsim.operation import added_totals, stream
from batchsim.result import SCHEMA_VERSION, ScheduleResult
from batchsim.scenario import Scenario, num_kv_blocks
from batchsim.schedules import SCHEDULES
from batchsim.workload import Requests
from calibration.points import profile_of
from calibration.provenance import provenance
from calibration.validate import Bench, host_speed, warm_up_of

if TYPE_CHECKING:
    from calibration.hardware.worker import Job

# From telling all replicas to start until they do.
AHEAD_NS = 50_000_000


def execute_replicas(job: Job) -> Iterator[dict[str, Any]]:
    """The executed points of replicas that share this process's cores, as `calibration.validate.execute` makes them.

    Requests are dealt in turn. Tokens a second are those of all replicas, over the time of the last; host speeds are
    measured while the other replicas rest.

    Raises:
        InputError: there are fewer devices.
        RunError: a replica failed.
    """
    count = job.configuration.replicas
    if job.device == "cuda" and (here := torch.cuda.device_count()) < count:
        raise InputError(None, "replicas", f"{count}, with a device each", f"at most {here}, those that there are")
    members = [_Member(job, number) for number in range(count)]
    try:
        for scenario in job.scenarios.values():
            yield _point(job, scenario, members)
    finally:
        for member in members:
            member.end()


def _point(job: Job, scenario: Scenario, members: Sequence[_Member]) -> dict[str, Any]:
    ready = together(members, {"do": "prepare", "scenario": scenario.model_dump(mode="json")})
    for schedule in scenario.schedules:
        together(members, {"do": "warm_up", "schedule": schedule})
    runs: dict[str, list[tuple[ScheduleResult, list[float]]]] = {name: [] for name in scenario.schedules}
    for _ in range(job.repeats):
        for schedule in scenario.schedules:
            speeds = [member.ask({"do": "speed", "schedule": schedule})["speed"] for member in members]
            start = time.perf_counter_ns() + AHEAD_NS
            done = together(members, {"do": "run", "schedule": schedule, "start_ns": start})
            speeds += [member.ask({"do": "speed", "schedule": schedule})["speed"] for member in members]
            runs[schedule].append((merged(schedule, done), speeds))
    for repeated in runs.values():
        repeated.sort(key=lambda run: -run[0].total_s)
    results = {schedule: repeated[len(repeated) // 2][0] for schedule, repeated in runs.items()}
    facts = dict(ready[0]["facts"])
    facts["host_speed"] = round(median(speed for each in runs.values() for _, speeds in each for speed in speeds), 4)
    facts["repeats"] = {
        schedule: [{"tokens_per_s": round(run.throughput, 1), "host_speeds": speeds} for run, speeds in repeated]
        for schedule, repeated in runs.items()
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "scenario": scenario.model_dump(mode="json"),
        "profile": job.profile(scenario).name,
        "measured": {schedule: result.to_json() for schedule, result in results.items()},
        "provenance": {"measured": facts},
    }


def merged(schedule: str, runs: Sequence[Mapping[str, Any]]) -> ScheduleResult:
    """The result of several replicas that started together: sums, over the time of the one that took longest."""
    totals = [Totals(**{**run["totals"], "steps_ns": np.array(run["totals"]["steps_ns"])}) for run in runs]
    counts = {key: sum(run["counts"][key] for run in runs) for key in runs[0]["counts"]}
    return added_totals(totals, max(each.total_ns for each in totals)).result(schedule, counts)


class _Member:
    """One replica's process; the runner's time limit ends it with all others."""

    def __init__(self, job: Job, number: int) -> None:
        self.number = number
        command = [sys.executable, "-m", "calibration.hardware.replicas"]
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": str(number)} if job.device == "cuda" else {})
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        about = {
            "profiles": None if job.profiles is None else str(job.profiles),
            "device": job.device,
            "number": number,
            "sleeps": job.configuration.crowded,
            "seconds": job.seconds,
        }
        self.tell(about)

    def tell(self, what: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RunError(f"replica {self.number} failed with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, what: Mapping[str, Any]) -> dict[str, Any]:
        self.tell(what)
        return self.hear()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def together(members: Sequence[_Member], what: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The answers of all, who do it at the same time."""
    for member in members:
        member.tell(what)
    return [member.hear() for member in members]


def _serve(orders: IO[str], answers: IO[str]) -> None:
    """Do what is asked, line by line."""
    about = json.loads(orders.readline())
    signal.alarm(about["seconds"])
    bench, profiles = Bench(about["device"], sleeps=about["sleeps"]), about["profiles"]
    served: _Served | None = None
    for line in orders:
        order = json.loads(line)
        answer: dict[str, Any] = {}
        if order["do"] == "prepare":
            served = _Served(bench, order["scenario"], None if profiles is None else Path(profiles), about["number"])
            answer["facts"] = served.facts
        assert served is not None
        if order["do"] == "speed":
            answer["speed"] = round(host_speed(served.executor, served.profile, order["schedule"]), 4)
        elif order["do"] == "warm_up":
            served.run(order["schedule"], warm_up_of(served.requests, len(served.requests)), 0)
        elif order["do"] == "run":
            answer |= served.run(order["schedule"], served.requests, order["start_ns"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class _Served:
    """A scenario, and what one replica needs to serve its part of the requests."""

    def __init__(self, bench: Bench, scenario: Mapping[str, Any], profiles: Path | None, number: int) -> None:
        self.scenario, self.number = Scenario.model_validate(scenario), number
        self.profile = profile_of(self.scenario.profile, profiles)
        self.requests = requests_of(self.scenario)
        self.executor = bench.executor(self.scenario, self.profile, self.requests)
        blocks = num_kv_blocks(self.scenario, self.profile.device_memory_bytes)
        blocks = min(blocks, self.executor.decoder.num_kv_blocks)
        self.limits = limits_of(self.scenario, blocks)
        facts = provenance(bench.device, f"python -m calibration.hardware run --device {bench.device}")
        self.facts = facts | {"num_kv_blocks": blocks}

    def run(self, schedule: str, asked: Requests, start_ns: int) -> dict[str, Any]:
        """Serve this replica's part of what is `asked`, from `start_ns` of the clock on."""
        mine = stream(asked, self.limits, first=self.number, stride=self.scenario.replicas)
        batcher, metrics = self.limits.batcher(mine, asked), Metrics()
        while time.perf_counter_ns() < start_ns:
            pass
        execution = self.executor.run(SCHEDULES[schedule](), batcher, observe=metrics)
        if batcher.unserved:
            raise RunError(f"{schedule}: the run ended with {batcher.unserved} requests not served to their end")
        totals = asdict(metrics.totals(execution.total_ns))
        totals["steps_ns"] = totals["steps_ns"].tolist()
        return {"totals": totals, "counts": batcher.counts}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    _serve(sys.stdin, answers)

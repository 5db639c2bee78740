"""The process that executes one configuration of a list: `python -m calibration.hardware.worker`, started by `run`."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from batchsim.command import outcome
from batchsim.files import write_json
from batchsim.profile import Profile
from batchsim.scenario import Scenario
from calibration.hardware.neighbour import neighbours
from calibration.hardware.points import Configuration, read
from calibration.points import Profiles, profile_of

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class Job:
    """What one process executes, and with which time limit."""

    configuration: Configuration
    scenarios: dict[str, Scenario]
    device: str
    repeats: int
    seconds: int
    profiles: Path | None

    def profile(self, scenario: Scenario) -> Profile:
        return profile_of(scenario.profile, self.profiles)


@app.command()
def main(
    file: Path,
    name: str,
    out: Annotated[Path, typer.Option()],
    device: Annotated[str, typer.Option()] = "cuda",
    repeats: Annotated[int, typer.Option()] = 2,
    seconds: Annotated[int, typer.Option()] = 300,
    only: Annotated[str, typer.Option()] = "",
    profiles: Profiles = None,
) -> None:
    """Execute the points of one configuration that are not in `out` yet, and write each as soon as it is done."""
    signal.alarm(seconds)  # the end of this process, whatever it then hangs in
    with outcome():
        configuration = read(file)[name]
        wanted = missing(configuration, out, only)
        began, cores = time.monotonic(), pin(configuration.cores)
        for point in _execute(Job(configuration, wanted, device, repeats, seconds, profiles)):
            facts = point["provenance"]["measured"]
            facts |= {"configuration": name, "cores_used": cores, "neighbours": configuration.neighbours}
            facts["waits"] = "asleep" if configuration.crowded else "spinning"
            write_json(out / f"{point['scenario']['name']}.json", point)
            told = (f"{name} {each['throughput_tokens_per_s']:,.0f}" for name, each in point["measured"].items())
            typer.echo(
                f"{time.monotonic() - began:5.1f} s {point['scenario']['name']}: tokens/s {', '.join(told)}; "
                f"host speed {facts['host_speed']}"
            )


def missing(configuration: Configuration, out: Path, only: str) -> dict[str, Scenario]:
    """The scenarios whose names start with `only` and that have no point in `out`."""
    scenarios = configuration.scenarios.items()
    return {name: it for name, it in scenarios if name.startswith(only) and not (out / f"{name}.json").exists()}


def pin(cores: int | None) -> int:
    """Keep this process and those that it starts to so many of its cores; how many it then has."""
    if not hasattr(os, "sched_setaffinity"):
        return os.cpu_count() or 1
    here = sorted(os.sched_getaffinity(0))
    if cores is not None:
        here = here[-cores:]  # the first ones serve the interrupts
        os.sched_setaffinity(0, here)
    return len(here)


def on_part(scenario: Scenario) -> Scenario:
    """The scenario on the smallest part of the device at hand that has the multiprocessors asked for."""
    hardware = scenario.hardware
    if hardware is None or hardware.sms is None:
        return scenario
    from calibration.executor.partition import smallest_part

    there = hardware.model_copy(update={"sms": smallest_part(hardware.sms)})
    return scenario.model_copy(update={"hardware": there})


def _execute(job: Job) -> Iterator[dict[str, Any]]:
    """The executed points of a job, one after the other."""
    if job.configuration.replicas > 1:
        from calibration.hardware.replicas import execute_replicas

        yield from execute_replicas(job)
        return
    from batchsim.engine import requests_of
    from calibration.services.predict import measured_json
    from calibration.validate import Bench, execute

    bench = Bench(job.device, sleeps=job.configuration.crowded)
    for asked in job.scenarios.values():
        scenario = on_part(asked)
        profile = job.profile(scenario)
        bench.executor(scenario, profile, requests_of(scenario))  # what is built now needs no quiet
        with neighbours(job.configuration.neighbours, job.seconds):
            run = execute(scenario, profile, job.device, repeats=job.repeats, bench=bench)
        yield measured_json(run, profile)


if __name__ == "__main__":
    sys.exit(app())

"""How fast the simulator is, on one core: `make bench` prints the tables. Nothing here fails for being slow."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from batchsim.costs import ProfileCosts
from batchsim.engine import Window, batcher_of, requests_of, simulate, window_of
from batchsim.machine import SimulatedMachine
from batchsim.metrics import Metrics
from batchsim.profile import KernelCounts, Profile
from batchsim.records import Span
from batchsim.scenario import Scenario
from batchsim.schedules import SCHEDULES
from tests.profiles import scenario, small_profile

REPEATS = 3


def llama_8b(output_len: int, *, cuda_graphs: bool = True) -> Scenario:
    """The headline scenario: 32 requests of 256 prompt tokens."""
    return scenario(
        32, 256, output_len, model="llama-3.1-8b", cuda_graphs=cuda_graphs, max_num_seqs=32, max_num_batched_tokens=8192
    )


def profile_8b() -> Profile:
    """Costs about like those of an H200, with as many kernels as its executor launches."""
    return small_profile("llama-3.1-8b", kernels=KernelCounts(first=1, layers=32, per_layer=9, last=3, split_rows=32))


def run(what: Scenario, profile: Profile, schedule: str) -> tuple[float, int, int]:
    """(seconds, steps, simulation events) of one schedule, metrics and window included."""
    costs = ProfileCosts(profile, schedule, graphs=what.cuda_graphs)
    requests = requests_of(what)
    metrics, window, batcher = Metrics(), Window(*window_of(what, requests)), batcher_of(what, requests)

    def observe(span: Span) -> None:
        metrics(span)
        window(span)

    machine = SimulatedMachine(batcher, costs, observe)
    start = time.perf_counter()
    total_ns = machine.run(SCHEDULES[schedule]())
    seconds = time.perf_counter() - start
    events = next(machine.env._eid)  # SimPy numbers its events
    return seconds, metrics.result(schedule, total_ns, batcher).counts["steps"], events


def peak_mb(output_len: int, cuda_graphs: bool) -> float:
    """The most memory that a process holds which simulates both schedules, interpreter and libraries included."""
    work = f"print(bench.simulated_peak_mb({output_len}, {cuda_graphs}))"
    command = [sys.executable, "-c", f"import tests.benchmarks.bench_simulator as bench; {work}"]
    return float(subprocess.run(command, capture_output=True, check=True).stdout)


def simulated_peak_mb(output_len: int, cuda_graphs: bool) -> float:
    """Simulate, and say how much memory this process held at most."""
    simulate(llama_8b(output_len, cuda_graphs=cuda_graphs), profile_8b())
    status = Path("/proc/self/status").read_text(encoding="ascii")  # getrusage would tell of the parent's peak too
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1e3


def test_simulated_steps_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(
        "launches", "tokens", "schedule", "seconds", "steps/s", "events/s", "us/step", "events/step", "peak MB"
    )
    for output_len, cuda_graphs in ((8192, True), (256, False)):
        what = llama_8b(output_len, cuda_graphs=cuda_graphs)
        peak = f"{peak_mb(output_len, cuda_graphs):.0f}"
        for schedule in SCHEDULES:
            seconds, steps, events = min(run(what, profile_8b(), schedule) for _ in range(REPEATS))
            table.add_row(
                "graphs" if cuda_graphs else "324 kernels", f"256 + {output_len:,}", schedule, f"{seconds:.3f}",
                f"{steps / seconds:,.0f}", f"{events / seconds:,.0f}", f"{seconds / steps * 1e6:.1f}",
                f"{events / steps:.1f}", peak,
            )  # fmt: skip
    with capsys.disabled():
        Console(width=120).print("\n8B, batch 32; peak: of a process that runs both schedules", table)


def test_time_grows_with_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("output tokens", "seconds, both schedules", "us/step", "peak MB")
    for output_len in (256, 512, 1024, 2048, 4096, 8192):
        what, profile = llama_8b(output_len), profile_8b()
        runs = [[run(what, profile, schedule) for schedule in SCHEDULES] for _ in range(REPEATS)]
        seconds, steps = min((sum(r[0] for r in both), sum(r[1] for r in both)) for both in runs)
        peak = peak_mb(output_len, True)
        table.add_row(f"{output_len:,}", f"{seconds:.3f}", f"{seconds / steps * 1e6:.1f}", f"{peak:.0f}")
    with capsys.disabled():
        Console(width=120).print("\nGrowth with the output: 8B, batch 32, graphs", table)

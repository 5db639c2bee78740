"""How fast requests are simulated at the iteration level: `make bench` prints the table. Nothing fails for being slow.

The scenario is `scenarios/serving_512_128.yaml`: requests of 512 + 128 tokens, batches of up to 128, sync, metrics on.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest
from rich.console import Console
from rich.table import Table

from batchsim.engine import simulate
from batchsim.profile import load_profile
from batchsim.result import ScheduleResult
from batchsim.scenario import load

FILE = Path(__file__).parents[2] / "scenarios" / "serving_512_128.yaml"
REPEATS = 3

# Values put over the file's; in brackets what was aimed at, seconds.
CASES = {
    "1,000 at 5/s [0.03]": ["workload.num_prompts=1000"],
    "10,000 at 5/s [0.25]": ["workload.num_prompts=10000"],
    "10,000 at 40/s [0.25]": ["workload.num_prompts=10000", "workload.request_rate=40"],
    "100,000 at 5/s [2.5]": ["workload.num_prompts=100000"],
    "32 x (128 + 8,000) at once [0.01]": [
        "workload.num_prompts=32", "workload.request_rate=null", "workload.input_len=128", "workload.output_len=8000",
    ],
    "100,000 at 40/s": ["workload.num_prompts=100000", "workload.request_rate=40"],
    "1,000,000 at 40/s [25]": ["workload.num_prompts=1000000", "workload.request_rate=40"],
}  # fmt: skip


def run(sets: list[str]) -> ScheduleResult:
    """One simulation of the synchronous schedule."""
    scenario = load(FILE, sets)
    return simulate(scenario, load_profile(scenario.profile)).results["sync"]


def peak_gb(sets: list[str]) -> float:
    """The most memory that a process of its own holds which runs this."""
    code = (
        f"import tests.benchmarks.bench_serving as bench; bench.run({sets!r})\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    return int(done.stdout) / 1e6


def test_serving(capsys: pytest.CaptureFixture[str]) -> None:
    run(CASES["1,000 at 5/s [0.03]"])  # loads the compiled engine
    table = Table("requests", "engine, s", "iterations", "M iterations/s", "events", "decisions", "M decisions/s")
    seconds: dict[str, float] = {}
    for name, sets in CASES.items():
        best = min((run(sets) for _ in range(REPEATS)), key=lambda result: result.engine_s or math.inf)
        took = seconds[name] = best.engine_s or math.inf
        iterations, decisions = best.iterations or 0, best.decisions or 0
        table.add_row(
            name, f"{took:.4f}", f"{iterations:,}", f"{iterations / took / 1e6:.2f}", f"{best.events:,}",
            f"{decisions:,}", f"{decisions / took / 1e6:.2f}",
        )  # fmt: skip
    growth = math.log(seconds["1,000,000 at 40/s [25]"] / seconds["10,000 at 40/s [0.25]"]) / math.log(100)
    command = [sys.executable, "-m", "batchsim", "run", str(FILE)]
    cold = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        cold.append(time.perf_counter() - start)
    with capsys.disabled():
        console = Console(width=120)
        console.print(table)
        console.print(f"growth from 10,000 to 1,000,000 at 40/s: exponent {growth:.3f} [1.05]")
        console.print(f"memory of 1,000,000: {peak_gb(CASES['1,000,000 at 40/s [25]']):.2f} GB [1.5]")
        console.print(f"whole command, 1,000 at 5/s: {median(cold):.2f} s [1.5]")

"""How fast dynamic batching is simulated: `make bench` prints the table. Nothing fails for being slow.

A table's server at three times what it can serve, with a bounded queue; and a million customers of M/M/1.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from batchsim.dynamic import simulate
from batchsim.result import ScheduleResult
from tests.dynamic import scenario

OVERLOAD = {"max_batch_size": 8, "workload.request_rate": 4_100.0, "max_queue_size": 100}
# In brackets what was aimed at, seconds of the whole simulation.
CASES: dict[str, dict[str, Any]] = {
    "M/M/1, 1,000,000 [1]": {
        "costs": {"kind": "table", "batch_ms": {1: {"dist": "expon", "scale": 5.0}}}, "max_batch_size": 1,
        "workload.request_rate": 100.0, "workload.num_prompts": 1_000_000,
    },
    "3x capacity, 1,000,000": OVERLOAD | {"workload.num_prompts": 1_000_000},
    "3x capacity, 10,000,000 [60]": OVERLOAD | {"workload.num_prompts": 10_000_000},
    "the same, batches of 1": OVERLOAD
    | {"max_batch_size": 1, "workload.request_rate": 572.0, "workload.num_prompts": 10_000_000},
}  # fmt: skip


def run(name: str) -> ScheduleResult:
    """One simulation of the synchronous schedule."""
    return simulate(scenario(CASES[name]), None).results["sync"]


def alone(name: str) -> tuple[float, float]:
    """(seconds, GB) of a process of its own: the simulation, once the engine is loaded, and its peak of memory."""
    code = (
        "import time, tests.benchmarks.bench_dynamic as bench\n"
        "bench.simulate(bench.scenario(), None)\n"
        f"start = time.perf_counter(); bench.run({name!r}); print(time.perf_counter() - start)\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    seconds, peak_kb = done.stdout.split()
    return float(seconds), int(peak_kb) / 1e6


def test_dynamic(capsys: pytest.CaptureFixture[str]) -> None:
    simulate(scenario(), None)  # loads the compiled engine
    table = Table("arrivals", "whole, s", "engine, s", "batches", "M batches/s", "peak, GB")
    for name in CASES:
        result = run(name)
        assert result.outcomes["arrivals"] == sum(n for key, n in result.outcomes.items() if key != "arrivals")
        seconds, peak = alone(name)
        engine_s, batches = result.engine_s or 0.0, result.iterations or 0
        table.add_row(
            name, f"{seconds:.2f}", f"{engine_s:.2f}", f"{batches:,}", f"{batches / engine_s / 1e6:.2f}", f"{peak:.2f}"
        )
    with capsys.disabled():
        Console(width=120).print(table)

"""How fast sweeps are, and what killing them does: `make bench` prints the table. Nothing fails for being slow.

`python -m tests.benchmarks.bench_sweep --kills 50` kills a sweep at as many random moments, resumes it, and compares.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.console import Console
from rich.table import Table

from batchsim.sweep.run import usual_draws
from tests.sweeps import ROOT, contents, server_sweep, serving_sweep, started, written

POINTS = int(os.environ.get("BATCHSIM_BENCH_POINTS", "1000"))


class Took(NamedTuple):
    wall_s: float
    cpu_s: float


def timed(file: Path, *options: str) -> Took:
    """One `batchsim sweep` by its clock and by the CPU time of all its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    command = [sys.executable, "-m", "batchsim", "sweep", str(file), *options]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Took(wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)


def test_sweep(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = written(tmp_path / "sweep.yaml", serving_sweep(POINTS))
    table = Table(f"{POINTS:,} points of 1,000 requests [180]", "wall, s", "CPU, s")
    took = {}
    for workers, draws in ((1, usual_draws()), (2, usual_draws()), (2, 0)):
        out = tmp_path / f"{workers}_{draws}"
        took[workers, draws] = timed(file, "--out", str(out), "--workers", str(workers), "--draws", str(draws))
        wall, cpu = took[workers, draws]
        table.add_row(f"{workers} worker{'s' * (workers > 1)}, {draws} draws", f"{wall:.1f}", f"{cpu:.1f}")
    again = timed(file, "--out", str(out), "--workers", "2", "--draws", "0")
    table.add_row("all of it done before", f"{again.wall_s:.1f}", f"{again.cpu_s:.1f}")
    faster = took[1, usual_draws()].wall_s / took[2, usual_draws()].wall_s
    with capsys.disabled():
        console = Console(width=100)
        console.print(table)
        console.print(f"two workers: {faster:.2f} times as fast as one [1.8]")


def killed(times: int, seed: int, points: int = 240) -> int:
    """How many of so many sweeps, killed at a random moment and started again, end with other bytes."""
    draw = random.Random(seed)
    different = 0
    with tempfile.TemporaryDirectory() as place:
        file = written(Path(place) / "sweep.yaml", server_sweep(points))
        start = time.perf_counter()
        started(file, Path(place) / "whole", "--workers", "2").communicate()
        took, whole = time.perf_counter() - start, contents(Path(place) / "whole")
        for number in range(times):
            out = Path(place) / str(number)
            process = started(file, out, "--workers", "2")
            moment = draw.uniform(0, took)
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.kill()
            process.communicate()
            done = len(list((out / "points").glob("*.json"))) if out.exists() else 0
            started(file, out, "--workers", "2").communicate()
            same = contents(out) == whole
            different += not same
            told = {"kill": number, "after_s": round(moment, 2), "done": done, "of": points, "same": same}
            print(json.dumps(told), flush=True)  # noqa: T201
    return different


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    sys.exit(killed(asked.kills, asked.seed) > 0)

"""Sweeps to run, to kill and to compare."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
SCENARIOS = ROOT / "scenarios"

# A server known by its times: a point takes milliseconds.
SERVER = {
    "kind": "dynamic",
    "name": "a server",
    "costs": {"kind": "table", "batch_ms": {1: 4.0, 4: {"p10": 4.4, "p50": 4.6, "p99": 9.3}, 16: 12.2}},
    "workload": {"kind": "fixed", "num_prompts": 200, "request_rate": 200},
    "max_batch_size": 8,
}
# 1,000 requests of 512 + 128 tokens on an H200; 8B, sync.
SERVING = "serving_512_128.yaml"


def server_sweep(points: int = 24) -> dict[str, Any]:
    """Rates and delays of the server; `points` is a multiple of 4."""
    rates = {"start": 100, "stop": 100 + 10 * (points // 4 - 1), "step": 10}
    grid = {"workload.request_rate": rates, "max_queue_delay_us": [0, 1000], "max_batch_size": [4, 8]}
    return {"kind": "sweep", "name": "a server", "scenario": SERVER, "grid": grid}


def serving_sweep(points: int = 1000) -> dict[str, Any]:
    """Rates and limits of batches of 1,000 requests; `points` is a multiple of 4."""
    grid = {
        "workload.num_prompts": [1000],
        "workload.request_rate": {"start": 2, "stop": 2 + 0.08 * (points // 4 - 1), "step": 0.08},
        "max_num_seqs": [16, 32, 64, 128],
    }
    return {"kind": "sweep", "name": "rates and batches", "scenario": str(SCENARIOS / SERVING), "grid": grid}


def written(path: Path, sweep: dict[str, Any]) -> Path:
    """The file of a sweep."""
    path.write_text(yaml.safe_dump(sweep, sort_keys=False), encoding="utf-8")
    return path


def started(file: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    """`batchsim sweep` in a process of its own."""
    command = [sys.executable, "-m", "batchsim", "sweep", str(file), "--out", str(out), "--draws", "0", *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder and below, by their paths."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

"""Where a measurement comes from, and how fast its host is."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from typing import Any, Self

import numpy as np
import torch

from batchsim import __version__

# The facts of `provenance` that tell one machine from another.
MACHINE_KEYS = ("device", "driver", "host_cpu", "host_cores")


def provenance(device: str, command: str) -> dict[str, Any]:
    """Device, driver, library versions, host, date and command; no paths and no host names."""
    facts: dict[str, Any] = {
        "batchsim": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "host_cpu": _cpu_model(),
        "host_cores": os.cpu_count(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": command,
    }
    if device == "cuda":
        import triton

        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
        }
    else:
        facts["device"] = "cpu"
    return facts


def host_yardstick_ns(repeats: int = 100) -> float:
    """Median time of a fixed piece of interpreter and numpy work, nanoseconds.

    The work is of the kind that a serving loop's host phases consist of; the ratio of two hosts' yardsticks
    estimates the ratio of their phases.
    """
    values = np.arange(256, dtype=np.int32)
    samples = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        table: dict[int, tuple[int, int]] = {}
        for i in range(400):
            table[i] = (i, i + 1)
        total = sum(a + b for a, b in table.values())
        for _ in range(20):
            values = (values + total) % 1000
        samples.append(time.perf_counter_ns() - start)
    return float(np.median(samples))


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


class QuietCore:
    """Keeps the calling thread on a core that other programs leave alone, and puts it back at the end.

    Virtual cores share physical ones with other tenants: the same work takes up to twice as long for seconds at a
    time on one core, and not on another.
    """

    WORSE = 1.1

    def __init__(self, *, move: bool = True) -> None:
        """With `move` off, or where the system lets no program choose, the thread stays where it is."""
        self._move = move and hasattr(os, "sched_setaffinity")
        self._cores = sorted(os.sched_getaffinity(0)) if self._move else []
        self.best_ns = host_yardstick_ns()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._move:
            os.sched_setaffinity(0, self._cores)

    def settle(self) -> None:
        """Move to a quiet core if this one is not."""
        now = host_yardstick_ns(5)
        if self._move and now > self.WORSE * self.best_ns:
            found = []
            for core in self._cores:
                os.sched_setaffinity(0, {core})
                found.append((host_yardstick_ns(5), core))
            now, core = min(found)
            os.sched_setaffinity(0, {core})
        self.best_ns = min(self.best_ns, now)

"""A busy neighbour: a program that keeps a core and the memory at work.

`python -m calibration.hardware.neighbour SECONDS`. It ends by itself when its time is over or its parent has gone.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from batchsim.errors import RunError

# More than the caches hold.
ARRAY_BYTES = 64 << 20
READY, READY_S = b"ready\n", 60


@contextmanager
def neighbours(count: int, seconds: float) -> Iterator[None]:
    """So many neighbours at work, on the cores that this process may use, for `seconds` at most.

    Raises:
        RunError: one did not start.
    """
    started: list[subprocess.Popen[bytes]] = []
    try:
        command = [sys.executable, "-m", "calibration.hardware.neighbour", f"{seconds:.0f}"]
        for _ in range(count):
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE))  # noqa: PERF401 (kept for the end)
        deadline = time.monotonic() + READY_S
        for process in started:
            assert process.stdout is not None
            readable, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not readable or process.stdout.readline() != READY:
                raise RunError("a neighbour did not start")
        yield
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def work(seconds: float) -> None:
    """Copy arrays and make objects until the time is over."""
    parent, end = os.getppid(), time.monotonic() + seconds
    ours = np.zeros(ARRAY_BYTES // 8)
    other = np.ones_like(ours)
    told = False
    while time.monotonic() < end and os.getppid() == parent:
        np.copyto(ours, other)
        data = ours[: 1 << 16].tobytes()
        table = {i: data[i : i + 8] for i in range(20_000)}
        other[: len(table)] += 1
        if not told:
            sys.stdout.buffer.write(READY)
            sys.stdout.flush()
            told = True


if __name__ == "__main__":
    work(float(sys.argv[1]))

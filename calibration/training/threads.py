"""Autograd launches backward passes from a thread of its own, which must be where the calling thread is."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def follow() -> None:
    """Let all threads of this process run on the cores on which the calling one may."""
    tasks = Path("/proc/self/task")
    if not hasattr(os, "sched_setaffinity") or not tasks.is_dir():
        return
    cores = os.sched_getaffinity(0)
    for task in tasks.iterdir():
        with suppress(OSError):  # a thread that has ended meanwhile
            os.sched_setaffinity(int(task.name), cores)

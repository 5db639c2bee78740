"""Programs for a machine. Read `sync.py` and `async_.py` side by side: their difference is asynchronous batching."""

from __future__ import annotations

from batchsim.operations import ProgramFactory
from batchsim.schedules.async_ import async_
from batchsim.schedules.sync import sync

SCHEDULES: dict[str, ProgramFactory] = {"sync": sync, "async": async_}


def loop_name(schedule: str, *, graphs: bool) -> str:
    """What profiles call the loop of a schedule with CUDA graphs or kernel by kernel: `sync/graph`, `async/eager`."""
    return f"{schedule}/{'graph' if graphs else 'eager'}"

"""Programs for a machine. Read `sync.py` and `async_.py` side by side: their difference is asynchronous batching.

`tile` is `async` with a forward whose dependent kernels overlap tile by tile.
"""

from __future__ import annotations

from batchsim.operations import ProgramFactory
from batchsim.schedules.async_ import async_
from batchsim.schedules.sync import sync
from batchsim.schedules.tile import tile

SCHEDULES: dict[str, ProgramFactory] = {"sync": sync, "async": async_, "tile": tile}

# Schedules whose host does what another's does, and whose loop is measured as that one's.
SAME_HOST = {"tile": "async"}
# The loops that are measured.
LOOPS = tuple(schedule for schedule in SCHEDULES if schedule not in SAME_HOST)


def loop_name(schedule: str, *, graphs: bool) -> str:
    """What profiles call the loop of a schedule with CUDA graphs or kernel by kernel: `sync/graph`, `async/eager`."""
    return f"{SAME_HOST.get(schedule, schedule)}/{'graph' if graphs else 'eager'}"

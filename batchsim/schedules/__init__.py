"""Programs for a machine. Read `sync.py` and `async_.py` side by side: their difference is asynchronous batching."""

from __future__ import annotations

from batchsim.operations import ProgramFactory
from batchsim.schedules.async_ import async_
from batchsim.schedules.sync import sync

SCHEDULES: dict[str, ProgramFactory] = {"sync": sync, "async": async_}

"""Programs for training. Read `train_sync.py` and `train_async.py` side by side: their difference is prefetching."""

from __future__ import annotations

from batchsim.schedules.train_async import train_async
from batchsim.schedules.train_sync import train_sync
from batchsim.training_operations import TrainingProgramFactory

TRAINING_SCHEDULES: dict[str, TrainingProgramFactory] = {"sync": train_sync, "async": train_async}

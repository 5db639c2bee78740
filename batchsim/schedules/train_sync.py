"""A plain training loop: every micro-batch is prepared when the loss of the one before has been read."""

from batchsim.operations import Record
from batchsim.training_operations import (
    Backward, CopyIn, Forward, NextMicroBatch, OptimizerStep, Prepare, ReadLoss, Synchronize, TrainingProgram,
)  # fmt: skip


def train_sync() -> TrainingProgram:
    """One micro-batch in flight, one stream, one pair of buffers."""
    while micro := (yield NextMicroBatch()):
        yield Prepare(micro, slot=0)
        yield CopyIn(micro, slot=0, stream="compute")
        yield Forward(micro, slot=0)
        yield Backward(micro)
        if micro.last:
            yield OptimizerStep(micro)
        yield Record("done", stream="compute")
        yield Synchronize("done", micro)
        yield ReadLoss(micro)

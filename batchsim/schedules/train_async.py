"""Prefetching: the host prepares, copies and launches micro-batch N+1 while the device computes micro-batch N."""

from batchsim.operations import Record, StreamWait
from batchsim.training_operations import (
    Backward, CopyIn, Forward, NextMicroBatch, OptimizerStep, Prepare, ReadLoss, Synchronize, TrainingProgram,
)  # fmt: skip


def train_async() -> TrainingProgram:
    """Two micro-batches in flight, two streams, two pairs of buffers in turn; losses are read one micro-batch late."""
    previous, slot = None, 0
    while (micro := (yield NextMicroBatch())) or previous:
        if micro:
            yield Prepare(micro, slot)
            yield CopyIn(micro, slot, stream="copy_in")
            yield Record(f"copied in {slot}", stream="copy_in")
            yield StreamWait("compute", f"copied in {slot}")
            yield Forward(micro, slot)
            yield Backward(micro)
            if micro.last:
                yield OptimizerStep(micro)
            yield Record(f"done {slot}", stream="compute")
        if previous:
            yield Synchronize(f"done {1 - slot}", previous)
            yield ReadLoss(previous)
        previous, slot = micro, 1 - slot

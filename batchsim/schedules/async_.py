"""Asynchronous batching: the host prepares and queues batch N+1 while the device computes batch N."""

from batchsim.operations import (
    BuildInputs, CopyIn, CopyOut, Forward, KernelSync, Program, Record, Schedule, StreamWait, Synchronize, Update,
)  # fmt: skip


def async_(kernels: KernelSync = "stream") -> Program:
    """Two batches in flight, three streams, two pairs of buffers in turn; results are read one step late."""
    previous, slot = None, 0
    while (batch := (yield Schedule())) or previous:
        if batch:
            yield BuildInputs(batch, slot, previous)
            yield CopyIn(batch, slot, stream="copy_in")
            yield Record(f"copied in {slot}", stream="copy_in")
            yield StreamWait("compute", f"copied in {slot}")
            yield Forward(batch, slot, kernels)
            yield Record(f"computed {slot}", stream="compute")
            yield StreamWait("copy_out", f"computed {slot}")
            yield CopyOut(batch, slot, stream="copy_out")
            yield Record(f"done {slot}", stream="copy_out")
        if previous:
            yield Synchronize(f"done {1 - slot}", previous)
            yield Update(previous)
        previous, slot = batch, 1 - slot

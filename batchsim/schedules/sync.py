"""Synchronous batching: the device idles while the host reads one batch and prepares the next."""

from batchsim.operations import (
    BuildInputs, CopyIn, CopyOut, Forward, Program, Record, Schedule, Synchronize, Update,
)  # fmt: skip


def sync() -> Program:
    """One batch in flight, one stream, one pair of buffers."""
    while batch := (yield Schedule()):
        yield BuildInputs(batch, slot=0)
        yield CopyIn(batch, slot=0, stream="compute")
        yield Forward(batch, slot=0)
        yield CopyOut(batch, slot=0, stream="compute")
        yield Record("done", stream="compute")
        yield Synchronize("done", batch)
        yield Update(batch)

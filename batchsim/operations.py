"""The operations that a schedule yields, and that a machine, simulated or real, carries out.

An operation is pure data. `phase` names the host work that carrying it out costs; profiles, records and reports
all use these names.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from batchsim.batching.batch import AnyBatch

Stream = Literal["compute", "copy_in", "copy_out"]
KernelSync = Literal["stream", "tile"]

HOST_PHASES = (
    "schedule", "build_inputs", "copy_in", "launch", "copy_out", "record", "stream_wait", "wait", "update",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Schedule:
    """Ask the batcher for the next batch; the machine answers with it, or with None when none is left."""

    phase: ClassVar[str] = "schedule"


@dataclass(frozen=True, slots=True)
class BuildInputs:
    """Write the batch's inputs into the pinned host buffer of `slot`.

    `previous` is the batch whose results the host has not read yet: tokens that it samples are carried over on
    the device, from their rows there to their rows here.
    """

    phase: ClassVar[str] = "build_inputs"
    batch: AnyBatch
    slot: int
    previous: AnyBatch | None = None


@dataclass(frozen=True, slots=True)
class CopyIn:
    """Copy the inputs of `slot` to the device, in order on `stream`."""

    phase: ClassVar[str] = "copy_in"
    batch: AnyBatch
    slot: int
    stream: Stream


@dataclass(frozen=True, slots=True)
class Forward:
    """Launch the forward pass and the sampling of `batch` on the compute stream, as a graph or kernel by kernel.

    `kernels`: whether a kernel starts when the one before it has ended (stream), or its tiles when the tiles that they
    read are written, wherever the tile level finds that faster (tile).
    """

    phase: ClassVar[str] = "launch"
    batch: AnyBatch
    slot: int
    kernels: KernelSync = "stream"


@dataclass(frozen=True, slots=True)
class CopyOut:
    """Copy the sampled tokens of `slot` to the host, in order on `stream`."""

    phase: ClassVar[str] = "copy_out"
    batch: AnyBatch
    slot: int
    stream: Stream


@dataclass(frozen=True, slots=True)
class Record:
    """Record `event` on `stream`: it completes when all that was enqueued there before has."""

    phase: ClassVar[str] = "record"
    event: str
    stream: Stream


@dataclass(frozen=True, slots=True)
class StreamWait:
    """Make `stream` wait for the latest recording of `event`; the host goes on."""

    phase: ClassVar[str] = "stream_wait"
    stream: Stream
    event: str


@dataclass(frozen=True, slots=True)
class Synchronize:
    """Block the host until the latest recording of `event` completes; `batch` is the one whose results it brings."""

    phase: ClassVar[str] = "wait"
    event: str
    batch: AnyBatch


@dataclass(frozen=True, slots=True)
class Update:
    """Read the tokens of `batch` and tell the batcher."""

    phase: ClassVar[str] = "update"
    batch: AnyBatch


Operation = Schedule | BuildInputs | CopyIn | Forward | CopyOut | Record | StreamWait | Synchronize | Update

# What a machine sends back is the batch for Schedule and None for all others.
Program = Generator[Operation, Any, None]
ProgramFactory = Callable[[], Program]

"""The operations that a training schedule yields, beside `Record` and `StreamWait` of serving.

As there, an operation is pure data, and `phase` names the host work that carrying it out costs. A backward pass is
launched by a thread of autograd's own while the one that called it waits: one after the other, they are one host.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar

from batchsim.batching.accumulation import MicroBatch
from batchsim.operations import Record, Stream, StreamWait

# The device's stages of training, by the host phase that launches each.
LAUNCHED = {"launch_forward": "forward", "launch_backward": "backward", "launch_optimizer": "optimizer"}


@dataclass(frozen=True, slots=True)
class NextMicroBatch:
    """The machine answers with the next micro-batch, or with None when there is none left."""

    phase: ClassVar[str] = "schedule"


@dataclass(frozen=True, slots=True)
class Prepare:
    """Collate the micro-batch's sequences into the pinned host buffer of `slot`, and whatever their data costs."""

    phase: ClassVar[str] = "prepare"
    micro: MicroBatch
    slot: int


@dataclass(frozen=True, slots=True)
class CopyIn:
    """Copy the tokens of `slot` to the device, in order on `stream`."""

    phase: ClassVar[str] = "copy_in"
    micro: MicroBatch
    slot: int
    stream: Stream


@dataclass(frozen=True, slots=True)
class Forward:
    """Launch the forward pass and the loss on the compute stream, kernel by kernel."""

    phase: ClassVar[str] = "launch_forward"
    micro: MicroBatch
    slot: int


@dataclass(frozen=True, slots=True)
class Backward:
    """Launch the backward pass: gradients are written by a step's first micro-batch, added to by later ones."""

    phase: ClassVar[str] = "launch_backward"
    micro: MicroBatch


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """Launch the optimiser and free the gradients."""

    phase: ClassVar[str] = "launch_optimizer"
    micro: MicroBatch


@dataclass(frozen=True, slots=True)
class Synchronize:
    """Block the host until the latest recording of `event` completes, which ends `micro` on the device."""

    phase: ClassVar[str] = "wait"
    event: str
    micro: MicroBatch


@dataclass(frozen=True, slots=True)
class ReadLoss:
    """Read the loss of `micro`; that of a step's last micro-batch ends the step."""

    phase: ClassVar[str] = "read_loss"
    micro: MicroBatch


TrainingOperation = (
    NextMicroBatch
    | Prepare
    | CopyIn
    | Forward
    | Backward
    | OptimizerStep
    | Record
    | StreamWait
    | Synchronize
    | ReadLoss
)

# What a machine sends back is the micro-batch for NextMicroBatch and None for all others.
TrainingProgram = Generator[TrainingOperation, Any, None]
TrainingProgramFactory = Callable[[], TrainingProgram]

"""Measured costs of training one model on one machine: read, check, interpolate.

As a profile of serving, it is measured by the calibrator and never typed in: it holds the cells as they were measured,
what was fitted to them, how far the fits are off, and where all of it comes from.

A micro-batch has four parts, told apart on the host and on the device: the embedding and the `layers`, the `head`
(norm, LM head and loss), the `head_backward`, and the `layers_backward`, which ends with the embedding's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from batchsim.profile import Measured, Positive, Rising, line, parsed
from batchsim.shipped import read_profile

PARTS = ("layers", "head", "head_backward", "layers_backward")


class HostFit(Measured):
    """Host time of a part, nanoseconds: the mean, times a ratio drawn each time from measured ones of mean 1.

    `later_ns` is what a step's second and later micro-batches take more. Samples beyond the outlier bound take no part;
    they are counted, with their total.
    """

    ns: NonNegativeFloat
    later_ns: FiniteFloat = 0.0
    ratios: list[NonNegativeFloat] = Field([1.0], min_length=1)
    samples: PositiveInt = 1
    outliers: NonNegativeInt = 0
    outlier_ns: NonNegativeFloat = 0.0

    @property
    def mean_ratio(self) -> float:
        return sum(self.ratios) / len(self.ratios)

    def at(self, *, first: bool) -> float:
        """Nanoseconds, without the ratio."""
        return self.ns if first else max(self.ns + self.later_ns, 0.0)


class Launches(Measured):
    """Host side of a part: kernels and other commands launched, by a step's first micro-batch and by later ones."""

    first: PositiveInt
    later: PositiveInt
    host: HostFit


class TokenFit(Measured):
    """Host time that grows with the data, nanoseconds: of a call, of each sequence and of each token in it."""

    call_ns: NonNegativeFloat
    sequence_ns: NonNegativeFloat = 0.0
    token_ns: NonNegativeFloat = 0.0
    ratios: list[NonNegativeFloat] = Field([1.0], min_length=1)

    def at(self, sequences: int, sequence_length: int) -> float:
        """Nanoseconds, without the ratio."""
        return self.call_ns + sequences * (self.sequence_ns + self.token_ns * sequence_length)


class Curve(Measured):
    """Device time of a part of a micro-batch: `ns` at so many `tokens`, and attention's share.

    `ns` is without what attention makes a token of a longer sequence cost more than one of the shortest measured:
    `token_ns` nanoseconds each, by `sequence_length`. Piecewise linear in both, the end segments going on.
    """

    tokens: Rising
    ns: list[NonNegativeFloat]
    sequence_length: Rising | None = None
    token_ns: list[FiniteFloat] = Field([])

    @model_validator(mode="after")
    def _paired(self) -> Self:
        for xs, ys in ((self.tokens, self.ns), (self.sequence_length or [], self.token_ns)):
            if len(xs) != len(ys):
                raise ValueError(f"{len(xs)} points have {len(ys)} times")
        return self

    def at(self, tokens: int, sequence_length: int) -> float:
        """Nanoseconds of a micro-batch of `tokens` in sequences of `sequence_length`."""
        return max(line(tokens, self.tokens, self.ns) + tokens * self.attention_ns(sequence_length), 0.0)

    def attention_ns(self, sequence_length: int) -> float:
        """What a token costs more in sequences of this length."""
        return line(sequence_length, self.sequence_length, self.token_ns) if self.sequence_length else 0.0


class OptimizerFit(Measured):
    """An optimiser's step: the host works, launches `launches` kernels, and frees the gradients (`zero_grad`)."""

    launches: PositiveInt
    host: HostFit
    zero_grad: HostFit
    device_ns: Positive


class PrecisionFit(Measured):
    """Everything that depends on the precision.

    `host` by checkpointing (`none`, `full`) and part. A forward pass that begins on an idle device has spent `lead` of
    the host's time for its layers before the device falls behind: its first kernels are shorter than their launches. On
    the device a layer that is computed anew takes `recompute`
    times what its forward does; later micro-batches add their gradients, `accumulate_ns` more by part.
    """

    host: dict[str, dict[str, Launches]]
    lead: Annotated[float, Field(ge=0, le=1)] = 0.0
    device: dict[str, Curve]
    recompute: NonNegativeFloat
    accumulate_ns: dict[str, NonNegativeFloat]
    optimizers: dict[str, OptimizerFit]
    residuals: dict[str, FiniteFloat]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for found in (set(self.device), *(set(table) for table in self.host.values())):
            if missing := set(PARTS) - found:
                raise ValueError(f"parts lack {', '.join(sorted(missing))}")
        return self


class TrainingProfile(Measured):
    """Everything measured for training one model on one machine.

    `overlaps` says whether the device computes while the host goes on; on a CPU a launch is the computation itself.
    `round_trip_ns`: from the launch of a kernel on an idle device to the host's waking up, beside the launch call's and
    the kernel's own time. `calls` are host times of single calls, by phase.
    """

    schema_version: Literal[1]
    kind: Literal["training_profile"]
    name: str
    model: str
    provenance: dict[str, Any]
    device_memory_bytes: int
    overlaps: bool
    layers: PositiveInt
    prepare: TokenFit
    copy_in_device: TokenFit
    calls: dict[str, HostFit]
    round_trip_ns: NonNegativeFloat
    precisions: dict[str, PrecisionFit]
    cells: list[dict[str, Any]]


def load_training_profile(name: str, base: Path | None = None) -> TrainingProfile:
    """Read a shipped profile of training by name, or any by the path of its JSON, relative to `base`.

    Raises:
        InputError: no such profile, or a file that is not one.
    """
    wanted = "a file that `batchsim calibrate --training` wrote"
    text, source = read_profile(name, base or Path(), "training", what="training profile", wanted=wanted)
    return parsed(TrainingProfile, text, source)

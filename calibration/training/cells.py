"""The cells of a calibration of training: which micro-batches are measured, and what for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from calibration.training.trainer import Checkpointing, Optimizer, Precision

# host: the host's time of every part, the device waiting for it. device: the device's, in steps one after the other as
# training makes them. optimizer: one optimiser's, both.
Purpose = Literal["host", "device", "optimizer"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One shape of micro-batch that is measured; an optimiser step accumulates `accumulation_steps` of them."""

    purpose: Purpose
    precision: Precision
    micro_batch: int
    sequence_length: int
    checkpointing: Checkpointing = "none"
    accumulation_steps: int = 2
    optimizer: Optimizer = "adamw"

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.sequence_length

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Grid:
    """Sizes to measure: micro-batches of `tokens` in sequences of `base_length`, or one of all where they are fewer.

    `uneven` shapes, (micro_batch, sequence_length), come between: numbers of tokens that no large power of two divides
    are slower, and most users' are such. At `length_tokens` also sequences of other `lengths`; checkpointed at
    `full_tokens`. The host's times are measured at `host_length`, one sequence at a time. A cell takes about `seconds`
    a round.
    """

    tokens: tuple[int, ...]
    base_length: int
    lengths: tuple[int, ...]
    length_tokens: int
    full_tokens: tuple[int, ...]
    host_length: int
    seconds: float
    uneven: tuple[tuple[int, int], ...] = ()

    def cells(self, precision: Precision) -> list[Cell]:
        """Every cell of a precision, the small ones first."""
        found = [
            Cell("host", precision, 1, self.host_length, checkpointing, 4) for checkpointing in ("none", "full")
        ]  # fmt: skip
        found += [Cell("optimizer", precision, 1, self.host_length, "none", 1, kind) for kind in _OPTIMIZERS]
        shapes = [(*self._shape(tokens), "none") for tokens in self.tokens]
        shapes += [(*self._shape(tokens), "full") for tokens in self.full_tokens]
        shapes += [(self.length_tokens // length, length, "none") for length in self.lengths]
        shapes += [(*shape, "none") for shape in self.uneven]
        distinct = sorted(set(shapes), key=lambda shape: (shape[0] * shape[1], shape))
        return found + [Cell("device", precision, *shape) for shape in distinct]  # type: ignore[arg-type]

    def _shape(self, tokens: int) -> tuple[int, int]:
        """(micro_batch, sequence_length)"""
        length = next(n for n in (self.base_length, self.base_length // 2, tokens) if tokens % n == 0)
        return tokens // length, length


_OPTIMIZERS: tuple[Optimizer, ...] = ("sgd", "momentum", "adamw")

# Tokens lie close where waves of thread blocks make times uneven.
GPU = Grid(
    tokens=(
        128, 256, 512, 768, 1024, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192, 10240, 12288, 16384,
        20480, 24576, 32768, 49152, 65536,
    ),
    base_length=512,
    lengths=(128, 256, 512, 1024, 2048, 4096, 8192),
    length_tokens=8192,
    full_tokens=(2048, 8192, 16384, 32768, 49152, 65536),
    host_length=128,
    seconds=0.35,
    uneven=(
        (2, 576), (2, 832), (3, 704), (4, 704), (5, 832), (7, 832), (9, 832), (11, 960), (13, 1088), (23, 832),
    ),
)  # fmt: skip
CPU = Grid(
    tokens=(32, 64, 128, 256),
    base_length=32,
    lengths=(16, 32, 64),
    length_tokens=128,
    full_tokens=(64, 256),
    host_length=16,
    seconds=0.02,
)

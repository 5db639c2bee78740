"""Gradient accumulation: optimiser steps as sequences of micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """`sequences` of `sequence_length` tokens, the `position`-th of the `of` micro-batches of optimiser step `step`.

    `index` counts over all steps.
    """

    index: int
    step: int
    position: int
    of: int
    sequences: int
    sequence_length: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.sequence_length

    @property
    def first(self) -> bool:
        """Whether its gradients are the step's first: kept as they come, where later ones are added."""
        return self.position == 0

    @property
    def last(self) -> bool:
        """Whether the optimiser step follows it."""
        return self.position == self.of - 1


def micro_batches(steps: int, accumulation_steps: int, sequences: int, sequence_length: int) -> Iterator[MicroBatch]:
    """All of `steps` optimiser steps, in order."""
    for index in range(steps * accumulation_steps):
        step, position = divmod(index, accumulation_steps)
        yield MicroBatch(index, step, position, accumulation_steps, sequences, sequence_length)


def divisors(number: int) -> list[int]:
    """The sizes into which so many can be divided evenly, the smallest first."""
    small = [i for i in range(1, int(number**0.5) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})

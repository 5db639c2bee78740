"""A loop, a pair of them, and the pair that most models need: the same stages, synchronously and asynchronously."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from calibration.pairs.lab import Array, Downloads, Lab, Uploads

_NOTHING: AbstractContextManager[Any] = nullcontext()


class Loop(ABC):
    """A user's loop. `outputs` has what its host made of each step's results: equal in the loops of a pair."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.outputs: list[Any] = []
        self.phase: Callable[[str], AbstractContextManager[Any]] = lambda _: _NOTHING

    @abstractmethod
    def step(self, step: int) -> None:
        """One step; steps are numbered from 0, without gaps."""

    def finish(self) -> None:
        """Read what is still on its way; the next step may follow."""
        self.lab.synchronize()


class Late(Loop):
    """A loop that reads each step's results after it has launched the next one."""

    pending: int | None = None

    def step(self, step: int) -> None:
        self.launch(step)
        self._read()
        self.pending = step

    def finish(self) -> None:
        self._read()
        super().finish()

    def _read(self) -> None:
        if self.pending is not None:
            self.read(self.pending)
            self.pending = None

    @abstractmethod
    def launch(self, step: int) -> None:
        """Prepare `step` and queue its work."""

    @abstractmethod
    def read(self, step: int) -> None:
        """Wait for the results of `step` and use them."""


class Stages(ABC):
    """What many loops do in a step: prepare inputs, run a model, use its results.

    `shape` and `dtype` are those of the inputs.
    """

    shape: Sequence[int]
    dtype: torch.dtype

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    @abstractmethod
    def prepare(self, step: int, out: Array) -> None:
        """Write the inputs of `step`, which depend on nothing but its number."""

    @abstractmethod
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Launch the model."""

    @abstractmethod
    def use(self, result: Array) -> Any:
        """What the host makes of the results, told in a few numbers."""


class Sync(Loop):
    """The stages as one writes them first: pageable memory, and every step waits for its results."""

    def __init__(self, stages: Stages) -> None:
        super().__init__(stages.lab)
        self.stages = stages
        self.numpy_dtype = torch.empty(0, dtype=stages.dtype).numpy().dtype

    def step(self, step: int) -> None:
        with self.phase("prepare"):
            array = np.empty(self.stages.shape, self.numpy_dtype)
            self.stages.prepare(step, array)
        with self.phase("to_device"):
            inputs = torch.from_numpy(array).to(self.lab.device)
        with self.phase("forward"):
            result = self.stages.forward(inputs)
        with self.phase("to_host"):
            values = result.cpu().numpy()
        with self.phase("use"):
            self.outputs.append(self.stages.use(values))


class Async(Late):
    """The same stages: pinned buffers, a stream for each direction, results read a step late."""

    def __init__(self, stages: Stages) -> None:
        super().__init__(stages.lab)
        self.stages = stages
        self.uploads, self.downloads = Uploads(self.lab, stages.shape, stages.dtype), Downloads(self.lab)

    def launch(self, step: int) -> None:
        with self.phase("prepare"):
            self.stages.prepare(step, self.uploads.buffer(step))
        with self.phase("to_device"):
            inputs = self.uploads.send(step)
        with self.phase("forward"):
            result = self.stages.forward(inputs)
        with self.phase("to_host"):
            self.downloads.send(step, result)

    def read(self, step: int) -> None:
        with self.phase("wait"):
            values = self.downloads.read(step)
        with self.phase("use"):
            self.outputs.append(self.stages.use(values))


Annotation = Literal["steps", "own", "none", "record"]
Outlook = Literal["gains", "nothing", "loses"]


@dataclass(frozen=True)
class Pair:
    """A loop and its asynchronous twin.

    `outlook` is what asynchrony gave on an H200, in medians over five rounds: `nothing` is less than 1.5% of the
    synchronous step, either way. A step time is the mean over `period` steps, where steps differ by turns. `annotation`
    says how the traces mark their steps: ProfilerStep#, annotations of the loop's own, nothing at all, or as
    `calibration.record` does.
    """

    name: str
    description: str
    outlook: Outlook
    sync: Callable[[Lab], Loop]
    twin: Callable[[Lab], Loop]
    annotation: Annotation = "steps"
    period: int = 1


def staged(
    name: str, description: str, outlook: Outlook, stages: Callable[[Lab], Stages],
    annotation: Annotation = "steps", period: int = 1,
) -> Pair:  # fmt: skip
    """The pair of `Sync` and `Async` around `stages`."""
    return Pair(
        name, description, outlook, lambda lab: Sync(stages(lab)), lambda lab: Async(stages(lab)), annotation, period
    )

"""Stages whose inputs, or whose results, are several arrays; the synchronous loop around them and its twin."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from calibration.pairs.lab import Array, Lab
from calibration.pairs.loop import Annotation, Late, Loop, Outlook, Pair

Tensors = tuple[torch.Tensor, ...]


class Parts(ABC):
    """What a step does: prepare the arrays of its inputs, run a model, use the arrays of its results.

    `inputs` has the shape and type of each input.
    """

    inputs: Sequence[tuple[Sequence[int], torch.dtype]]

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def arrays(self) -> list[Array]:
        """New arrays for the inputs."""
        return [np.empty(shape, torch.empty(0, dtype=dtype).numpy().dtype) for shape, dtype in self.inputs]

    @abstractmethod
    def prepare(self, step: int, outs: Sequence[Array]) -> None:
        """Write the inputs of `step`, which depend on nothing but its number."""

    @abstractmethod
    def forward(self, *inputs: torch.Tensor) -> Tensors:
        """Launch the model."""

    def converted(self, result: torch.Tensor) -> torch.Tensor:
        """A result in the form that the host wants, made on the device."""
        return result

    @abstractmethod
    def use(self, *results: Any) -> Any:
        """What the host makes of the results, told in a few numbers."""


class SyncParts(Loop):
    """One blocking copy for each input and each result."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.lab)
        self.parts = parts

    def step(self, step: int) -> None:
        with self.phase("prepare"):
            arrays = self.parts.arrays()
            self.parts.prepare(step, arrays)
        with self.phase("to_device"):
            inputs = [torch.from_numpy(array).to(self.lab.device) for array in arrays]
        with self.phase("forward"):
            results = self.parts.forward(*inputs)
        with self.phase("to_host"):
            values = self.fetch(results)
        with self.phase("use"):
            self.outputs.append(self.parts.use(*values))

    def fetch(self, results: Tensors) -> list[Any]:
        return [self.parts.converted(result).cpu().numpy() for result in results]


class SyncLists(SyncParts):
    """Results become lists of Python's at once."""

    def fetch(self, results: Tensors) -> list[Any]:
        return [self.parts.converted(result).tolist() for result in results]


class PartUploads:
    """Two sets of pinned buffers and of their twins on the device, each set sent as one.

    As with `Uploads`, each step's results must have been read before the step after the next begins.
    """

    def __init__(self, lab: Lab, inputs: Sequence[tuple[Sequence[int], torch.dtype]]) -> None:
        self._lab, self._stream = lab, lab.stream()
        self._hosts = [[lab.pinned(*one) for one in inputs] for _ in range(2)]
        self._arrays = [[host.numpy() for host in hosts] for hosts in self._hosts]
        self._twins = [[lab.zeros(*shape, dtype=dtype) for shape, dtype in inputs] for _ in range(2)]
        self._events = [lab.event() for _ in range(2)]

    def buffers(self, step: int) -> list[Array]:
        return self._arrays[step % 2]

    def send(self, step: int) -> list[torch.Tensor]:
        """The inputs of `step` on the device, for which the current stream waits."""
        slot = step % 2
        with self._lab.on(self._stream):
            for twin, host in zip(self._twins[slot], self._hosts[slot], strict=True):
                twin.copy_(host, non_blocking=True)
            self._events[slot].record()
        self._events[slot].wait()
        return self._twins[slot]


class PartDownloads:
    """Two sets of pinned buffers for results, which come on a stream of their own by way of copies on the device."""

    def __init__(self, lab: Lab) -> None:
        self._lab, self._stream = lab, lab.stream()
        self._staged: list[list[torch.Tensor]] = []
        self._hosts: list[list[torch.Tensor]] = []
        self._ready, self._events = [lab.event() for _ in range(2)], [lab.event() for _ in range(2)]

    def send(self, step: int, results: Sequence[torch.Tensor]) -> None:
        """Start to bring `results`, which may be overwritten by what follows in the current stream."""
        slot = step % 2
        if not self._hosts:
            self._staged = [[torch.empty_like(result) for result in results] for _ in range(2)]
            self._hosts = [[self._lab.pinned(result.shape, result.dtype) for result in results] for _ in range(2)]
        for staged, result in zip(self._staged[slot], results, strict=True):
            staged.copy_(result)
        self._ready[slot].record()
        with self._lab.on(self._stream):
            self._ready[slot].wait()
            for host, staged in zip(self._hosts[slot], self._staged[slot], strict=True):
                host.copy_(staged, non_blocking=True)
            self._events[slot].record()

    def read(self, step: int) -> list[Array]:
        """The results of `step`, for which the host waits; good until two steps later."""
        slot = step % 2
        self._events[slot].synchronize()
        return [host.numpy() for host in self._hosts[slot]]


class AsyncParts(Late):
    """Pinned buffers, a stream and one event for each direction, results read a step late."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.lab)
        self.parts = parts
        self.uploads, self.downloads = PartUploads(self.lab, parts.inputs), PartDownloads(self.lab)

    def launch(self, step: int) -> None:
        with self.phase("prepare"):
            self.parts.prepare(step, self.uploads.buffers(step))
        with self.phase("to_device"):
            inputs = self.uploads.send(step)
        with self.phase("forward"):
            results = self.parts.forward(*inputs)
        with self.phase("to_host"):
            self.downloads.send(step, [self.parts.converted(result) for result in results])

    def read(self, step: int) -> None:
        with self.phase("wait"):
            values = self.listed(self.downloads.read(step))
        with self.phase("use"):
            self.outputs.append(self.parts.use(*values))

    def listed(self, values: list[Array]) -> list[Any]:
        return values


class AsyncLists(AsyncParts):
    """Results become lists of Python's, as in `SyncLists`."""

    def listed(self, values: list[Array]) -> list[Any]:
        return [value.tolist() for value in values]


def in_parts(
    name: str, description: str, outlook: Outlook, parts: Callable[[Lab], Parts], annotation: Annotation,
    *, lists: bool = False,
) -> Pair:  # fmt: skip
    """The pair around `parts`, whose results the host takes as arrays or as `lists`."""
    sync, twin = (SyncLists, AsyncLists) if lists else (SyncParts, AsyncParts)
    return Pair(name, description, outlook, lambda lab: sync(parts(lab)), lambda lab: twin(parts(lab)), annotation)

"""Loops that wait in other ways than `Sync`, or that have asynchrony in them already."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calibration.pairs.dependent import Queued
from calibration.pairs.lab import Array
from calibration.pairs.loop import Loop, Stages
from calibration.pairs.parts import Parts


class Rotated(Queued):
    """Waits for each step at the start of the next one: a synchronous loop that begins elsewhere in its circle."""

    def step(self, step: int) -> None:
        self._read()
        self.launch(step)
        self.pending = step


class Polling(Queued):
    """Asks an event, over and over, whether the step has ended."""

    def step(self, step: int) -> None:
        self.launch(step)
        with self.phase("poll"):
            while not self.done[step % 2].query():
                pass
        self.read(step)


class Thorough(Queued):
    """Synchronises three times in a row before it touches results: the event, the stream and then the device."""

    def step(self, step: int) -> None:
        self.launch(step)
        with self.phase("wait"):
            self.done[step % 2].synchronize()
            if self.lab.on_gpu:
                torch.cuda.current_stream().synchronize()
            self.lab.synchronize()
        self.read(step)


class Prefetched(Queued):
    """Prepares the next step's inputs while the device works, and then waits."""

    prepared = -1

    def step(self, step: int) -> None:
        if self.prepared < step:
            self._prepare(step)
        with self.phase("forward"):
            result = self.stages.forward(self.hosts[step % 2].to(self.lab.device, non_blocking=True))
        self._prepare(step + 1)
        with self.phase("to_host"):
            values = result.cpu().numpy()
        with self.phase("use"):
            self.outputs.append(self.stages.use(values))

    def _prepare(self, step: int) -> None:
        with self.phase("prepare"):
            self.stages.prepare(step, self.hosts[step % 2].numpy())
        self.prepared = step


class TwoLate(Loop):
    """Reads each step's results after it has launched the two that follow: pinned buffers, a stream for copies."""

    SLOTS = 3

    def __init__(self, stages: Stages) -> None:
        super().__init__(stages.lab)
        self.stages, lab = stages, stages.lab
        self.copies = lab.stream()
        self.hosts = [lab.pinned(stages.shape, stages.dtype) for _ in range(self.SLOTS)]
        self.twins = [lab.zeros(*stages.shape, dtype=stages.dtype) for _ in range(self.SLOTS)]
        self.results: list[torch.Tensor] = []
        self.sent, self.done = ([lab.event() for _ in range(self.SLOTS)] for _ in range(2))
        self.pending: list[int] = []

    def step(self, step: int) -> None:
        slot = step % self.SLOTS
        with self.phase("prepare"):
            self.stages.prepare(step, self.hosts[slot].numpy())
        with self.phase("to_device"), self.lab.on(self.copies):
            self.twins[slot].copy_(self.hosts[slot], non_blocking=True)
            self.sent[slot].record()
        with self.phase("forward"):
            self.sent[slot].wait()
            result = self.stages.forward(self.twins[slot])
        if not self.results:
            self.results = [self.lab.pinned(result.shape, result.dtype) for _ in range(self.SLOTS)]
        with self.phase("to_host"):
            self.results[slot].copy_(result, non_blocking=True)
            self.done[slot].record()
        self.pending.append(step)
        if len(self.pending) == self.SLOTS:
            self._read()

    def finish(self) -> None:
        while self.pending:
            self._read()
        super().finish()

    def _read(self) -> None:
        slot = self.pending.pop(0) % self.SLOTS
        with self.phase("wait"):
            self.done[slot].synchronize()
        with self.phase("use"):
            self.outputs.append(self.stages.use(self.results[slot].numpy()))


class PinnedPieces(Loop):
    """Pinned memory and copies that do not block, but one set of each and a wait in every step."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.lab)
        self.parts = parts
        self.hosts = [self.lab.pinned(*one) for one in parts.inputs]
        self.arrays: Sequence[Array] = [host.numpy() for host in self.hosts]
        self.results: list[torch.Tensor] = []

    def step(self, step: int) -> None:
        with self.phase("prepare"):
            self.parts.prepare(step, self.arrays)
        with self.phase("to_device"):
            inputs = [host.to(self.lab.device, non_blocking=True) for host in self.hosts]
        with self.phase("forward"):
            results = self.parts.forward(*inputs)
        if not self.results:
            self.results = [self.lab.pinned(result.shape, result.dtype) for result in results]
        with self.phase("to_host"):
            for mine, result in zip(self.results, results, strict=True):
                mine.copy_(result, non_blocking=True)
            self.lab.synchronize()
        with self.phase("use"):
            self.outputs.append(self.parts.use(*(result.numpy() for result in self.results)))

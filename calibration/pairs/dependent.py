"""Loops of which something goes against asynchrony, or which need other loops than the usual two."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from calibration.pairs.host_work import turns
from calibration.pairs.lab import Array, Lab
from calibration.pairs.loop import Async, Stages, Sync
from calibration.pairs.models import Mlp
from calibration.pairs.pipelines import Scores


class ValueMidway(Scores):
    """A value read midway decides which half of the model comes next."""

    def __init__(self, lab: Lab, **shape: int) -> None:
        super().__init__(lab, **shape)
        layers = lab.size(shape["layers"], 2)
        self.likely, self.unlikely = Mlp(lab, self.width, layers), Mlp(lab, self.width, layers)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = self.model(self.base + inputs.to(self.lab.dtype))
        chosen = self.likely if x[0, 0].item() > 0 else self.unlikely
        return chosen(x).mean(0).float()


class RowsMidway(Scores):
    """How many rows go on is known midway only, and the host has to know it."""

    def __init__(self, lab: Lab, **shape: int) -> None:
        super().__init__(lab, **shape)
        self.rest = Mlp(lab, self.width, 2 * lab.size(shape["layers"], 1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = self.model(self.base + inputs.to(self.lab.dtype))
        good = x[:, 0] > -0.5
        good[0] = True
        kept = x[good.nonzero().squeeze(1)]
        return self.rest(kept).mean(0).float()


class HostFeedback(Scores):
    """Each step's inputs are made of the results of the one before, by Python."""

    last = np.zeros(1, np.float32)

    def prepare(self, step: int, out: Array) -> None:
        turn = turns(self.care, int(self.last.argmax()) + step)
        out[:] = np.roll(np.linspace(-1, 1, self.width, dtype=np.float32), turn % self.width)

    def use(self, result: Array) -> Any:
        self.last = result.copy()
        return super().use(result)


class InOrder(Async):
    """The machinery of the asynchronous loop, in the order of the synchronous one."""

    def step(self, step: int) -> None:
        self.launch(step)
        self.read(step)


class Queued(Async):
    """One stream, pinned buffers, results read a step late."""

    def __init__(self, stages: Stages) -> None:
        super().__init__(stages)
        lab = self.lab
        self.hosts = [lab.pinned(stages.shape, stages.dtype) for _ in range(2)]
        self.results: list[torch.Tensor] = []
        self.done = [lab.event() for _ in range(2)]

    def launch(self, step: int) -> None:
        with self.phase("prepare"):
            self.stages.prepare(step, self.hosts[step % 2].numpy())
        with self.phase("forward"):
            inputs = self.hosts[step % 2].to(self.lab.device, non_blocking=True)
            result = self.stages.forward(inputs)
        if not self.results:
            self.results = [self.lab.pinned(result.shape, result.dtype) for _ in range(2)]
        with self.phase("to_host"):
            self.results[step % 2].copy_(result, non_blocking=True)
            self.done[step % 2].record()

    def read(self, step: int) -> None:
        with self.phase("wait"):
            self.done[step % 2].synchronize()
        with self.phase("use"):
            self.outputs.append(self.stages.use(self.results[step % 2].numpy()))


class Careful(Sync):
    """Synchronises after everything, as code does that wants to time its parts."""

    def step(self, step: int) -> None:
        lab = self.lab
        with self.phase("prepare"):
            array = np.empty(self.stages.shape, self.numpy_dtype)
            self.stages.prepare(step, array)
        with self.phase("to_device"):
            inputs = torch.from_numpy(array).to(lab.device)
            lab.synchronize()
        with self.phase("forward"):
            result = self.stages.forward(inputs)
            lab.synchronize()
        with self.phase("to_host"):
            values = result.cpu().numpy()
            lab.synchronize()
        with self.phase("use"):
            self.outputs.append(self.stages.use(values))


class Fields(Scores):
    """Inputs are many short lists."""

    dtype = torch.int64

    def __init__(self, lab: Lab, *, fields: int, length: int, **shape: int) -> None:
        super().__init__(lab, **shape)
        self.shape = (fields, length)
        self.table = lab.weights(1000, self.width)

    def prepare(self, step: int, out: Array) -> None:
        for field, values in enumerate(self.lists(step)):
            out[field] = values

    def lists(self, step: int) -> list[list[int]]:
        fields, length = self.shape
        return [[(field * 31 + i * i + step) % 1000 for i in range(length)] for field in range(fields)]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(self.table[inputs].mean((0, 1)))


class ListByList(Sync):
    """Every list becomes a tensor on the device by itself."""

    def step(self, step: int) -> None:
        stages = self.stages
        assert isinstance(stages, Fields)
        with self.phase("prepare"):
            lists = stages.lists(step)
        with self.phase("to_device"):
            inputs = torch.stack([torch.tensor(values, device=self.lab.device) for values in lists])
        with self.phase("forward"):
            result = stages.forward(inputs)
        with self.phase("to_host"):
            values = result.cpu().numpy()
        with self.phase("use"):
            self.outputs.append(stages.use(values))

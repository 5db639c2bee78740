"""Series, filters and volumes: recurrent networks, small batched matrices, sums along axes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its customary name

from calibration.pairs.lab import Array, Lab, digest
from calibration.pairs.loop import Stages


class Sensors(Stages):
    """Series of sensors, resampled by numpy, through an LSTM; Python looks for alarms in what it says."""

    dtype = torch.float32

    def __init__(self, lab: Lab, *, batch: int, length: int, width: int) -> None:
        super().__init__(lab)
        batch, self.length, width = lab.size(batch, 2), lab.size(length, 8), lab.size(width, 8)
        self.shape = (batch, self.length, 32)
        self.raw = np.random.default_rng(3).standard_normal((batch, 4 * self.length, 32)).astype(np.float32)
        self.kind = torch.float16 if lab.on_gpu else torch.float32
        self.lstm = torch.nn.LSTM(32, width, num_layers=2, batch_first=True).to(lab.device, self.kind)
        for parameter in self.lstm.parameters():
            fan_in = parameter.shape[1:] or (1,)
            parameter.requires_grad_(False).copy_(lab.weights(*fan_in, len(parameter)).T.squeeze(1))
        self.lstm.flatten_parameters()
        self.head = lab.weights(width, 64).to(self.kind)

    def prepare(self, step: int, out: Array) -> None:
        at = np.linspace(step % 16, 3 * self.length, self.length)
        below = at.astype(np.int64)
        part = (at - below).astype(np.float32)[:, None]
        np.multiply(self.raw[:, below], 1 - part, out=out)
        out += self.raw[:, below + 1] * part

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(inputs.to(self.kind))
        found: torch.Tensor = (states @ self.head).float().amax(1)
        return found

    def use(self, result: Array) -> Any:
        alarms: dict[int, list[float]] = {}
        for series in result.tolist():
            for channel, value in enumerate(series):
                if value > 0.01:
                    alarms.setdefault(channel, []).append(round(value, 2))
        return digest(result), len(alarms)


class Kalman(Stages):
    """Thousands of Kalman filters of their own state, advanced by readings that Python parses out of text."""

    dtype = torch.float32

    def __init__(self, lab: Lab, *, filters: int, size: int, readings: int) -> None:
        super().__init__(lab)
        filters, self.width, readings = lab.size(filters, 8), lab.size(size, 4), lab.size(readings, 4)
        self.shape = (3, readings)
        self.repeats = filters // readings
        values = np.random.default_rng(4).standard_normal((32, readings)).round(4)
        self.lines = [";".join(map(str, row)) for row in values.tolist()]
        self.motion = (torch.eye(self.width, device=lab.device) * 0.97).expand(filters, -1, -1).contiguous()
        self.looks = [lab.weights(filters, self.width, 1).float() for _ in range(3)]
        self.state = lab.zeros(filters, self.width, 1, dtype=torch.float32)
        self.spread = torch.eye(self.width, device=lab.device).expand(filters, -1, -1).contiguous()

    def prepare(self, step: int, out: Array) -> None:
        for row in range(3):
            out[row] = [float(value) for value in self.lines[(step * 3 + row) % 32].split(";")]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.state = torch.bmm(self.motion, self.state)
        spread = torch.bmm(torch.bmm(self.motion, self.spread), self.motion) + 0.01
        for look, reading in zip(self.looks, inputs.repeat_interleave(self.repeats, 1), strict=True):
            across = torch.bmm(spread, look)
            gain = across / ((look * across).sum(1, keepdim=True) + 0.5)
            self.state = self.state + gain * (reading[:, None, None] - (look * self.state).sum(1, keepdim=True))
            spread = spread - torch.bmm(gain, across.transpose(1, 2))
        self.spread = spread
        return self.state[:, 0, 0] + spread.diagonal(dim1=1, dim2=2).mean(1)

    def use(self, result: Array) -> Any:
        return digest(result)


class Unrolled(Stages):
    """A recurrent cell written out by hand in small operations, in a Python loop over time."""

    dtype = torch.float32

    def __init__(self, lab: Lab, *, length: int) -> None:
        super().__init__(lab)
        self.shape = (lab.size(length, 3), 16, 64)
        self.into, self.over = lab.weights(64, 256).float(), lab.weights(64, 256).float()
        self.series = np.random.default_rng(5).standard_normal((64 + self.shape[0], 16, 64)).astype(np.float32)

    def prepare(self, step: int, out: Array) -> None:
        out[:] = self.series[step % 64 :][: len(out)]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = cell = torch.zeros_like(inputs[0])
        for x in inputs:
            let_in, forget, out, new = (x @ self.into + hidden @ self.over).chunk(4, 1)
            cell = torch.sigmoid(forget) * cell + torch.sigmoid(let_in) * torch.tanh(new)
            hidden = torch.sigmoid(out) * torch.tanh(cell)
        return hidden

    def use(self, result: Array) -> Any:
        return digest(result)


class Volumes(Stages):
    """A large volume goes over in pageable memory; box filters by sums along its axes."""

    dtype = torch.float32

    def __init__(self, lab: Lab, *, passes: int) -> None:
        super().__init__(lab)
        self.shape = (lab.size(96, 4), lab.size(256, 8), lab.size(256, 8))
        self.passes = lab.size(passes, 2)
        self.scan = np.random.default_rng(6).random(self.shape, dtype=np.float32)

    def prepare(self, step: int, out: Array) -> None:
        np.multiply(self.scan, np.float32(0.5 + step % 11 / 16), out=out)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = inputs
        for _ in range(self.passes):
            for axis in range(3):
                x = x.cumsum(axis).mul_(0.05).sin_()
            x = F.avg_pool3d(x[None], 3, stride=1, padding=1)[0] + inputs
        return torch.cat([x.mean((1, 2)), x.amax((0, 1))])

    def use(self, result: Array) -> Any:
        return digest(result)

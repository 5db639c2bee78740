"""Products of whole numbers, kernels written in Triton, an iterative solver, long scans, arrays in pieces."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its customary name

from calibration.pairs.lab import Array, Lab, digest
from calibration.pairs.loop import Stages
from calibration.pairs.models import normed
from calibration.pairs.parts import Parts, Tensors


class Quantised(Stages):
    """Layers of 8-bit products, whose rows are scaled on the way; a heap of deadlines on the host."""

    dtype = torch.float32

    def __init__(self, lab: Lab, *, rows: int, width: int, layers: int, jobs: int) -> None:
        super().__init__(lab)
        self.rows, self.width, self.jobs = lab.size(rows, 32), lab.size(width, 32), jobs
        self.shape = (self.width,)
        self.base = lab.weights(self.rows, self.width) * 10
        # Columns in one piece, which is what the products of 8-bit numbers are made for.
        self.layers = [
            (lab.weights(self.width, self.width).float() * 300).round().clamp(-127, 127).to(torch.int8).t()
            for _ in range(lab.size(layers, 2))
        ]  # fmt: skip
        self.deadlines = [(i * 7919 % 100_003, i) for i in range(4096)]
        heapq.heapify(self.deadlines)

    def prepare(self, step: int, out: Array) -> None:
        done = 0
        for _ in range(self.jobs):
            deadline, job = heapq.heappop(self.deadlines)
            heapq.heappush(self.deadlines, (deadline + 1 + job * 31 % 5003, job))
            done += job
        out[:] = np.arange(self.width, dtype=np.float32) % (2 + (done + step) % 29)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = normed(self.base + inputs.to(self.lab.dtype) * 0.1)
        for weights in self.layers:
            scale = x.abs().amax(1, keepdim=True) / 127
            product = torch._int_mm((x / scale).round().clamp(-127, 127).to(torch.int8), weights)
            x = normed(F.gelu(product * scale.float() * 0.001).to(x.dtype) + x)
        return x.float().mean(0)

    def use(self, result: Array) -> Any:
        return digest(result)


class Fused(Stages):
    """Softmaxes and gates in kernels of Triton; the host counts digests of its chunks."""

    dtype = torch.float32

    def __init__(self, lab: Lab, *, rows: int, width: int, layers: int, chunks: int) -> None:
        super().__init__(lab)
        self.shape, self.rows = (lab.size(width, 16),), lab.size(rows, 4)
        self.layers, self.chunks = lab.size(layers, 2), chunks
        self.base = lab.weights(self.rows, *self.shape) * 10
        self.count: Counter[int] = Counter()
        if lab.on_gpu:
            from calibration.pairs.triton_kernels import gated_softmax

            self.layer = gated_softmax
        else:
            self.layer = _gated_softmax

    def prepare(self, step: int, out: Array) -> None:
        for chunk in range(self.chunks):
            self.count[hashlib.sha256(b"%d of %d" % (chunk, step)).digest()[0]] += 1
        out[:] = np.arange(len(out), dtype=np.float32) % (3 + self.count[7] % 31)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = self.base + inputs.to(self.lab.dtype)
        for _ in range(self.layers):
            x = self.layer(x)
        return x.float().mean(0)

    def use(self, result: Array) -> Any:
        return digest(result)


def _gated_softmax(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x.float()).to(x.dtype) + x.float().softmax(1).to(x.dtype)


class Solver(Stages):
    """Conjugate gradients: the host reads the residual of every iteration to know whether another follows."""

    dtype = torch.float32

    def __init__(self, lab: Lab, *, size: int) -> None:
        super().__init__(lab)
        self.shape = (lab.size(size, 64),)
        factor = lab.weights(*self.shape, *self.shape).float() * 3  # squared and one added: eigenvalues of 1 to 37
        self.matrix = factor @ factor.T
        self.matrix.diagonal().add_(1)
        self.loads = np.random.default_rng(11).standard_normal(self.shape[0] + 128).astype(np.float32)

    def prepare(self, step: int, out: Array) -> None:
        out[:] = self.loads[step % 128 :][: len(out)]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x, residual = torch.zeros_like(inputs), inputs.clone()
        direction, size = residual, residual @ residual
        enough = size.item() * 1e-6
        while size.item() > enough:
            ahead = self.matrix @ direction
            along = size / (direction @ ahead)
            x, residual = x + along * direction, residual - along * ahead
            before, size = size, residual @ residual
            direction = residual + size / before * direction
        return x

    def use(self, result: Array) -> Any:
        return float(np.abs(result).max())


class Scans(Stages):
    """Sums along long rows, over a gigabyte, many times over; next to nothing on the host."""

    dtype = torch.float32

    def __init__(self, lab: Lab, *, rows: int, length: int, passes: int) -> None:
        super().__init__(lab)
        self.shape, length, self.passes = (lab.size(rows, 8),), lab.size(length, 32), lab.size(passes, 2)
        self.base = lab.weights(*self.shape, length).float() * 50

    def prepare(self, step: int, out: Array) -> None:
        out[:] = np.arange(len(out)) % (step % 7 + 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = self.base + inputs[:, None]
        for _ in range(self.passes):
            x = x.cumsum(1).mul_(0.01).sin_()
        return x.mean(1)

    def use(self, result: Array) -> Any:
        return digest(result)


class Pieces(Parts):
    """A dozen arrays go over and a few come back, of a mebibyte or two each."""

    def __init__(self, lab: Lab, *, pieces: int, copies: int) -> None:
        super().__init__(lab)
        self.high, self.wide, self.copies = lab.size(512, 4), lab.size(1024, 8), lab.size(copies, 2)
        self.inputs = [((self.high, self.wide), torch.float32)] * pieces
        self.base = np.random.default_rng(12).random((pieces, self.high, self.wide), dtype=np.float32)
        self.gates = lab.weights(self.copies, 1, self.wide).float() * 10

    def prepare(self, step: int, outs: Sequence[Array]) -> None:
        for base, out in zip(self.base, outs, strict=True):
            np.multiply(base, np.float32(1 + step % 13), out=out)

    def forward(self, *inputs: torch.Tensor) -> Tensors:
        found = [F.layer_norm((piece * self.gates).softmax(-1), piece.shape[-1:]) for piece in inputs]
        third = len(found) // 3
        together = [torch.stack(found[i * third : i * third + third]).amax((0, 1)) for i in range(3)]
        return tuple(part[:, : self.wide // 2] + part[:, self.wide // 2 :] for part in together)

    def use(self, *results: Any) -> Any:
        return [digest(result) for result in results], int(results[0].argmax())

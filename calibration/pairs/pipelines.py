"""Loops of which each step prepares its inputs on its own: scoring, images, sound, texts, training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its customary name

from calibration.pairs.host_work import normalised, tokenise, turns
from calibration.pairs.lab import Array, Lab, digest
from calibration.pairs.loop import Stages
from calibration.pairs.models import Convnet, Encoder, Mlp, normed


class Scores(Stages):
    """A multilayer perceptron, eager, over rows that a small vector of features shifts."""

    dtype = torch.float32

    def __init__(self, lab: Lab, *, rows: int, width: int, layers: int, care: int) -> None:
        """`care` is the number of turns of Python that each step's preparation takes, and half that of its use."""
        super().__init__(lab)
        self.rows, self.width, self.care = lab.size(rows, 8), lab.size(width, 16), care
        self.shape = (self.width,)
        self.model = Mlp(lab, self.width, lab.size(layers, 2))
        self.base = lab.weights(self.rows, self.width) * self.rows**0.5

    def prepare(self, step: int, out: Array) -> None:
        out[:] = np.sin(np.arange(self.width, dtype=np.float32) * (1 + turns(self.care, step) % 97))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model(self.base + inputs.to(self.lab.dtype)).mean(0).float()

    def use(self, result: Array) -> Any:
        return digest(np.sort(result)), turns(self.care // 2, int(result.argmax()))


class Alternating(Scores):
    """Every other step has a sixteenth of the rows."""

    launched = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.launched += 1
        rows = max(self.rows // 16, 1) if self.launched % 2 else self.rows
        return self.model(self.base[:rows] + inputs.to(self.lab.dtype)).mean(0).float()


class LargeResults(Scores):
    """All rows come back, in single precision."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model(self.base + inputs.to(self.lab.dtype)).float()

    def use(self, result: Array) -> Any:
        return digest(result.max(axis=1)), int(result.argmax())


class Branches(Scores):
    """Two branches on two streams, joined by events."""

    def __init__(self, lab: Lab, **shape: int) -> None:
        super().__init__(lab, **shape)
        self.other = Mlp(lab, self.width, lab.size(shape["layers"], 2))
        self.side, self.forked, self.joined = lab.stream(), lab.event(), lab.event()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = self.base + inputs.to(self.lab.dtype)
        self.forked.record()
        with self.lab.on(self.side):
            self.forked.wait()
            right = self.other(x)
            self.joined.record()
        left = self.model(x)
        self.joined.wait()
        return (left * right).mean(0).float()


class TinyKernels(Stages):
    """Many elementwise kernels on a few numbers, as feature code written in torch has them."""

    shape, dtype = (1024,), torch.float32

    def prepare(self, step: int, out: Array) -> None:
        out[:] = np.arange(1024) % (step % 7 + 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = inputs
        for i in range(self.lab.size(40, 4)):
            x = torch.clamp(x * 0.9 + i, -50, 50)
        return x

    def use(self, result: Array) -> Any:
        return digest(result)


class Images(Stages):
    """Images of bytes, made numbers around zero by numpy and then classified."""

    dtype = torch.float32

    def __init__(self, lab: Lab, *, batch: int, depth: int) -> None:
        super().__init__(lab)
        self.batch, side = lab.size(batch, 2), lab.size(224, 32)
        self.shape = (self.batch, side, side, 3)
        self.pixels = np.random.default_rng(0).integers(0, 256, (4 * self.batch, side, side, 3), dtype=np.uint8)
        self.model = Convnet(lab, lab.size(64, 4), 3, lab.size(depth, 1))

    def prepare(self, step: int, out: Array) -> None:
        normalised(self.pixels[step % 3 * self.batch :][: self.batch], out)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model(inputs).float()

    def use(self, result: Array) -> Any:
        return result.argmax(axis=1).tolist()


class Ranking(Stages):
    """A recommender in a CUDA graph: sums of rows of a large table, a perceptron, and the best candidates."""

    dtype = torch.int64

    def __init__(self, lab: Lab, *, candidates: int, layers: int) -> None:
        super().__init__(lab)
        self.shape = (lab.size(candidates, 16), 32)
        self.table_rows = lab.size(4_000_000, 1000)
        self.table, self.width = lab.weights(self.table_rows, 64), lab.size(1024, 64)
        self.into, self.model = lab.weights(64, self.width), Mlp(lab, self.width, lab.size(layers, 1))
        self.ids, self.result = lab.zeros(*self.shape, dtype=torch.int64), lab.zeros(self.shape[0], dtype=torch.float32)
        self.candidates = np.arange(self.shape[0])[:, None] * 7919 + np.arange(32) * 104729
        self.replay = lab.capture(self._forward)

    def _forward(self) -> None:
        x = normed(F.embedding(self.ids, self.table).sum(1) @ self.into)
        self.result.copy_(self.model(x)[:, 0])

    def prepare(self, step: int, out: Array) -> None:
        np.remainder(self.candidates * (step % 89 + 1), self.table_rows, out=out)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.ids.copy_(inputs)
        self.replay()
        return self.result

    def use(self, result: Array) -> Any:
        best: dict[int, list[int]] = {}
        for candidate in np.argsort(-result, kind="stable")[:400].tolist():
            best.setdefault(candidate % 20, []).append(candidate)
        return sorted(shop[0] for shop in best.values()), digest(result)


class Spectra(Stages):
    """Windows of sound, filtered in the frequency domain several times over."""

    dtype = torch.float32

    def __init__(self, lab: Lab, *, windows: int, filters: int) -> None:
        super().__init__(lab)
        self.shape = (lab.size(windows, 4), lab.size(8192, 64))
        self.sound = np.random.default_rng(1).standard_normal(2 * self.shape[0] * self.shape[1]).astype(np.float32)
        self.window = np.hanning(self.shape[1]).astype(np.float32)
        self.responses = lab.weights(self.shape[1] // 2 + 1, lab.size(filters, 2)).float().T.contiguous()

    def prepare(self, step: int, out: Array) -> None:
        begin = step * 997 % (self.sound.size // 2)
        np.multiply(self.sound[begin : begin + out.size].reshape(out.shape), self.window, out=out)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = inputs
        for response in self.responses:
            x = torch.fft.irfft(torch.fft.rfft(x) * (1 + response))
        return x.square().mean(1).log1p()

    def use(self, result: Array) -> Any:
        return digest(np.sort(result))


class Texts(Stages):
    """Texts, cut into tokens by Python and encoded by a bidirectional transformer, eager."""

    dtype = torch.int64

    def __init__(self, lab: Lab, *, texts: int, length: int, layers: int) -> None:
        super().__init__(lab)
        self.shape = (lab.size(texts, 2), lab.size(length, 16))
        self.model = Encoder(
            lab, hidden=lab.size(768, 32), heads=lab.size(12, 2), layers=lab.size(layers, 1), vocabulary=2048
        )

    def prepare(self, step: int, out: Array) -> None:
        tokenise(step, out)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model(inputs).float()

    def use(self, result: Array) -> Any:
        return [digest(row) for row in result]


class Training(Stages):
    """A training step, eager: forward, backward, optimiser; the host wants the loss."""

    dtype = torch.float32

    def __init__(self, lab: Lab, *, rows: int, width: int, layers: int, care: int) -> None:
        super().__init__(lab)
        self.width, self.care = lab.size(width, 16), care
        self.shape = (lab.size(rows, 8), 64)
        self.into, self.base = lab.weights(64, self.width), np.random.default_rng(2).standard_normal(self.shape)
        self.model = Mlp(lab, self.width, lab.size(layers, 2))
        parameters = [matrix.requires_grad_() for layer in self.model.layers for matrix in layer]
        self.optimiser = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

    def prepare(self, step: int, out: Array) -> None:
        np.multiply(self.base, 1 + turns(self.care, step) % 5, out=out, casting="same_kind")

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = inputs.to(self.lab.dtype) @ self.into
        loss = (self.model(x).float() - x.float().sin()).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.detach()

    def use(self, result: Array) -> Any:
        return float(result), turns(self.care // 2, int(result * 1e6))

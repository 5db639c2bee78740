"""Decode steps of a language model's server: token ids go in, one token a request comes out and goes in again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from calibration.pairs.host_work import Request
from calibration.pairs.lab import Downloads, Lab, Uploads
from calibration.pairs.loop import Late, Loop, Pair
from calibration.pairs.models import Decoder


class Engine:
    """The model with its static tensors, and what the host knows of each request."""

    def __init__(
        self, lab: Lab, *, batch: int, hidden: int, layers: int, context: int, care: int, graph: bool = True,
    ) -> None:  # fmt: skip
        """`care` is the host's work a token: see `Request.take`."""
        hidden, layers, context = lab.size(hidden, 64), lab.size(layers, 2), lab.size(context, 16)
        self.model = Decoder(lab, batch, hidden=hidden, layers=layers, context=context, vocabulary=lab.size(32000, 128))
        self.requests = [Request(index, last=index + 1, length=index) for index in range(batch)]
        self.care = care
        self.tokens, self.positions, self.next = (lab.zeros(batch, dtype=torch.int64) for _ in range(3))
        self.next.copy_(torch.arange(1, batch + 1))
        self.forward: Callable[[], None] = lab.capture(self._forward) if graph else self._forward
        self.next.copy_(torch.arange(1, batch + 1))

    def _forward(self) -> None:
        self.next.copy_(self.model(self.tokens, self.positions))

    def advance(self) -> list[int]:
        """Schedule a token for each request; their positions."""
        for request in self.requests:
            request.length += 1
        return [request.length for request in self.requests]

    def take(self, tokens: list[int]) -> int:
        """Note each request's token; a number that depends on all of them."""
        return sum(r.take(token, self.care) for r, token in zip(self.requests, tokens, strict=True))


class SyncDecode(Loop):
    """Reads each step's tokens and writes them into the next step's inputs."""

    def __init__(self, lab: Lab, engine: Engine) -> None:
        super().__init__(lab)
        self.engine = engine

    def step(self, _: int) -> None:
        engine = self.engine
        with self.phase("schedule"):
            positions = engine.advance()
        with self.phase("build_inputs"):
            engine.tokens.copy_(torch.tensor([request.last for request in engine.requests]))
            engine.positions.copy_(torch.tensor(positions))
        with self.phase("forward"):
            engine.forward()
        with self.phase("retrieve"):
            tokens = engine.next.tolist()
        with self.phase("update"):
            self.outputs.append(engine.take(tokens))


class LateDecode(Late):
    """Feeds tokens back on the device and reads them a step late."""

    def __init__(self, lab: Lab, engine: Engine) -> None:
        super().__init__(lab)
        self.engine = engine
        self.uploads, self.downloads = Uploads(lab, engine.positions.shape, torch.int64), Downloads(lab)

    def launch(self, step: int) -> None:
        engine = self.engine
        with self.phase("schedule"):
            positions = engine.advance()
        with self.phase("build_inputs"):
            self.uploads.buffer(step)[:] = np.array(positions)
            engine.positions.copy_(self.uploads.send(step))
            engine.tokens.copy_(engine.next)
        with self.phase("forward"):
            engine.forward()
            self.downloads.send(step, engine.next)

    def read(self, step: int) -> None:
        with self.phase("retrieve"):
            tokens = self.downloads.read(step).tolist()
        with self.phase("update"):
            self.outputs.append(self.engine.take(tokens))


def decode(pair: Callable[..., Pair], **shape: Any) -> Pair:
    """`pair` with the two loops over an engine of `shape`."""
    return pair(
        sync=lambda lab: SyncDecode(lab, Engine(lab, **shape)), twin=lambda lab: LateDecode(lab, Engine(lab, **shape))
    )

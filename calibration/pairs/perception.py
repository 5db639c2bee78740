"""Object detection: numpy brings frames to size, convolutions find boxes, Python throws the overlapping ones out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its customary name

from calibration.pairs.lab import Array, Lab, digest
from calibration.pairs.parts import Parts, Tensors

Box = tuple[float, float, float, float]


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if wide <= 0 or high <= 0:
        return 0.0
    both = wide * high
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


class Detection(Parts):
    """Boxes, scores and classes come back one by one, each made single precision first."""

    def __init__(self, lab: Lab, *, frames: int, channels: int, blocks: int, candidates: int) -> None:
        super().__init__(lab)
        self.frames, channels = lab.size(frames, 2), lab.size(channels, 8)
        self.side, self.candidates = lab.size(512, 32), lab.size(candidates, 4)
        self.inputs = [((self.frames, self.side, self.side, 3), torch.uint8)]
        high, wide = lab.size(720, 36), lab.size(1280, 64)
        self.camera = np.random.default_rng(7).integers(0, 256, (6, high, wide, 3), dtype=np.uint8)
        self.tall = self.side * high // wide
        self.rows, self.columns = np.arange(self.tall) * high // self.tall, np.arange(self.side) * wide // self.side
        self.stem = lab.weights(channels, 3, 3, 3)
        self.blocks = [
            (lab.weights(channels, 1, 3, 3), lab.weights(channels, channels, 1, 1))
            for _ in range(lab.size(blocks, 1))
        ]  # fmt: skip
        self.head = lab.weights(4 + 1 + 20, channels, 1, 1)

    def prepare(self, step: int, outs: Sequence[Array]) -> None:
        (out,) = outs
        margin = (self.side - self.tall) // 2
        for frame in range(self.frames):
            seen = self.camera[(step + frame) % len(self.camera)].take(self.rows, axis=0).take(self.columns, axis=1)
            out[frame] = 114
            out[frame, margin : margin + self.tall] = seen[..., ::-1]

    def forward(self, *inputs: torch.Tensor) -> Tensors:
        x = F.conv2d(inputs[0].to(self.lab.dtype).permute(0, 3, 1, 2) / 255, self.stem, stride=2, padding=1)
        for deep, wide in self.blocks:
            x = x + F.relu6(F.conv2d(F.conv2d(x, deep, padding=1, groups=x.shape[1]), wide))
        found = F.max_pool2d(F.conv2d(x, self.head), 8 if self.lab.on_gpu else 4).flatten(2).transpose(1, 2)
        best = found[..., 4].topk(self.candidates, 1)
        chosen = found.gather(1, best.indices[..., None].expand(-1, -1, found.shape[2]))
        return chosen[..., :4], best.values.sigmoid(), chosen[..., 5:].argmax(-1)

    def converted(self, result: torch.Tensor) -> torch.Tensor:
        return result.float()

    def use(self, *results: Any) -> Any:
        boxes, scores, classes = (result.tolist() for result in results)
        kept = [self._kept(*one) for one in zip(boxes, scores, classes, strict=True)]
        return kept, digest(results[1])

    def _kept(self, boxes: list[list[float]], scores: list[float], classes: list[float]) -> list[int]:
        """Which candidates, best first, overlap none of those before them in their class."""
        kept: list[tuple[int, Box]] = []
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        for i in order:
            x, y, wide, high = boxes[i]
            box = (x - abs(wide) - 0.1, y - abs(high) - 0.1, x + abs(wide), y + abs(high))
            if all(overlap(box, other) < 0.5 or classes[i] != classes[j] for j, other in kept):
                kept.append((i, box))
        return [i for i, _ in kept]

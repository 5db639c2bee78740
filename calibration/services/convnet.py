"""A ResNet of bottleneck blocks with random weights, its batch norms folded into the convolutions before them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear, max_pool2d

from batchsim.model import ConvNetShape

EPS = 1e-5
# Mean and deviation of ImageNet's pixels, by channel.
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class Convolution(NamedTuple):
    """A convolution without bias and the batch norm after it: weight (out, in, k, k), the others (out,)."""

    weight: Tensor
    gamma: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor
    stride: int


class Block(NamedTuple):
    """A bottleneck: 1x1, 3x3, which has the stride, 1x1; `project` where the shortcut changes the shape."""

    reduce: Convolution
    spatial: Convolution
    expand: Convolution
    project: Convolution | None


class Weights(NamedTuple):
    """A network's parameters before they are folded; float32, on the CPU."""

    stem: Convolution
    blocks: list[Block]
    classifier: Tensor
    bias: Tensor

    @classmethod
    def random(cls, shape: ConvNetShape, seed: int) -> Weights:
        """Weights that keep the activations' scale through all blocks."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int, mean: float = 0.0, std: float) -> Tensor:
            return torch.empty(size).normal_(mean, std, generator=generator)

        def convolution(into: int, out: int, kernel: int, stride: int = 1, gain: float = 1.0) -> Convolution:
            weight = normal(out, into, kernel, kernel, std=(2 / (into * kernel * kernel)) ** 0.5)
            var = torch.empty(out).uniform_(0.5, 1.5, generator=generator)
            beta, mean = normal(out, std=0.1), normal(out, std=0.1)
            return Convolution(weight, normal(out, mean=gain, std=0.1 * gain), beta, mean, var, stride)

        stem = convolution(3, shape.width, 7, 2)
        blocks, channels = [], shape.width
        for stage, depth in enumerate(shape.depths):
            inner = shape.width << stage
            for block in range(depth):
                stride = 2 if stage and not block else 1
                blocks.append(
                    Block(
                        convolution(channels, inner, 1),
                        convolution(inner, inner, 3, stride),
                        convolution(inner, 4 * inner, 1, gain=0.3),
                        None if block else convolution(channels, 4 * inner, 1, stride, gain=0.7),
                    )
                )
                channels = 4 * inner
        classifier = normal(shape.num_classes, channels, std=channels**-0.5)
        return cls(stem, blocks, classifier, normal(shape.num_classes, std=0.1))

    @property
    def parameters(self) -> int:
        """Weights and biases, counted: not the running mean and variance."""
        convolutions = [self.stem, *(c for block in self.blocks for c in block if c is not None)]
        trained = [t for c in convolutions for t in (c.weight, c.gamma, c.beta)]
        return sum(t.numel() for t in (*trained, self.classifier, self.bias))


class _Folded(NamedTuple):
    weight: Tensor
    bias: Tensor
    stride: int

    def __call__(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, self.bias, self.stride, self.weight.shape[-1] // 2)


class ConvNet:
    """Takes decoded images, bytes by row, column and channel; normalises them, and answers with the classes' logits.

    All images are of the same size: the padded length of a batch means nothing here. Weights are drawn on the CPU, the
    same ones for every device.
    """

    item_type = torch.uint8
    splits_lengths = False

    def __init__(self, shape: ConvNetShape, *, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self.answer_size = shape.num_classes
        weights = Weights.random(shape, seed)
        self.parameters = weights.parameters

        def fold(convolution: Convolution) -> _Folded:
            scale = convolution.gamma / torch.sqrt(convolution.var + EPS)
            weight = (convolution.weight * scale[:, None, None, None]).to(device, dtype)
            bias = (convolution.beta - convolution.mean * scale).to(device, dtype)
            return _Folded(weight.contiguous(memory_format=torch.channels_last), bias, convolution.stride)

        self.stem = fold(weights.stem)
        self.blocks = [tuple(None if c is None else fold(c) for c in block) for block in weights.blocks]
        self.classifier, self.bias = weights.classifier.to(device, dtype), weights.bias.to(device, dtype)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
        self.scale, self.shift = (1 / std).to(device, dtype), (-mean / std).to(device, dtype)

    @property
    def launches(self) -> tuple[int, int, int]:
        """Kernels that the host launches for a forward: before the blocks, in one on average, and after; with stamps.

        A convolution's bias is a kernel of its own.
        """
        projections = sum(block[3] is not None for block in self.blocks)
        in_blocks = len(self.blocks) * (3 * 2 + 2 + 2) + projections * 2
        return 1 + 2 + 2 + 2, round(in_blocks / len(self.blocks)), 3 + 1

    def item_size(self, length: int) -> int:  # noqa: ARG002
        """Bytes of an image."""
        return 3 * self.shape.image_size**2

    def payload(self, number: int, length: int) -> npt.NDArray[np.uint8]:  # noqa: ARG002
        """The pixels of request `number`, the same whatever else there is: patches of colour under noise."""
        rng, size = np.random.default_rng(number), self.shape.image_size
        patches = rng.integers(0, 128, (4, 4, 3), dtype=np.uint8).repeat(size // 4, 0).repeat(size // 4, 1)
        return (patches + rng.integers(0, 128, patches.shape, dtype=np.uint8)).ravel()

    def collate(self, items: npt.NDArray[Any], payloads: Sequence[npt.NDArray[Any]]) -> None:
        """Write `payloads` to the rows of `items` (requests, bytes)."""
        for item, payload in zip(items, payloads, strict=True):
            item[:] = payload

    def forward(self, items: Tensor) -> Tensor:
        """Answers (rows, classes) to `items` (rows, bytes), launched on the current stream."""
        size = self.shape.image_size
        pixels = items.view(-1, size, size, 3).permute(0, 3, 1, 2).to(self.dtype)  # channels last
        x = torch.addcmul(self.shift, pixels, self.scale)
        x = max_pool2d(self.stem(x).relu_(), 3, 2, 1)
        for reduce, spatial, expand, project in self.blocks:
            assert reduce is not None and spatial is not None and expand is not None
            inner = expand(spatial(reduce(x).relu_()).relu_())
            x = inner.add_(x if project is None else project(x)).relu_()
        return linear(x.mean((2, 3)), self.classifier, self.bias)

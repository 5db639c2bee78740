"""Models of a few lines with random weights: what loops run on the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - its customary name

from calibration.pairs.lab import Lab


def normed(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:])


class Mlp:
    """`layers` residual blocks of two matrix products, (rows, width) to (rows, width)."""

    def __init__(self, lab: Lab, width: int, layers: int, expansion: int = 4) -> None:
        self.layers = [
            (lab.weights(width, expansion * width), lab.weights(expansion * width, width)) for _ in range(layers)
        ]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in self.layers:
            x = normed(x + F.gelu(x @ up) @ down)
        return x


class Decoder:
    """One decode step of a transformer: token ids and positions, (batch,) each, to the next token ids.

    Attention reads a cache of `context` tokens that is never written to. Only `distinct` layers have weights of their
    own, which the others share: the L2 cache holds none of them for long.
    """

    def __init__(
        self, lab: Lab, batch: int, *, hidden: int, layers: int, vocabulary: int, context: int, distinct: int = 4
    ) -> None:
        heads = max(hidden // 128, 1)
        self.split = (batch, heads, 1, hidden // heads)
        self.embedding, self.head = lab.weights(hidden, vocabulary).T.contiguous(), lab.weights(hidden, vocabulary)
        self.places = lab.weights(4096, hidden)
        cache = (batch, heads, context, hidden // heads)
        self.layers = [
            (
                lab.weights(hidden, 3 * hidden), lab.weights(hidden, hidden), lab.weights(*cache), lab.weights(*cache),
                lab.weights(hidden, 4 * hidden), lab.weights(4 * hidden, hidden),
            )
            for _ in range(min(layers, distinct))
        ]  # fmt: skip
        self.order = [self.layers[i % len(self.layers)] for i in range(layers)]

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = normed(self.embedding[tokens] + self.places[positions % 4096])
        for inward, outward, keys, values, up, down in self.order:
            query, key, value = (part.reshape(self.split) for part in (x @ inward).chunk(3, -1))
            attended = F.scaled_dot_product_attention(query, keys, values) + key * value
            x = normed(x + attended.reshape(x.shape) @ outward)
            x = normed(x + F.silu(x @ up) @ down)
        return (x @ self.head).argmax(-1)


class Encoder:
    """A bidirectional transformer: token ids (batch, length) to one vector a text, (batch, hidden)."""

    def __init__(self, lab: Lab, *, hidden: int, heads: int, layers: int, vocabulary: int) -> None:
        self.heads = heads
        self.embedding = lab.weights(vocabulary, hidden)
        self.layers = [
            (lab.weights(hidden, 3 * hidden), lab.weights(hidden, hidden), Mlp(lab, hidden, 1)) for _ in range(layers)
        ]

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, length = tokens.shape
        x = normed(F.embedding(tokens, self.embedding))
        for inward, outward, mlp in self.layers:
            query, key, value = (x @ inward).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(query, key, value)
            x = mlp(normed(x + attended.transpose(1, 2).reshape(x.shape) @ outward))
        return x.mean(1)


class Convnet:
    """Convolutions that halve the image and double the channels; (batch, height, width, 3) to (batch, classes)."""

    def __init__(self, lab: Lab, channels: int, stages: int, depth: int, classes: int = 1000) -> None:
        self.stem = lab.weights(channels, 3, 7, 7)
        self.stages = []
        for stage in range(stages):
            wide = channels << stage
            self.stages.append(
                ([lab.weights(wide, wide, 3, 3) for _ in range(depth)], lab.weights(2 * wide, wide, 3, 3))
            )
        self.head = lab.weights(channels << stages, classes)
        self.dtype = lab.dtype

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(images.to(self.dtype).permute(0, 3, 1, 2), self.stem, stride=2, padding=3)
        for blocks, down in self.stages:
            for block in blocks:
                x = F.relu(x + F.conv2d(x, block, padding=1) * 0.5)
            x = F.relu(F.conv2d(x, down, stride=2, padding=1))
        return x.mean((2, 3)) @ self.head

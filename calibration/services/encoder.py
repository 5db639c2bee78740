"""A BERT-shaped encoder with random weights: post-norm layers, learned positions, padding masked out of attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import embedding, gelu, layer_norm, linear, scaled_dot_product_attention

from batchsim.model import EncoderShape

EPS = 1e-12  # BERT's
BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
PADDING = 0  # the id that stands for no token


class Affine(NamedTuple):
    """Weight and bias of a linear map, (out features, in features) and (out features,), or of a norm."""

    weight: Tensor
    bias: Tensor


class Layer(NamedTuple):
    """One layer's parameters; `qkv` holds the three projections one below the other."""

    qkv: Affine
    output: Affine
    attention_norm: Affine
    up: Affine
    down: Affine
    mlp_norm: Affine


class Encoder:
    """Takes token ids padded with PADDING; answers with the last layer's values of the first token.

    A request of no tokens is answered as one whose only token is padding. Weights are drawn on the CPU, the same ones
    for every device.
    """

    item_type = torch.int32
    splits_lengths = True

    def __init__(self, shape: EncoderShape, *, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self.answer_size = shape.hidden_size
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int, mean: float = 0.0, std: float) -> Tensor:
            return torch.empty(size).normal_(mean, std, generator=generator).to(device, dtype)

        def dense(rows: int, columns: int) -> Affine:
            return Affine(normal(rows, columns, std=1 / math.sqrt(columns)), normal(rows, std=0.1))

        def norm() -> Affine:
            return Affine(normal(shape.hidden_size, mean=1.0, std=0.1), normal(shape.hidden_size, std=0.1))

        hidden, inner = shape.hidden_size, shape.intermediate_size
        self.tokens = normal(shape.vocab_size, hidden, std=1.0)
        self.positions = normal(shape.max_length, hidden, std=0.5)
        self.norm = norm()
        self.layers = [
            Layer(dense(3 * hidden, hidden), dense(hidden, hidden), norm(), dense(inner, hidden),
                  dense(hidden, inner), norm())
            for _ in range(shape.num_layers)
        ]  # fmt: skip

    @property
    def parameters(self) -> int:
        """Weights and biases, counted."""
        affines = [self.norm, *(affine for layer in self.layers for affine in layer)]
        return sum(t.numel() for t in (self.tokens, self.positions, *(t for affine in affines for t in affine)))

    @property
    def launches(self) -> tuple[int, int, int]:
        """Kernels that the host launches for a forward: before the layers, in each, and after them; stamps counted."""
        return 1 + 7, 10, 1 + 1

    def item_size(self, length: int) -> int:
        """Elements of a request in a batch padded to `length` tokens."""
        return length

    def payload(self, number: int, length: int) -> npt.NDArray[np.int32]:
        """The `length` token ids of request `number`, the same whatever else there is."""
        rng = np.random.default_rng(number)
        return rng.integers(1, self.shape.vocab_size, length, dtype=np.int32)

    def collate(self, items: npt.NDArray[Any], payloads: Sequence[npt.NDArray[Any]]) -> None:
        """Write `payloads` to the rows of `items` (requests, length), padded."""
        items[:] = PADDING
        for item, payload in zip(items, payloads, strict=True):
            item[: len(payload)] = payload

    def forward(self, items: Tensor) -> Tensor:
        """Answers (rows, hidden) to `items` (rows, length), launched on the current stream."""
        shape = self.shape
        rows, length = items.shape
        heads = (rows, length, 3, shape.num_heads, shape.hidden_size // shape.num_heads)
        mask = torch.zeros(rows, length, dtype=self.dtype, device=self.device)
        mask.masked_fill_(items == PADDING, -torch.inf)
        mask[:, 0] = 0.0  # a row of nothing but padding attends to its first
        mask = mask[:, None, None]
        x = self._norm(embedding(items, self.tokens) + self.positions[:length], self.norm)
        # Of torch's fast kernels this one takes a mask; which one is used is settled here, not by torch's version.
        with sdpa_kernel(BACKENDS) if self.device.type == "cuda" else nullcontext():
            for layer in self.layers:
                q, k, v = linear(x, *layer.qkv).view(heads).permute(2, 0, 3, 1, 4)
                attended = scaled_dot_product_attention(q, k, v, attn_mask=mask)
                attended = attended.transpose(1, 2).reshape(rows, length, shape.hidden_size)
                x = self._norm(x + linear(attended, *layer.output), layer.attention_norm)
                x = self._norm(x + linear(gelu(linear(x, *layer.up)), *layer.down), layer.mlp_norm)
        return x[:, 0]

    def _norm(self, x: Tensor, norm: Affine) -> Tensor:
        return layer_norm(x, (self.shape.hidden_size,), *norm, eps=EPS)

"""Shapes of models whose dependent kernels a scenario can name."""

from __future__ import annotations

from dataclasses import dataclass

from batchsim.model import MODELS


@dataclass(frozen=True, slots=True)
class Decoder:
    """A decoder's layer: counts of elements, before it is divided among devices."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    gated: bool = True


@dataclass(frozen=True, slots=True)
class Stage:
    """`layers` times `convs` 3x3 convolutions of `channels` channels on images of `height` x `width`."""

    height: int
    width: int
    channels: int
    convs: int
    layers: int


# GPT-3: Brown et al., 2020, table 2.1. LLaMA-65B: Touvron et al., 2023, table 2, and its published parameters.
DECODERS: dict[str, Decoder] = {
    "gpt3": Decoder(96, 12288, 4 * 12288, 96, 96, 128, gated=False),
    "llama-65b": Decoder(80, 8192, 22016, 64, 64, 128),
} | {
    name: Decoder(
        shape.num_layers, shape.hidden_size, shape.intermediate_size, shape.num_heads, shape.num_kv_heads,
        shape.head_dim,
    )
    for name, shape in MODELS.items()
}  # fmt: skip


def _stages(convs: tuple[int, ...], layers: tuple[int, ...]) -> tuple[Stage, ...]:
    images = ((56, 64), (28, 128), (14, 256), (7, 512))
    return tuple(Stage(size, size, c, n, count) for (size, c), n, count in zip(images, convs, layers, strict=True))


# The 3x3 convolutions as Jangda et al. (CGO 2024) list them in table II.
CONVOLUTIONS: dict[str, tuple[Stage, ...]] = {
    "resnet38": _stages((2, 2, 2, 2), (3, 4, 6, 3)),
    "vgg19": _stages((2, 2, 4, 4), (1, 1, 1, 1)),
}
CHANNELS = sorted({stage.channels for stages in CONVOLUTIONS.values() for stage in stages})

"""The kernels of each model's forwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from batchsim.errors import InputError
from batchsim.hardware.kernels import Kernel, decode_attention, over_rows, product, projections
from batchsim.model import MODELS, SERVICES, ConvNetShape, EncoderShape, ModelShape

STEM = 7


class Forwards(Protocol):
    """What a profile's forwards launch, on one of `devices` that share the model."""

    dtype: str

    def decode(self, rows: int, kv_tokens: float, devices: int) -> Sequence[Kernel]:
        """A forward of `rows` rows with contexts of `kv_tokens` in all, or of a service with so many tokens in all."""
        ...

    def prompts(self, num_tokens: int, devices: int) -> Sequence[Kernel]:
        """A forward of so many new tokens, without attention."""
        ...

    def attention(self, rows: int, kv_tokens: float, devices: int) -> Sequence[Kernel]:
        """The part of `decode` that reads contexts."""
        ...


class DecoderForwards:
    """Of a Llama-shaped decoder, as calibration/executor/decoder.py launches them."""

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self.dtype = "bf16" if shape.dtype_bytes <= 2 else "tf32"

    def decode(self, rows: int, kv_tokens: float, devices: int) -> Sequence[Kernel]:
        return (*projections(self.shape.shard(devices), rows, rows), *self.attention(rows, kv_tokens, devices))

    def prompts(self, num_tokens: int, devices: int) -> Sequence[Kernel]:
        return projections(self.shape.shard(devices), num_tokens, 1)

    def attention(self, rows: int, kv_tokens: float, devices: int) -> Sequence[Kernel]:
        return tuple(decode_attention(self.shape.shard(devices), rows, kv_tokens))


class EncoderForwards:
    """Of a BERT-shaped encoder, as calibration/services/encoder.py launches them."""

    dtype = "bf16"

    def __init__(self, shape: EncoderShape) -> None:
        self.shape = shape

    def decode(self, rows: int, kv_tokens: float, devices: int) -> Sequence[Kernel]:  # noqa: ARG002
        shape, tokens, size = self.shape, max(round(kv_tokens), rows), self.shape.dtype_bytes
        hidden, inner, layers = shape.hidden_size, shape.intermediate_size, shape.num_layers
        length, pairs = tokens / rows, tokens * tokens / rows
        blocks = max(1, round(rows * shape.num_heads * -(-length // 64)))
        moved = 4.0 * tokens * hidden * size
        return (
            product("qkv", layers, tokens, 3 * hidden, hidden, size),
            Kernel("attention", "attention", layers, moved, 4.0 * pairs * hidden, blocks),
            product("output", layers, tokens, hidden, hidden, size),
            over_rows("norm", 4 * layers, tokens * hidden * 3 * size, tokens),
            product("up", layers, tokens, inner, hidden, size),
            over_rows("gelu", layers, tokens * inner * 2 * size, tokens * -(-inner // 1024)),
            product("down", layers, tokens, hidden, inner, size),
            over_rows("ends", 8, tokens * hidden * 2 * size, tokens),
        )

    def prompts(self, num_tokens: int, devices: int) -> Sequence[Kernel]:
        return self.decode(num_tokens, num_tokens, devices)

    def attention(self, rows: int, kv_tokens: float, devices: int) -> Sequence[Kernel]:
        return self.decode(rows, kv_tokens, devices)[1:2]


class ConvNetForwards:
    """Of a residual network, its convolutions as the matrix products that they amount to."""

    dtype = "bf16"

    def __init__(self, shape: ConvNetShape) -> None:
        self.shape = shape

    def decode(self, rows: int, kv_tokens: float, devices: int) -> Sequence[Kernel]:  # noqa: ARG002
        shape, size = self.shape, self.shape.dtype_bytes
        side = -(-shape.image_size // 2)
        found = [
            product("stem", 1, rows * side**2, shape.width, 3 * STEM**2, size),
            over_rows("pixels", 3, rows * shape.image_size**2 * 3 * 2 * size, rows * shape.image_size),
        ]
        side, channels = -(-side // 2), shape.width
        found.append(over_rows("pool", 1, rows * side**2 * 5 * channels * size, rows * side))
        for stage, depth in enumerate(shape.depths):
            inner = shape.width << stage
            for block in range(depth):
                before, side = side, -(-side // 2) if stage and not block else side
                pixels = rows * side**2
                found.append(product("reduce", 1, rows * before**2, inner, channels, size))
                found.append(product("spatial", 1, pixels, inner, 9 * inner, size))
                found.append(product("expand", 1, pixels, 4 * inner, inner, size))
                if not block:
                    found.append(product("shortcut", 1, pixels, 4 * inner, channels, size))
                found.append(over_rows("add", 3, pixels * 4 * inner * 2 * size, pixels * 4 * inner // 1024))
                channels = 4 * inner
        found.append(product("classifier", 1, rows, shape.num_classes, channels, size))
        return found

    def prompts(self, num_tokens: int, devices: int) -> Sequence[Kernel]:
        return self.decode(num_tokens, 0, devices)

    def attention(self, rows: int, kv_tokens: float, devices: int) -> Sequence[Kernel]:  # noqa: ARG002
        return ()


def forwards_of(model: str) -> Forwards:
    """The forwards of a model.

    Raises:
        InputError: without a file; a model whose kernels are not known.
    """
    if model in MODELS:
        return DecoderForwards(MODELS[model])
    service = SERVICES.get(model)
    if isinstance(service, EncoderShape):
        return EncoderForwards(service)
    if isinstance(service, ConvNetShape):
        return ConvNetForwards(service)
    raise InputError(None, "hardware", f"a profile of {model}", f"one of {', '.join([*MODELS, *SERVICES])}")

"""Model shapes, and the sizes that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Llama-shaped decoder: RMSNorm, RoPE, grouped-query attention, gated MLP, untied or tied LM head.

    Sizes are counts of elements; `dtype_bytes` is the size of one weight, activation or KV element. `head_shares`: how
    many devices divide the LM head among them, of which this is one.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    dtype_bytes: int = 2
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    head_shares: int = 1

    def shard(self, devices: int) -> ModelShape:
        """What each of `devices` holds that share the model: they divide its heads, the columns of its MLPs, and the
        vocabulary of its LM head; `devices` divides the first two."""
        return replace(
            self,
            num_heads=self.num_heads // devices,
            num_kv_heads=self.num_kv_heads // devices,
            intermediate_size=self.intermediate_size // devices,
            head_shares=devices,
        )

    @property
    def head_size(self) -> int:
        """Rows of the LM head, one for each token of the vocabulary that it scores."""
        return -(-self.vocab_size // self.head_shares)

    @property
    def qkv_size(self) -> int:
        """Columns of the fused query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Weights of one decoder layer, its two norms included."""
        attention = self.hidden_size * (self.qkv_size + self.num_heads * self.head_dim)
        return attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size

    @property
    def parameters(self) -> int:
        """All weights: embedding, layers, final norm, LM head (untied)."""
        outer = (self.vocab_size + self.head_size) * self.hidden_size
        return outer + self.num_layers * self.layer_parameters + self.hidden_size

    @property
    def weight_bytes(self) -> int:
        return self.parameters * self.dtype_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token adds to the cache, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype_bytes


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """A BERT-shaped encoder: learned positions, multi-head attention and GELU MLP with biases, LayerNorm after each.

    Its answer to a request is the `hidden_size` values of the first token. Sizes are counts of elements.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    vocab_size: int = 30_522
    max_length: int = 512
    dtype_bytes: int = 2

    @property
    def parameters(self) -> int:
        """All weights and biases: embeddings and their norm, layers."""
        hidden, inner = self.hidden_size, self.intermediate_size
        layer = 4 * (hidden * hidden + hidden) + 2 * hidden * inner + inner + hidden + 4 * hidden
        return (self.vocab_size + self.max_length) * hidden + 2 * hidden + self.num_layers * layer

    @property
    def weight_bytes(self) -> int:
        return self.parameters * self.dtype_bytes


@dataclass(frozen=True, slots=True)
class ConvNetShape:
    """A ResNet of bottleneck blocks: a 7x7 stem, four stages of `depths` blocks, a linear classifier.

    A request is one image of `3 x image_size x image_size`; its answer `num_classes` values.
    """

    name: str
    depths: tuple[int, int, int, int]
    width: int
    image_size: int
    num_classes: int = 1000
    dtype_bytes: int = 2

    @property
    def parameters(self) -> int:
        """All weights, normalisation's included: stem, blocks with their projections, classifier."""
        total, channels = 3 * 49 * self.width + 2 * self.width, self.width
        for stage, depth in enumerate(self.depths):
            inner = self.width << stage
            for block in range(depth):
                total += channels * inner + 9 * inner * inner + inner * 4 * inner + 2 * (inner + inner + 4 * inner)
                if block == 0:
                    total += channels * 4 * inner + 2 * 4 * inner
                channels = 4 * inner
        return total + channels * self.num_classes + self.num_classes

    @property
    def weight_bytes(self) -> int:
        return self.parameters * self.dtype_bytes


def _llama(name: str, layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int) -> ModelShape:
    return ModelShape(name, layers, hidden, heads, kv_heads, hidden // heads, intermediate, 128_256)


# Shapes from the models' published config.json (meta-llama/Llama-3.2-1B, -3B, Llama-3.1-8B).
MODELS: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _llama("llama-3.2-1b", 16, 2048, 32, 8, 8192),
        _llama("llama-3.2-3b", 28, 3072, 24, 8, 8192),
        _llama("llama-3.1-8b", 32, 4096, 32, 8, 14336),
        # For tests and newcomers: runs in milliseconds on a CPU.
        ModelShape("tiny", 2, 64, 4, 2, 16, 128, 512, dtype_bytes=4),
    )
}

# What dynamic batching serves. Shapes as published: BERT (Devlin et al. 2018), ResNet-50 (He et al. 2015).
SERVICES: dict[str, EncoderShape | ConvNetShape] = {
    shape.name: shape
    for shape in (
        EncoderShape("bert-base", 12, 768, 12, 3072),
        ConvNetShape("resnet-50", (3, 4, 6, 3), 64, 224),
        EncoderShape("tiny-encoder", 2, 64, 4, 128, vocab_size=512, max_length=128, dtype_bytes=4),
        ConvNetShape("tiny-convnet", (1, 1, 1, 1), 8, 32, num_classes=10, dtype_bytes=4),
    )
}

# What is trained: weights in float32 unless a scenario says otherwise.
TRAINED: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        # From a launch-bound size to one that fills the device: the vocabulary and heads of Llama 2.
        ModelShape("llama-160m", 12, 768, 12, 12, 64, 2048, 32_000),
        ModelShape("llama-1.3b", 24, 2048, 16, 16, 128, 5504, 32_000),
        MODELS["llama-3.2-1b"],
        MODELS["tiny"],
    )
}

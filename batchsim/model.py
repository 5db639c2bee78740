"""Model shapes, and the sizes that follow from them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Llama-shaped decoder: RMSNorm, RoPE, grouped-query attention, gated MLP, untied or tied LM head.

    Sizes are counts of elements; `dtype_bytes` is the size of one weight, activation or KV element.
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
        return 2 * self.vocab_size * self.hidden_size + self.num_layers * self.layer_parameters + self.hidden_size

    @property
    def weight_bytes(self) -> int:
        return self.parameters * self.dtype_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token adds to the cache, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype_bytes


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

"""A Llama-shaped model in eager PyTorch, and training it with gradient accumulation, as a user would write both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from batchsim.model import ModelShape

Optimizer = Literal["sgd", "momentum", "adamw"]
Precision = Literal["bf16", "mixed", "fp32"]
Checkpointing = Literal["none", "full"]
# Told as parts of a micro-batch have been launched: `layers`, `head`, and in the backward pass `head_backward`.
Mark = Callable[[str], None]

# (weights, gradients and optimiser state; what matrix products and attention compute in)
DTYPES: dict[Precision, tuple[torch.dtype, torch.dtype]] = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.float32, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
}


class Attention(nn.Module):
    """Grouped-query attention, causal, with rotary positions; keys and values are not repeated for their groups."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.head_dim = shape.head_dim
        self.grouped = shape.num_heads != shape.num_kv_heads
        self.query = nn.Linear(shape.hidden_size, queries, bias=False)
        self.key = nn.Linear(shape.hidden_size, keys, bias=False)
        self.value = nn.Linear(shape.hidden_size, keys, bias=False)
        self.output = nn.Linear(queries, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return self.output(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Gated: down(silu(gate) * up)."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention and MLP, each behind a norm, each added to the residual stream."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.attention = Attention(shape)
        self.mlp_norm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class Llama(nn.Module):
    """Embedding, layers, norm and an untied LM head; `checkpointing` keeps of each layer its input alone."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.checkpointing = False
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)

    def hidden(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """(micro_batch, sequence_length) token ids -> (..., hidden_size); rotary positions are of `dtype`."""
        x = self.embedding(tokens)
        cos, sin = rotary(tokens.shape[1], self.shape, tokens.device, dtype)
        for layer in self.layers:
            x = checkpoint(layer, x, cos, sin, use_reentrant=False) if self.checkpointing else layer(x, cos, sin)
        return x  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., hidden_size) -> (..., vocab_size)."""
        return self.lm_head(self.norm(hidden))  # type: ignore[no-any-return]


def rotary(length: int, shape: ModelShape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the angles, each (length, head_dim); the halves of a head turn as pairs."""
    frequency = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim)
    angles = (torch.arange(length, device=device)[:, None] * frequency).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(..., length, head_dim), turned by the angles of its positions."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Trainer:
    """A model and its optimiser.

    `bf16` keeps weights, gradients and optimiser state in bfloat16. `mixed` keeps them in float32 and computes under
    `torch.autocast` to bfloat16: matrix products and attention read weights that are cast once a micro-batch (with
    checkpointing, once more as a layer is computed anew), the residual stream and the norms stay in float32. `fp32`
    has no cast at all; there grouped attention has no fused kernel on a GPU. The loss is computed in float32 of all
    logits at once.

    Optimisers are torch's own, in their fused implementation: one pass over weights, gradients and state, and no
    temporaries. Gradients are freed after every optimiser step (`set_to_none`), so that the first micro-batch's are
    kept as they come and the later ones' added to them.
    """

    def __init__(
        self,
        shape: ModelShape,
        device: str,
        *,
        precision: Precision = "mixed",
        optimizer: Optimizer = "adamw",
        checkpointing: Checkpointing = "none",
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.device, self.precision = torch.device(device), precision
        weights, self.compute_dtype = DTYPES[precision]
        with self.device:
            self.model = Llama(shape).to(weights)
        self.checkpointing = checkpointing
        self.optimizer = build_optimizer(self.model, optimizer)

    @property
    def checkpointing(self) -> Checkpointing:
        return "full" if self.model.checkpointing else "none"

    @checkpointing.setter
    def checkpointing(self, value: Checkpointing) -> None:
        self.model.checkpointing = value == "full"

    def forward(self, tokens: Tensor, accumulation_steps: int = 1, mark: Mark | None = None) -> Tensor:
        """This micro-batch's part of the optimiser step's mean loss; `tokens` (micro_batch, sequence_length + 1)."""
        with self._autocast():
            hidden = self.model.hidden(tokens[:, :-1], self.compute_dtype)
            if mark is not None:
                mark("layers")
                hidden.register_hook(lambda _: mark("head_backward"))  # type: ignore[no-untyped-call]
            logits = self.model.logits(hidden).float()
            loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / accumulation_steps
        if mark is not None:
            mark("head")
        return loss

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradients to those of the step."""
        loss.backward()  # type: ignore[no-untyped-call]

    def optimizer_step(self) -> None:
        """Change the weights, and free the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, micro_batches: Sequence[Tensor]) -> float:
        """One optimiser step over micro-batches of equal size; its mean loss, which the host waits for."""
        losses = []
        for tokens in micro_batches:
            loss = self.forward(tokens, len(micro_batches))
            self.backward(loss)
            losses.append(loss.detach())
        self.optimizer_step()
        return float(torch.stack(losses).sum())

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision != "mixed":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)


def build_optimizer(model: nn.Module, kind: Optimizer) -> torch.optim.Optimizer:
    """A fused optimiser; its state is made in its first step."""
    weights = model.parameters()
    if kind == "adamw":
        return torch.optim.AdamW(weights, lr=1e-4, fused=True)
    return torch.optim.SGD(weights, lr=1e-3, momentum=0.9 if kind == "momentum" else 0.0, fused=True)


def random_tokens(micro_batch: int, sequence_length: int, vocab_size: int, device: str, seed: int = 0) -> Tensor:
    """(micro_batch, sequence_length + 1) token ids: each the next one's input, and the last one a target alone."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(vocab_size, (micro_batch, sequence_length + 1), generator=generator, device=device)

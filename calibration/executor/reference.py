"""The decoder's operations in plain torch, and a decoder without a cache: what the fast path must equal.

The operations take the arguments of `kernels.py` and write their results in place, for the CPU in any float type.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import silu

from calibration.executor.buffers import Inputs

if TYPE_CHECKING:
    from calibration.executor.decoder import Decoder


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, computed in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    return normed.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `x` (rows, heads, head_dim), halves against each other; `cos`, `sin` (rows, head_dim / 2)."""
    wide = x.to(cos.dtype)
    left, right = wide.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal grouped-query attention of `q` (queries, heads, dim), the last ones of `k`, `v` (keys, kv_heads, dim)."""
    queries, heads, dim = q.shape
    group = heads // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) / math.sqrt(dim)
    hidden = torch.ones(queries, k.shape[0], dtype=torch.bool, device=q.device).triu(k.shape[0] - queries + 1)
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
    return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1))


def begin(inputs: Inputs, sampled: Tensor, slot: int, embedding: Tensor, weight: Tensor, eps: float,
          residual: Tensor, out: Tensor) -> None:  # fmt: skip
    """Stamp; resolve each row's token; `residual` (rows, hidden) = its embedding, `out` = the norm of that."""
    sampled[slot, 0] = time.perf_counter_ns()
    carried = sampled.view(-1)[inputs.carry.clamp(min=0).long()]
    tokens = torch.where(inputs.carry >= 0, carried, inputs.tokens.long())
    torch.index_select(embedding, 0, tokens, out=residual)
    out.copy_(rms_norm(residual, weight, eps))


def end(sampled: Tensor, slot: int) -> None:
    """Stamp the end."""
    sampled[slot, 1] = time.perf_counter_ns()


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """`residual` += `x`; `out` = RMSNorm(`residual`) * `weight`. All (rows, hidden)."""
    residual.add_(x)
    out.copy_(rms_norm(residual, weight, eps))


def rope_cache(qkv: Tensor, inputs: Inputs, cos: Tensor, sin: Tensor, cache: Tensor) -> None:
    """Rotate the queries of `qkv` (rows, qkv_size) in place; write rotated keys, and values, to one layer's `cache`.

    `cache` is (2, num_blocks, kv_heads, block_size, head_dim); `cos` and `sin` (positions, head_dim / 2).
    """
    _, _, kv_heads, block_size, dim = cache.shape
    heads = qkv.view(len(qkv), -1, dim)
    rotated = heads[:, : heads.shape[1] - kv_heads]
    positions = inputs.positions.long()
    rotated.copy_(rotate(rotated, cos[positions], sin[positions]))
    rows = torch.nonzero(inputs.slots >= 0).flatten()
    blocks, offsets = inputs.slots[rows].long() // block_size, inputs.slots[rows].long() % block_size
    cache[0][blocks, :, offsets] = heads[rows, -2 * kv_heads : -kv_heads]
    cache[1][blocks, :, offsets] = heads[rows, -kv_heads:]


def _cached(cache: Tensor, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    block_size, dim = cache.shape[3:]
    pages = cache[:, table[: -(-length // block_size)].long()]
    keys, values = pages.transpose(2, 3).reshape(2, -1, cache.shape[2], dim)[:, :length]
    return keys, values


def decode_attention(qkv: Tensor, inputs: Inputs, rows: int, tables: Tensor, cache: Tensor, _scratch: Tensor,
                     _splits: int, out: Tensor) -> None:  # fmt: skip
    """Attention of the first `rows` rows, a decoding sequence each; `out` (rows, heads * head_dim).

    Rows of length 0 are left as they are. The scratch space and the splits matter to the kernels alone.
    """
    kv_heads, dim = cache.shape[2], cache.shape[4]
    for row in range(rows):
        length = int(inputs.seq_lens[row])
        if length:
            keys, values = _cached(cache, tables[int(inputs.lines[row])], length)
            q = qkv[row].view(1, -1, dim)[:, : -2 * kv_heads]
            out[row] = attend(q, keys, values).flatten()


def prefill_attention(qkv: Tensor, inputs: Inputs, tile: int, tables: Tensor, cache: Tensor, out: Tensor) -> None:
    """Attention of the prefilling sequences: each query tile of `tile` rows against its past, itself included."""
    kv_heads, dim = cache.shape[2], cache.shape[4]
    for seq, first in inputs.tiles.view(-1, 2).tolist():
        start, stop = inputs.starts[seq : seq + 2].tolist()
        last = min(first + tile, stop - start)
        length = int(inputs.seq_lens[seq]) - (stop - start) + last
        keys, values = _cached(cache, tables[int(inputs.lines[seq])], length)
        rows = slice(start + first, start + last)
        q = qkv[rows].view(last - first, -1, dim)[:, : -2 * kv_heads]
        out[rows] = attend(q, keys, values).flatten(1)


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """`out` (rows, size) = silu(gate) * up, of `gate_up` (rows, 2 * size)."""
    gate, up = gate_up.chunk(2, -1)
    torch.mul(silu(gate), up, out=out)


def greedy(decoder: Decoder, prompt: Sequence[int], output_tokens: int, dtype: torch.dtype | None = None) -> list[int]:
    """The greedy continuation of `prompt` by the weights of `decoder`, everything computed anew for each token.

    No cache, no batch, no shared code but the norm, the rotation and the attention above. `dtype` (default: the
    decoder's) is the type to compute in.
    """
    shape, dtype = decoder.shape, dtype or decoder.dtype
    cos, sin = (table.to(torch.promote_types(dtype, torch.float32)) for table in (decoder.cos, decoder.sin))
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(output_tokens):
            count = len(tokens)
            x = decoder.embedding[torch.tensor(tokens, device=decoder.device)].to(dtype)
            for layer in decoder.layers:
                h = rms_norm(x, layer.attention_norm.to(dtype), shape.norm_eps)
                qkv = (h @ layer.qkv.to(dtype).t()).view(count, -1, shape.head_dim)
                q, k, v = torch.split(qkv, [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], 1)
                q, k = rotate(q, cos[:count], sin[:count]), rotate(k, cos[:count], sin[:count])
                x = x + attend(q, k, v).flatten(1) @ layer.output.to(dtype).t()
                h = rms_norm(x, layer.mlp_norm.to(dtype), shape.norm_eps)
                gate, up = (h @ layer.gate_up.to(dtype).t()).chunk(2, -1)
                x = x + (silu(gate) * up) @ layer.down.to(dtype).t()
            last = rms_norm(x[-1], decoder.final_norm.to(dtype), shape.norm_eps)
            tokens.append(int((decoder.head.to(dtype) @ last).argmax()))
    return tokens[len(prompt) :]

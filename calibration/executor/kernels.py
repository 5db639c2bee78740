"""The decoder's operations as Triton kernels, apart from attention. Import on a CUDA machine only.

Each wrapper takes what its namesake in `reference.py` takes. All arithmetic is float32, whatever the type in memory.
Sizes that are fixed for a decoder are compile-time constants and no row count is an argument, so that a kernel
compiles once and never in the middle of a run.
"""

# Triton kernels are not Python functions with types; the wrappers below are.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from batchsim.tiles.level import Choice
from calibration.executor.attention import decode_attention, prefill_attention
from calibration.executor.buffers import Inputs
from calibration.executor.launch import kernel
from calibration.executor.tiles.mlp import TileMlp

__all__ = ["add_norm", "begin", "decode_attention", "end", "prefill_attention", "rope_cache", "swiglu", "tile_mlp"]


@triton.jit
def _normed(x, weight, cols, live, HIDDEN: tl.constexpr, EPS: tl.constexpr):
    mean = tl.sum(x * x, 0) / HIDDEN
    return x * tl.rsqrt(mean + EPS) * tl.load(weight + cols, mask=live, other=0.0).to(tl.float32)


@kernel
@triton.jit
def _begin_kernel(
    tokens, carry, sampled, stamp, embedding, weight, residual, out,
    HIDDEN: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, STAMP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if STAMP:
        tl.store(stamp, tl.extra.cuda.globaltimer(), mask=row == 0)
    source = tl.load(carry + row)
    carried = tl.load(sampled + source, mask=source >= 0, other=0)
    token = tl.where(source >= 0, carried, tl.load(tokens + row).to(tl.int64))
    cols = tl.arange(0, BLOCK)
    live = cols < HIDDEN
    x = tl.load(embedding + token * HIDDEN + cols, mask=live, other=0.0)
    at = row.to(tl.int64) * HIDDEN + cols
    tl.store(residual + at, x, mask=live)
    normed = _normed(x.to(tl.float32), weight, cols, live, HIDDEN, EPS)
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=live)


def begin(inputs: Inputs, sampled: Tensor, slot: int, embedding: Tensor, weight: Tensor, eps: float,
          residual: Tensor, out: Tensor) -> None:  # fmt: skip
    """Stamp; resolve each row's token; `residual` (rows, hidden) = its embedding, `out` = the norm of that."""
    hidden = embedding.shape[1]
    _begin_kernel[(len(residual),)](
        inputs.tokens, inputs.carry, sampled, sampled[slot], embedding, weight, residual, out,
        HIDDEN=hidden, EPS=eps, BLOCK=triton.next_power_of_2(hidden), STAMP=sampled.is_cuda, num_warps=_warps(hidden),
    )  # fmt: skip


@kernel
@triton.jit
def _end_kernel(stamp, STAMP: tl.constexpr):
    if STAMP:
        tl.store(stamp, tl.extra.cuda.globaltimer())


def stamp(word: Tensor) -> None:
    """Write the device's clock, in nanoseconds, to the first element of `word` (int64)."""
    _end_kernel[(1,)](word, STAMP=word.is_cuda, num_warps=1)


def end(sampled: Tensor, slot: int) -> None:
    """Stamp the end."""
    stamp(sampled[slot, 1:])


@kernel
@triton.jit
def _add_norm_kernel(x, residual, weight, out, HIDDEN: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    live = cols < HIDDEN
    at = row * HIDDEN + cols
    total = tl.load(x + at, mask=live, other=0.0).to(tl.float32) + tl.load(residual + at, mask=live, other=0.0)
    rounded = total.to(residual.dtype.element_ty)
    tl.store(residual + at, rounded, mask=live)
    normed = _normed(rounded.to(tl.float32), weight, cols, live, HIDDEN, EPS)
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=live)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """`residual` += `x`; `out` = RMSNorm(`residual`) * `weight`. All (rows, hidden)."""
    rows, hidden = x.shape
    _add_norm_kernel[(rows,)](
        x, residual, weight, out, HIDDEN=hidden, EPS=eps, BLOCK=triton.next_power_of_2(hidden), num_warps=_warps(hidden)
    )


@kernel
@triton.jit
def _rope_cache_kernel(
    qkv, positions, slots, cos, sin, cache, value_offset,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)
    half = tl.arange(0, DIM // 2)
    live = head < HEADS + 2 * KV_HEADS
    left_at = row.to(tl.int64) * ((HEADS + 2 * KV_HEADS) * DIM) + head[:, None] * DIM + half[None, :]
    left = tl.load(qkv + left_at, mask=live[:, None], other=0.0)
    right = tl.load(qkv + left_at + DIM // 2, mask=live[:, None], other=0.0)
    position = tl.load(positions + row)
    c = tl.load(cos + position * (DIM // 2) + half)[None, :]
    s = tl.load(sin + position * (DIM // 2) + half)[None, :]
    rotates = (head < HEADS + KV_HEADS)[:, None]
    wide_left, wide_right = left.to(tl.float32), right.to(tl.float32)
    left = tl.where(rotates, wide_left * c - wide_right * s, wide_left).to(left.dtype)
    right = tl.where(rotates, wide_right * c + wide_left * s, wide_right).to(right.dtype)
    query = (head < HEADS)[:, None]
    tl.store(qkv + left_at, left, mask=query)
    tl.store(qkv + left_at + DIM // 2, right, mask=query)

    slot = tl.load(slots + row)
    page = (slot // PAGE).to(tl.int64)
    kv_head = (head - HEADS) % KV_HEADS
    # Values follow the keys of all pages, possibly more than 2^31 elements further on.
    start = tl.where(head >= HEADS + KV_HEADS, value_offset, 0).to(tl.int64)
    start += page * (KV_HEADS * PAGE * DIM) + kv_head * (PAGE * DIM) + (slot % PAGE) * DIM
    cached = ((head >= HEADS) & live & (slot >= 0))[:, None]
    tl.store(cache + start[:, None] + half[None, :], left, mask=cached)
    tl.store(cache + start[:, None] + half[None, :] + DIM // 2, right, mask=cached)


def rope_cache(qkv: Tensor, inputs: Inputs, cos: Tensor, sin: Tensor, cache: Tensor) -> None:
    """Rotate the queries of `qkv` (rows, qkv_size) in place; write rotated keys, and values, to one layer's `cache`.

    `cache` is (2, num_blocks, kv_heads, block_size, head_dim); `cos` and `sin` (positions, head_dim / 2).
    """
    _, _, kv_heads, block_size, dim = cache.shape
    rows, total = len(qkv), qkv.shape[1] // dim
    _rope_cache_kernel[(rows, triton.cdiv(total, 16))](
        qkv, inputs.positions, inputs.slots, cos, sin, cache, cache.stride(0),
        HEADS=total - 2 * kv_heads, KV_HEADS=kv_heads, DIM=dim, PAGE=block_size, TILE=16, num_warps=4,
    )  # fmt: skip


@kernel
@triton.jit
def _swiglu_kernel(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = cols < SIZE
    gate = tl.load(gate_up + row * (2 * SIZE) + cols, mask=live, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * SIZE) + SIZE + cols, mask=live, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * SIZE + cols, result.to(out.dtype.element_ty), mask=live)


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """`out` (rows, size) = silu(gate) * up, of `gate_up` (rows, 2 * size)."""
    rows, size = out.shape
    _swiglu_kernel[(rows, triton.cdiv(size, 1024))](gate_up, out, SIZE=size, BLOCK=1024, num_warps=4)


def tile_mlp(choice: Choice) -> TileMlp:
    """The gated MLP of a layer as one tile-synchronised kernel; see `TileMlp`."""
    return TileMlp(choice.policy, choice.tilings)


def _warps(hidden: int) -> int:
    return 8 if hidden > 2048 else 4

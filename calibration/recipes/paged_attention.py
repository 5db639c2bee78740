"""Attention for transformers' continuous batching from PyTorch and Triton alone, where no flash-attn package is there.

transformers asks one function, `lazy_import_paged_flash_attention`, for two: attention of packed prompts, and decoding
from a paged cache. `install` answers with PyTorch's built-in FlashAttention-2 and with the Triton kernels below, which
can be captured in a CUDA graph: the grid depends on shapes only, and lengths are read on the device.
"""

# Triton kernels are not Python functions with types; the wrappers below are.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

IMPLEMENTATION = "paged|flash_attention_2"
LOG2_E = math.log2(math.e)
PROGRAMS = 264
"""Programs that fill a large GPU about twice: contexts of small batches are split until there are so many."""


@triton.jit
def _kv_write(
    new_keys, new_values, keys, values, lengths, table, table_stride,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Append one sequence's new key and value, `WIDTH` = kv_heads * head_dim wide. A row of padding has length -1."""
    row = tl.program_id(0)
    length = tl.load(lengths + row)
    if length < 0:
        return
    page = tl.load(table + row * table_stride + length // PAGE)
    if page < 0:
        return
    column = tl.arange(0, BLOCK)
    live = column < WIDTH
    source = row.to(tl.int64) * WIDTH + column
    target = (page.to(tl.int64) * PAGE + length % PAGE) * WIDTH + column
    tl.store(keys + target, tl.load(new_keys + source, mask=live), mask=live)
    tl.store(values + target, tl.load(new_values + source, mask=live), mask=live)


@triton.jit
def _decode_split(
    queries, keys, values, lengths, table, table_stride, partial, sums, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, PAGE: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one sequence, one key-value head with its group of queries, one share of the context."""
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + row) + 1
    share = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    begin = split * share
    end = tl.minimum(begin + share, length)
    if begin >= end:
        return

    PER_KV: tl.constexpr = HEADS // KV_HEADS  # noqa: N806
    member = tl.arange(0, GROUP)
    column = tl.arange(0, COLUMNS)
    wide = column < DIM
    head = row.to(tl.int64) * HEADS + kv_head * PER_KV + member
    real = member < PER_KV
    q = tl.load(queries + head[:, None] * DIM + column[None, :], mask=real[:, None] & wide[None, :], other=0.0)

    top = tl.full((GROUP,), -float("inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    acc = tl.zeros((GROUP, COLUMNS), tl.float32)
    for start in range(begin, end, BLOCK):
        n = start + tl.arange(0, BLOCK)
        live = n < end
        page = tl.load(table + row * table_stride + n // PAGE, mask=live, other=0).to(tl.int64)
        at = ((page * PAGE + n % PAGE) * KV_HEADS + kv_head) * DIM
        there = live[:, None] & wide[None, :]
        k = tl.load(keys + at[:, None] + column[None, :], mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(live[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(values + at[:, None] + column[None, :], mask=there, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = new_top

    at = head * SPLITS + split
    acc = acc / total[:, None]
    tl.store(partial + at[:, None] * DIM + column[None, :], acc, mask=real[:, None] & wide[None, :])
    tl.store(sums + at, top + tl.log2(total), mask=real)


@triton.jit
def _decode_merge(
    partial, sums, lengths, out,
    HEADS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Weigh the shares of one (sequence, head) by their sums of exponentials; rows of padding become zeros."""
    row = tl.program_id(0)
    length = tl.load(lengths + row) + 1
    share = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    head = row.to(tl.int64) * HEADS + tl.program_id(1)
    split = tl.arange(0, SPLITS)
    column = tl.arange(0, COLUMNS)
    wide = column < DIM
    live = split * share < length
    log_sum = tl.load(sums + head * SPLITS + split, mask=live, other=-1e30)
    weights = tl.where(live, tl.exp2(log_sum - tl.max(log_sum, 0)), 0.0)
    parts = tl.load(
        partial + (head * SPLITS + split)[:, None] * DIM + column[None, :],
        mask=live[:, None] & wide[None, :], other=0.0,
    )  # fmt: skip
    result = tl.sum(parts * weights[:, None], 0) / tl.maximum(tl.sum(weights, 0), 1e-30)
    tl.store(out + head * DIM + column, result.to(out.dtype.element_ty), mask=wide)


def paged_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor, block_table: Tensor,
    softmax_scale: float | None = None, causal: bool = True, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """Append `k` and `v` to the cache and attend to it, as flash-attn's `flash_attn_with_kvcache`; returns q's shape.

    q (batch, 1, heads, head_dim); k, v (batch, 1, kv_heads, head_dim); caches (pages, page, kv_heads, head_dim), all
    contiguous; cache_seqlens (batch,) int32, lengths before the append, -1 in rows of padding; block_table (batch,
    pages of a sequence) int32. One new token a sequence, so `causal` changes nothing. Raises NotImplementedError for
    sliding windows.
    """
    del causal
    if tuple(window_size) != (-1, -1):
        raise NotImplementedError("the built-in attention has no sliding window")
    batch, _, heads, dim = q.shape
    page, kv_heads = k_cache.shape[1], k_cache.shape[2]
    columns, half_width = triton.next_power_of_2(dim), q.dtype.itemsize <= 2
    block = min(page, max(16, (8192 if half_width else 2048) // columns))
    splits = _splits(batch * kv_heads, page * block_table.shape[1] // (2 * block))
    out = torch.empty_like(q)
    partial = torch.empty(batch * heads * splits * dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(batch * heads * splits, dtype=torch.float32, device=q.device)
    width, stride = kv_heads * dim, block_table.stride(0)
    _kv_write[(batch,)](
        k, v, k_cache, v_cache, cache_seqlens, block_table, stride,
        PAGE=page, WIDTH=width, BLOCK=triton.next_power_of_2(width),
    )  # fmt: skip
    _decode_split[(batch, kv_heads, splits)](
        q, k_cache, v_cache, cache_seqlens, block_table, stride, partial, sums,
        LOG2_E * (dim**-0.5 if softmax_scale is None else softmax_scale),
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, COLUMNS=columns, PAGE=page,
        GROUP=max(16, triton.next_power_of_2(heads // kv_heads)), BLOCK=block, SPLITS=splits,
        PRECISION="tf32" if half_width else "ieee", num_warps=4, num_stages=3 if half_width else 1,
    )  # fmt: skip
    _decode_merge[(batch, heads)](
        partial, sums, cache_seqlens, out, HEADS=heads, DIM=dim, COLUMNS=columns, BLOCK=block, SPLITS=splits,
    )  # fmt: skip
    return out


def _splits(programs: int, most: int) -> int:
    # A power of two, from shapes alone: a captured grid serves every length.
    splits = 1
    while splits < 16 and programs * splits * 2 <= PROGRAMS and splits * 2 <= most:
        splits *= 2
    return splits


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """Attention of sequences laid end to end, as flash-attn's `flash_attn_varlen_func`: q (tokens, heads, head_dim).

    The causal mask is aligned to the last key, so that a chunk of a prompt sees its past. Raises NotImplementedError
    for sliding windows.
    """
    if tuple(window_size) != (-1, -1):
        raise NotImplementedError("the built-in attention has no sliding window")
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, causal, False, scale=softmax_scale
    )[0]
    return out


def install(model: Any, packed: Any = packed_attention, decode: Any = paged_decode) -> None:
    """Make `model`, a causal language model of transformers, use these functions in continuous batching."""
    from transformers.generation.continuous_batching import initialization
    from transformers.integrations import flash_paged

    def functions(*_arguments: Any, **_options: Any) -> tuple[Any, Any]:
        return packed, decode

    for module in (flash_paged, initialization):
        module.lazy_import_paged_flash_attention = functions
    # Not through `set_attn_implementation`, which looks for the flash-attn package.
    model.config._attn_implementation_internal = IMPLEMENTATION

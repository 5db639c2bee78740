"""Attention over a paged cache, grouped-query: one kernel for decoding (split-KV), one for chunks of prompts.

The cache of one layer is (2, num_blocks, kv_heads, block_size, head_dim): a page holds `block_size` keys of one head
next to each other, so that a program reads whole lines of memory. Offsets are 64-bit: a cache may exceed 2^31 elements.
"""

# ruff: noqa: N803, N806
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from calibration.executor.buffers import Inputs
from calibration.executor.launch import kernel

LOG2_E = math.log2(math.e)


@kernel
@triton.jit
def _decode_kernel(
    qkv, cache, value_offset, tables, lines, seq_lens, out, partial, sums,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one sequence, one key-value head with its group of queries, one share of the context."""
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(seq_lens + row)
    share = tl.cdiv(tl.cdiv(length, SPLITS), 16) * 16
    begin = split * share
    end = tl.minimum(begin + share, length)
    if begin >= end:
        return

    PER_KV: tl.constexpr = HEADS // KV_HEADS
    member = tl.arange(0, GROUP)
    dim = tl.arange(0, DIM)
    head = kv_head * PER_KV + member
    real = (member < PER_KV)[:, None]
    q_row = qkv + row.to(tl.int64) * ((HEADS + 2 * KV_HEADS) * DIM)
    q = tl.load(q_row + head[:, None] * DIM + dim[None, :], mask=real, other=0.0)
    table = tables + tl.load(lines + row) * WIDTH

    top = tl.full((GROUP,), -float("inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    acc = tl.zeros((GROUP, DIM), tl.float32)
    for start in range(begin, end, BLOCK):
        n = start + tl.arange(0, BLOCK)
        live = n < end
        page = tl.load(table + n // PAGE, mask=live, other=0).to(tl.int64)
        at = page * (KV_HEADS * PAGE * DIM) + kv_head * (PAGE * DIM) + (n % PAGE) * DIM
        keys = tl.load(cache + at[:, None] + dim[None, :], mask=live[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * SCALE
        scores = tl.where(live[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(cache + value_offset + at[:, None] + dim[None, :], mask=live[:, None], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        top = new_top

    acc = acc / total[:, None]
    out_row = row.to(tl.int64) * HEADS + head
    if SPLITS == 1:
        tl.store(out + out_row[:, None] * DIM + dim[None, :], acc.to(out.dtype.element_ty), mask=real)
    else:
        at = out_row * SPLITS + split
        tl.store(partial + at[:, None] * DIM + dim[None, :], acc, mask=real)
        tl.store(sums + at, top + tl.log2(total), mask=member < PER_KV)


@kernel
@triton.jit
def _combine_kernel(seq_lens, partial, sums, out, HEADS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr):
    """Weigh the shares of one (sequence, head) by their sums of exponentials."""
    row = tl.program_id(0)
    length = tl.load(seq_lens + row)
    if length == 0:
        return
    share = tl.cdiv(tl.cdiv(length, SPLITS), 16) * 16
    at = row.to(tl.int64) * HEADS + tl.program_id(1)
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, DIM)
    live = split * share < length
    log_sum = tl.load(sums + at * SPLITS + split, mask=live, other=-float("inf"))
    weights = tl.exp2(log_sum - tl.max(log_sum, 0))
    parts = tl.load(partial + (at * SPLITS + split)[:, None] * DIM + dim[None, :], mask=live[:, None], other=0.0)
    result = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + at * DIM + dim, result.to(out.dtype.element_ty))


def decode_attention(qkv: Tensor, inputs: Inputs, rows: int, tables: Tensor, cache: Tensor, scratch: Tensor,
                     splits: int, out: Tensor) -> None:  # fmt: skip
    """Attention of the first `rows` rows, a decoding sequence each; `out` (rows, heads * head_dim).

    Rows of length 0 are left as they are. Each of the `splits` (a power of two) shares of a context is a program
    of its own; `scratch` holds at least rows * heads * splits * (head_dim + 1) float32.
    """
    _, _, kv_heads, page, dim = cache.shape
    heads = out.shape[1] // dim
    parts = rows * heads * splits
    sums, partial = scratch[:parts], scratch[parts : parts * (dim + 1)]
    half_width = cache.dtype.itemsize <= 2
    _decode_kernel[(rows, kv_heads, splits)](
        qkv, cache, cache.stride(0), tables, inputs.lines, inputs.seq_lens, out, partial, sums,
        WIDTH=tables.shape[1], HEADS=heads, KV_HEADS=kv_heads, DIM=dim, PAGE=page,
        GROUP=max(16, triton.next_power_of_2(heads // kv_heads)), BLOCK=max(32, 8192 // dim) if half_width else 32,
        SPLITS=splits, SCALE=LOG2_E / math.sqrt(dim), PRECISION=_precision(cache),
        num_warps=4, num_stages=3 if half_width else 1,
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(rows, heads)](
            inputs.seq_lens, partial, sums, out, HEADS=heads, DIM=dim, SPLITS=splits, num_warps=4
        )


@kernel
@triton.jit
def _prefill_kernel(
    qkv, cache, value_offset, tables, lines, seq_lens, starts, tiles, out,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    QUERIES: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one tile of queries of one sequence, one head."""
    seq = tl.load(tiles + 2 * tl.program_id(0))
    first = tl.load(tiles + 2 * tl.program_id(0) + 1)
    head = tl.program_id(1)
    start_row = tl.load(starts + seq)
    count = tl.load(starts + seq + 1) - start_row
    length = tl.load(seq_lens + seq)
    query = first + tl.arange(0, QUERIES)
    position = length - count + query
    real = (query < count)[:, None]
    dim = tl.arange(0, DIM)
    row = (start_row + query).to(tl.int64)
    q_at = row[:, None] * ((HEADS + 2 * KV_HEADS) * DIM) + head * DIM + dim[None, :]
    q = tl.load(qkv + q_at, mask=real, other=0.0)
    table = tables + tl.load(lines + seq) * WIDTH
    kv_head = head // (HEADS // KV_HEADS)

    top = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, DIM), tl.float32)
    end = tl.minimum(length - count + first + QUERIES, length)
    for start in range(0, end, BLOCK):
        n = start + tl.arange(0, BLOCK)
        live = n < end
        page = tl.load(table + n // PAGE, mask=live, other=0).to(tl.int64)
        at = page * (KV_HEADS * PAGE * DIM) + kv_head * (PAGE * DIM) + (n % PAGE) * DIM
        keys = tl.load(cache + at[:, None] + dim[None, :], mask=live[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * SCALE
        scores = tl.where((n[None, :] <= position[:, None]) & live[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(cache + value_offset + at[:, None] + dim[None, :], mask=live[:, None], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        top = new_top

    acc = acc / total[:, None]
    out_at = row[:, None] * (HEADS * DIM) + head * DIM + dim[None, :]
    tl.store(out + out_at, acc.to(out.dtype.element_ty), mask=real)


def prefill_attention(qkv: Tensor, inputs: Inputs, tile: int, tables: Tensor, cache: Tensor, out: Tensor) -> None:
    """Attention of the prefilling sequences: each query tile of `tile` rows against its past, itself included."""
    _, _, kv_heads, page, dim = cache.shape
    heads = out.shape[1] // dim
    half_width = cache.dtype.itemsize <= 2
    _prefill_kernel[(inputs.tiles.shape[0] // 2, heads)](
        qkv, cache, cache.stride(0), tables, inputs.lines, inputs.seq_lens, inputs.starts, inputs.tiles, out,
        WIDTH=tables.shape[1], HEADS=heads, KV_HEADS=kv_heads, DIM=dim, PAGE=page, QUERIES=tile,
        BLOCK=64 if half_width else 32, SCALE=LOG2_E / math.sqrt(dim), PRECISION=_precision(cache),
        num_warps=8 if tile >= 128 else 4, num_stages=3 if half_width else 1,
    )  # fmt: skip


def _precision(cache: Tensor) -> str:
    # Full float32 products for the comparison with the reference; bf16 operands ignore it.
    return "ieee" if cache.dtype == torch.float32 else "tf32"

"""The kernels of a decoder's forward, as the executor launches them (calibration/executor): work, bytes and blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Literal

from batchsim.memory.serving import splits
from batchsim.model import ModelShape

FLOAT32 = 4
GROUP = 16  # rows of a query group in decode attention: what a matrix instruction takes at least
STEP = 8192  # elements of keys in a step of a block
SHARE = 16  # tokens of a context that a block takes at least
ROPE_HEADS, SWIGLU_COLUMNS = 16, 1024  # of one block

Kind = Literal["product", "attention", "rows", "reduce"]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel, launched `count` times in a forward.

    kind: a matrix product, attention of decoding rows, a kernel of few operations over rows, or an all-reduce.
    rows, columns, depth: of a product; else 0. flops: on the matrix units. size_bytes: to and from device memory.
    blocks: thread blocks; of a product they follow from its tiles. block_bytes: of attention, what the steps of a block
    would read that are whole.
    """

    name: str
    kind: Kind
    count: int
    size_bytes: float
    flops: float = 0.0
    blocks: int = 0
    rows: int = 0
    columns: int = 0
    depth: int = 0
    element_bytes: int = 2
    block_bytes: float = 0.0


def product(name: str, count: int, rows: int, columns: int, depth: int, size: int) -> Kernel:
    """(rows, depth) x (depth, columns), elements of `size` bytes."""
    moved = size * (depth * columns + rows * (depth + columns))
    return Kernel(name, "product", count, moved, 2.0 * rows * columns * depth, 0, rows, columns, depth, size)


def over_rows(name: str, count: int, size_bytes: float, blocks: int) -> Kernel:
    return Kernel(name, "rows", count, size_bytes, 0.0, blocks)


@cache
def projections(shape: ModelShape, rows: int, sampled: int) -> tuple[Kernel, ...]:
    """All kernels of a forward of `rows` rows but attention, of a model or one device's share of it.

    `sampled` of the rows go through the LM head.
    """
    size, hidden, layers = shape.dtype_bytes, shape.hidden_size, shape.num_layers
    qkv, inner, heads = shape.qkv_size, shape.intermediate_size, shape.num_heads * shape.head_dim
    found = [
        product("qkv", layers, rows, qkv, hidden, size),
        over_rows("rope", layers, rows * qkv * 2 * size, rows * -(-qkv // (ROPE_HEADS * shape.head_dim))),
        product("output", layers, rows, hidden, heads, size),
        over_rows("add_norm", 2 * layers, rows * hidden * 4 * size, rows),
        product("gate_up", layers, rows, 2 * inner, hidden, size),
        over_rows("swiglu", layers, rows * inner * 3 * size, rows * -(-inner // SWIGLU_COLUMNS)),
        product("down", layers, rows, hidden, inner, size),
        over_rows("begin", 1, rows * hidden * 3 * size, rows),
    ]
    if sampled:
        found.append(product("head", 1, sampled, shape.head_size, hidden, size))
        found.append(over_rows("argmax", 2, sampled * shape.head_size * size / 2, sampled))
    if shape.head_shares > 1:
        found.append(Kernel("all_reduce", "reduce", 2 * layers, rows * hidden * size))
        found.append(Kernel("choose", "reduce", 1, sampled * 16 * shape.head_shares))
        found.append(over_rows("chosen", 5, sampled * 16 * shape.head_shares, 1))
    return tuple(found)


def decode_attention(shape: ModelShape, rows: int, kv_tokens: float) -> Iterator[Kernel]:
    """Attention of `rows` decoding rows with contexts of `kv_tokens` in all, each as long as the others.

    A block takes a share of a context for one head of keys and values, step by step; shares are whole multiples of 16
    tokens, and blocks that none is left for end at once.
    """
    size, layers, heads, kv_heads = shape.dtype_bytes, shape.num_layers, shape.num_heads, shape.num_kv_heads
    shares, context = splits(shape, rows), max(kv_tokens / rows, 1.0)
    share = SHARE * ceil(ceil(context / shares) / SHARE)
    blocks = rows * kv_heads * ceil(context / share)
    step = max(32, STEP // shape.head_dim)
    steps = ceil(min(share, context) / step)
    read = 2 * kv_tokens * kv_heads * shape.head_dim * size + 2 * rows * heads * shape.head_dim * size
    flops = 4.0 * kv_tokens * kv_heads * GROUP * shape.head_dim
    taken = steps * step * 2 * shape.head_dim * size
    yield Kernel("decode_attention", "attention", layers, read, flops, blocks, block_bytes=taken)
    if shares > 1:
        yield over_rows("combine", layers, rows * heads * shares * (shape.head_dim + 1) * FLOAT32, rows * heads)

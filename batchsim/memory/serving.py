"""The tape of a decoder that serves: what the executor (calibration/executor) builds, and what running it takes.

Everything is taken before the first request and kept: parameters, KV cache, buffers for the largest batch, and per
stream that computes a workspace for matrix products. A captured graph computes in the same buffers; its pool holds the
workspace of the stream on which it was captured.
"""

from __future__ import annotations

from dataclasses import dataclass

from batchsim.memory.overheads import CPU, Library
from batchsim.memory.tape import Tape
from batchsim.model import ModelShape

SLOTS = 2  # batches in flight
QUERY_TILE, CPU_QUERY_TILE = 128, 16  # prompt rows of one program of the attention kernel: bfloat16, and the reference
MAX_SPLITS, PROGRAMS_WANTED = 32, 1024  # shares of a context, and programs, of the attention of decoding sequences


@dataclass(frozen=True, slots=True)
class Serving:
    """A decoder's limits, as `calibration.executor.Decoder` takes them; `graphs`: decoding runs as CUDA graphs."""

    shape: ModelShape
    num_kv_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int = 16
    graphs: bool = True
    library: Library = CPU


def splits(shape: ModelShape, rows: int) -> int:
    """Shares that the attention of `rows` decoding sequences cuts each context into, to fill the device."""
    shares = 1
    while shares < MAX_SPLITS and rows * shape.num_kv_heads * shares < PROGRAMS_WANTED:
        shares *= 2
    return shares


def input_bytes(serving: Serving) -> int:
    """Bytes of one slot's inputs, int32: four a row, two and a block table a sequence, two a query tile, and more.

    The arithmetic of calibration/executor/buffers.py: every field is padded to 16 bytes.
    """
    seqs = serving.max_num_seqs
    rows = max(serving.max_num_batched_tokens, seqs)
    tiles = rows // (QUERY_TILE if serving.shape.dtype_bytes <= 2 else CPU_QUERY_TILE) + seqs
    table = _padded(-(-serving.max_model_len // serving.block_size))
    fields = (*(rows,) * 4, *(seqs,) * 2, seqs + 1, 2 * tiles, seqs)
    return 4 * (sum(map(_padded, fields)) + seqs * table)


def _padded(count: int) -> int:
    return -(-count // 4) * 4


def tape(serving: Serving) -> Tape:
    """Building the decoder, capturing its graphs, and running it."""
    shape, library, found = serving.shape, serving.library, Tape()
    size, seqs = shape.dtype_bytes, serving.max_num_seqs
    rows = max(serving.max_num_batched_tokens, seqs)
    heads = shape.num_heads * shape.head_dim

    found.phase("building")
    for _ in range(SLOTS):
        found.new("inputs", input_bytes(serving))
    found.new("inputs", SLOTS * (2 + _padded(seqs)) * 8)  # sampled tokens and two stamps
    found.new("parameters", shape.vocab_size * shape.hidden_size * size)
    for _ in range(shape.num_layers):
        for elements in (
            shape.hidden_size, shape.qkv_size * shape.hidden_size, shape.hidden_size * heads, shape.hidden_size,
            2 * shape.intermediate_size * shape.hidden_size, shape.hidden_size * shape.intermediate_size,
        ):  # fmt: skip
            found.new("parameters", elements * size)
    found.new("parameters", shape.hidden_size * size)
    found.new("parameters", shape.head_size * shape.hidden_size * size)
    for _ in range(shape.num_layers):
        found.new("KV cache", serving.num_kv_blocks * serving.block_size * shape.kv_bytes_per_token // shape.num_layers)
    for _ in ("cos", "sin"):
        found.new("inputs", serving.max_model_len * (shape.head_dim // 2) * 4)
    # Residual, normed, branch; query, key and value; attended; gate and up; their product; the sampled rows.
    for columns in (
        *(shape.hidden_size,) * 3,
        shape.qkv_size,
        heads,
        2 * shape.intermediate_size,
        shape.intermediate_size,
    ):
        found.new("activations", rows * columns * size)
    found.new("activations", seqs * shape.hidden_size * size)
    found.new("logits", seqs * shape.head_size * size)
    parts = max(rows_ * splits(shape, rows_) for rows_ in range(1, seqs + 1)) * shape.num_heads
    found.new("activations", parts * (shape.head_dim + 1) * 4)

    found.phase("serving")
    found.new("workspace", library.product_workspace)  # the stream of the warm-up
    if serving.graphs:
        found.empty_cache()
        found.new("workspace", library.product_workspace, "graphs")
    found.new("workspace", library.product_workspace)  # the stream of the run
    return found

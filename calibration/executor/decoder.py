"""A Llama-shaped decoder with random weights and a paged KV cache, made to be captured in CUDA graphs."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchsim.model import ModelShape
from batchsim.operations import KernelSync
from batchsim.tiles.level import TileLevel
from calibration.executor.buffers import STAMPS, Buffers, Geometry, Inputs
from calibration.executor.parallel import WHOLE, Share
from calibration.executor.partition import stream_like_current

# Takes a layer's normed input, its two weights, room for what is between them, and room for the output.
TileMlp = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]

MAX_SPLITS = 32
PROGRAMS_WANTED = 1024  # of the decode attention: about eight for each of an H200's 132 multiprocessors


class Layer(NamedTuple):
    """One layer's weights; matrices are (out features, in features)."""

    attention_norm: Tensor
    qkv: Tensor
    output: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class Decoder:
    """The model, its cache and its buffers, on one device.

    `max_num_seqs`, `max_num_batched_tokens` and `max_model_len` (tokens of one request, the wasted one included)
    bound what a batch may hold; `num_kv_blocks` blocks of `block_size` tokens (a power of two, at least 16) make
    the cache. Batches that only decode are padded to the next of `graph_sizes`, of which `max_num_seqs` is always
    one, whether or not they run as graphs, so that both compute the same bits. Weights and the cache's first
    contents come from `seed`. On a GPU `dtype` is bfloat16 or float32, on the CPU any float type. Set
    `tiles` to have forwards that ask for tile-synchronised kernels run them, on a GPU in bfloat16. With a `share`
    it is one of several that compute the model of `shape` together; its own `shape` is then its share's.

    Raises ValueError for a shape or size that the kernels do not handle.
    """

    def __init__(
        self, shape: ModelShape, *, device: str | torch.device, dtype: torch.dtype, seed: int, num_kv_blocks: int,
        block_size: int = 16, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int,
        graph_sizes: Sequence[int] = (), share: Share = WHOLE,
    ) -> None:  # fmt: skip
        whole, shape = shape, share.shape(shape)
        for value, name, least in ((shape.head_dim, "head_dim", 16), (block_size, "block_size", 16)):
            if value < least or value & (value - 1):
                raise ValueError(f"{name} is {value}; it has to be a power of two, at least {least}")
        if shape.num_heads % shape.num_kv_heads:
            raise ValueError(f"{shape.num_heads} query heads cannot share {shape.num_kv_heads} key-value heads evenly")
        self.shape, self.device, self.dtype, self.seed = shape, torch.device(device), dtype, seed
        self.share = share
        self.block_size, self.num_kv_blocks = block_size, num_kv_blocks
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.max_model_len = max_model_len
        self.graph_sizes = sorted({size for size in graph_sizes if 0 < size < max_num_seqs} | {max_num_seqs})
        self.prefill_tile = 128 if dtype.itemsize <= 2 else 16
        self.ops: Any = importlib.import_module(
            "calibration.executor.kernels" if self.device.type == "cuda" else "calibration.executor.reference"
        )
        rows = max(max_num_batched_tokens, max_num_seqs)
        self.buffers = Buffers(
            device=self.device, max_rows=rows, max_seqs=max_num_seqs,
            max_tiles=rows // self.prefill_tile + max_num_seqs, table_width=-(-max_model_len // block_size),
        )  # fmt: skip
        with torch.inference_mode():
            self._make_weights(whole)
            self._make_workspace(rows)
        self._graphs: dict[tuple[int, int, bool], torch.cuda.CUDAGraph] = {}
        self.tiles: TileLevel | None = None
        self._tile_mlps: dict[int, TileMlp | None] = {}
        self._pool: Any = None
        self._capturing: torch.cuda.Stream | None = None  # None: torch's own for this

    def _make_weights(self, whole: ModelShape) -> None:
        """Random weights, scaled so that the residual stream stays near unit variance through all layers.

        Of those of the `whole` model it keeps its share, drawn one layer at a time.
        """
        shape, share = self.shape, self.share
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def normal(*size: int, mean: float = 0.0, std: float) -> Tensor:
            return torch.empty(size, dtype=self.dtype, device=self.device).normal_(mean, std, generator=generator)

        def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
            return normal(rows, columns, std=gain / math.sqrt(columns))

        def norm() -> Tensor:
            return normal(shape.hidden_size, mean=1.0, std=0.1)

        residual_gain = 1 / math.sqrt(2 * shape.num_layers)
        self.embedding = normal(shape.vocab_size, shape.hidden_size, std=1.0)
        self.layers = [
            share.layer(
                Layer(
                    norm(),
                    matrix(whole.qkv_size, whole.hidden_size),
                    matrix(whole.hidden_size, whole.num_heads * whole.head_dim, residual_gain),
                    norm(),
                    matrix(2 * whole.intermediate_size, whole.hidden_size),
                    matrix(whole.hidden_size, whole.intermediate_size, residual_gain),
                ),
                shape,
            )
            for _ in range(shape.num_layers)
        ]
        self.final_norm = norm()
        self.head = share.head(matrix(shape.vocab_size, shape.hidden_size))
        size = (2, self.num_kv_blocks, shape.num_kv_heads, self.block_size, shape.head_dim)
        self.caches = [torch.empty(size, dtype=self.dtype, device=self.device) for _ in range(shape.num_layers)]
        for cache in self.caches:
            for half in cache:
                half.normal_(generator=generator)
        wide = torch.promote_types(self.dtype, torch.float32)
        exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
        angles = torch.outer(torch.arange(self.max_model_len, dtype=torch.float64), shape.rope_theta**-exponents)
        self.cos, self.sin = angles.cos().to(self.device, wide), angles.sin().to(self.device, wide)

    def _make_workspace(self, rows: int) -> None:
        shape, seqs = self.shape, self.max_num_seqs

        def zeros(*size: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=self.device)

        self.residual, self.hidden = zeros(rows, shape.hidden_size), zeros(rows, shape.hidden_size)
        self.branch = zeros(rows, shape.hidden_size)
        self.qkv = zeros(rows, shape.qkv_size)
        self.attended = zeros(rows, shape.num_heads * shape.head_dim)
        self.gate_up, self.inner = zeros(rows, 2 * shape.intermediate_size), zeros(rows, shape.intermediate_size)
        self.chosen, self.logits = zeros(seqs, shape.hidden_size), zeros(seqs, shape.head_size)
        parts = max(size * self.splits(size) for size in range(1, seqs + 1)) * shape.num_heads
        self.scratch = zeros(parts * (shape.head_dim + 1), dtype=torch.float32)

    def padded(self, decodes: int) -> int:
        """The graph size that a batch of `decodes` decoding sequences is padded to."""
        return next(size for size in self.graph_sizes if size >= decodes)

    def splits(self, rows: int) -> int:
        """Shares that the decode attention cuts each context into: enough programs to fill the device."""
        splits = 1
        while splits < MAX_SPLITS and rows * self.shape.num_kv_heads * splits < PROGRAMS_WANTED:
            splits *= 2
        return splits

    @property
    def kernels_per_forward(self) -> dict[str, int]:
        """Launches that the host issues for a forward, by kind.

        `decode`: only decoding, at the smallest graph size; `decode_whole`: at sizes whose contexts are not split;
        `prefill`: only prompts, the last token sampled. A batch of both kinds adds the decode attention to
        `prefill`. A matrix product counts as one, though cuBLAS may add a reduction when it splits K.
        """
        common = 4 + 1 + 2 + 1  # products; rotation and cache; norms; activation
        ends = 1 + 2 + 1  # beginning; head and argmax; end
        layers = self.shape.num_layers
        split = 2 if self.splits(self.graph_sizes[0]) > 1 else 1
        return {
            "decode": ends + layers * (common + split),
            "decode_whole": ends + layers * (common + 1),
            "prefill": ends + 1 + layers * (common + 1),
        }

    def forward(self, slot: int, geometry: Geometry, *, graph: bool = False, kernels: KernelSync = "stream") -> None:
        """Launch one forward of the inputs of `slot` on the current stream: stamps, layers, greedy sampling.

        Sampled tokens go to `buffers.sampled[slot, 2:]`, stamps before them. With `graph`, a batch that only
        decodes is replayed from a CUDA graph, captured now if it was not before; ignored on the CPU. `kernels`: tile
        runs each MLP as one tile-synchronised kernel where `tiles` says that it is faster.
        """
        mlp = self._tile_mlp(geometry.rows) if kernels == "tile" else None
        if graph and not geometry.tiles and self.device.type == "cuda":
            captured = self._graphs.get((slot, geometry.rows, mlp is not None))
            if captured is None:
                captured = self._capture(slot, geometry, mlp)
            captured.replay()
        else:
            self._launch(slot, geometry, mlp)

    def _tile_mlp(self, rows: int) -> TileMlp | None:
        """The tile-synchronised MLP of `rows` rows, or None where the library's kernels are to be used."""
        if self.tiles is None or self.device.type != "cuda":
            return None
        if rows not in self._tile_mlps:
            choice = self.tiles.choice(rows)
            self._tile_mlps[rows] = None if choice is None else self.ops.tile_mlp(choice)
        return self._tile_mlps[rows]

    def _launch(self, slot: int, geometry: Geometry, mlp: TileMlp | None = None) -> None:
        ops, buffers, eps, share = self.ops, self.buffers, self.shape.norm_eps, self.share
        inputs: Inputs = buffers.device(slot, geometry)
        tables, sampled = buffers.device_tables[slot], buffers.sampled
        rows, decodes = geometry.rows, geometry.decodes
        residual, hidden, branch = self.residual[:rows], self.hidden[:rows], self.branch[:rows]
        qkv, attended = self.qkv[:rows], self.attended[:rows]
        gate_up, inner = self.gate_up[:rows], self.inner[:rows]
        splits = self.splits(self.padded(decodes)) if decodes else 1

        ops.begin(inputs, sampled, slot, self.embedding, self.layers[0].attention_norm, eps, residual, hidden)
        for index, layer in enumerate(self.layers):
            cache = self.caches[index]
            torch.mm(hidden, layer.qkv.t(), out=qkv)
            ops.rope_cache(qkv, inputs, self.cos, self.sin, cache)
            if decodes:
                ops.decode_attention(qkv, inputs, decodes, tables, cache, self.scratch, splits, attended)
            if geometry.tiles:
                ops.prefill_attention(qkv, inputs, self.prefill_tile, tables, cache, attended)
            torch.mm(attended, layer.output.t(), out=branch)
            share.reduce(branch)
            ops.add_norm(branch, residual, layer.mlp_norm, eps, hidden)
            if mlp is not None:
                mlp(hidden, layer.gate_up, layer.down, inner, branch)
            else:
                torch.mm(hidden, layer.gate_up.t(), out=gate_up)
                ops.swiglu(gate_up, inner)
                torch.mm(inner, layer.down.t(), out=branch)
            share.reduce(branch)
            last = index + 1 == len(self.layers)
            weight = self.final_norm if last else self.layers[index + 1].attention_norm
            ops.add_norm(branch, residual, weight, eps, hidden)
        if geometry.samples:
            logits = self.logits[: geometry.samples]
            if geometry.tiles:
                chosen = self.chosen[: geometry.samples]
                torch.index_select(hidden, 0, inputs.sample_rows, out=chosen)
                hidden = chosen
            torch.mm(hidden, self.head.t(), out=logits)
            share.choose(logits, sampled[slot, STAMPS : STAMPS + geometry.samples])
        ops.end(sampled, slot)

    def warm_up(self) -> None:
        """Compile all kernels and load all libraries that a run may need: one forward of each kind and size.

        Runs idle inputs through both slots; what the slots held is lost, the cache is kept.
        """
        rows = min(self.prefill_tile, self.max_num_batched_tokens)
        with torch.inference_mode():
            for slot in range(len(self.buffers.device_inputs)):
                for geometry in (*map(Geometry.decoding, self.graph_sizes), Geometry(rows, 0, 1, 1, 1)):
                    self._stage_idle(slot, geometry)
                    self._launch(slot, geometry)
        self._finish()

    def capture(self, sizes: Iterable[int] | None = None) -> None:
        """Capture graphs of `sizes` (default: all of `graph_sizes`) for every slot, so that no run has to.

        Nothing on the CPU. Raises ValueError for a size that is not a graph size.
        """
        if self.device.type != "cuda":
            return
        for size in self.graph_sizes if sizes is None else sizes:
            if size not in self.graph_sizes:
                raise ValueError(f"{size} is not among the graph sizes {self.graph_sizes}")
            for slot in range(len(self.buffers.device_inputs)):
                if (slot, size, False) not in self._graphs:
                    self._stage_idle(slot, Geometry.decoding(size))
                    with torch.inference_mode():
                        self._capture(slot, Geometry.decoding(size))

    def _capture(self, slot: int, geometry: Geometry, mlp: TileMlp | None = None) -> torch.cuda.CUDAGraph:
        # Launching first compiles kernels and sets cuBLAS up, which a capture could not. In the middle of a run it
        # computes what the replay computes again from the same inputs, so nothing is spoilt.
        self._launch(slot, geometry, mlp)
        torch.cuda.synchronize(self.device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # One pool for all: graphs share it safely because they replay in order on one stream. NCCL's own thread may
        # query events meanwhile, which a capture allows other threads only so.
        self._capturing = self._capturing or stream_like_current(self.device)
        with torch.cuda.graph(graph, pool=self._pool, stream=self._capturing, capture_error_mode="thread_local"):
            self._launch(slot, geometry, mlp)
        self._graphs[slot, geometry.rows, mlp is not None] = graph
        return graph

    def _stage_idle(self, slot: int, geometry: Geometry) -> None:
        inputs = self.buffers.host(slot, geometry)
        self.buffers.pad(inputs, 0)
        if geometry.tiles:
            inputs.seq_lens[:], inputs.starts[:] = geometry.rows, (0, geometry.rows)
            inputs.tiles[:], inputs.sample_rows[:] = 0, geometry.rows - 1
        destination, source = self.buffers.copy_in(slot, geometry, 0)
        destination.copy_(source)

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

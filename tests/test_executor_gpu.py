"""The Triton kernels against float64, and the executor's tokens with streams and graphs, on a GPU.

The kernel tests also run without one, in Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/test_executor_gpu.py`.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import random
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._C._autograd import DeviceType

from batchsim.batching.continuous import ContinuousBatcher, Request
from batchsim.model import ModelShape
from batchsim.schedules import SCHEDULES
from calibration.executor import Decoder, Execution, Executor, prompt_tokens, reference
from calibration.executor.buffers import Geometry, Inputs
from calibration.executor.inputs import prompt_ids

CUDA = torch.cuda.is_available()
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if CUDA else "cpu"

# Warnings of Triton and of torch's CUDA parts are not this project's.
pytestmark = [pytest.mark.filterwarnings("default"), *([] if INTERPRETER else [pytest.mark.gpu])]
needs_kernels = pytest.mark.skipif(not (CUDA or INTERPRETER), reason="needs a GPU, or TRITON_INTERPRET=1 and Triton")
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU: torch.cuda is not available")

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}  # relative norm; bf16 rounds to 2^-9
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
HALF = torch.float16 if INTERPRETER else torch.bfloat16  # the interpreter multiplies bfloat16 matrices as integers


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    from calibration.executor import kernels

    return kernels


def normal(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, device=DEVICE).to(dtype)


def poison(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.full(size, torch.nan, dtype=dtype, device=DEVICE)


def integers(values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=DEVICE)


def check(result: Tensor, exact: Tensor) -> None:
    assert exact.dtype == torch.float64
    error = (result.double() - exact).norm() / exact.norm()
    assert error < TOLERANCE[result.dtype], f"relative error {error:.2e}"  # NaN fails, too


@needs_kernels
@DTYPES
@pytest.mark.parametrize("hidden", [64, 96, 3072])
def test_begin_resolves_tokens_and_norms(kernels: ModuleType, dtype: torch.dtype, hidden: int) -> None:
    embedding, weight = normal(50, hidden, dtype=dtype), normal(hidden, dtype=dtype)
    sampled = torch.randint(50, (2, 10), device=DEVICE)
    carry, staged = integers([-1, 4, 17, -1, 19]), integers([3, 0, 0, 49, 1])
    inputs = Inputs(staged, carry, None, None, None, None)
    residual, out = poison(5, hidden, dtype=dtype), poison(5, hidden, dtype=dtype)
    tokens = torch.tensor([3, int(sampled[0, 4]), int(sampled[1, 7]), 49, int(sampled[1, 9])], device=DEVICE)
    kernels.begin(inputs, sampled, 0, embedding, weight, 1e-5, residual, out)
    assert torch.equal(residual, embedding[tokens])
    check(out, reference.rms_norm(embedding[tokens].double(), weight.double(), 1e-5))


@needs_kernels
@DTYPES
@pytest.mark.parametrize("hidden", [64, 96, 3072])
def test_add_norm(kernels: ModuleType, dtype: torch.dtype, hidden: int) -> None:
    x, residual, weight = normal(7, hidden, dtype=dtype), normal(7, hidden, dtype=dtype), normal(hidden, dtype=dtype)
    total, out = x.double() + residual.double(), poison(7, hidden, dtype=dtype)
    kernels.add_norm(x, residual, weight, 1e-5, out)
    check(residual, total)
    check(out, reference.rms_norm(total, weight.double(), 1e-5))


@needs_kernels
@DTYPES
def test_swiglu(kernels: ModuleType, dtype: torch.dtype) -> None:
    gate_up, out = normal(5, 2 * 1500, dtype=dtype), poison(5, 1500, dtype=dtype)
    exact = poison(5, 1500, dtype=torch.float64)
    kernels.swiglu(gate_up, out)
    reference.swiglu(gate_up.double(), exact)
    check(out, exact)


SHAPES = pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page"), [(4, 2, 64, 16), (6, 2, 128, 32), (20, 1, 64, 16)]
)


@needs_kernels
@DTYPES
@SHAPES
def test_rope_cache(kernels: ModuleType, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, page: int) -> None:
    rows, blocks = 6, 9
    qkv = normal(rows, (heads + 2 * kv_heads) * dim, dtype=dtype)
    cache = normal(2, blocks, kv_heads, page, dim, dtype=dtype)
    cos, sin = normal(100, dim // 2, dtype=torch.float32), normal(100, dim // 2, dtype=torch.float32)
    slots = [5, -1, page * 3, page * blocks - 1, page + 7, 0]
    inputs = Inputs(None, None, integers([0, 99, 3, 50, 7, 1]), integers(slots), None, None)
    exact_qkv, exact_cache = qkv.double(), cache.double()
    reference.rope_cache(exact_qkv, inputs, cos.double(), sin.double(), exact_cache)
    before = cache.clone()
    kernels.rope_cache(qkv, inputs, cos, sin, cache)
    check(qkv[:, : heads * dim], exact_qkv[:, : heads * dim])
    check(cache, exact_cache)
    untouched = exact_cache == before.double()
    assert torch.equal(cache[untouched], before[untouched])


def paged(lengths: list[int], kv_heads: int, dim: int, page: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A cache with NaN wherever no token of `lengths` is, its scattered tables, and each sequence's line."""
    width = -(-max(lengths) // page) + 1
    blocks = torch.randperm(width * len(lengths)).view(len(lengths), width)
    cache = poison(2, blocks.numel(), kv_heads, page, dim, dtype=dtype)
    lines = torch.randperm(len(lengths))
    for seq, length in enumerate(lengths):
        for token in range(length):
            cache[:, blocks[lines[seq], token // page], :, token % page] = normal(2, kv_heads, dim, dtype=dtype)
    return cache, integers(blocks), integers(lines)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@SHAPES
@pytest.mark.parametrize("splits", [1, 4, 32])
def test_decode_attention(
    kernels: ModuleType, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, page: int, splits: int
) -> None:
    lengths = [1, 16, 0, 17, 130, 333]
    cache, tables, lines = paged(lengths, kv_heads, dim, page, dtype)
    rows = len(lengths)
    qkv = normal(rows, (heads + 2 * kv_heads) * dim, dtype=dtype)
    inputs = Inputs(None, None, None, None, integers(lengths), lines)
    scratch = poison(rows * heads * splits * (dim + 1), dtype=torch.float32)
    out, exact = poison(rows, heads * dim, dtype=dtype), poison(rows, heads * dim, dtype=torch.float64)
    kernels.decode_attention(qkv, inputs, rows, tables, cache, scratch, splits, out)
    reference.decode_attention(qkv.double(), inputs, rows, tables, cache.double(), scratch, 1, exact)
    real = [row for row, length in enumerate(lengths) if length]
    check(out[real], exact[real])
    assert out[2].isnan().all(), "a padding row was written"


@needs_kernels
@SHAPES
@pytest.mark.parametrize(("dtype", "tile"), [(torch.float32, 16), (HALF, 32), (HALF, 128)], ids=str)
def test_prefill_attention(
    kernels: ModuleType, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, page: int, tile: int
) -> None:
    # Two decoding rows come first and belong to another kernel. (cached, new): whole prompts and chunks.
    spans = [(20, 1), (3, 1), (0, 5), (130, 70), (33, 1), (0, 150)]
    lengths = [cached + new for cached, new in spans]
    cache, tables, lines = paged(lengths, kv_heads, dim, page, dtype)
    starts = np.concatenate(([0], np.cumsum([new for _, new in spans])))
    tiles = [(seq, first) for seq in range(2, len(spans)) for first in range(0, spans[seq][1], tile)]
    rows = int(starts[-1])
    inputs = Inputs(None, None, None, None, integers(lengths), lines, integers(starts), integers(tiles).flatten(), None)
    qkv = normal(rows, (heads + 2 * kv_heads) * dim, dtype=dtype)
    out, exact = poison(rows, heads * dim, dtype=dtype), poison(rows, heads * dim, dtype=torch.float64)
    kernels.prefill_attention(qkv, inputs, tile, tables, cache, out)
    reference.prefill_attention(qkv.double(), inputs, tile, tables, cache.double(), exact)
    check(out[2:], exact[2:])
    assert out[:2].isnan().all(), "a decoding row was written"


def small(dim: int) -> ModelShape:
    return ModelShape("small", 3, 256, 4, 2, dim, 384, 1000)


def decoder_of(dim: int, dtype: torch.dtype, max_num_batched_tokens: int = 160) -> Decoder:
    return Decoder(
        small(dim), device=DEVICE, dtype=dtype, seed=11, num_kv_blocks=200, max_num_seqs=6,
        max_num_batched_tokens=max_num_batched_tokens, max_model_len=400, graph_sizes=(1, 2, 4),
    )  # fmt: skip


LENGTHS = ((5, 9), (130, 6), (1, 12), (300, 8), (16, 3), (40, 20), (64, 5), (257, 4))


def execute(decoder: Decoder, schedule: str, graphs: bool, lengths: tuple[tuple[int, int], ...]) -> Execution:
    requests = [Request(index, prompt, output) for index, (prompt, output) in enumerate(lengths)]
    batcher = ContinuousBatcher(
        requests, max_num_seqs=6, max_num_batched_tokens=decoder.max_num_batched_tokens, num_kv_blocks=200
    )
    random.Random(0).shuffle(batcher.pool._free)
    return Executor(decoder, graphs=graphs).run(SCHEDULES[schedule](), batcher, keep_tokens=True)


@needs_kernels
@pytest.mark.parametrize("dim", [64, 128])
def test_float32_tokens_equal_an_uncached_reference(kernels: ModuleType, dim: int) -> None:
    decoder = decoder_of(dim, torch.float32)
    decoder.ops = kernels
    lengths = LENGTHS if CUDA else LENGTHS[:3]
    tokens = {}
    for index, (prompt, output) in enumerate(lengths):
        ids = prompt_tokens(decoder.seed, np.full(prompt, index), np.arange(prompt), 1000).tolist()
        tokens[index] = reference.greedy(decoder, ids, output, torch.float64)
    for schedule in SCHEDULES if CUDA else ["async"]:
        for graphs in (False, True) if CUDA else (False,):
            assert execute(decoder, schedule, graphs, lengths).tokens == tokens, (schedule, graphs)


@needs_gpu
@pytest.mark.parametrize("num_kv_blocks", [21, 30, 200])
def test_preemption_and_prefix_caching_change_no_token(num_kv_blocks: int) -> None:
    decoder = decoder_of(64, torch.float32)
    lengths = ((5, 49), (130, 36), (140, 42), (300, 8), (16, 33), (40, 50), (131, 15), (257, 4))
    # The first four blocks are alike, those after them another request's own.
    hashes = [[block if block < 4 else 100 * i + block for block in range(n // 16)] for i, (n, _) in enumerate(lengths)]

    def requests() -> list[Request]:
        return [Request(i, prompt, output, hashes=hashes[i]) for i, (prompt, output) in enumerate(lengths)]

    tokens = {}
    for request in requests():
        ids = prompt_ids(request, 0, request.prompt_tokens, 16)
        prompt = prompt_tokens(decoder.seed, ids, np.arange(request.prompt_tokens), 1000).tolist()
        tokens[request.id] = reference.greedy(decoder, prompt, request.output_tokens, torch.float64)
    for schedule, graphs, caching in itertools.product(SCHEDULES, (False, True), (False, True)):
        batcher = ContinuousBatcher(
            requests(), max_num_seqs=6, max_num_batched_tokens=decoder.max_num_batched_tokens,
            num_kv_blocks=num_kv_blocks, prefix_caching=caching,
        )  # fmt: skip
        random.Random(0).shuffle(batcher.pool._free)
        result = Executor(decoder, graphs=graphs).run(SCHEDULES[schedule](), batcher, keep_tokens=True)
        assert result.tokens == tokens, (schedule, graphs, caching)
        assert (batcher.preemptions > 0) == (num_kv_blocks < 200)


@needs_gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_bfloat16_tokens_are_the_same_bits_for_equal_compositions(dim: int) -> None:
    """Equal lengths, all admitted at once: sync and async form the same batches, up to wasted tokens."""
    decoder = decoder_of(dim, torch.bfloat16, max_num_batched_tokens=512)
    lengths = ((80, 40),) * 5
    runs = [execute(decoder, schedule, graphs, lengths) for schedule in SCHEDULES for graphs in (False, True)]
    assert all(run.tokens == runs[0].tokens for run in runs)
    again = execute(decoder, "async", True, lengths)
    assert again.tokens == runs[0].tokens


@needs_gpu
def test_device_spans_follow_one_another_and_lie_within_the_run() -> None:
    decoder = decoder_of(64, torch.bfloat16)
    decoder.warm_up()
    decoder.capture()
    for schedule in SCHEDULES:
        result = execute(decoder, schedule, True, LENGTHS)
        lanes = {lane: [s for s in result.spans if s.lane == lane] for lane in ("copy_in", "compute", "copy_out")}
        slack_ns = 50_000
        for spans in lanes.values():
            assert [span.step for span in spans] == list(range(result.steps))
            assert all(a.end_ns <= b.start_ns + 2_000 for a, b in itertools.pairwise(spans))
            assert all(-slack_ns <= span.start_ns <= span.end_ns <= result.total_ns + slack_ns for span in spans)
        for copied, computed, returned in zip(*lanes.values(), strict=True):
            assert copied.end_ns <= computed.start_ns + slack_ns
            assert computed.end_ns <= returned.start_ns + slack_ns


@needs_gpu
def test_kernels_per_forward_are_those_that_a_profiler_sees() -> None:
    decoder = decoder_of(64, torch.bfloat16)
    decoder.warm_up()
    geometry = Geometry.decoding(4)
    with torch.inference_mode():
        decoder._stage_idle(0, geometry)
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            decoder.forward(0, geometry)
            torch.cuda.synchronize()
    on_device = [event.name for event in profile.events() if event.device_type == DeviceType.CUDA]
    names = [name for name in on_device if "Mem" not in name and "Sync" not in name]
    if not names:
        pytest.skip("the profiler sees no kernels on this machine")
    added = sum("splitKreduce" in name for name in names)
    assert len(names) - added == decoder.kernels_per_forward["decode"]

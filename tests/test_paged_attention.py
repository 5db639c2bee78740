"""The recipe's attention against plain torch: decoding in Triton's interpreter or on a GPU, prompts on a GPU.

Without a GPU: `TRITON_INTERPRET=1 pytest tests/test_paged_attention.py` where Triton is installed.
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
TOLERANCE = 2e-2 if CUDA else 2e-5
PAGE = 256

# Warnings of Triton and of torch's CUDA parts are not this project's.
pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(not (CUDA or INTERPRETER), reason="needs a GPU, or TRITON_INTERPRET=1 and Triton"),
]


@pytest.fixture(scope="module")
def attention() -> ModuleType:
    from calibration.recipes import paged_attention

    return paged_attention


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


def decode_inputs(heads: int, kv_heads: int, dim: int, lengths: list[int]) -> tuple[Tensor, ...]:
    """Queries, caches, new keys and values, lengths before the append, and a table of pages in no order."""
    batch, width = len(lengths), max(lengths) // PAGE + 2
    order = torch.randperm(batch * width, generator=torch.Generator().manual_seed(0))
    table = order.view(batch, width).to(torch.int32)
    for i, length in enumerate(lengths):
        table[i, (length // PAGE + 1 if length >= 0 else 0) :] = -1
    caches = [normal(seed, batch * width, PAGE, kv_heads, dim) for seed in (1, 2)]
    new = [normal(seed, batch, 1, kv_heads, dim) for seed in (3, 4)]
    sizes = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return normal(0, batch, 1, heads, dim), *caches, *new, sizes, table.to(DEVICE)


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "lengths"), [
    (4, 2, 16, [0, 5, 255, 256, 300, -1]),
    (6, 1, 24, [511, 40]),
    (2, 2, 64, [700, -1, 0]),
])  # fmt: skip
def test_decoding_appends_and_attends(
    attention: ModuleType, heads: int, kv_heads: int, dim: int, lengths: list[int]
) -> None:
    q, keys, values, k, v, _, table = inputs = decode_inputs(heads, kv_heads, dim, lengths)
    untouched = keys.clone()
    result = attention.paged_decode(*inputs, softmax_scale=dim**-0.5)
    assert result.shape == q.shape
    written = torch.zeros(keys.shape[:2], dtype=torch.bool, device=DEVICE)
    for i, length in enumerate(lengths):
        if length < 0:  # a row of padding
            assert not result[i].any()
            continue
        page, offset = int(table[i, length // PAGE]), length % PAGE
        written[page, offset] = True
        assert torch.equal(keys[page, offset], k[i, 0]) and torch.equal(values[page, offset], v[i, 0])
        at = torch.arange(length + 1, device=DEVICE)
        own = [cache[table[i, at // PAGE].long(), at % PAGE].float() for cache in (keys, values)]
        own_keys, own_values = (each.repeat_interleave(heads // kv_heads, 1) for each in own)
        scores = torch.einsum("hd,nhd->hn", q[i, 0].float(), own_keys) * dim**-0.5
        wanted = torch.einsum("hn,nhd->hd", torch.softmax(scores, -1), own_values)
        assert (result[i, 0].float() - wanted).abs().max() < TOLERANCE
    assert torch.equal(keys[~written], untouched[~written])


def test_a_sliding_window_is_refused(attention: ModuleType) -> None:
    inputs = decode_inputs(2, 1, 16, [3])
    with pytest.raises(NotImplementedError, match="sliding window"):
        attention.paged_decode(*inputs, window_size=(128, 0))
    with pytest.raises(NotImplementedError, match="sliding window"):
        attention.packed_attention(*inputs[:3], *inputs[:2], 1, 1, window_size=(128, 0))


@pytest.mark.parametrize("programs", [1, 8, 100, 264, 1000])
def test_a_context_is_split_until_the_device_is_full(attention: ModuleType, programs: int) -> None:
    splits = attention._splits(programs, 64)
    assert splits in (1, 2, 4, 8, 16)
    assert splits == 1 or programs * splits <= attention.PROGRAMS
    assert splits == 16 or programs * splits * 2 > attention.PROGRAMS
    assert attention._splits(1, 3) == 2  # no share of a context is empty for long


@pytest.mark.gpu
def test_decoding_from_a_graph_is_the_same(attention: ModuleType) -> None:
    inputs = decode_inputs(32, 8, 128, [0, 255, 256, 1000, -1])
    eager = attention.paged_decode(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention.paged_decode(*inputs)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, eager)


@pytest.mark.gpu
def test_prompts_laid_end_to_end_see_their_own_past(attention: ModuleType) -> None:
    new, past = [100, 1, 37], [100, 60, 337]
    ends = [torch.tensor([0, *torch.tensor(n).cumsum(0)], device="cuda", dtype=torch.int32) for n in (new, past)]
    q, k, v = normal(0, sum(new), 8, 64), normal(1, sum(past), 2, 64), normal(2, sum(past), 2, 64)
    result = attention.packed_attention(q, k, v, *ends, max(new), max(past), softmax_scale=0.125, causal=True)
    for i in range(3):
        mine, theirs = (slice(int(end[i]), int(end[i + 1])) for end in ends)
        keys, values = (each[theirs].float().repeat_interleave(4, 1) for each in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[mine].float(), keys) * 0.125
        before = torch.arange(past[i])[None] <= torch.arange(new[i])[:, None] + past[i] - new[i]
        weights = torch.softmax(scores.masked_fill(~before.cuda(), -torch.inf), -1)
        assert (torch.einsum("hqk,khd->qhd", weights, values) - result[mine].float()).abs().max() < TOLERANCE

"""Small experiments on what no formula knows: what libraries and kernels take beside their results."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from calibration.memory.measure import beside, fresh

# (sequences, tokens of each, query heads, key-value heads, elements of a head)
ATTENTION = (
    (1, 512, 12, 12, 64), (4, 1024, 12, 12, 64), (2, 1000, 16, 16, 128), (4, 2048, 16, 16, 128), (1, 4096, 16, 16, 128),
    (8, 512, 32, 8, 64), (2, 2048, 32, 8, 64), (3, 777, 32, 8, 64),
)  # fmt: skip
ROWS = ((512, 2048), (3072, 2048), (4096, 2048), (20_000, 768))
VOCABULARY = 32_000
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


def extra(work: Callable[[], Any]) -> tuple[int, int]:
    """(peak, kept) of what `work` allocates, bytes, while its result is held."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = work()
    torch.cuda.synchronize()
    found = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    del kept
    return found


def attention(dtype: torch.dtype) -> list[dict[str, Any]]:
    """Forward and backward of causal attention, as the trainer calls it."""
    found = []
    for sequences, length, heads, kv_heads, size in ATTENTION:
        fresh()
        q, k, v = (
            torch.randn(sequences, length, count, size, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_()
            for count in (heads, kv_heads, kv_heads)
        )

        def attend(q: Tensor = q, k: Tensor = k, v: Tensor = v, grouped: bool = heads != kv_heads) -> Tensor:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

        torch.autograd.grad(attend().sum(), (q, k, v))  # libraries are set up
        forward = extra(attend)
        y = attend()
        gradient = torch.ones_like(y)
        backward = extra(partial(torch.autograd.grad, y, (q, k, v), gradient))
        found.append({
            "sequences": sequences, "length": length, "heads": heads, "kv_heads": kv_heads, "head_dim": size,
            "width": dtype.itemsize, "kernel": type(y.grad_fn).__name__, "forward": forward, "backward": backward,
        })  # fmt: skip
        del q, k, v, y, gradient, attend
    return found


def rows() -> list[dict[str, Any]]:
    """Norms, the embedding and the loss by rows: (peak, kept) of their forwards and backwards."""
    found = []
    for count, hidden in ROWS:
        for dtype in (torch.bfloat16, torch.float32):
            fresh()
            tokens = torch.randint(VOCABULARY, (count,), device="cuda")
            x = torch.randn(count, hidden, device="cuda", dtype=dtype, requires_grad=True)
            weight = torch.ones(hidden, device="cuda", dtype=dtype, requires_grad=True)
            table = torch.randn(VOCABULARY, hidden, device="cuda", dtype=dtype, requires_grad=True)
            logits = torch.randn(count, VOCABULARY, device="cuda", dtype=torch.float32, requires_grad=True)
            works: dict[str, tuple[Callable[[], Tensor], tuple[Tensor, ...]]] = {
                "norm": (partial(functional.rms_norm, x, (hidden,), weight, 1e-5), (x, weight)),
                "embedding": (partial(functional.embedding, tokens, table), (table,)),
                "loss": (partial(functional.cross_entropy, logits, tokens), (logits,)),
            }
            told: dict[str, Any] = {"rows": count, "hidden": hidden, "width": dtype.itemsize}
            for name, (work, inputs) in works.items():
                y = work()
                gradient = torch.ones_like(y)
                torch.autograd.grad(y, inputs, gradient)
                forward = extra(work)
                y = work()
                told[name] = forward, extra(partial(torch.autograd.grad, y, inputs, gradient))
                del y, gradient
            found.append(told)
            del tokens, x, weight, table, logits, works, work, inputs
    return found


def products() -> int:
    """What the first matrix product on a stream leaves behind: a workspace."""
    fresh()
    a = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    torch.mm(a, a, out=torch.empty_like(a))
    return torch.cuda.memory_allocated() - before


def biased_products() -> int:
    """What the first product to which a bias is added leaves behind, after one without: cuBLASLt's workspace."""
    products()
    a = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    functional.linear(a, a, a[0])
    return torch.cuda.memory_allocated() - before


def stem() -> list[dict[str, Any]]:
    """A convolution of three channels, last in memory, by images: (peak, kept) of its forward."""
    fresh()
    found = []
    with torch.inference_mode():
        weight = torch.ones(64, 3, 7, 7, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        for count in IMAGES:
            x = torch.ones(count, 224, 224, 3, device="cuda", dtype=torch.bfloat16).permute(0, 3, 1, 2)
            found.append({"images": count, "forward": extra(partial(functional.conv2d, x, weight, None, 2, 3))})
    return found


def images() -> list[dict[str, Any]]:
    """A convolutional network's forward by images: (peak, kept)."""
    from batchsim.model import SERVICES, ConvNetShape
    from calibration.services.convnet import ConvNet

    shape = SERVICES["resnet-50"]
    assert isinstance(shape, ConvNetShape)
    fresh()
    network = ConvNet(shape, device=torch.device("cuda"), dtype=torch.bfloat16, seed=0)
    found = []
    for count in IMAGES:
        items = torch.zeros(count, network.item_size(1), dtype=torch.uint8, device="cuda")
        with torch.inference_mode():
            network.forward(items)
            found.append({"images": count, "forward": extra(partial(network.forward, items))})
    return found


def graphs() -> dict[str, int]:
    """What capturing a graph of many small kernels takes beside the allocator."""
    found = {}
    x = torch.ones(1024, device="cuda")
    for kernels in (1, 100, 1000, 4000):
        fresh()
        before = beside()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(kernels):
                x.add_(1.0)
        graph.replay()
        torch.cuda.synchronize()
        found[str(kernels)] = beside() - before
        del graph
    return found


def probe() -> dict[str, Any]:
    """All experiments."""
    torch.zeros(1, device="cuda")
    context = beside()
    return {
        "context": context,
        "product_workspace": products(),
        "attention": [*attention(torch.bfloat16), *attention(torch.float32)],
        "rows": rows(),
        "biased_product_workspace": biased_products(),
        "stem": stem(),
        "images": images(),
        "graphs": graphs(),
        "context_after": beside(),
    }

"""What attention takes in training, as one fused kernel or composed of products and a softmax."""

from __future__ import annotations

from batchsim.memory.autograd import Graph, Storage, Tensor
from batchsim.memory.overheads import AttentionKernel

FLOAT32, BOOL = 4, 1


def fused(graph: Graph, q: Tensor, k: Tensor, v: Tensor, rows: int, kernel: AttentionKernel) -> Tensor:
    """With its result it keeps the logarithms of the sums of exponentials, float32; `rows` count queries of all heads.

    What its backward pass takes for a moment is the kernel's own.
    """
    elements = q.size // q.width
    return graph.operation(
        "attention", q.size, q.width, [(each, "temporaries", each.size) for each in (q, k, v)],
        kept=[q.storage, k.storage, v.storage], also=[rows * FLOAT32], keeps_result=True,
        backward_workspace=[elements * kernel.element + rows * kernel.row + kernel.fixed],
    )  # fmt: skip


def composed(graph: Graph, q: Tensor, k: Tensor, v: Tensor, length: int, head_dim: int) -> Tensor:
    """All scores at once, as torch's `_scaled_dot_product_attention_math`: keys and values are repeated for groups."""
    width, size = q.width, q.size
    scores = size // head_dim * length
    query = _scaled(graph, q, size)
    mask = Storage(graph.tape, "temporaries", length * length * width)
    keys = graph.operation("temporaries", size, width, [(k, "temporaries", k.size)])
    values = graph.operation("attention", size, width, [(v, "temporaries", v.size)])
    turned = _scaled(graph, keys, size)
    whole = graph.result(Storage(graph.tape, "attention", size), width, [query], lambda gradient: (gradient,))
    found = graph.operation(
        "attention", scores, width, [(turned, "temporaries", size), (whole, "temporaries", size)],
        kept=[whole.storage, turned.storage],
    )  # fmt: skip
    found = graph.result(Storage(graph.tape, "attention", scores), width, [found], lambda gradient: (gradient,))
    found = graph.operation("attention", scores, width, [(found, "temporaries", scores)], keeps_result=True)
    found = graph.operation(
        "attention", size, width, [(values, "temporaries", size), (found, "temporaries", scores)],
        kept=[found.storage, values.storage],
    )  # fmt: skip
    del mask, query, keys
    # The heads lie apart; the product that follows wants them together.
    return graph.operation("attention", size, width, [(found, "temporaries", size)])


def _scaled(graph: Graph, x: Tensor, size: int) -> Tensor:
    return graph.operation("attention", size, x.width, [(x, "temporaries", size)])

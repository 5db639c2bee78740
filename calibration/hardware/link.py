"""What all-reduces cost by their size: called one by one, in a CUDA graph, and in a graph between kernels.

Fit data of the link between devices; executed scenarios test it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from calibration.executor.parallel import AllReduce

SMALLEST_BYTES, LARGEST_BYTES = 1 << 8, 1 << 26  # of a few best tokens; of the residual stream of 8,192 rows
CALLS, REPEATS, WARM_UPS = 20, 15, 5

Call = Callable[[], None]


def measure(all_reduce: AllReduce, device: torch.device, largest: int = LARGEST_BYTES) -> dict[str, Any]:
    """Times of all-reduces (bfloat16, summed in place) of up to `largest` bytes a rank, small ones first.

    Microseconds a call, medians of `REPEATS` chains of `CALLS`: `eager_us` launched one by one; `issue_us` the host's
    share of that; on a GPU `graph_us` in a CUDA graph, and `marginal_us` what a call adds to a graph of kernels that
    each write its buffer. Every rank has to call this; each gets its own figures.
    """
    token = torch.zeros(1, device=device)
    found = []
    size = SMALLEST_BYTES
    while size <= largest:
        buffer = torch.ones(size // 2, dtype=torch.bfloat16, device=device)
        found.append({"bytes": size, **_times(all_reduce, buffer, token)})
        size *= 2
    return {"calls": CALLS, "repeats": REPEATS, "all_reduce": found}


def _times(all_reduce: AllReduce, buffer: Tensor, token: Tensor) -> dict[str, float]:
    cuda = buffer.is_cuda

    def together() -> None:
        all_reduce(token)

    def call() -> None:
        all_reduce(buffer)

    def touch() -> None:
        buffer.mul_(0.5)  # halves what an all-reduce of two doubles

    def eager() -> None:
        for _ in range(CALLS):
            call()

    for _ in range(WARM_UPS):
        call()
    took, issued = _median(eager, together, cuda)
    times = {"eager_us": took, "issue_us": issued}
    if cuda:
        chain, _ = _median(_graph(call), together, cuda)
        both, _ = _median(_graph(touch, call), together, cuda)
        alone, _ = _median(_graph(touch), together, cuda)
        times |= {"graph_us": chain, "marginal_us": both - alone}
    return {name: round(value, 3) for name, value in times.items()}


def _graph(*calls: Call) -> Call:
    """Replays a graph of `CALLS` times all of `calls`."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            for call in calls:
                call()
    graph.replay()
    return graph.replay


def _median(chain: Call, together: Call, cuda: bool) -> tuple[float, float]:
    """(microseconds that a call of the chain takes, those of the host)."""
    took, issued = [], []
    for _ in range(REPEATS):
        together()
        if cuda:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
        began = time.perf_counter_ns()
        chain()
        ended = time.perf_counter_ns()
        if cuda:
            stop.record()
            torch.cuda.synchronize()
            took.append(start.elapsed_time(stop) * 1e3)
        else:
            took.append((ended - began) / 1e3)
        issued.append((ended - began) / 1e3)
    return median(took) / CALLS, median(issued) / CALLS

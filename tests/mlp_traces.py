"""Profiler traces of eager loops over MLPs, as torch writes them with `record_shapes=True`, made up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calibration.kineto import Trace, read_trace
from tests.kineto_traces import Event, kernel, op, saved

GEMM = "nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_TNT"
SILU = "void at::native::vectorized_elementwise_kernel<8, at::native::silu_kernel(at::TensorIteratorBase&)>"
GELU = "void at::native::vectorized_elementwise_kernel<8, at::native::GeluCUDAKernelImpl(at::TensorIteratorBase&)>"
MUL = "void at::native::vectorized_elementwise_kernel<8, at::native::BinaryFunctor<at::native::MulFunctor<float> > >"
NORM = "void at::native::vectorized_layer_norm_kernel<__nv_bfloat16, float>"
ATTENTION = "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128> >"
SMALL_US = 3.0

# An operator that launches one kernel: its name, its inputs' shapes, the kernel, and that one's microseconds.
Launch = tuple[str, list[list[int]] | None, str, float]


def product(rows: int, columns: int, inner: int, us: float, gemm: str = GEMM) -> Launch:
    return "aten::mm", [[rows, inner], [inner, columns]], gemm, us


def gated(rows: int, hidden: int, inner: int, us: float) -> list[Launch]:
    """Gate, up and down of `us` microseconds in all, as transformers launches them, with a norm before."""
    return [
        ("aten::native_layer_norm", None, NORM, SMALL_US),
        product(rows, inner, hidden, us / 3),
        ("aten::silu", None, SILU, SMALL_US),
        product(rows, inner, hidden, us / 3),
        ("aten::mul", None, MUL, SMALL_US),
        product(rows, hidden, inner, us / 3),
    ]


def fused(rows: int, hidden: int, inner: int, us: float) -> list[Launch]:
    """Gate and up in one product, and an activation that is a kernel of its engine's own."""
    activation = ("", None, "void vllm::act_and_mul_kernel<c10::BFloat16, &vllm::silu_kernel>", SMALL_US)
    return [product(rows, 2 * inner, hidden, us / 2), activation, product(rows, hidden, inner, us / 2)]


def plain(rows: int, hidden: int, inner: int, us: float) -> list[Launch]:
    up = ("aten::addmm", [[inner], [rows, hidden], [hidden, inner], [], []], GEMM, us / 2)
    down = ("aten::addmm", [[hidden], [rows, inner], [inner, hidden], [], []], GEMM, us / 2)
    return [up, ("aten::gelu", None, GELU, SMALL_US), down]


def attention(rows: int, hidden: int, us: float) -> list[Launch]:
    """As many heads of keys as of queries: products that fit each other as those of a square MLP would."""
    products = [product(rows, hidden, hidden, us / 4) for _ in range(4)]
    return [*products[:3], ("", None, ATTENTION, us), products[3]]


def traced(folder: Path, launches: list[Launch], steps: int = 6, device: str = "NVIDIA H200", **how: Any) -> Trace:
    """The trace of a loop that launches these one by one and waits for them, in each step; `how` as in `events`."""
    recorded = [*events(launches, steps, **how)]
    return read_trace(saved(folder, {"deviceProperties": [{"id": 0, "name": device}], "traceEvents": recorded}))


def events(
    launches: list[Launch], steps: int, *, shapes: bool = True, ids: bool = True, graph: bool = False
) -> Iterator[Event]:
    """`shapes`: with Input Dims; `ids`: kernels bear their operators' external ids; `graph`: all are one launch's."""
    now, free, number = 100.0, 0.0, 0
    for step in range(steps):
        began = now
        now += 20
        if graph:
            number += 1
            yield _call("cudaGraphLaunch", now, correlation=number)
        for name, dims, gemm, us in launches:
            number += not graph
            external = {"External id": number} if ids and name else {}
            if name and not graph:
                args = {"External id": number} | ({"Input Dims": dims} if shapes and dims else {})
                yield op(name, now, 8.0, **args)
            if not graph:
                yield _call("cudaLaunchKernel", now + 2, correlation=number, **external)
            free = max(free, now + 8)
            yield kernel(gemm, free, us, correlation=number, **({} if graph else external))
            free += us + 0.5
            now += 1 if graph else 10
        yield _call("cudaStreamSynchronize", now, max(free - now, 0) + 5)
        now = max(free, now) + 20
        yield {**op(f"ProfilerStep#{step}", began, now - began), "cat": "user_annotation"}


def _call(name: str, ts: float, dur: float = 5.0, **args: Any) -> Event:
    return {**op(name, ts, dur, **args), "cat": "cuda_runtime"}

"""What the probe times on a part of a device: products of matrices, the kernels that they launch, and forwards."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from batchsim.model import MODELS, ModelShape
from batchsim.schedules import SCHEDULES
from calibration.cells import read_samples
from calibration.executor import build
from calibration.executor.partition import count_multiprocessors, limited_to, stream_like_current
from calibration.hardware.probe import BLOCK_SIZE, Sizes, cells_of
from calibration.provenance import provenance

# A product's weights take turns, so that none is still in the cache when its turn comes again.
ROTATED_BYTES, MOST_COPIES = 300_000_000, 16
REPEATS = 5
CLOCKS_EVERY_S = 0.25
MARK = "rows"
HOW = "parts are green contexts of CUDA; products in graphs, their weights beyond the L2; kernels by the profiler"

Entry = dict[str, Any]


def on_part(sizes: Sizes, device: str, sms: int) -> Entry:
    """All that is timed on `sms` multiprocessors of the device at hand, 0: all, with where it comes from.

    Raises:
        InputError: without a file; the device has no such part.
    """
    whole = torch.cuda.get_device_properties(0).multi_processor_count if device == "cuda" else 1
    limited = nullcontext(whole) if sms in (0, whole) else limited_to(sms)
    with limited, clocks(device) as sampled:
        found = count_multiprocessors() if device == "cuda" else whole
        result: Entry = {
            "provenance": provenance(device, "python -m calibration.hardware.probe measure") | {"how": HOW},
            "info": {"asked": sms, "stream": found}, "gemm": [], "kernels": [], "cells": {}, "clocks": sampled,
        }  # fmt: skip
        for model in sizes.models:
            shape = MODELS[model]
            result["gemm"] += products(shape, sizes, device)
            result["kernels"] += kernels(shape, sizes, device)
            result["cells"][model] = list(forwards(shape, sizes, device))
            gc.collect()  # the decoder, before the next one
            if device == "cuda":
                torch.cuda.empty_cache()
    return result


def shapes_of(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """(columns, depth) of a model's products."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    return {
        "qkv": (shape.qkv_size, hidden), "o": (hidden, shape.num_heads * shape.head_dim),
        "gate_up": (2 * inner, hidden), "down": (hidden, inner), "head": (shape.head_size, hidden),
    }  # fmt: skip


def products(shape: ModelShape, sizes: Sizes, device: str) -> Iterator[Entry]:
    """Microseconds of each product, of as many in a row as there are weights to take turns."""
    stream = stream_like_current(torch.device(device)) if device == "cuda" else None
    for name, (columns, depth) in shapes_of(shape).items():
        copies = max(1, min(MOST_COPIES, ROTATED_BYTES // (2 * columns * depth)))
        weights = _weights(copies, columns, depth, device)
        for rows in _rows(sizes.rows, name, sizes):
            given, made = _random(rows, depth, device), _random(rows, columns, device)

            def work(given: Tensor = given, made: Tensor = made, weights: list[Tensor] = weights) -> None:
                for weight in weights:
                    torch.mm(given, weight.t(), out=made)

            told = {"model": shape.name, "name": name, "rows": rows, "n": columns, "k": depth, "copies": copies}
            yield told | {"us": _median_us(work, stream, device) / copies}


def kernels(shape: ModelShape, sizes: Sizes, device: str) -> Iterator[Entry]:
    """The kernels of each product, with their grids and microseconds in the profiler, at two weights in turn."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    for name, (columns, depth) in shapes_of(shape).items():
        weights = _weights(2, columns, depth, device)
        pairs = [
            (_random(rows, depth, device), _random(rows, columns, device))
            for rows in _rows(sizes.profiled, name, sizes)
        ]
        for given, made in pairs:
            torch.mm(given, weights[0].t(), out=made)  # libraries choose and load their kernels
        _wait(device)
        with profile(activities=activities) as profiler:
            for given, made in pairs:
                with record_function(f"{MARK}{len(given)}"):
                    for weight in weights:
                        torch.mm(given, weight.t(), out=made)
                _wait(device)
        for rows, event in launched(_events(profiler)):
            told, args = {"model": shape.name, "name": name, "rows": rows, "n": columns, "k": depth}, event["args"]
            yield told | {"kernel": event["name"], "grid": args["grid"], "block": args["block"], "us": event["dur"]}


def launched(events: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Kernels of a Chrome trace, each with the number of the mark (`rows64`) within which the host launched it."""
    marks, launches, found = [], {}, []
    for event in events:
        category, args = event.get("cat"), event.get("args", {})
        if category == "user_annotation" and event["name"].startswith(MARK):
            marks.append((event["ts"], event["ts"] + event["dur"], int(event["name"].removeprefix(MARK))))
        elif category in ("cuda_runtime", "cuda_driver") and "correlation" in args:
            launches[args["correlation"]] = event["ts"]
        elif category == "kernel":
            found.append(event)
    for event in found:
        at = launches.get(event["args"].get("correlation"), -1)
        for start, end, rows in marks:
            if start <= at <= end:
                yield rows, event


def forwards(shape: ModelShape, sizes: Sizes, device: str) -> Iterator[Entry]:
    """Median nanoseconds of forwards and of their launches, in the executor's loops."""
    cells = cells_of(sizes)
    executor = build(
        shape, device, max_num_seqs=max(sizes.seqs), max_num_batched_tokens=max(cell.num_tokens for cell in cells),
        max_model_len=sizes.max_model_len, num_kv_blocks=sizes.kv_tokens // BLOCK_SIZE, block_size=BLOCK_SIZE,
        graph_sizes=sizes.seqs,
    )  # fmt: skip
    for cell in cells:
        batcher = cell.batcher(block_size=BLOCK_SIZE, num_kv_blocks=executor.decoder.num_kv_blocks)
        samples = read_samples(executor.run(SCHEDULES[cell.schedule](), batcher).spans, cell)
        stage = "prefill" if cell.chunk else "decode"
        yield {
            "key": cell.key, "num_seqs": cell.num_seqs, "context": cell.context, "chunk": cell.chunk,
            "decodes": cell.decodes, "kv_tokens": cell.kv_tokens, "num_tokens": cell.num_tokens, "stage": stage,
            "median_ns": median(samples[stage]), "launch_ns": median(samples["launch"]),
        }  # fmt: skip


@contextmanager
def clocks(device: str) -> Iterator[list[tuple[float, int, int]]]:
    """Samples of the device while the block runs: (seconds, MHz, mW); none where the driver's library is not there."""
    sampled: list[tuple[float, int, int]] = []
    ended, began = threading.Event(), time.monotonic()

    def watch() -> None:
        while not ended.wait(CLOCKS_EVERY_S):
            try:
                sampled.append((round(time.monotonic() - began, 2), torch.cuda.clock_rate(), torch.cuda.power_draw()))
            except (ImportError, RuntimeError):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    if device == "cuda":
        watcher.start()
    try:
        yield sampled
    finally:
        ended.set()
        if device == "cuda":
            watcher.join()


def _rows(rows: Iterable[int], name: str, sizes: Sizes) -> list[int]:
    return [count for count in rows if name != "head" or count <= sizes.head_rows]


def _random(rows: int, columns: int, device: str) -> Tensor:
    """Of the executor's type on that device."""
    return torch.randn(rows, columns, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)


def _weights(copies: int, columns: int, depth: int, device: str) -> list[Tensor]:
    return [_random(columns, depth, device).mul_(depth**-0.5) for _ in range(copies)]


def _median_us(work: Callable[[], None], stream: torch.cuda.Stream | None, device: str) -> float:
    """Microseconds of `work`, on a GPU of a CUDA graph of it that was captured on `stream`."""
    work()
    if device == "cpu":
        return median(_wall_us(work) for _ in range(REPEATS))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # None: torch's own
        work()
    graph.replay()
    took: list[float] = []
    for _ in range(REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        took.append(start.elapsed_time(stop) * 1e3)
    return median(took)


def _wall_us(work: Callable[[], None]) -> float:
    began = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - began) / 1e3


def _events(profiler: profile) -> list[dict[str, Any]]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return events


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()

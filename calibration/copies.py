"""Copies between host and device, by direction, size and kind of host memory."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

SIZES = (4 << 10, 64 << 10, 1 << 20, 16 << 20)


def measure_copies(repeats: int = 15) -> list[dict[str, Any]]:
    """Median host time to issue a copy and its median time on the device, nanoseconds, for each kind.

    Kinds are interleaved, so that a disturbance hits all of them alike.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    kinds = [(d, size, pinned) for d in ("h2d", "d2h") for size in SIZES for pinned in (True, False)]
    host = {size: {p: torch.randint(255, (size,), dtype=torch.uint8) for p in (True, False)} for size in SIZES}
    for buffers in host.values():
        buffers[True] = buffers[True].pin_memory()
    device = {size: torch.randint(255, (size,), dtype=torch.uint8, device="cuda") for size in SIZES}
    samples: dict[Any, list[tuple[int, float]]] = {kind: [] for kind in kinds}
    for _ in range(repeats + 3):
        for kind in kinds:
            direction, size, pinned = kind
            source, target = host[size][pinned], device[size]
            if direction == "d2h":
                source, target = target, source
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                begin.record(stream)
                start = time.perf_counter_ns()
                target.copy_(source, non_blocking=True)
                issued = time.perf_counter_ns() - start
                end.record(stream)
            end.synchronize()
            samples[kind].append((issued, begin.elapsed_time(end) * 1e6))
    return [
        {
            "direction": direction,
            "bytes": size,
            "pinned": pinned,
            "issue_ns": round(float(np.median([s[0] for s in samples[direction, size, pinned][3:]]))),
            "device_ns": round(float(np.median([s[1] for s in samples[direction, size, pinned][3:]]))),
            "samples": repeats,
        }
        for direction, size, pinned in kinds
    ]

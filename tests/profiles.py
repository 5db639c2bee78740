"""A small profile, written down by hand, and scenarios to run on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchsim.profile import DecodeCurve, DeviceFit, KernelCounts, LoopFit, PhaseFit, PrefillFit, Profile
from batchsim.scenario import Scenario
from batchsim.workload_scenario import FixedWorkload

SIZES = (1, 8, 32)
RATIOS = [0.9, 0.95, 1.0, 1.05, 1.1]


def phase(step_ns: float, seq_ns: float = 0.0, ratios: list[float] = RATIOS) -> PhaseFit:
    """Host costs that vary by `ratios`, whose mean is one."""
    return PhaseFit(
        step_ns=step_ns, seq_ns=seq_ns, ratios=ratios, samples=100, outliers=0, outlier_ns=0.0, residuals={}
    )


def loop(factor: float = 1.0) -> LoopFit:
    """A loop whose host phases take `factor` times 0.2 ms and a bit for each sequence."""
    phases = {
        "schedule": phase(30_000 * factor, 1_000), "build_inputs": phase(80_000 * factor, 2_000),
        "copy_in": phase(7_000), "launch": phase(30_000 * factor), "copy_out": phase(6_000), "record": phase(2_000),
        "stream_wait": phase(1_500), "wait": phase(1_000), "update": phase(40_000 * factor, 1_000),
    }  # fmt: skip
    return LoopFit(
        phases=phases, kernel_launch=phase(5_000 * factor), launch_ns=9_000, copy_ns=5_000, event_ns=2_000,
        gap_ns=2_000, wake_up_ns=8_000, copy_in_device_ns=3_000, copy_out_device_ns=2_000,
    )  # fmt: skip


def device() -> DeviceFit:
    """Decode in 1 ms and a bit for each row and each token of context, up to 32 rows of 16,384."""
    curves = [
        DecodeCurve(
            size=size,
            kv_tokens=[size, 16_384 * size],
            ns=[1_000_000 + 2_000.0 * size, 1_000_000 + 2_000 * size + 1.0 * 16_384 * size],
        )
        for size in SIZES
    ]
    prefill = PrefillFit(
        tile=64, num_tokens=[64, 8_192], ns=[1_000_000, 9_000_000], pair_ns=0.05, depth_ns=1.0, mixed_ns=10_000,
        row_ns=500, kv_ns=1, residuals={},
    )  # fmt: skip
    ratios = [0.99, 1.0, 1.01]
    return DeviceFit(
        decode=curves, prefill=prefill, eager_factor=1.1, outer_share=0.1, decode_ratios=ratios, prefill_ratios=ratios
    )


def small_profile(model: str = "llama-3.2-1b", **changes: Any) -> Profile:
    """A profile of four loops on a device of 141 GB; `changes` replace fields."""
    fields: dict[str, Any] = {
        "schema_version": 1,
        "kind": "profile",
        "name": "small",
        "model": model,
        "provenance": {"device": "none"},
        "device_memory_bytes": 141_000_000_000,
        "overlaps": True,
        "kernels": KernelCounts(first=1, layers=16, per_layer=9, last=4, split_rows=32),
        "loops": {
            "sync/graph": loop(), "async/graph": loop(1.1), "sync/eager": loop(), "async/eager": loop(1.1),
        },
        "device": device(),
        "copies": [],
        "cells": [],
    }  # fmt: skip
    return Profile(**fields | changes)


def scenario(num_prompts: int = 6, input_len: int = 32, output_len: int = 20, **changes: Any) -> Scenario:
    """Requests of the 1B model on `small_profile`; `changes` replace other fields."""
    fields: dict[str, Any] = {
        "kind": "serving",
        "name": "a test",
        "model": "llama-3.2-1b",
        "profile": "small",
        "workload": FixedWorkload(kind="fixed", num_prompts=num_prompts, input_len=input_len, output_len=output_len),
        "max_num_seqs": 4,
        "max_num_batched_tokens": 128,
    }
    return Scenario(**fields | changes)


def serving(changes: Mapping[str, Any] | None = None) -> Scenario:
    """400 requests that arrive over time, at about half of what `small_profile` can serve under sync.

    `changes` replace values, those of the workload by names such as `workload.request_rate`.
    """
    fields: dict[str, Any] = {
        "kind": "serving",
        "name": "requests over time",
        "model": "llama-3.2-1b",
        "profile": "small",
        "workload": {
            "kind": "random",
            "num_prompts": 400,
            "request_rate": 150,
            "input_len": {"dist": "lognorm", "s": 0.8, "scale": 40, "max": 300},
            "output_len": {"dist": "lognorm", "s": 0.6, "scale": 16, "max": 80},
        },
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
    }
    for name, value in (changes or {}).items():
        _, dot, key = name.partition(".")
        place = fields["workload"] if dot else fields
        place[key if dot else name] = value
    return Scenario.model_validate(fields)

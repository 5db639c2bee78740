"""Scenarios of dynamic batching, and a small profile of a service, written down by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchsim.dynamic_scenario import DynamicScenario
from batchsim.profile import DecodeCurve, LoopFit, Profile
from tests.profiles import device, phase, small_profile

# A server that takes 4 ms and now and then 9, and a little longer for a full batch.
BIMODAL: dict[int, Any] = {1: {"samples": [4, 4, 4, 9]}, 8: {"samples": [5, 5, 5, 11]}}


def service_loop(factor: float = 1.0) -> LoopFit:
    """A loop whose phases, and whose copies on the device, grow with the batch and its tokens."""
    inputs = phase(20_000 * factor, 1_500).model_copy(update={"token_ns": 3.5})
    return LoopFit(
        phases={
            "schedule": phase(10_000 * factor, 300), "build_inputs": inputs, "copy_in": phase(7_000),
            "launch": phase(15_000 * factor), "copy_out": phase(6_000), "record": phase(2_000),
            "stream_wait": phase(1_500), "wait": phase(1_000), "update": phase(9_000 * factor, 400),
        },
        kernel_launch=phase(5_000 * factor), launch_ns=9_000, copy_ns=5_000, event_ns=2_000, gap_ns=2_000,
        wake_up_ns=8_000, copy_in_device_ns=3_000, copy_out_device_ns=2_000, copy_in_device_seq_ns=40.25,
        copy_in_device_token_ns=1.75, copy_out_device_seq_ns=130.5,
    )  # fmt: skip


def service_profile(**changes: Any) -> Profile:
    """An encoder whose forward takes 0.2 ms and 1 us a token, measured for up to 8 rows of 64 to 128 tokens."""
    curves = [
        DecodeCurve(size=size, kv_tokens=[64 * size, 128 * size], ns=[200_000 + 64e3 * size, 200_000 + 128e3 * size])
        for size in (1, 2, 4, 8)
    ]
    loops = {f"{name}/{how}": service_loop(1.1 if name == "async" else 1.0) for name in ("sync", "async") for how in
             ("graph", "eager")}  # fmt: skip
    fields: dict[str, Any] = {
        "model": "tiny-encoder", "loops": loops, "device": device().model_copy(update={"decode": curves}),
    }  # fmt: skip
    return small_profile(**fields | changes)


def scenario(changes: Mapping[str, Any] | None = None) -> DynamicScenario:
    """300 requests of `BIMODAL`'s server, at 120 a second; `changes` replace values, by names such as
    `workload.request_rate`. With a profile among them the server is the encoder's."""
    fields: dict[str, Any] = {
        "kind": "dynamic",
        "name": "a test",
        "costs": {"kind": "table", "batch_ms": BIMODAL},
        "workload": {"kind": "fixed", "num_prompts": 300, "request_rate": 120.0},
        "max_batch_size": 8,
    }
    changes = dict(changes or {})
    if "profile" in changes:
        fields["model"] = "tiny-encoder"
        del fields["costs"]
    for name, value in changes.items():
        _, dot, key = name.partition(".")
        place = fields["workload"] if dot else fields
        place[key if dot else name] = value
    return DynamicScenario.model_validate(fields)

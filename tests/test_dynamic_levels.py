"""The iteration level of dynamic batching equals the operation level to the nanosecond: every request, every figure."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchsim import dynamic
from batchsim.answered import MOMENTS
from batchsim.dynamic_scenario import DynamicScenario
from batchsim.engine import requests_of
from batchsim.profile import KernelCounts, Profile
from tests.dynamic import scenario, service_profile

KERNELS = KernelCounts(first=1, layers=3, per_layer=9, last=4, split_rows=32)
PROFILES = {overlaps: service_profile(kernels=KERNELS, overlaps=overlaps) for overlaps in (True, False)}


def assert_equal_levels(asked: DynamicScenario, profile: Profile | None) -> None:
    requests = requests_of(asked)
    for schedule in asked.schedules:
        assert dynamic._compiled(asked, profile, schedule)
        ours = dynamic._serve(asked, profile, schedule, requests)
        theirs = dynamic._serve(asked.model_copy(update={"level": "operation"}), profile, schedule, requests)
        for name in ("arrival_ns", "left_ns", "tokens", "priority", "batch", "outcome"):
            np.testing.assert_array_equal(ours.answered.requests[name], theirs.answered.requests[name], err_msg=name)
        for name in ("size", "padded_len", "instance", *MOMENTS):
            np.testing.assert_array_equal(ours.answered.batches[name], theirs.answered.batches[name], err_msg=name)
        assert ours.answered.total_ns == theirs.answered.total_ns
        found, wanted = (asdict(ran.result) for ran in (ours, theirs))
        for name in found:
            if name in ("engine_s", "decisions", "events"):
                continue
            if name == "stage_ms":  # a stage that took no time may be left out
                for stage in found[name].keys() | wanted[name].keys():
                    assert found[name].get(stage, 0) == wanted[name].get(stage, 0), stage
            else:
                assert found[name] == wanted[name], name
        outcomes = ours.answered.outcomes
        assert outcomes.pop("arrivals") == len(requests) == sum(outcomes.values())
        assert "waiting" not in outcomes
        latencies = ours.answered.latencies()
        whole = latencies.pop("e2e")
        np.testing.assert_array_equal(sum(latencies.values()), whole)
        assert all((part >= 0).all() for part in latencies.values())


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    count = draw(st.integers(1, 60))
    us = st.sampled_from([0.0, 0.001, 1.0, 100.0, 700.0, 3_000.0, 9_000.0, 40_000.0]) | st.floats(0, 20_000)
    most = draw(st.integers(1, 10))
    found: dict[str, Any] = {
        "max_batch_size": most,
        "max_queue_delay_us": draw(us),
        "preferred_batch_sizes": draw(st.lists(st.integers(1, most), max_size=3, unique=True)),
        "late": draw(st.sampled_from(["drop", "serve"])),
        "queue_timeout_us": draw(st.none() | us),
        "max_queue_size": draw(st.none() | st.integers(1, 12)),
        "max_priority_wait_us": draw(st.none() | us),
        "length_bucket": draw(st.sampled_from([1, 16, 64])),
        "jitter": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
        "warm_up_s": draw(st.sampled_from([0.0, 0.0, 0.02])),
        "schedules": ["sync", "async"],
        "workload.kind": "random",
        "workload.num_prompts": count,
        "workload.request_rate": draw(st.sampled_from([None, 50.0, 200.0, 800.0, 5_000.0, 1e6])),
        "workload.input_len": draw(st.sampled_from([0, 1, 100, {"dist": "randint", "low": 0, "high": 128}])),
    }
    if found["late"] == "drop" and found["queue_timeout_us"] is not None:
        found["max_queue_delay_us"] = min(found["max_queue_delay_us"], found["queue_timeout_us"])
    if draw(st.booleans()):
        classes = draw(st.lists(st.integers(-3, 3), min_size=1, max_size=3, unique=True))
        found["workload.priorities"] = [{"priority": each, "share": 1.0} for each in classes]
    if draw(st.integers(0, 3)) == 0:
        found["workload.max_concurrency"] = draw(st.integers(1, 12))
        if found["max_queue_size"] is not None:
            found["max_queue_size"] += found["workload.max_concurrency"]
    return found


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(), st.booleans(), st.booleans(), st.sampled_from([1.0, 0.1, 3.7]))
def test_a_service(case: dict[str, Any], overlaps: bool, graphs: bool, host_speed: float) -> None:
    case |= {"profile": "small", "cuda_graphs": graphs, "host_speed": host_speed}
    assert_equal_levels(scenario(case), PROFILES[overlaps])


TABLES: list[dict[int, Any]] = [
    {1: 4.0, 8: 9.0},
    {4: 2.0},
    {1: {"samples": [4, 9]}, 3: {"samples": [5, 6, 11]}},
    {2: {"dist": "expon", "scale": 3.0}, 6: {"p10": 3, "p50": 4, "p99": 9}},
]


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(), st.sampled_from(TABLES), st.integers(1, 5))
def test_a_table(case: dict[str, Any], table: dict[int, Any], instances: int) -> None:
    case |= {"costs": {"kind": "table", "batch_ms": table}}
    if instances > 1 and "workload.max_concurrency" not in case:
        case |= {"instances": instances, "schedules": ["sync"]}
    assert_equal_levels(scenario(case), None)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    cases(), st.integers(1, 4), st.integers(1, 4), st.integers(0, 4), st.none() | st.integers(4, 9), st.integers(0, 9)
)
def test_much_happens_at_the_same_moment(
    case: dict[str, Any], instances: int, time_ms: int, delay_ms: int, timeout_ms: int | None, patience_ms: int
) -> None:
    """All requests are there at the start, and all times are whole milliseconds."""
    case.pop("workload.max_concurrency", None)
    case |= {
        "costs": {"kind": "table", "batch_ms": {1: float(time_ms), 10: float(time_ms)}}, "schedules": ["sync"],
        "instances": instances, "max_queue_delay_us": 1e3 * delay_ms, "workload.request_rate": None,
        "queue_timeout_us": None if timeout_ms is None else 1e3 * timeout_ms, "max_priority_wait_us": 1e3 * patience_ms,
    }  # fmt: skip
    assert_equal_levels(scenario(case), None)


@pytest.mark.parametrize("schedule", ["sync", "async"])
def test_a_long_run_refills_its_buffers(schedule: str) -> None:
    changes = {"workload.num_prompts": 12_000, "max_batch_size": 1, "workload.request_rate": 150.0}
    assert_equal_levels(scenario(changes | {"schedules": [schedule]}), None)
    assert_equal_levels(scenario(changes | {"profile": "small", "schedules": [schedule]}), PROFILES[True])

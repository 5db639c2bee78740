"""Scenarios of dynamic batching: what a file may say, and what a wrong line gets told."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchsim.dynamic import simulate
from batchsim.dynamic_scenario import DynamicScenario, load, parse
from batchsim.errors import InputError

FILE = Path(__file__).parents[1] / "scenarios" / "dynamic_table.yaml"
TEXT = """\
kind: dynamic
name: a test
costs:
  kind: table
  batch_ms: {1: 4.2, 8: {p10: 3, p50: 4, p99: 9}, 16: {samples: [4, 4, 9]}, 32: {dist: expon, scale: 5}}
workload: {kind: fixed, num_prompts: 100, request_rate: 50}
"""
MEASURED = """\
kind: dynamic
name: a test
model: bert-base
profile: some-profile
workload: {kind: random, num_prompts: 100, request_rate: 50, input_len: {values: [0, 128]}}
"""


def test_the_shipped_table_runs_as_it_is() -> None:
    asked = load(FILE)
    assert asked.schedules == ("sync",)
    result = simulate(asked, None).results["sync"]
    assert result.unstable is None
    assert result.breaking_requests_per_s is not None and result.breaking_requests_per_s > 250
    assert result.latency_ms["e2e"]["p50"] >= 4
    assert result.warnings == ()


def test_a_scenario_is_what_its_dump_says() -> None:
    for text in (TEXT, MEASURED):
        asked = parse(text)
        assert DynamicScenario.model_validate(asked.model_dump(mode="json")) == asked


def test_a_profile_runs_both_schedules() -> None:
    assert parse(MEASURED).schedules == ("sync", "async")


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (["costs.batch_ms.8=x"], "costs.batch_ms.8: found the string 'x', wanted milliseconds above 0"),
        (["costs.batch_ms.8=-1"], "costs.batch_ms.8: found -1, wanted milliseconds above 0"),
        (["costs.batch_ms.0=3"], "costs.batch_ms.0: found a key that is no batch size, wanted an integer"),
        (["costs.batch_ms.8={p50: 4, p10: 5}"], "costs.batch_ms.8.p50: found 4, less than p10 = 5, wanted at least 5"),
        (["costs.batch_ms.8={p101: 4}"], "costs.batch_ms.8.p101: found an unknown key, wanted samples, dist"),
        (["costs.batch_ms.8={p50: x}"], "costs.batch_ms.8.p50: found the string 'x', wanted milliseconds above 0"),
        (["costs.batch_ms.8={dist: expo}"], "distribution of scipy.stats (the nearest: expon)"),
        (["costs.batch_ms.8={dist: norm}"], "costs.batch_ms.8: found times from -3.7"),
        (["costs.batch_ms.8={samples: []}"], "costs.batch_ms.8.samples: found an empty list"),
        (["costs.batch_ms={}"], "costs.batch_ms: found an empty mapping, wanted a mapping of batch sizes"),
        (["model=bert-base"], "model: found model beside costs, wanted one of the two"),
        (["costs=null"], "model: found nothing, wanted model and profile, or costs"),
        (["schedules=[tile]"], "schedules.0: found tile, which is for generating models, wanted sync or async"),
        (["schedules=[sync, sync]"], "schedules: found sync twice"),
        (["preferred_batch_sizes=[64]"], "preferred_batch_sizes: found 64, more than max_batch_size = 32"),
        (["max_batch_size=0"], "max_batch_size: found 0, wanted an integer from 1 to 1024"),
        (["workload.output_len=4"], "workload.output_len: found an unknown key"),
        (["workload.input_len=-1"], "workload.input_len: found -1, wanted an integer from 0"),
        (["late=keep"], "late: found the string 'keep', wanted drop or serve"),
        (["queue_timeout_us=5", "max_queue_delay_us=9"], "max_queue_delay_us: found 9, more than queue_timeout_us = 5"),
        (["workload.max_concurrency=5", "max_queue_size=3"], "max_queue_size: found 3, less than max_concurrency = 5"),
        (["workload.max_concurrency=5", "instances=2"], "instances: found 2 with max_concurrency"),
        (["kind=serving"], "kind: found serving, wanted dynamic"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_a_sentence(sets: list[str], told: str) -> None:
    with pytest.raises(InputError) as raised:
        parse(TEXT, sets=sets)
    assert told in str(raised.value)
    assert len(raised.value.problems) <= 2

"""Choosing: no setting of the same grid is better, other seeds agree, and what cannot be chosen is refused."""

from __future__ import annotations

import json
from functools import partial
from math import inf
from pathlib import Path

import pytest
from typer.testing import CliRunner

from batchsim import dynamic, training
from batchsim.batching.accumulation import divisors
from batchsim.cli import app
from batchsim.dynamic_scenario import DynamicScenario
from batchsim.dynamic_scenario import parse as parse_dynamic
from batchsim.errors import InputError
from batchsim.memory import library_for, peak_bytes
from batchsim.result import Run
from batchsim.tune.dynamic import Setting, Tuning, _Search, tune
from batchsim.tune.training import tune as tune_training
from tests.training_profiles import small_training_profile
from tests.training_profiles import training as training_scenario

SERVER = """
kind: dynamic
name: a server
costs:
  kind: table
  batch_ms: {1: 4.0, 4: {p10: 4.4, p50: 4.6, p80: 8.8, p99: 9.3}, 16: {p10: 7.0, p50: 7.3, p80: 11.5, p99: 12.2}}
workload: {kind: fixed, num_prompts: 4000, request_rate: 600}
max_batch_size: 8
"""


def server(**sets: object) -> DynamicScenario:
    return parse_dynamic(SERVER, sets=[f"{key.replace('__', '.')}={value}" for key, value in sets.items()])


def simulate(scenario: DynamicScenario) -> Run:
    return dynamic.simulate(scenario, None)


@pytest.fixture(scope="module")
def fastest() -> Tuning:
    return tune(server(), simulate, None)


@pytest.fixture(scope="module")
def bounded() -> Tuning:
    return tune(server(), simulate, None, bound_ms=25.0)


def test_no_setting_of_the_grid_has_a_clearly_lower_latency(fastest: Tuning) -> None:
    search = _Search(server(), simulate, 16, "p99", None)
    search.breaking()
    every = [
        search.trial(Setting("sync", size, delay), 600.0).latency_ms
        for size in search.sizes
        for delay in search.delays_us
    ]
    assert len(every) > 2 * fastest.simulations / 3  # the search looks at other loads as well
    assert fastest.best.latency_ms <= min(every) * 1.02
    assert fastest.best.latency_ms <= fastest.asked.latency_ms
    assert fastest.best.requests_per_s == 600.0


def test_the_highest_load_keeps_the_bound_and_no_setting_serves_clearly_more(bounded: Tuning) -> None:
    best = bounded.best
    assert best.latency_ms <= 25.0
    assert bounded.verified.latency_ms + bounded.verified.half_width_ms <= 25.0
    assert best.requests_per_s < bounded.breaking_requests_per_s
    search = _Search(server(), simulate, 16, "p99", None)
    search.breaking()
    more = min(1.08 * best.requests_per_s, bounded.breaking_requests_per_s)
    latencies = [
        search.trial(Setting("sync", size, delay), more).latency_ms
        for size in search.sizes
        for delay in search.delays_us
    ]
    assert min(latencies) > 25.0


def test_other_seeds_say_about_the_same(fastest: Tuning) -> None:
    verified = fastest.verified
    assert verified.replications >= 5
    assert abs(verified.latency_ms - fastest.best.latency_ms) <= max(
        3 * verified.half_width_ms, 0.05 * verified.latency_ms
    )


def test_the_frontier_costs_latency_for_load_and_holds_the_choice(bounded: Tuning) -> None:
    loads = [trial.requests_per_s for trial in bounded.frontier]
    latencies = [trial.latency_ms for trial in bounded.frontier]
    assert loads == sorted(loads)
    assert latencies == sorted(latencies)
    assert max(latencies) < inf
    assert bounded.best in bounded.frontier


def test_a_warm_up_as_long_as_the_trials_hides_nothing(bounded: Tuning) -> None:
    found = tune(server(warm_up_s=1e6), simulate, None, bound_ms=25.0)
    assert abs(found.best.requests_per_s / bounded.best.requests_per_s - 1) < 0.1


def test_no_delay_is_longer_than_the_timeout() -> None:
    scenario = server(queue_timeout_us=3000, max_queue_delay_us=2000)
    found = tune(scenario, simulate, None)
    assert max(trial.setting.max_queue_delay_us for trial in found.trials) <= 3000


def test_the_answer_is_the_same_each_time(fastest: Tuning) -> None:
    assert tune(server(), simulate, None) == fastest


def test_a_median_may_be_asked_for(fastest: Tuning) -> None:
    found = tune(server(), simulate, None, percentile="p50")
    assert found.best.latency_ms == found.best.p50_ms <= fastest.best.p50_ms


@pytest.mark.parametrize(
    ("sets", "options", "key", "wanted"),
    [
        ({"workload__request_rate": "null"}, {}, "workload.request_rate", "one number"),
        ({"workload__request_rate": 100_000}, {}, "workload.request_rate", "less than the"),
        ({}, {"bound_ms": 1.0}, "--slo-ms", "at least 4"),
        ({"workload__max_concurrency": 4}, {"bound_ms": 30.0}, "workload.max_concurrency", "a workload without it"),
        ({"slo__queue_ms": 5}, {}, "slo.queue_ms", "slo.e2e_ms"),
    ],
)
def test_what_cannot_be_tuned_is_refused(
    sets: dict[str, object], options: dict[str, float], key: str, wanted: str
) -> None:
    with pytest.raises(InputError) as error:
        tune(server(**sets), simulate, None, **options)  # type: ignore[arg-type]
    assert error.value.key == key
    assert wanted in error.value.wanted


def test_the_fastest_micro_batch_that_fits_is_chosen() -> None:
    scenario, profile = training_scenario(), small_training_profile()
    found = tune_training(scenario, partial(training.simulate, profile=profile), profile)
    library = library_for("none")
    for size in divisors(scenario.global_batch):
        for kept in ("none", "full"):
            candidate = scenario.model_copy(update={"micro_batch": size, "checkpointing": kept, "steps": 5})
            assert peak_bytes(candidate, profile.device_memory_bytes, library) <= profile.device_memory_bytes
            for result in training.simulate(candidate, profile).results.values():
                assert found.best.step_ms is not None
                assert found.best.step_ms <= result.step_ms["mean"] * 1.002
    assert {(trial.setting.micro_batch, trial.setting.checkpointing) for trial in found.trials} == {
        (size, kept) for size in divisors(scenario.global_batch) for kept in ("none", "full")
    }


def test_what_does_not_fit_is_not_chosen() -> None:
    scenario, library = training_scenario(), library_for("none")
    least, most = (
        peak_bytes(scenario.model_copy(update={"micro_batch": size}), 1 << 40, library)
        for size in (1, scenario.global_batch)
    )
    short = least + (most - least) // 2
    profile = small_training_profile(device_memory_bytes=short)
    found = tune_training(scenario, partial(training.simulate, profile=profile), profile)
    assert any(not trial.fits and trial.step_ms is None for trial in found.trials)
    assert found.best.fits and found.best.peak_bytes <= short
    nothing = small_training_profile(device_memory_bytes=1 << 16)
    with pytest.raises(InputError, match="checkpointing and a micro-batch of 1"):
        tune_training(scenario, partial(training.simulate, profile=nothing), nothing)


class TestCommand:
    def test_it_prints_json_and_writes_a_page(self, tmp_path: Path) -> None:
        file = tmp_path / "server.yaml"
        file.write_text(SERVER)
        told = CliRunner().invoke(app, ["tune", str(file), "--slo-ms", "25", "--json", "--out", str(tmp_path / "out")])
        assert told.exit_code == 0
        value = json.loads(told.stdout)
        assert value["bound_ms"] == 25.0
        assert value == json.loads((tmp_path / "out" / "tuning.json").read_text())
        page = (tmp_path / "out" / "report.html").read_text()
        assert f"max_batch_size {value['best']['setting']['max_batch_size']}" in page

    def test_a_table_says_what_to_set(self, tmp_path: Path, fastest: Tuning) -> None:
        file = tmp_path / "server.yaml"
        file.write_text(SERVER)
        told = CliRunner().invoke(app, ["tune", str(file)])
        assert told.exit_code == 0
        words = " ".join(told.stdout.split())
        setting = fastest.best.setting
        assert f"max_batch_size {setting.max_batch_size}, max_queue_delay_us {setting.max_queue_delay_us:g}" in words

    def test_a_serving_loop_is_refused(self) -> None:
        scenario = Path(__file__).parents[1] / "scenarios" / "async_8b_h200.yaml"
        told = CliRunner().invoke(app, ["tune", str(scenario)])
        assert told.exit_code == 2
        assert told.stderr.startswith(f"{scenario}: kind: found serving, wanted dynamic or training")

    def test_an_unknown_percentile_is_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "server.yaml"
        file.write_text(SERVER)
        told = CliRunner().invoke(app, ["tune", str(file), "--percentile", "p98"])
        assert told.exit_code == 2
        assert "--percentile: found the string 'p98'" in told.stderr

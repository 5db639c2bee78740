"""90% intervals: the design of the draws, what a draw is, and what an interval of them is."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from io import StringIO
from math import log, prod, sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from batchsim import dynamic, engine, training
from batchsim.intervals import DRAWS, SWEEP_DRAWS, bound, of_run, perturbed, with_intervals
from batchsim.intervals.belief import columns, spreads
from batchsim.intervals.design import BLOCK, MOST_FACTORS, signs
from batchsim.intervals.groups import group_of, scale_of
from batchsim.intervals.learned import NORMAL, learned, loop_of
from batchsim.intervals.perturb import SERVING, TRAINING
from batchsim.intervals.within import _consistent, draw, offsets
from batchsim.profile import Profile, Transfer
from batchsim.report import print_run
from batchsim.report.tuning import sentences
from batchsim.result import Run, ScheduleResult, figures, run_json
from batchsim.tune.dynamic import tune
from batchsim.tune.training import tune as tune_training
from tests.dynamic import scenario as dynamic_scenario
from tests.profiles import scenario, serving, small_profile
from tests.training_profiles import small_training_profile
from tests.training_profiles import training as training_scenario

PROFILE = small_profile()


@pytest.fixture(scope="module")
def served() -> Run:
    return intervals(serving())


def intervals(asked: Any, profile: Any = PROFILE, draws: int = SWEEP_DRAWS, *, probed: bool = False) -> Run:
    kinds: dict[str, Any] = {"serving": engine, "dynamic": dynamic, "training": training}
    simulate = kinds[asked.kind].simulate
    return with_intervals(simulate(asked, profile), asked, profile, simulate, draws=draws, probed=probed)


# The design.


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**30), st.integers(1, 5))
def test_every_block_of_a_design_is_orthogonal_and_none_changes_with_more(
    seed: int, replication: int, blocks: int
) -> None:
    found = signs(BLOCK * blocks, MOST_FACTORS, seed=seed, replication=replication)
    assert np.array_equal(np.abs(found), np.ones_like(found))
    for block in np.split(found, blocks):
        assert np.array_equal(block.T @ block, BLOCK * np.eye(MOST_FACTORS))
        assert not block.sum(axis=0).any()
    assert np.array_equal(signs(5, 3, seed=seed, replication=replication), found[:5, :3])


def test_runs_default_to_whole_blocks() -> None:
    assert DRAWS % BLOCK == 0 and SWEEP_DRAWS % BLOCK == 0


def test_all_factors_have_a_column() -> None:
    assert sorted(name for names in columns(PROFILE) for name in names) == sorted(SERVING)
    assert sorted(name for names in columns(small_training_profile()) for name in names) == sorted(TRAINING)
    assert max(len(columns(PROFILE)), len(columns(small_training_profile()))) <= MOST_FACTORS


# Perturbed profiles.


@pytest.mark.parametrize(("profile", "factors"), [(PROFILE, SERVING), (small_training_profile(), TRAINING)])
def test_factors_of_one_change_nothing_and_each_other_one_does(profile: Any, factors: tuple[str, ...]) -> None:
    assert perturbed(profile, dict.fromkeys(factors, 0.0)) == profile == perturbed(profile, {})
    for name in factors:
        assert perturbed(profile, {name: 0.5}) != profile


def test_a_factor_scales_its_part_and_no_other() -> None:
    twice = perturbed(PROFILE, {"sync": log(2)})
    assert isinstance(twice, Profile)
    for name, fit in PROFILE.loops["sync/graph"].phases.items():
        assert twice.loops["sync/graph"].phases[name].mean_ns(8, 3, 1) == pytest.approx(2 * fit.mean_ns(8, 3, 1))
    assert twice.loops["async/graph"] == PROFILE.loops["async/graph"] and twice.device == PROFILE.device
    slower = perturbed(PROFILE, {"decode": log(3), "prefill": log(2)})
    assert isinstance(slower, Profile)
    assert slower.device.decode[1].at(4_000) == pytest.approx(3 * PROFILE.device.decode[1].at(4_000))
    assert slower.device.prefill.at(512, 9_000, 400, 0, 0) == pytest.approx(
        2 * PROFILE.device.prefill.at(512, 9_000, 400, 0, 0)
    )
    assert slower.loops == PROFILE.loops


def test_loops_that_a_run_has_no_use_for_are_left_out() -> None:
    found = perturbed(PROFILE, {}, ["sync/graph", "absent/graph"])
    assert isinstance(found, Profile) and list(found.loops) == ["sync/graph"]


def test_twice_as_slow_training_takes_twice_as_long() -> None:
    profile, asked = small_training_profile(), training_scenario(jitter=False)
    slower = perturbed(profile, dict.fromkeys(("host", "device", "optimizer", "copies"), log(2)))
    one, two = (training.simulate(asked, each).results["sync"].total_s for each in (profile, slower))  # type: ignore[arg-type]
    assert two == pytest.approx(2 * one, rel=1e-3)


# The belief.


def test_a_probe_of_the_host_and_no_transfer_make_spreads_smaller() -> None:
    drift = {"host": 0.1, "unprobed": 0.3, "decode": 0.02}
    told = partial(spreads, loops=["sync/graph"], drift=drift, share=1.0)
    known, unknown = told(PROFILE, probed=True), told(PROFILE, probed=False)
    assert known["host"] == 0.1 and unknown["host"] == pytest.approx(sqrt(0.1))
    there = Transfer(source="a", target="b", hardware="b", spread={"decode": 0.1, "host": 0.0})
    moved = told(PROFILE.model_copy(update={"transfer": there}), probed=True)
    assert moved["decode"] == pytest.approx(sqrt(known["decode"] ** 2 + 0.01)) and moved["host"] == known["host"]


def test_residuals_of_the_calibration_count() -> None:
    loop = PROFILE.loops["sync/graph"]
    phases = {name: fit.model_copy(update={"residuals": {"a": 0.2, "b": -0.2}}) for name, fit in loop.phases.items()}
    off = PROFILE.model_copy(update={"loops": {"sync/graph": loop.model_copy(update={"phases": phases})}})
    assert spreads(off, ["sync/graph"], {}, 1.0, probed=True)["sync"] == pytest.approx(0.2)
    assert spreads(off, ["sync/graph"], {}, 0.5, probed=True)["sync"] == pytest.approx(0.1)
    assert spreads(PROFILE, ["sync/graph"], {}, 1.0, probed=True)["sync"] == 0


# Draws and intervals.


def test_offsets_are_the_root_of_the_sum_of_squares_of_what_each_factor_adds() -> None:
    """Of a machine whose time is a product of powers of its costs, exactly."""
    powers = {"host": 0.2, "decode": 0.7, "prefill": -0.3, "shape": 0.0}

    def simulate(_: Any, costs: Any) -> Run:
        shown = {
            "host": costs.loops["sync/graph"].phases["update"].step_ns,
            "decode": sqrt(costs.device.decode[0].ns[0] * costs.device.decode[0].ns[-1]),
            "prefill": costs.device.prefill.pair_ns,
            "shape": 1.0,
        }
        total_s = prod(shown[name] ** power for name, power in powers.items())
        blank: dict[str, Any] = {
            "throughput_tokens_per_s": None, "step_ms": {}, "device_busy_fraction": 0.5, "launch_gap_fraction": None,
            "host_busy_fraction": 0.5, "idle_ns": {}, "stage_ms": {}, "counts": {},
        }  # fmt: skip
        return Run("simulated", {}, {"sync": ScheduleResult(schedule="sync", total_s=total_s, **blank)}, {}, {})

    drift = {"host": 0.1, "decode": 0.05, "prefill": 0.2}
    known = learned().model_copy(update={"drift": {"serving/closed": drift}, "share": {}})
    asked, profile = scenario(schedules=("sync",)), small_profile()
    drawn = [each["sync"] for each in draw(asked, profile, simulate, BLOCK, known, same_requests=True, probed=True)]
    found = offsets(simulate(asked, profile).results["sync"], drawn)["total_s"]
    assert found == pytest.approx(sqrt(sum((powers[name] * spread) ** 2 for name, spread in drift.items())), rel=1e-3)


def test_intervals_are_around_the_figures_and_of_all_of_them(served: Run) -> None:
    plain = engine.simulate(serving(), PROFILE)
    for name, result in served.results.items():
        assert replace(result, interval_90={}) == plain.results[name]
        assert result.interval_90.keys() == figures(result).keys()
        for key, value in figures(result).items():
            low, high = result.interval_90[key]
            assert low <= value <= high, key
            if key.endswith("_fraction"):
                assert low >= 0 and high <= 1
        low, high = result.interval_90["latency_ms.ttft.p99"]
        assert low < high
    assert served.results["sync"].interval_90["gain_over_sync"] == (0.0, 0.0)


def test_the_same_seed_gives_the_same_intervals_and_another_one_others(served: Run) -> None:
    assert json.dumps(run_json(intervals(serving()))) == json.dumps(run_json(served))
    other = intervals(serving({"seed": 1}))
    assert other.results["sync"].interval_90 != served.results["sync"].interval_90


def test_results_without_intervals_are_written_as_before() -> None:
    run = engine.simulate(scenario(), PROFILE)
    assert with_intervals(run, scenario(), PROFILE, engine.simulate, draws=0) is run
    assert all("interval_90" not in result.to_json() for result in run.results.values())
    partial_run = replace(run, results={"sync": replace(run.results["sync"], partial="interrupted")})
    assert with_intervals(partial_run, scenario(), PROFILE, engine.simulate, draws=8) is partial_run


def test_a_transferred_profile_has_wider_intervals() -> None:
    there = Transfer(source="a", target="b", hardware="b", spread={"decode": 0.1, "prefill": 0.1})
    asked = scenario(output_len=60)
    own, moved = (
        intervals(asked, each).results["async"].interval_90["throughput_tokens_per_s"]
        for each in (PROFILE, PROFILE.model_copy(update={"transfer": there}))
    )
    assert moved[0] < own[0] < own[1] < moved[1]


def test_what_is_known_makes_intervals_narrower() -> None:
    asked = scenario(output_len=60)
    every, probed = (
        intervals(asked, probed=known).results["sync"].interval_90["host_busy_fraction"] for known in (False, True)
    )
    assert every[1] - every[0] > probed[1] - probed[0] > 0


def test_a_figure_that_nothing_changes_has_an_interval_of_nothing() -> None:
    table = dynamic_scenario({"workload.request_rate": None, "jitter": False})
    for key, (low, high) in intervals(table, None).results["sync"].interval_90.items():
        assert low == pytest.approx(high), key


def test_intervals_of_a_table_hold_other_replications() -> None:
    """Of a server with the user's own times nothing is uncertain but chance: nine in ten other runs are inside."""
    inside = []
    for seed in range(24):
        asked = dynamic_scenario({"seed": seed})
        run = intervals(asked, None)
        other = dynamic.simulate(asked.model_copy(update={"replication": 10_000}), None).results["sync"]
        for key in ("latency_ms.e2e.mean", "batch_size.mean", "total_s"):
            low, high = run.results["sync"].interval_90[key]
            inside.append(low <= figures(other)[key] <= high)
    assert 0.78 <= np.mean(inside) <= 0.99


def test_draws_have_requests_of_their_own_unless_they_are_known() -> None:
    seen: list[int] = []

    def simulate(asked: Any, costs: Any) -> Run:
        seen.append(asked.replication)
        assert asked.replications == 1
        return engine.simulate(asked, costs)

    asked = scenario(replication=3, replications=2)
    run = engine.simulate(asked, PROFILE)
    with_intervals(run, asked, PROFILE, simulate, draws=3)
    with_intervals(run, asked, PROFILE, simulate, draws=2, same_requests=True)
    assert seen == [5, 6, 7, 3, 3]


def test_long_trainings_are_judged_by_a_few_steps() -> None:
    profile = small_training_profile()
    seen: list[int] = []

    def simulate(asked: Any, costs: Any) -> Run:
        seen.append(asked.steps)
        return training.simulate(asked, costs)

    asked = training_scenario(steps=40, schedules=["sync"])
    run = with_intervals(training.simulate(asked, profile), asked, profile, simulate, draws=8)
    assert max(seen) <= 4
    result = run.results["sync"]
    low, high = result.interval_90["total_s"]
    assert low < result.total_s < high < 3 * result.total_s


def test_loops_are_told_apart() -> None:
    assert loop_of(serving()) == "serving/open" and loop_of(scenario()) == "serving/closed"
    assert loop_of(dynamic_scenario()) == "dynamic" and loop_of(training_scenario()) == "training"


# Bounds.


def test_bounds_go_through_the_point_and_the_ends(served: Run) -> None:
    result = served.results["sync"]
    for key in ("throughput_tokens_per_s", "latency_ms.ttft.p99", "device_busy_fraction"):
        low, high = result.interval_90[key]
        assert bound(result, key, 0.95, upper=True) == pytest.approx(high)
        assert bound(result, key, 0.95, upper=False) == pytest.approx(low)
        assert bound(result, key, 0.5, upper=True) == pytest.approx(figures(result)[key])
        levels = [bound(result, key, confidence, upper=True) for confidence in (0.5, 0.6, 0.8, 0.9, 0.95, 0.99)]
        assert levels == sorted(levels)
    plain = engine.simulate(scenario(), PROFILE).results["sync"]
    assert bound(plain, "total_s", 0.9, upper=True) == plain.total_s
    with pytest.raises(KeyError):
        bound(plain, "latency_ms.nothing", 0.9, upper=True)


# Scales and what was learned.


@given(
    st.sampled_from(["total_s", "latency_ms.ttft.p99", "batch_size.mean", "kv_use.mean", "gain_over_sync"]),
    st.floats(0, 1),
)
def test_scales_lead_back(key: str, value: float) -> None:
    assert scale_of(key).back(scale_of(key).of(value)) == pytest.approx(value, abs=1e-9)


def test_scales_keep_figures_possible() -> None:
    assert scale_of("device_busy_fraction").back(1.2) == 1 and scale_of("kv_use.max").back(5.0) == 1
    assert scale_of("total_s").back(-1e9) == 0 and scale_of("gain_over_sync").back(-3) == -1
    assert scale_of("gain_over_sync").back(0.3) == 0.3


def test_every_figure_of_a_group_that_was_learned_has_its_width(served: Run) -> None:
    groups = {group_of(key) for key in figures(served.results["async"])}
    assert groups <= learned().widths["serving/open"].keys()
    for width in (width for widths in learned().widths.values() for width in widths.values()):
        assert width.spread >= NORMAL and width.floor >= 0


def test_more_draws_change_widths_little() -> None:
    asked = scenario(output_len=60)
    few, many = (intervals(asked, draws=count).results["async"].interval_90["total_s"] for count in (8, 64))
    assert log(few[1] / few[0]) == pytest.approx(log(many[1] / many[0]), rel=0.1)


# Where they are shown.


def test_terminals_show_intervals_within_eighty_columns(served: Run) -> None:
    out = StringIO()
    print_run(Console(file=out, width=80), served)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    low, high = served.results["sync"].interval_90["throughput_tokens_per_s"]
    (row,) = (line for line in lines if line.startswith("tokens/s"))
    assert f"[{low:,.0f}, {high:,.0f}]" in row
    assert sum(line.startswith("  90%") for line in lines) == sum(
        len(result.latency_ms) for result in served.results.values()
    )
    measured = engine.simulate(serving(), PROFILE)
    out = StringIO()
    print_run(Console(file=out, width=80), served, replace(measured, source="executed"))
    count = sum(len(result.interval_90) for result in served.results.values()) - 1  # sync gains nothing over itself
    assert f"{count} of {count} measured figures are inside" in " ".join(out.getvalue().split())


def test_runs_that_would_take_long_say_so(served: Run) -> None:
    asked = serving()
    long = replace(served, results={"sync": replace(served.results["sync"], iterations=10**7, events=10**7)})
    found = of_run(long, asked, PROFILE, engine.simulate)
    assert any("no 90% intervals" in text for text in found.results["sync"].warnings)
    asked_for = of_run(long, asked.model_copy(update={"schedules": ("sync",)}), PROFILE, engine.simulate, draws=2)
    assert asked_for.results["sync"].interval_90


def test_a_tuned_setting_has_an_interval() -> None:
    asked = dynamic_scenario({"workload.request_rate": 300.0, "workload.num_prompts": 500})

    def at(candidate: Any, costs: Any = None) -> Run:
        return dynamic.simulate(candidate, costs)

    found = tune(asked, at, None, again=at)
    assert found.interval_90_ms is not None
    assert found.interval_90_ms[0] < found.best.latency_ms < found.interval_90_ms[1]
    assert any("90% confidence" in sentence for sentence in sentences(found))
    assert tune(asked, at, None).interval_90_ms is None


def test_a_tuned_training_has_an_interval() -> None:
    def at(candidate: Any, costs: Any = None) -> Run:
        return training.simulate(candidate, costs or small_training_profile())

    found = tune_training(training_scenario(steps=2), at, small_training_profile(), again=at)
    assert found.interval_90_ms is not None and found.best.step_ms is not None
    assert found.interval_90_ms[0] < found.best.step_ms < found.interval_90_ms[1]


@given(st.lists(st.tuples(*[st.floats(0, 1e6)] * 3), min_size=2, max_size=5))
def test_bounds_of_quantiles_rise_and_keep_their_points(drawn: list[tuple[float, float, float]]) -> None:
    points = sorted(sorted(each)[1] for each in drawn)
    bounds = [(min(point, *each), max(point, *each)) for point, each in zip(points, drawn, strict=True)]
    keys = [f"latency_ms.ttft.{name}" for name in ("p50", "p90", "p95", "p99", "p99.9")[: len(points)]]
    found = _consistent(dict(zip(keys, bounds, strict=True)))
    lows, highs = zip(*found.values(), strict=True)
    assert list(found) == keys
    assert list(lows) == sorted(lows) and list(highs) == sorted(highs)
    assert all(low <= point <= high for point, low, high in zip(points, lows, highs, strict=True))


def test_no_more_requests_are_good_than_are_served() -> None:
    served, good = (40.0, 60.0), (10.0, 90.0)
    bounds = _consistent({"throughput_requests_per_s": served, "goodput_requests_per_s": good})
    assert bounds["goodput_requests_per_s"] == (10.0, 60.0)

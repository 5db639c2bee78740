"""Virtual speed-ups: what each stage is worth, by the laws that a loop of host and device follows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import yaml
from typer.testing import CliRunner

import batchsim.profile
from batchsim.cli import app
from batchsim.dynamic_scenario import DynamicScenario
from batchsim.explain import Explained, Explanation, Gain, explain
from batchsim.explain.stages import all_faster, stages_of
from batchsim.kinds import KINDS
from batchsim.profile import Profile
from batchsim.scenario import Scenario
from batchsim.training_scenario import Data, TrainingScenario
from tests.profiles import device, loop, scenario, serving, small_profile
from tests.training_profiles import small_training_profile, training

BY = 0.1
HOST = ("schedule", "build_inputs", "copy_in", "copy_out", "record", "stream_wait", "wait", "update", "launch")


def closed(**changes: Any) -> Scenario:
    """Equal requests that are all there at the start, in one batch."""
    return scenario(num_prompts=4, output_len=300, jitter=False, **changes)


def gains(found: Explanation, schedule: str) -> dict[str, Gain]:
    return {gain.stage: gain for gain in found.schedules[schedule].gains}


def explained(asked: Scenario, profile: Profile, by: float = BY) -> Explanation:
    return explain(KINDS["serving"], asked, profile, by=by)


@pytest.fixture(scope="module")
def host_heavy() -> Explanation:
    """A host that takes a good part of a sync step, and hides behind the device in an async one."""
    return explained(closed(), small_profile())


@pytest.mark.parametrize("schedule", ["sync", "async"])
@pytest.mark.parametrize("by", [0.1, 0.5])
def test_all_stages_faster_is_a_faster_machine(schedule: str, by: float) -> None:
    found = explained(closed(schedules=(schedule,)), small_profile(), by)
    everything = found.schedules[schedule].everything
    assert everything.throughput == pytest.approx(by, rel=1e-4)
    for gain in everything.latency.values():
        assert gain == pytest.approx(1 - 1 / (1 + by), rel=1e-3)


def test_under_sync_the_stages_gains_sum_to_nearly_the_whole(host_heavy: Explanation) -> None:
    """One after the other, every stage's time counts; each gain is a little less of a step that is not shorter yet."""
    total = sum(gain.throughput for gain in host_heavy.schedules["sync"].gains)
    assert 0.95 * BY < total < 1.001 * BY


def test_under_sync_no_stage_gains_more_than_its_share_of_the_step(host_heavy: Explanation) -> None:
    for gain in host_heavy.schedules["sync"].gains:
        assert gain.throughput >= -1e-9
        if gain.share is not None:
            assert gain.throughput <= gain.share * BY + 1e-6


def test_under_async_a_hidden_host_is_worth_nothing_and_the_device_everything(host_heavy: Explanation) -> None:
    found = gains(host_heavy, "async")
    assert all(abs(found[name].throughput) < 1e-3 for name in HOST if name in found)
    assert found["decode"].throughput == pytest.approx(BY, rel=0.05)
    assert host_heavy.schedules["async"].gains[0].stage == "decode"
    assert "a faster host gives nothing" in host_heavy.sentences[1]
    sync = gains(host_heavy, "sync")
    assert sync["build_inputs"].throughput > 0.004  # where it is not hidden, it is worth its share


def test_under_async_a_host_that_is_the_bottleneck_is_worth_everything_and_the_device_nothing() -> None:
    slow = small_profile(loops={name: loop(10) for name in ("sync/graph", "async/graph", "sync/eager", "async/eager")})
    found = gains(explained(closed(schedules=("async",)), slow), "async")
    assert abs(found["decode"].throughput) < 1e-3
    assert sum(found[name].throughput for name in HOST if name in found) == pytest.approx(BY, rel=0.1)


def test_stages_are_ordered_by_what_they_are_worth(host_heavy: Explanation) -> None:
    for each in host_heavy.schedules.values():
        worth = [gain.sure(each.measure) for gain in each.gains]
        assert worth == sorted(worth, reverse=True)
        assert each.measure == "throughput"


def test_a_schedule_has_only_stages_that_it_uses(host_heavy: Explanation) -> None:
    assert "stream_wait" not in gains(host_heavy, "sync")
    assert "stream_wait" in gains(host_heavy, "async")


def test_launching_kernel_by_kernel_is_what_a_loop_without_graphs_is_worth() -> None:
    slow = small_profile(loops={name: loop(10) for name in ("sync/graph", "async/graph", "sync/eager", "async/eager")})
    found = explained(closed(cuda_graphs=False), slow)
    for schedule in ("sync", "async"):
        assert gains(found, schedule)["launch"].throughput > 0.5 * BY


def test_where_requests_come_at_their_own_times_latency_is_what_there_is_to_gain() -> None:
    found = explained(serving({"schedules": ["sync"], "workload.num_prompts": 200}), small_profile())
    each = found.schedules["sync"]
    assert each.measure == "e2e.p50"
    assert each.everything.latency["e2e.p50"] > 0.08  # at least as much as a step, and queues on top
    assert each.everything.throughput == pytest.approx(BY, rel=0.01)  # what it would serve when requests always wait
    assert "e2e.p50" in each.everything.half_width
    assert each.gains[0].stage in ("decode", "prefill")


def test_an_overloaded_service_is_ordered_by_what_it_serves() -> None:
    asked = serving({"schedules": ["sync"], "workload.num_prompts": 400, "workload.request_rate": 2_000})
    each = explained(asked, small_profile()).schedules["sync"]
    assert each.measure.startswith("throughput")


@pytest.mark.parametrize("ms", [8, {"p10": 4, "p50": 8, "p99": 20}, {"samples": [4, 9]}, {"dist": "expon", "scale": 5}])
def test_a_table_of_times_is_one_stage_and_all_there_is(ms: Any) -> None:
    asked = DynamicScenario.model_validate(
        {
            "kind": "dynamic", "name": "a table", "costs": {"kind": "table", "batch_ms": {"1": ms}},
            "max_batch_size": 1,
            "workload": {"kind": "fixed", "num_prompts": 300, "max_concurrency": 1},
        }
    )  # fmt: skip
    each = explain(KINDS["dynamic"], asked, None, by=BY).schedules["sync"]
    (gain,) = each.gains
    assert gain.throughput == pytest.approx(BY, rel=1e-3)
    assert gain.throughput == each.everything.throughput


def test_training_is_a_loop_as_any_other() -> None:
    data = Data(prepare_ms_per_sequence=0.5)
    asked: TrainingScenario = training(jitter=False, host_threads=2, data=data)
    found = explain(KINDS["training"], asked, small_training_profile(), by=BY)
    for schedule, each in found.schedules.items():
        assert each.everything.throughput == pytest.approx(BY, rel=1e-3), schedule
        assert {"forward", "backward", "prepare"} <= {gain.stage for gain in each.gains}
    # Beside the device, on a thread of its own, preparing is worth little; before it, its share.
    assert gains(found, "async")["prepare"].throughput < 0.004
    assert gains(found, "sync")["prepare"].throughput > 0.03


def test_no_stage_is_made_faster_twice() -> None:
    """One after the other and all at once are the same costs, and twice as fast and half as fast the ones before."""
    asked, profile = closed(), small_profile()
    stages = stages_of(asked, profile)
    assert len({stage.name for stage in stages}) == len(stages)
    one = profile
    for stage in stages:
        _, one = stage.faster(asked, one, 2.0)
    assert one == all_faster(stages, asked, profile, 2.0)[1]
    _, back = all_faster(stages, asked, one, 0.5)
    assert back == profile
    assert one.device != device()


def test_everything_in_the_explanation_is_plain_data_and_shows_itself(host_heavy: Explanation) -> None:
    told = json.loads(json.dumps(host_heavy.to_json(), allow_nan=False))
    assert told["by"] == BY and set(told["schedules"]) == {"sync", "async"}
    rows = host_heavy.rows()
    assert sum(row["stage"] == "everything" for row in rows) == 2
    assert isinstance(host_heavy.figure(), go.Figure)
    assert "build_inputs" in host_heavy._repr_html_()
    pandas = pytest.importorskip("pandas")
    assert len(host_heavy.frame()) == len(rows) and isinstance(host_heavy.frame(), pandas.DataFrame)


def test_ctrl_c_leaves_the_stages_that_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    import batchsim.engine

    whole = batchsim.engine.simulate
    told: list[Any] = []

    def simulate(*arguments: Any, **options: Any) -> Any:
        if len(told) == 5:
            raise KeyboardInterrupt
        told.append(arguments)
        return whole(*arguments, **options)

    monkeypatch.setattr(batchsim.engine, "simulate", simulate)
    found = explained(closed(schedules=("sync",)), small_profile())
    assert found.partial is not None and found.partial.startswith("interrupted after 3 of")
    assert len(found.schedules["sync"].gains) <= 3
    assert found.sentences[0].startswith("This is not the whole answer")


def test_ctrl_c_before_the_first_stage_is_told(host_heavy: Explanation) -> None:
    stopped = replace(
        host_heavy,
        partial="interrupted after 0 of 9 stages",
        schedules={name: replace(each, gains=()) for name, each in host_heavy.schedules.items()},
    )
    assert stopped.sentences[1:] == [
        f"{name}: of no stage is it known yet what it is worth." for name in stopped.schedules
    ]
    assert stopped.to_json()["partial"]


def test_a_small_speed_up_is_worth_its_share() -> None:
    """What a stage is worth does not depend on how much faster it is taken to get."""
    told = [explained(closed(schedules=("sync",)), small_profile(), by).sentences[0] for by in (BY, 0.002)]
    assert all("work on" in text and "a faster host gives nothing" not in text for text in told)
    assert "10% faster" in told[0] and "0.2% faster" in told[1]


def test_the_command_explains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_text(yaml.safe_dump(closed().model_dump(mode="json", exclude_none=True)))
    monkeypatch.setattr(batchsim.profile, "load_profile", lambda *_: small_profile())
    done = CliRunner().invoke(app, ["explain", str(path), "--json", "--by", "0.2", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed == json.loads((tmp_path / "out" / "explain.json").read_text())
    assert printed["schedules"]["sync"]["everything"]["throughput"] == pytest.approx(0.2, rel=1e-3)
    for by in ("0", "-1", "nan", "20"):
        refused = CliRunner().invoke(app, ["explain", str(path), "--by", by])
        assert refused.exit_code == 2 and "--by: found" in refused.stderr


def test_what_chance_may_have_done_is_not_sure() -> None:
    gain = Gain("decode", "device", "", 0.05, {"e2e.p50": 0.02}, {"e2e.p50": 0.03})
    assert gain.sure("throughput") == 0.05
    assert gain.at("e2e.p50") == 0.02 and gain.sure("e2e.p50") == 0
    assert Explained("sync", "e2e.p50", {}, (gain,), gain).gains[0] is gain

"""Plans: what may be written, and what a wrong line gets told; the answer, its words, and what Ctrl-C leaves of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import PydanticCustomError
from typer.testing import CliRunner

from batchsim.cli import app
from batchsim.errors import InputError
from batchsim.evaluate import evaluate
from batchsim.plan import PlanResult, plan
from batchsim.plan.bench import ScenarioBench
from batchsim.plan.objectives import STATISTICS, parse
from batchsim.plan.traffic import scaled
from batchsim.workload import requests_of
from batchsim.workload_scenario import RandomWorkload
from tests.plan_problems import SCENARIOS, problem, small_plan

LATENCIES = st.builds(
    "{}_{}_ms".format, st.sampled_from(STATISTICS), st.sampled_from(("ttft", "tpot", "itl", "e2e", "queue"))
)
RATES = st.sampled_from(("throughput_tokens_per_s", "throughput_requests_per_s", "goodput_requests_per_s"))
LIMITS = st.floats(1e-3, 1e6)


@cache
def answered() -> PlanResult:
    return plan(small_plan())


@given(LATENCIES, LIMITS)
def test_a_latency_is_bounded_from_above(key: str, limit: float) -> None:
    found = parse(key, f" <= {limit!r} ")
    assert found.at_most and found.limit == limit
    assert found.margin(limit) == 0
    assert found.margin(limit / 2) > 0 > found.margin(limit * 2)
    with pytest.raises(PydanticCustomError, match="<="):
        parse(key, f">={limit!r}")


@given(RATES, LIMITS)
def test_a_rate_is_bounded_from_below(key: str, limit: float) -> None:
    found = parse(key, f">={limit!r}")
    assert not found.at_most and found.limit == limit
    assert found.margin(limit * 2) > 0 > found.margin(limit / 2)
    assert found.margin(None) == -inf
    with pytest.raises(PydanticCustomError, match=">="):
        parse(key, f"<={limit!r}")


def candidates(**changes: Any) -> dict[str, Any]:
    return {"candidates": small_plan()["candidates"] | changes}


CUSTOM = {
    "sms": 100, "clock_mhz": 1500, "matrix_tflops": {"bf16": 300}, "vector_tflops": {"fp32": 20},
    "memory_bytes": 80_000_000_000, "memory_gb_per_s": 2000, "pcie_gb_per_s": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"objectives": {}}, "objectives: found an empty mapping, wanted a mapping of figures to bounds"),
        (
            {"objectives": {"p99_ttft_ms": ">=500"}},
            """objectives.p99_ttft_ms: found the string '>=500', wanted "<=500\"""",
        ),
        ({"objectives": {"p99_ttft_ms": 500}}, """objectives.p99_ttft_ms: found 500, wanted a bound: "<=500\""""),
        ({"objectives": {"p99_ttft_ms": "<500"}}, "wanted a bound such as"),
        ({"objectives": {"p99_ttft_ms": "<=nan"}}, "wanted a bound such as"),
        ({"objectives": {"p99_ttft_ms": "<=1e999"}}, "wanted a bound such as"),
        ({"objectives": {"p99_ttft_ms": "<=0"}}, "wanted a number above 0"),
        ({"objectives": {"p99_tfft_ms": "<=500"}}, "the nearest: p99_ttft_ms"),
        ({"objectives": {"goodput": ">=5"}}, "objectives.goodput: found an unknown objective"),
        ({"objectives": {"goodput_requests_per_s": ">=5"}}, "wanted a scenario with slo"),
        ({"objectives": {"slo_attainment": ">=95"}}, "wanted a share above 0 and at most 1"),
        ({"confidence": 1.5}, "confidence: found 1.5, wanted a number from 0.5 to 0.99"),
        (candidates(hardware=["h20"]), "candidates.hardware: found the string 'h20', wanted h200"),
        (candidates(hardware=[{"base": "l40s", "sms": 0}]), "candidates.hardware.sms: found 0, wanted an integer"),
        (candidates(hardware=[CUSTOM]), "found custom, whose price per hour is not known, wanted its price"),
        (candidates(hardware=[{"base": "l4", "price_per_hour": 0}]), "candidates.hardware: found l4, for 0, wanted"),
        (candidates(hardware=[]), "candidates.hardware: found an empty list"),
        (candidates(schedules=["asink"]), "candidates.schedules: found the string 'asink', wanted sync, async or tile"),
        (candidates(schedules=["sync", "sync"]), "candidates.schedules: found sync twice"),
        (candidates(max_num_seqs=[0]), "candidates.max_num_seqs: found 0, wanted an integer from 1 to 65536"),
        (candidates(max_num_seqs=[10_000]), "with which max_num_batched_tokens is refused: found 8192"),
        (candidates(replicas={"max": 0}), "candidates.replicas.max: found 0, wanted an integer from 1 to 1024"),
        (candidates(replicas={"min": 3, "max": 2}), "candidates.replicas.max: found 2, less than min = 3"),
        (candidates(replicas=[2, 2]), "candidates.replicas: found a number twice"),
        (candidates(replicas="many"), "a list of such, or a mapping with min and max"),
        (candidates(tensor_parallel=[3]), "candidates.tensor_parallel: found 3, which does not divide"),
        (candidates(fields={"replicas": [1]}), "candidates.fields.replicas: found replicas among fields"),
        (candidates(fields={"block_size": [17]}), "candidates.fields.block_size: found 17, wanted a power of two"),
        (candidates(fields={"block_sise": [16]}), "wanted block_size"),
        (candidates(fields={"block_size": 16}), "candidates.fields.block_size: found 16, wanted a list of values"),
        ({"scenario": {"kind": "dynamic"}}, "`batchsim tune` chooses"),
        ({"scenario": small_plan()["scenario"] | {"max_num_seqs": 0}}, "max_num_seqs: found 0"),
        ({"scenario": "nowhere.yaml"}, "nowhere.yaml: found no readable file"),
        ({"kind": "serving"}, "kind: found serving, wanted plan: `batchsim run` is the command"),
    ],
)
def test_what_is_wrong_is_told_with_its_key_and_what_would_do(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as caught:
        plan(small_plan(**changes))
    assert told in str(caught.value)


def test_a_refusal_names_the_line_of_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(small_plan(**candidates(max_num_seqs=[64, 0])), sort_keys=False))
    line = path.read_text().splitlines().index("  max_num_seqs:") + 1
    with pytest.raises(InputError) as caught:
        plan(path)
    assert str(caught.value).startswith(f"{path}:{line + 2}: candidates.max_num_seqs: found 0")


def test_a_model_that_fits_no_candidate_is_refused() -> None:
    scenario = small_plan()["scenario"] | {"model": "llama-3.1-8b", "profile": "h200-llama-3.1-8b"}
    with pytest.raises(InputError, match=r"16\.1 GB of weights, wanted a model that fits the device's 10 GB"):
        plan(small_plan(scenario=scenario, **candidates(hardware={"base": "l4", "memory_bytes": 10_000_000_000})))


def test_the_answer_meets_all_objectives_and_nothing_known_to_do_is_cheaper() -> None:
    found = answered()
    best = found.best
    assert best is not None and best.meets and best.stable
    for objective in found.objectives:
        bound = best.bounds[objective.key]
        assert bound is not None and bound <= objective.limit
        value = best.values[objective.key]
        assert value is not None and value <= bound
    assert all(best.merit <= trial.merit for trial in found.evaluated if trial.meets)
    assert found.binds == best.tightest
    assert (
        found.runner_up is None
        or found.runner_up.candidate.configuration.hardware != best.candidate.configuration.hardware
    )
    # The answer is no other than what a run of its own gives.
    document = small_plan()["scenario"] | dict(best.candidate.configuration.overrides)
    document["replicas"] = best.candidate.replicas
    run = evaluate(document, file="plan", base=SCENARIOS, draws=8)
    assert best.result == run.results[best.candidate.configuration.schedule]


def test_costs_are_of_all_devices() -> None:
    found = plan(small_plan(**candidates(hardware=["h200"], tensor_parallel=[2], replicas=[2], max_num_seqs=[64])))
    (trial,) = {id(trial): trial for trial in found.evaluated}.values()
    assert trial.candidate.devices == 4
    price = trial.candidate.configuration.price_per_hour
    assert trial.candidate.cost_per_hour == pytest.approx(4 * price)
    tokens_per_s = trial.figures["throughput_tokens_per_s"]
    assert trial.cost_per_million_tokens == pytest.approx(4 * price / 3600 / tokens_per_s * 1e6)


def test_the_frontier_trades_cost_for_latency() -> None:
    found = answered()
    assert found.latency is not None and len(found.frontier) > 1
    points = [(trial.cost_per_million_tokens or inf, trial.figures[found.latency.figure]) for trial in found.frontier]
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(points))
    for trial in found.evaluated:
        cost = trial.cost_per_million_tokens
        if trial.stable and cost is not None:
            latency = trial.figures[found.latency.figure]
            assert any(point[0] <= cost and point[1] <= latency for point in points)


def test_objectives_that_nothing_meets_are_told_with_what_comes_closest() -> None:
    found = plan(small_plan(objectives={"mean_tpot_ms": "<=0.5"}))
    assert found.best is None and found.runner_up is None and found.binds is None
    assert found.sentences[0] == "No candidate meets all objectives at a confidence of 90%."
    (change,) = found.would_change
    assert change.kind == "near_miss" and "misses mean TPOT" in change.text
    json.dumps(found.to_json(), allow_nan=False)


def test_what_no_candidate_can_reach_takes_no_simulation() -> None:
    found = plan(small_plan(objectives={"throughput_tokens_per_s": ">=1e6"}))
    assert found.best is None and found.simulations == 0
    assert "beyond them" in found.sentences[1]


@pytest.mark.parametrize(
    ("fewest", "objectives", "told"),
    [
        (1, {"p99_ttft_ms": "<=60000"}, "No candidate is cheaper."),
        (2, {"p99_ttft_ms": "<=60000"}, "No candidate is cheaper."),
        (
            1,
            {"throughput_tokens_per_s": ">=6000"},
            "No cheaper candidate can carry the load at the rate that is asked for, by the profile's costs alone.",
        ),
    ],
)
def test_why_nothing_cheaper_was_tried(fewest: int, objectives: dict[str, str], told: str) -> None:
    scenario = small_plan()["scenario"]
    scenario["workload"] = {"kind": "fixed", "num_prompts": 200, "input_len": 30, "output_len": 200}
    asked = candidates(hardware=["l4"], max_num_seqs=[64], replicas={"min": fewest, "max": 16})
    found = plan(small_plan(scenario=scenario, objectives=objectives, **asked))
    assert [each.text for each in found.would_change if each.kind in ("floor", "near_miss")] == [told]


def test_rates_and_shares_are_reached_with_the_wanted_confidence() -> None:
    scenario = small_plan()["scenario"] | {"slo": {"ttft_ms": 60, "tpot_ms": 20}}
    found = plan(
        small_plan(scenario=scenario, objectives={"goodput_requests_per_s": ">=15", "slo_attainment": ">=0.9"})
    )
    assert found.best is not None
    for objective in found.objectives:
        bound, value = found.best.bounds[objective.key], found.best.values[objective.key]
        assert bound is not None and value is not None
        assert objective.limit <= bound <= value
    json.dumps(found.to_json(), allow_nan=False)


def test_more_confidence_never_costs_less() -> None:
    objectives = {"p99_ttft_ms": "<=70", "mean_tpot_ms": "<=20"}
    costs = []
    for confidence in (0.5, 0.8, 0.99):
        best = plan(small_plan(objectives=objectives, confidence=confidence)).best
        costs.append(inf if best is None else best.candidate.cost_per_hour)
    assert costs == sorted(costs)


def test_the_same_plan_gives_the_same_bytes() -> None:
    assert json.dumps(plan(small_plan()).to_json(), allow_nan=False) == json.dumps(
        answered().to_json(), allow_nan=False
    )


def test_results_show_themselves() -> None:
    found = answered()
    assert isinstance(found.figure(), go.Figure)
    html = found._repr_html_()
    assert found.best is not None and found.best.candidate.words in html
    rows = found.rows()
    assert len(rows) == len(found.evaluated) and rows[0]["role"] == "best"
    pandas = pytest.importorskip("pandas")
    assert isinstance(found.frame(), pandas.DataFrame) and len(found.frame()) == len(rows)


def test_ctrl_c_leaves_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ScenarioBench.screen
    told: list[Any] = []

    def screen(self: ScenarioBench, candidate: Any) -> Any:
        if len(told) == 4:
            raise KeyboardInterrupt
        told.append(candidate)
        return whole(self, candidate)

    monkeypatch.setattr(ScenarioBench, "screen", screen)
    found = plan(small_plan())
    assert found.partial is not None and found.partial.startswith("interrupted after")
    assert {trial.candidate for trial in found.evaluated} == set(told)
    assert found.sentences[0].startswith("This is not the whole answer: interrupted")
    json.dumps(found.to_json(), allow_nan=False)


RATE_FORMS: list[Any] = [
    8,
    {"mean": 8, "amplitude": 0.5, "period_s": 60, "peak_s": 10},
    [{"rate": 4, "duration_s": 20}, {"rate": 16, "duration_s": 10}, {"rate": 8}],
]


@pytest.mark.parametrize("rate", RATE_FORMS)
def test_more_traffic_is_the_same_requests_in_less_time(rate: Any) -> None:
    workload = {"kind": "random", "num_prompts": 200, "request_rate": rate, "input_len": 10, "output_len": 5}
    twice = scaled({"workload": workload}, 2.0)
    assert twice is not None
    before, after = (
        requests_of(RandomWorkload.model_validate(each), seed=3, replication=0)
        for each in (workload, twice["workload"])
    )
    assert abs(before.arrival_ns - 2 * after.arrival_ns).max() <= 100
    assert scaled({"workload": {"kind": "fixed", "num_prompts": 5}}, 2.0) is None
    assert scaled({"workload": {"kind": "trace", "rate_scale": 3.0}}, 2.0) == {
        "workload": {"kind": "trace", "rate_scale": 6.0}
    }


def test_the_command_writes_and_prints_the_same_answer(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(small_plan()))
    invoke: Callable[..., Any] = CliRunner().invoke
    done = invoke(app, ["plan", str(path), "--json", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert json.loads((tmp_path / "out" / "plan.json").read_text()) == printed
    assert (tmp_path / "out" / "report.html").stat().st_size > 0
    best = answered().best
    assert best is not None and printed["best"]["replicas"] == best.candidate.replicas
    refused = invoke(app, ["plan", str(path), "--set", "confidence=2"])
    assert refused.exit_code == 2
    assert "--set: confidence: found 2, wanted a number from 0.5 to 0.99" in refused.stderr


def test_the_example_is_a_plan() -> None:
    asked = yaml.safe_load((SCENARIOS / "plan_chat.yaml").read_text())
    assert problem(asked).candidates > 100

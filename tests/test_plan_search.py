"""The search for the cheapest candidate: what trying all of them finds, at a fraction of the simulations."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchsim.engine import requests_of
from batchsim.evaluate import evaluate
from batchsim.plan.candidate import Candidate, Trial
from batchsim.plan.capacity import Load, least_replicas, most_rows, request_ns
from batchsim.plan.search import Search, exhaustive
from batchsim.profile import load_profile
from batchsim.scenario import load
from tests.plan_problems import (
    SCENARIOS,
    bench_of,
    candidates_of,
    formula_problem,
    problem,
    real_problem,
    small_plan,
)  # fmt: skip

SHARE = 0.2
DRAWS = 4


def both(seed: int) -> tuple[Candidate | None, Candidate | None, float, int]:
    """(found, wanted, the search's share of the simulations, candidates) of a generated problem on a formula."""
    bench, configurations, replicas = formula_problem(seed)
    found = Search(bench, replicas).cheapest(configurations)
    used, bench.simulations = bench.simulations, 0
    every = [Candidate(*each) for each in product(configurations, replicas)]
    wanted, _ = exhaustive(bench, every)
    share = used / bench.simulations
    return _of(found), _of(wanted), share, len(every)


def _of(trial: Trial | None) -> Candidate | None:
    return None if trial is None else trial.candidate


@pytest.mark.parametrize("seed", range(20))
def test_the_search_finds_the_optimum_of_all_candidates_with_a_fifth_of_the_simulations(seed: int) -> None:
    found, wanted, share, _ = both(seed)
    assert found == wanted
    assert share <= SHARE


@given(st.integers(20, 100_000))
@settings(max_examples=25, deadline=None)
def test_the_search_finds_the_optimum_whatever_the_problem(seed: int) -> None:
    found, wanted, share, count = both(seed)
    assert found == wanted
    assert share <= SHARE or count <= 48  # of few candidates those that have to be looked at are many


def test_the_problems_differ_and_some_have_no_answer() -> None:
    wanted = [both(seed)[1] for seed in range(20)]
    assert None in wanted
    assert len({each.configuration.hardware for each in wanted if each}) > 2
    assert len({each.replicas for each in wanted if each}) > 3


def test_nothing_dearer_than_the_answer_is_confirmed_without_need() -> None:
    """Of each configuration at most a bracket around the answer's cost is looked at."""
    for seed in range(20):
        bench, configurations, replicas = formula_problem(seed)
        best = Search(bench, replicas).cheapest(configurations)
        if best is None:
            continue
        confirmed = [candidate for candidate, draws in bench.runs if draws]
        dearer = [each for each in confirmed if each.cost_per_hour > 4 * best.candidate.cost_per_hour]
        assert not dearer


@pytest.mark.parametrize("number", [1, 3, 6])
def test_on_the_simulator_the_search_finds_the_optimum_of_all_candidates(number: int) -> None:
    generated = real_problem(number, requests=80, replicas=3, hardware=2, batches=2)
    bench, every = bench_of(generated, DRAWS), bench_of(generated, DRAWS)
    found = Search(bench, generated.replicas).cheapest(generated.configurations)
    wanted, trials = exhaustive(every, candidates_of(generated))
    assert _of(found) == _of(wanted)
    assert every.simulations == len(trials) * (1 + DRAWS)
    assert (
        bench.simulations <= 0.4 * every.simulations
    )  # of only 32 candidates; benchmarks/bench_plan.py has larger ones
    if found and wanted:
        assert found.bounds == wanted.bounds
    for trial in trials:
        # No bound on replicas rules out what does, and no candidate that does is taken not to.
        least = bench.least(trial.candidate.configuration)
        assert least is not None
        assert not trial.meets or trial.candidate.replicas >= least


def test_what_is_known_to_miss_with_some_draws_misses_with_all() -> None:
    small = problem(small_plan(objectives={"p99_ttft_ms": "<=65", "mean_tpot_ms": "<=17"}))
    bench = bench_of(small, DRAWS)
    stopped = 0
    for candidate in candidates_of(small):
        screened = bench.screen(candidate)
        if not screened.passes:
            continue
        before = bench.simulations
        confirmed = bench.confirm(screened)
        assert bench.simulations - before == confirmed.draws
        whole = bench.whole(candidate)
        assert confirmed.meets == whole.meets
        if confirmed.complete:
            assert confirmed.bounds == whole.bounds
        else:
            stopped += 1
            for key, margin in confirmed.confident_margins.items():
                assert whole.confident_margins[key] <= margin + 1e-9
    assert stopped


def test_a_batch_that_never_reaches_its_limit_is_the_same_under_another() -> None:
    small = problem(small_plan())
    low, high = (Candidate(each, 2) for each in small.configurations[:2])
    bench = bench_of(small)
    one, other = bench.screen(low), bench.screen(high)
    run = evaluate(bench.document(high.configuration, replicas=2), file="plan", base=small.base)
    assert one.figures["batch_size.max"] < 64  # else nothing would be shared
    assert bench.simulations == 1
    assert other.result == run.results["async"]


@pytest.mark.parametrize(
    ("name", "sets"),
    [
        ("serving_512_128", []),
        ("serving_512_128", ["max_num_seqs=16"]),
        ("serving_512_128", ["max_num_batched_tokens=512"]),
        ("serving_512_128", ["cuda_graphs=false", "max_num_seqs=32"]),
        ("serving_chat_8b_h200", ["workload.num_prompts=2000"]),
        # Steps that are full of prompts, with few decodes beside them.
        # A slow host, for which all that counts is how few steps there are: all full, with 6.7 decodes beside a prompt.
        (
            "serving_512_128",
            [
                "workload.input_len=300",
                "workload.output_len=5",
                "max_num_seqs=17",
                "max_num_batched_tokens=512",
                "cuda_graphs=false",
                "host_speed=0.1",
            ],
        ),
    ],
)
def test_no_run_serves_more_than_the_bound_without_simulation(name: str, sets: list[str]) -> None:
    scenario = load(SCENARIOS / f"{name}.yaml", ["schedules=[sync, async]", *sets])
    profile = load_profile(scenario.profile)
    document = scenario.model_dump(mode="json", exclude_none=True)
    document["workload"] |= {"request_rate": 1e6, "burstiness": 1.0}
    run = evaluate(document | {"warm_up_s": 0.0}, file=name, base=SCENARIOS)
    offered = Load.of(scenario, requests_of(scenario))
    for schedule, result in run.results.items():
        served = result.throughput_requests_per_s
        assert served is not None
        bound = 1e9 / request_ns(scenario, profile, schedule, offered, most_rows(scenario, profile, offered))
        assert least_replicas(scenario, profile, schedule, offered, served) == 1
        assert served <= bound / 0.9  # the slack that it is used with
        assert served >= 0.7 * bound  # and it is a bound worth having

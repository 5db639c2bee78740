"""Laws that any serving of requests over time obeys, whatever the costs: conservation, order, load, repeatability."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import batchsim.engine
from batchsim.costs import ProfileCosts
from batchsim.engine import limits_of, requests_of, simulate
from batchsim.errors import InputError
from batchsim.iteration.engine import Iterations
from batchsim.model import MODELS
from batchsim.profile import load_profile
from batchsim.records import Span
from batchsim.result import Run, ScheduleResult, run_json
from batchsim.scenario import load
from batchsim.served import Int64, Served
from batchsim.workload_scenario import TraceWorkload
from tests.profiles import serving, small_profile
from tests.requests import printed

PROFILE = small_profile()
SCENARIOS = Path(__file__).parents[1] / "scenarios"
BLOCK = 16 * MODELS["llama-3.2-1b"].kv_bytes_per_token
# What bounds a batch, and in which order requests come to it.
CASES: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "a tight cache": {"kv_cache_bytes": 40 * BLOCK, "workload.request_rate": 300},
    "reserved": {"kv_cache_bytes": 40 * BLOCK, "preemption": "none", "workload.request_rate": 300},
    "whole prompts": {"chunked_prefill": False, "max_num_batched_tokens": 700},
    "by priority": {
        "scheduling_policy": "priority",
        "workload.priorities": [{"priority": 0, "share": 1}, {"priority": 1, "share": 2}],
        "kv_cache_bytes": 40 * BLOCK,
        "workload.request_rate": 300,
    },
    "prefixes": {
        "prefix_caching": True,
        "workload.shared_prefix": {"len": 64, "count": 5},
        "workload.input_len": {"dist": "lognorm", "s": 0.5, "scale": 90, "max": 300},
        "kv_cache_bytes": 90 * BLOCK,
    },
    "replicas": {"replicas": 3, "router": "least_outstanding", "workload.request_rate": 300},
    "a closed loop": {"workload.request_rate": None, "workload.max_concurrency": 7},
    "held back": {"workload.max_concurrency": 7, "workload.request_rate": 300},
    "all at once": {"workload.request_rate": None},
    "without graphs": {"cuda_graphs": False},
    "warmed up": {"warm_up_s": 0.5, "slo": {"ttft_ms": 20, "tpot_ms": 2, "e2e_ms": 80}},
}
each_case = pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
each_schedule = pytest.mark.parametrize("schedule", ["sync", "async"])


def run(changes: dict[str, Any] | None = None, /, **more: Any) -> Run:
    return simulate(serving((changes or {}) | more), PROFILE)


def served(changes: dict[str, Any] | None = None, /, schedule: str = "sync", **more: Any) -> Served:
    return run(changes, schedules=[schedule], **more).served[schedule]


def result(changes: dict[str, Any] | None = None, /, schedule: str = "sync", **more: Any) -> ScheduleResult:
    return run(changes, schedules=[schedule], **more).results[schedule]


def in_system(table: Served, moments_ns: Int64) -> Int64:
    """How many requests have arrived by each moment, and not finished."""
    finished = np.sort(table.finished_ns[table.finished_ns >= 0])
    arrived = np.searchsorted(table.arrival_ns, moments_ns, side="right")
    return np.asarray(arrived - np.searchsorted(finished, moments_ns, side="right"), np.int64)


def mean_ms(found: ScheduleResult, latency: str) -> float:
    return found.latency_ms[latency]["mean"]


def interrupted_after(calls: int) -> Callable[[float], None]:
    """Ctrl-C, once, when progress has been told so often."""
    told: list[float] = []

    def progress(fraction: float) -> None:
        told.append(fraction)
        if len(told) == calls:
            raise KeyboardInterrupt

    return progress


def iterations(changes: dict[str, Any], schedule: str) -> Iterations:
    scenario = serving(changes)
    blocks = changes.get("kv_cache_bytes", 10_000 * BLOCK) // BLOCK
    costs = [
        ProfileCosts(PROFILE, schedule, graphs=scenario.cuda_graphs, replica=replica)
        for replica in range(scenario.replicas)
    ]
    return Iterations(
        requests_of(scenario), costs, limits_of(scenario, blocks), asynchronous=schedule == "async", warm_up_ns=0
    )


# Conservation.


@each_schedule
@each_case
def test_every_request_is_served_once_and_in_order(changes: dict[str, Any], schedule: str) -> None:
    told = run(changes, schedules=[schedule])
    table, counts = told.served[schedule], told.results[schedule].counts
    assert counts["requests"] == len(table.arrival_ns) == 400
    assert counts["output_tokens"] == table.output_tokens.sum()
    assert counts["preemptions"] == table.preemptions.sum()
    np.testing.assert_array_equal(table.generated, table.output_tokens)
    times = (table.arrival_ns, table.started_ns, table.first_token_ns, table.finished_ns)
    for before, after in pairwise(times):
        assert (before <= after).all()
    assert (table.first_token_ns > table.started_ns).all()
    one = table.output_tokens == 1
    np.testing.assert_array_equal(table.first_token_ns[one], table.finished_ns[one])
    assert (table.cached_tokens < table.prompt_tokens).all()


@each_case
def test_idle_time_and_busy_time_add_up(changes: dict[str, Any]) -> None:
    for found in run(changes).results.values():
        idle_s = sum(found.idle_ns.values()) / 1e9
        assert idle_s + found.device_busy_fraction * found.total_s == pytest.approx(found.total_s)
        assert all(ns > 0 for ns in found.idle_ns.values())


@each_schedule
@each_case
def test_whenever_a_run_stops_what_arrived_has_finished_or_runs_or_waits(
    changes: dict[str, Any], schedule: str
) -> None:
    stopped, progress = iterations(changes, schedule), interrupted_after(1)
    assert stopped.run(lambda finished, now_ns: progress(finished / 400)) is False
    table, replicas = stopped.served(), stopped.arrays.replicas
    finished, running, waiting = (int(replicas[name].sum()) for name in ("finished", "running", "waiting"))
    assert stopped.accepted == len(table.arrival_ns) == finished + running + waiting
    assert 0 < finished < 400
    assert np.count_nonzero(table.finished_ns >= 0) == finished == stopped.counts["requests"]
    begun = np.count_nonzero(table.started_ns >= 0)
    assert finished + running <= begun <= finished + running + np.count_nonzero(table.preemptions)
    assert table.generated.sum() == stopped.counts["output_tokens"]
    assert (table.generated <= table.output_tokens).all()


@each_schedule
@each_case
def test_the_cache_is_never_over_full_and_empty_in_the_end(changes: dict[str, Any], schedule: str) -> None:
    series = served(changes, schedule).series
    pool = changes.get("kv_cache_bytes", 10**12) // BLOCK * changes.get("replicas", 1)
    assert 0 <= series.kv_blocks.min() <= series.kv_blocks.max() <= pool
    whole = iterations(changes, schedule)
    assert whole.run()
    for name in ("used", "running", "waiting"):
        assert not whole.arrays.replicas[name].any(), name


def test_a_tight_cache_is_used_to_its_last_blocks() -> None:
    found = result(CASES["a tight cache"])
    assert found.counts["preemptions"] > 0
    assert found.kv_use["max"] > 0.97
    assert result(CASES["reserved"]).counts["preemptions"] == 0


@each_schedule
@each_case
def test_littles_law_holds_exactly(changes: dict[str, Any], schedule: str) -> None:
    """Requests in the system over time add up to what each spent there, and decisions see the same requests."""
    table = served({**changes, "workload.num_prompts": 120}, schedule)
    events = np.unique(np.concatenate([table.arrival_ns, table.finished_ns]))
    spent_ns = int((table.finished_ns - table.arrival_ns).sum())
    assert int(in_system(table, events)[:-1] @ np.diff(events)) == spent_ns
    assert in_system(table, events)[-1] == 0
    series = table.series
    seen = series.running + series.waiting
    if changes == CASES["held back"]:
        assert (seen <= in_system(table, series.time_ns)).all()
    elif "replicas" not in changes:
        np.testing.assert_array_equal(seen, in_system(table, series.time_ns))
        # Until the next decision nobody leaves unseen, but some arrive.
        ends_ns = np.append(series.time_ns[1:], table.total_ns)
        unseen_ns = int((ends_ns[np.searchsorted(ends_ns, table.arrival_ns)] - table.arrival_ns).sum())
        assert spent_ns <= int(seen @ (ends_ns - series.time_ns)) + unseen_ns


@each_case
def test_gaps_between_tokens_add_up(changes: dict[str, Any]) -> None:
    table = served({**changes, "warm_up_s": 0.0})
    assert table.itl_ns @ table.itl_count == (table.finished_ns - table.first_token_ns).sum()
    assert table.itl_count.sum() == (table.output_tokens - 1).sum()


def test_nobody_overtakes_in_a_queue() -> None:
    for changes in (CASES["as it comes"], CASES["reserved"], CASES["whole prompts"], CASES["held back"]):
        assert (np.diff(served(changes).started_ns) >= 0).all()


# Closed loops.


@each_schedule
@pytest.mark.parametrize("limit", [1, 7, 30])
def test_a_closed_loop_has_so_many_outstanding_and_never_more(limit: int, schedule: str) -> None:
    changes = CASES["a closed loop"] | {"workload.max_concurrency": limit}
    table = served(changes, schedule)
    outstanding = in_system(table, np.unique(table.arrival_ns))
    assert outstanding.max() == limit
    # As one leaves, one comes, until no more are to come.
    assert (outstanding[:-1] == limit).all()
    assert (table.series.running + table.series.waiting).max() <= limit


def test_clients_hold_back_what_would_be_too_many_and_it_counts_as_latency() -> None:
    held, free = CASES["held back"], CASES["as it comes"] | {"workload.request_rate": 300}
    one, other = served(held), served(free)
    np.testing.assert_array_equal(one.arrival_ns, other.arrival_ns)
    assert (one.series.running + one.series.waiting).max() <= 7
    assert (other.series.running + other.series.waiting).max() > 7
    assert mean_ms(result(held), "e2e") >= 0.9 * mean_ms(result(free), "e2e")


# Refusals.


def test_a_pool_too_small_for_one_of_a_million_requests_is_refused_before_any_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(batchsim.engine, "_serve")
    scenario = serving(
        {
            "workload.num_prompts": 1_000_000,
            "workload.input_len": {"dist": "lognorm", "s": 1.0, "scale": 100, "max": 100_000},
            "kv_cache_bytes": 300 * BLOCK,
        }
    )
    requests = requests_of(scenario)
    tokens = requests.prompt_tokens + requests.output_tokens + 1
    longest = int(tokens.argmax())
    lengths = rf"{requests.prompt_tokens[longest]:,} \+ {requests.output_tokens[longest]:,} tokens"
    assert tokens[longest] > 300 * 16
    with pytest.raises(InputError, match=rf"workload: found request {longest:,} of {lengths}, .* fit the 300 that"):
        simulate(scenario, PROFILE)


# Load.


def capacity(schedule: str) -> float:
    """Requests a second when there are always more."""
    rate = result({"workload.request_rate": None, "workload.num_prompts": 3_000}, schedule).throughput_requests_per_s
    assert rate is not None
    return rate


def test_overload_is_called_unstable_and_moderate_load_is_not() -> None:
    most = capacity("sync")
    changes: dict[str, Any] = {"workload.num_prompts": 3_000}
    calm, overloaded = (result(changes | {"workload.request_rate": share * most}) for share in (0.6, 1.3))
    assert calm.unstable is None
    assert overloaded.unstable is not None
    assert mean_ms(overloaded, "queue") > 20 * mean_ms(calm, "queue")


def test_async_serves_what_sync_cannot() -> None:
    sync, async_ = capacity("sync"), capacity("async")
    assert async_ > 1.1 * sync
    between = run({"workload.num_prompts": 10_000, "workload.request_rate": (sync + async_) / 2}).results
    assert between["sync"].unstable is not None
    assert between["async"].unstable is None
    assert mean_ms(between["sync"], "ttft") > 2 * mean_ms(between["async"], "ttft")


def test_one_slot_with_poisson_arrivals_is_the_queue_of_the_textbook() -> None:
    """M/D/1: the mean wait is rho S / (2 (1 - rho)), by Pollaczek and Khinchine."""
    alone: dict[str, Any] = {
        "max_num_seqs": 1, "jitter": False, "workload.input_len": 32, "workload.output_len": 1, "seed": 5
    }  # fmt: skip
    table = served(alone | {"workload.request_rate": None, "workload.num_prompts": 100})
    service_s = float(np.diff(table.started_ns)[0]) / 1e9
    assert np.ptp(np.diff(table.started_ns)) < 0.01 * service_s * 1e9
    for rho in (0.3, 0.6, 0.8):
        found = result(alone | {"workload.request_rate": rho / service_s, "workload.num_prompts": 300_000})
        assert mean_ms(found, "queue") / 1e3 == pytest.approx(rho * service_s / (2 * (1 - rho)), rel=0.03)
        assert 1 - found.idle_ns["no_requests"] / 1e9 / found.total_s == pytest.approx(rho, rel=0.01)


def test_the_urgent_wait_less() -> None:
    changes = CASES["by priority"] | {"kv_cache_bytes": 10_000 * BLOCK, "workload.request_rate": 600}
    by_priority, first_come = served(changes), served(changes, scheduling_policy="fcfs")
    np.testing.assert_array_equal(by_priority.priority, first_come.priority)

    def wait_s(table: Served, priority: int) -> float:
        return float((table.started_ns - table.arrival_ns)[table.priority == priority].mean() / 1e9)

    assert wait_s(by_priority, 0) < 0.2 * wait_s(first_come, 0)
    assert wait_s(by_priority, 1) > wait_s(first_come, 1)
    assert wait_s(first_come, 0) == pytest.approx(wait_s(first_come, 1), rel=0.2)


def test_cached_prefixes_are_not_computed_again() -> None:
    changes = CASES["prefixes"] | {"kv_cache_bytes": 10_000 * BLOCK, "workload.shared_prefix": {"len": 64, "count": 5}}
    kept, computed = run(changes), run(changes, prefix_caching=False)
    assert not computed.served["sync"].cached_tokens.any()
    table = kept.served["sync"]
    np.testing.assert_array_equal(table.prompt_tokens, computed.served["sync"].prompt_tokens)
    # All but the first with each prefix find it; whole blocks of it, and at least one token is computed.
    assert np.count_nonzero(table.cached_tokens) > 0.85 * np.count_nonzero(table.prompt_tokens > 16)
    assert set(table.cached_tokens.tolist()) == {0, 16, 32, 48, 64}
    for schedule in ("sync", "async"):
        assert mean_ms(kept.results[schedule], "ttft") < mean_ms(computed.results[schedule], "ttft")


def test_a_router_that_looks_beats_one_that_does_not_when_load_is_uneven() -> None:
    bursty: dict[str, Any] = {
        "replicas": 2, "workload.burstiness": 0.3, "workload.request_rate": 400, "workload.num_prompts": 3_000,
        "workload.output_len": {"values": [4, 200], "weights": [9, 1]},
    }  # fmt: skip
    blind, looking = (result(bursty, router=router) for router in ("round_robin", "least_outstanding"))
    assert mean_ms(looking, "queue") < 0.7 * mean_ms(blind, "queue")
    for router in ("round_robin", "least_outstanding"):
        share = served(bursty, router=router).replica.mean()
        assert share == pytest.approx(0.5, abs=0.1)


def test_twice_the_replicas_serve_about_twice_as_much() -> None:
    at_once: dict[str, Any] = {"workload.request_rate": None, "workload.num_prompts": 2_000}
    one, two = (result(at_once, replicas=replicas).throughput_requests_per_s or 0.0 for replicas in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.05)


# Replications and warm-up.


def test_intervals_shrink_with_the_square_root_of_the_replications() -> None:
    figure = "latency_ms.e2e.mean"
    few, many = (
        result({"workload.num_prompts": 60, "workload.request_rate": 120}, replications=n).interval[figure]
        for n in (16, 144)
    )
    # Student's t at 15 and 143 degrees of freedom, and a standard deviation that 16 samples give to within a half.
    expected = sqrt(144 / 16) * 2.131 / 1.977
    assert expected / 1.5 < few / many < expected * 1.5


def test_replications_are_the_runs_that_each_would_be() -> None:
    alone = [result(replication=3 + i) for i in range(4)]
    together = result(replication=3, replications=4)
    for figure in (lambda found: mean_ms(found, "ttft"), lambda found: found.throughput_tokens_per_s):
        assert figure(together) == pytest.approx(np.mean([figure(each) for each in alone]))
    assert result().interval == {}


def test_requests_of_the_warm_up_are_left_out() -> None:
    whole, warm = run(schedules=["sync"]), run(schedules=["sync"], warm_up_s=1.0)
    table, found = warm.served["sync"], warm.results["sync"]
    np.testing.assert_array_equal(table.finished_ns, whole.served["sync"].finished_ns)
    counted = table.arrival_ns >= 10**9
    assert 0.1 < counted.mean() < 0.9
    for name, ends in (("ttft", table.first_token_ns), ("queue", table.started_ns), ("e2e", table.finished_ns)):
        assert mean_ms(found, name) == pytest.approx((ends - table.arrival_ns)[counted].mean() / 1e6)
    finished = np.count_nonzero(table.finished_ns > 10**9)
    assert found.throughput_requests_per_s == pytest.approx(finished / (table.total_ns / 1e9 - 1))
    assert table.itl_count.sum() < whole.served["sync"].itl_count.sum()
    # What the machine did is told of the whole run.
    assert found.throughput_tokens_per_s == whole.results["sync"].throughput_tokens_per_s


# Two levels, one truth.


def comparable(told: Run) -> dict[str, Any]:
    """What `run --json` prints, but for how the figures were found."""
    value: dict[str, Any] = json.loads(json.dumps(run_json(told)))
    del value["scenario"]["level"]
    for found in value["schedules"].values():
        del found["decisions"], found["events"]
    return value


def whole_steps(window: Sequence[Span]) -> list[Span]:
    """A window from its first decision on, without what had been launched before it.

    The launches of each forward are joined, as the iteration level tells them.
    """
    first = next(span for span in window if span.stage == "schedule")
    spans: dict[tuple[int, str, int], Span] = {}
    for span in window:
        if span.start_ns >= first.start_ns and (span.step < 0 or span.step >= first.step):
            own = 0 if span.stage == "launch" else span.start_ns
            launch = spans.get((span.step, span.stage, own), span)
            spans[span.step, span.stage, own] = launch._replace(end_ns=span.end_ns)
    return sorted(spans.values(), key=lambda span: (span.start_ns, span.end_ns))


@each_case
def test_both_levels_tell_the_same(changes: dict[str, Any]) -> None:
    small = changes | {"workload.num_prompts": 60}
    by_iteration, by_operation = (run(small, level=level) for level in ("iteration", "operation"))
    assert comparable(by_iteration) == comparable(by_operation)
    for schedule, window in by_iteration.windows.items():
        assert {span.lane for span in window} == {"host", "copy_in", "compute", "copy_out"}
        if changes.get("workload.request_rate", 1) is not None:
            assert whole_steps(window) == whole_steps(by_operation.windows[schedule])


def test_both_levels_tell_the_same_of_a_trace(tmp_path: Path) -> None:
    rows = [f"{i * 7e-3:.4f},{1 + i * 37 % 211},{i * 13 % 40}" for i in range(80)]
    header = "arrived_at,num_prefill_tokens,num_decode_tokens"
    (tmp_path / "t.csv").write_text("\n".join([header, *rows]), encoding="utf-8")
    trace = {"kind": "trace", "path": "t.csv", "no_output": "drop", "rate_scale": 1.5}
    told = [
        simulate(serving({"workload": trace, "level": level}), PROFILE, base=tmp_path)
        for level in ("iteration", "operation")
    ]
    assert comparable(told[0]) == comparable(told[1])
    assert told[0].results["sync"].counts["requests"] == 78
    assert "2 requests of the trace have no tokens and were dropped" in told[0].results["sync"].warnings


# Ctrl-C.


def test_an_interrupted_run_is_valid_and_says_so() -> None:
    told = simulate(serving(), PROFILE, progress=interrupted_after(1))
    assert list(told.results) == ["sync"]
    found, table = told.results["sync"], told.served["sync"]
    assert 0 < found.counts["requests"] < 400
    assert found.partial == f"interrupted after {found.counts['requests']} of 400 requests"
    # Up to there it is the run that it would have been.
    whole = served()
    ended = table.finished_ns >= 0
    assert np.count_nonzero(ended) == found.counts["requests"]
    np.testing.assert_array_equal(table.finished_ns[ended], whole.finished_ns[: len(ended)][ended])
    np.testing.assert_array_equal(table.arrival_ns, whole.arrival_ns[: len(ended)])
    assert table.total_ns >= table.finished_ns.max()
    assert sum(found.idle_ns.values()) / 1e9 == pytest.approx((1 - found.device_busy_fraction) * found.total_s)
    assert json.loads(json.dumps(run_json(told), allow_nan=False))["schedules"]["sync"]["partial"] == found.partial


def test_an_interruption_ends_replications() -> None:
    told = simulate(serving({"replications": 3, "schedules": ["sync"]}), PROFILE, progress=interrupted_after(1))
    assert told.results["sync"].partial is not None
    assert told.results["sync"].interval == {}


# Effort.


def peak_bytes(changes: dict[str, Any]) -> int:
    scenario = serving(changes)
    tracemalloc.start()
    try:
        simulate(scenario, PROFILE)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_grows_with_requests_and_not_with_tokens() -> None:
    many = {
        "workload.num_prompts": 100_000, "workload.request_rate": None, "max_num_seqs": 128,
        "max_num_batched_tokens": 512, "schedules": ["sync"],
    }  # fmt: skip
    result(many | {"workload.num_prompts": 100})  # imports and the compiler are none of the run's
    short, long = (peak_bytes(many | {"workload.output_len": tokens}) for tokens in (16, 64))
    assert short < 100_000 * 1000
    # Not even a byte for each token; what is kept is some bytes a step.
    assert long - short < 100_000 * (64 - 16)


def test_effort_grows_with_requests_and_not_with_tokens() -> None:
    calm: dict[str, Any] = {"workload.num_prompts": 2_000, "max_num_seqs": 32, "workload.request_rate": 20}
    short, long, more = (
        result(calm | {"workload.num_prompts": count, "workload.output_len": tokens})
        for count, tokens in ((2_000, 20), (2_000, 80), (4_000, 20))
    )
    assert long.iterations is not None and short.iterations is not None and long.iterations > 2 * short.iterations
    assert long.decisions == pytest.approx(short.decisions, rel=0.1)
    assert more.decisions == pytest.approx(2 * (short.decisions or 0), rel=0.1)
    # Events are decisions, arrivals, and what wakes an idle loop.
    assert (long.events or 0) <= 1.1 * (short.events or 0)


# The same again.

PRINT_RUNS = """
import json
from batchsim.engine import simulate
from batchsim.result import run_json
from tests.profiles import serving, small_profile
from tests.test_serving import CASES
for changes in CASES.values():
    for level in ("iteration", "operation"):
        run = simulate(serving(changes | {"workload.num_prompts": 40, "level": level}), small_profile())
        print(json.dumps(run_json(run)), run.windows, [table.finished_ns.tolist() for table in run.served.values()])
"""


def test_the_same_seed_gives_the_same_bytes_in_every_process() -> None:
    assert len(printed(PRINT_RUNS, "0", "4711")) == 1


@each_case
def test_all_schedules_see_the_same_requests(changes: dict[str, Any]) -> None:
    both, alone = run(changes).served, served(changes, "async")
    for name in ("prompt_tokens", "output_tokens", "priority"):
        np.testing.assert_array_equal(getattr(both["sync"], name), getattr(both["async"], name))
    if changes.get("workload.request_rate", 1) is not None:
        np.testing.assert_array_equal(both["sync"].arrival_ns, both["async"].arrival_ns)
    np.testing.assert_array_equal(alone.finished_ns, both["async"].finished_ns)


def test_another_seed_or_replication_gives_other_requests() -> None:
    others: list[dict[str, Any]] = [{}, {"seed": 1}, {"replication": 1}]
    told = [served(where).finished_ns.tolist() for where in others]
    assert len({tuple(times) for times in told}) == 3


# What is shipped.


@pytest.mark.parametrize("name", ["async_1b_h200", "async_8b_h200", "nograph_3b_h200", *sorted(
    path.stem for path in SCENARIOS.glob("serving_*.yaml")
)])  # fmt: skip
def test_shipped_scenarios_run_within_what_their_profiles_know(name: str) -> None:
    scenario = load(SCENARIOS / f"{name}.yaml")
    for found in simulate(scenario, load_profile(scenario.profile)).results.values():
        assert not isinstance(scenario.workload, TraceWorkload)
        assert found.counts["requests"] == scenario.workload.num_prompts
        assert (found.unstable, found.partial, found.warnings) == (None, None, ())
        if scenario.slo is not None:
            assert 0.5 < (found.slo_attainment or 0) <= 1


def test_in_the_shipped_chat_service_async_keeps_more_of_its_objectives() -> None:
    scenario = load(SCENARIOS / "serving_chat_8b_h200.yaml")
    told = simulate(scenario, load_profile(scenario.profile))
    sync, async_ = (told.results[schedule].slo_attainment or 0.0 for schedule in ("sync", "async"))
    assert async_ > sync + 0.05
    assert np.count_nonzero(told.served["sync"].cached_tokens) > 0.99 * len(told.served["sync"].cached_tokens)

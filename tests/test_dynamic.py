"""Dynamic batching: its rules hold in every run, no request is lost from the count, a seed gives the same bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from batchsim.answered import ACCEPTED, DROPPED, REFUSED, SERVED_LATE, Answered
from batchsim.dynamic import breaking_per_s, simulate
from batchsim.dynamic_scenario import DynamicScenario, nanoseconds
from batchsim.engine import requests_of
from batchsim.errors import InputError, RunError
from batchsim.result import Run
from tests.dynamic import scenario, service_profile
from tests.requests import printed
from tests.test_dynamic_levels import cases


def ran(asked: DynamicScenario) -> Answered:
    """The tables of a synchronous run, whose count is checked."""
    run = simulate(asked, None if asked.profile is None else service_profile())
    for schedule, result in run.results.items():
        outcomes = dict(result.outcomes)
        assert outcomes == run.answered[schedule].outcomes
        assert outcomes.pop("arrivals") == len(requests_of(asked)) == sum(outcomes.values())
        assert outcomes.keys() == {"accepted", "refused", "dropped", "served_late"}
    return run.answered["sync"]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_the_rules_hold_at_every_decision(case: dict[str, Any]) -> None:
    case.pop("workload.max_concurrency", None)
    case |= {"schedules": ["sync"]}
    asked = scenario(case)
    answered = ran(asked)
    requests, batches = answered.requests, answered.batches
    arrival, left, outcome = (requests[name] for name in ("arrival_ns", "left_ns", "outcome"))
    number = requests["batch"]
    timeout, delay = nanoseconds(asked.queue_timeout_us), nanoseconds(asked.max_queue_delay_us) or 0
    served = (outcome == ACCEPTED) | (outcome == SERVED_LATE)
    assert (left >= arrival).all() and ((number >= 0) == served).all()
    np.testing.assert_array_equal(batches["decided_ns"][number[served]], left[served])
    np.testing.assert_array_equal(np.bincount(number[served], minlength=len(batches)), batches["size"])

    # In time, late, dropped: by how long they waited.
    if timeout is None:
        assert not (outcome == SERVED_LATE).any() and not (outcome == DROPPED).any()
    else:
        assert (left - arrival)[outcome == ACCEPTED].max(initial=0) <= timeout
        assert (left - arrival)[outcome == SERVED_LATE].min(initial=timeout + 1) > timeout
        assert ((left - arrival)[outcome == DROPPED] == timeout).all()
        assert not (outcome == (DROPPED if asked.late == "serve" else SERVED_LATE)).any()

    # The queue that each arrival finds: it is refused if and only if that is full.
    waits = np.flatnonzero(outcome != REFUSED)
    for i in range(len(requests)):
        found = int(np.count_nonzero(left[waits[waits < i]] >= arrival[i]))
        full = asked.max_queue_size is not None and found >= asked.max_queue_size
        assert (outcome[i] == REFUSED) == full
        assert asked.max_queue_size is None or found <= asked.max_queue_size

    preferred = asked.preferred_batch_sizes or (asked.max_batch_size,)
    for index, batch in enumerate(batches):
        now = batch["decided_ns"]
        inside = number == index
        # Dropped ones leave right after their moment.
        queue = (outcome != REFUSED) & (arrival <= now) & (left >= now)
        oldest = arrival[queue].min()
        size, fits = int(batch["size"]), [each for each in preferred if each <= queue.sum()]
        assert inside[queue].sum() == size <= asked.max_batch_size
        # Never before its time, and never after it while the server is free.
        assert now - oldest >= delay or (fits and size == max(fits))
        assert now <= max(oldest + delay, batches["finished_ns"][index - 1] if index else 0)
        if fits and (delay == 0 or now - oldest < delay):
            assert size == max(fits)
        elif now - oldest >= delay:
            assert size == min(queue.sum(), asked.max_batch_size)
        if (queue & ~inside).any():
            assert_goes_first(asked, now, requests, inside, queue & ~inside, timeout)


def assert_goes_first(
    asked: DynamicScenario, now: int, requests: Any, inside: Any, stays: Any, timeout: int | None
) -> None:
    """No request that was left in the queue goes before one that was taken."""
    aged_ns = nanoseconds(asked.max_priority_wait_us)
    waited = now - requests["arrival_ns"]
    late = waited > timeout if timeout is not None else np.zeros(len(requests), np.bool_)
    aged = ~late & (waited > aged_ns) if aged_ns is not None else np.zeros(len(requests), np.bool_)

    def rank(i: Any) -> tuple[int, int, int]:
        if aged[i]:
            return 0, 0, i
        return (2, 0, i) if late[i] else (1, int(requests["priority"][i]), i)

    assert max(map(rank, np.flatnonzero(inside))) < min(map(rank, np.flatnonzero(stays)))


OVERLOAD: dict[str, Any] = {
    "workload.num_prompts": 1_000_000,
    "workload.request_rate": 4_100.0,
}  # of 1,260 that it serves


@pytest.mark.parametrize("late", ["drop", "serve"])
@pytest.mark.parametrize("timeout_us", [None, 20_000.0])
@pytest.mark.parametrize("bound", [None, 1, 100])
def test_three_times_the_capacity(late: str, timeout_us: float | None, bound: int | None) -> None:
    answered = ran(scenario(OVERLOAD | {"late": late, "queue_timeout_us": timeout_us, "max_queue_size": bound}))
    lost = answered.outcomes["refused"] + answered.outcomes["dropped"]
    served = answered.outcomes["accepted"] + answered.outcomes["served_late"]
    if bound is None and (timeout_us is None or late == "serve"):
        assert lost == 0
    else:
        assert lost > served > 0


def test_a_burst_is_served_whole() -> None:
    answered = ran(scenario({"workload.request_rate": None, "workload.num_prompts": 100_000}))
    assert answered.outcomes["accepted"] == 100_000
    assert set(answered.batches["size"].tolist()) == {8}


@pytest.mark.parametrize("profile", [None, "small"])
def test_requests_without_tokens(profile: str | None) -> None:
    changes: dict[str, Any] = {"workload.input_len": 0} | ({"profile": profile} if profile else {})
    answered = ran(scenario(changes))
    assert answered.outcomes["accepted"] == 300
    assert (answered.batches["padded_len"] == 64).all()


@pytest.mark.parametrize("profile", [None, "small"])
@pytest.mark.parametrize("instances", [1, 3])
def test_a_queue_of_one(profile: str | None, instances: int) -> None:
    changes: dict[str, Any] = {"max_queue_size": 1, "instances": instances, "workload.request_rate": 20_000.0}
    answered = ran(scenario(changes | ({"profile": profile} if profile else {})))
    assert answered.outcomes["refused"] > 0
    assert answered.batches["size"].max() == 1


@pytest.mark.parametrize("schedule", ["sync", "async"])
@pytest.mark.parametrize("threads", [1, 2])
def test_instances_take_turns_on_one_device(schedule: str, threads: int) -> None:
    asked = scenario(
        {
            "profile": "small", "instances": 3, "schedules": [schedule], "workload.request_rate": 20_000.0,
            "host_threads": threads,
        }
    )  # fmt: skip
    run = simulate(asked, service_profile())
    answered, result = run.answered[schedule], run.results[schedule]
    assert set(answered.batches["instance"].tolist()) == {0, 1, 2}
    order = np.argsort(answered.batches["computes_ns"])
    starts, ends = (answered.batches[name][order] for name in ("computes_ns", "computed_ns"))
    assert (starts[1:] >= ends[:-1]).all()
    busy = (ends - starts).sum() / answered.total_ns
    assert result.device_busy_fraction == pytest.approx(busy) and busy <= 1
    assert sum(result.idle_ns.values()) == answered.total_ns - (ends - starts).sum()
    parts = answered.latencies()
    whole = parts.pop("e2e")
    np.testing.assert_array_equal(sum(parts.values()), whole)
    assert all((part >= 0).all() for part in parts.values())
    assert parts["device_queue"].max() > 0


def test_two_instances_hide_the_host() -> None:
    """While one prepares, the device computes for the other."""
    busy = []
    for instances in (1, 2):
        asked = scenario({"profile": "small", "instances": instances, "schedules": ["sync"], "host_threads": 2,
                          "workload.request_rate": None, "workload.num_prompts": 2_000})  # fmt: skip
        busy.append(simulate(asked, service_profile()).results["sync"].device_busy_fraction)
    assert busy[1] > busy[0] * 1.05


CLASSES = [{"priority": 0, "share": 9.0}, {"priority": 1, "share": 1.0}]


def test_no_class_starves_that_is_protected() -> None:
    """Urgent requests alone are more than the server can take."""
    changes = {"workload.priorities": CLASSES, "workload.request_rate": 2_000.0, "workload.num_prompts": 20_000}
    starving = ran(scenario(changes))
    protected = ran(scenario(changes | {"max_priority_wait_us": 100_000.0}))
    last = starving.requests["arrival_ns"][-1]

    def served(answered: Answered) -> int:
        requests = answered.requests
        return int(np.count_nonzero((requests["priority"] == 1) & (requests["left_ns"] <= last)))

    assert served(starving) < 50
    assert served(protected) > 900


@pytest.mark.parametrize("level", ["iteration", "operation"])
def test_the_same_seed_gives_the_same_bytes(level: str) -> None:
    script = (
        "import json, sys\n"
        "from batchsim.dynamic import simulate\n"
        "from tests.dynamic import scenario, service_profile\n"
        "for changes in ({}, {'profile': 'small'}):\n"
        f"    run = simulate(scenario(changes | {{'level': {level!r}}}), service_profile() if changes else None)\n"
        "    for name in run.results:\n"
        "        print(json.dumps(run.results[name].to_json(), sort_keys=True))\n"
        "        sys.stdout.write(str(run.answered[name].requests['left_ns'].tolist()))\n"
    )
    assert len(printed(script, "0", "1")) == 1


def test_settings_are_compared_by_the_same_requests_and_draws() -> None:
    """A longer delay changes what is formed, not what arrives; another replication changes both."""
    first, delayed, other = (
        ran(scenario(changes)) for changes in ({}, {"max_queue_delay_us": 9_000.0}, {"replication": 1})
    )
    np.testing.assert_array_equal(first.requests["arrival_ns"], delayed.requests["arrival_ns"])
    assert (first.requests["arrival_ns"] != other.requests["arrival_ns"]).all()
    assert len(delayed.batches) < len(first.batches)


def run_of(**changes: Any) -> Run:
    return simulate(scenario(changes), service_profile() if "profile" in changes else None)


@pytest.mark.parametrize(
    ("changes", "per_s"),
    [
        ({}, 8 / 6.5e-3),
        ({"instances": 3}, 3 * 8 / 6.5e-3),
        ({"jitter": False, "max_batch_size": 1}, 1 / 5.25e-3),
        ({"max_queue_size": 1}, 1 / 5.25e-3),
        ({"preferred_batch_sizes": [1, 4]}, 4 / (5.25e-3 + 1.25e-3 * 3 / 7)),
        ({"preferred_batch_sizes": [4], "max_queue_delay_us": 10.0}, 8 / 6.5e-3),
    ],
)
def test_the_rate_at_which_a_table_breaks(changes: dict[str, Any], per_s: float) -> None:
    """A full batch over its mean time; and what is served when all requests are there at the start."""
    result = run_of(**changes, **{"workload.request_rate": 10 * per_s, "workload.num_prompts": 20_000}).results["sync"]
    assert result.breaking_requests_per_s == pytest.approx(per_s, rel=1e-4)
    assert result.throughput_requests_per_s == pytest.approx(per_s, rel=0.02)


@pytest.mark.parametrize("changes", [{}, {"instances": 2, "host_threads": 2}, {"workload.input_len": 120}])
def test_the_rate_at_which_a_service_breaks(changes: dict[str, Any]) -> None:
    run = run_of(**changes, profile="small", **{"workload.request_rate": 1e6, "workload.num_prompts": 8_000})
    for result in run.results.values():
        assert result.throughput_requests_per_s == pytest.approx(result.breaking_requests_per_s, rel=0.02)


@pytest.mark.parametrize("profile", [None, "small"])
def test_an_unstable_load_is_said_to_be(profile: str | None) -> None:
    changes: dict[str, Any] = {"schedules": ["sync"]} | ({"profile": profile} if profile else {})
    asked = scenario(changes)
    breaking = breaking_per_s(asked, service_profile() if profile else None, "sync", requests_of(asked))
    for load, unstable in ((0.8, False), (1.3, True)):
        told = run_of(**changes, **{"workload.request_rate": load * breaking, "workload.num_prompts": 20_000})
        result = told.results["sync"]
        assert (result.unstable is not None) == unstable
        if result.unstable is not None:
            assert result.unstable.endswith(f"it breaks at {result.breaking_requests_per_s:,.1f} requests/s")
    # What is shed is no growing queue.
    shed = {"max_queue_size": 50, "workload.request_rate": 3 * breaking, "workload.num_prompts": 20_000}
    assert run_of(**changes, **shed).results["sync"].unstable is None


def test_objectives() -> None:
    result = run_of(slo={"queue_ms": 4.0, "e2e_ms": 12.0}, **{"workload.request_rate": 500.0}).results["sync"]
    answered = run_of(**{"workload.request_rate": 500.0}).answered["sync"]
    parts = answered.latencies()
    good = np.count_nonzero((parts["queue"] <= 4e6) & (parts["e2e"] <= 12e6))
    assert 0 < good < 300
    assert result.slo_attainment == good / 300
    assert result.goodput_requests_per_s == pytest.approx(good / (answered.total_ns / 1e9))


def test_a_closed_loop_keeps_its_clients_busy() -> None:
    changes = {"workload.request_rate": None, "workload.max_concurrency": 5, "workload.num_prompts": 500}
    result = run_of(**changes, queue_timeout_us=1.0).results["sync"]
    assert result.batch_size["max"] == result.batch_size["mean"] == 5
    assert result.breaking_requests_per_s is None and result.unstable is None


def test_replications_have_intervals() -> None:
    result = run_of(replications=4).results["sync"]
    assert 0 < result.interval["latency_ms.e2e.mean"] < result.latency_ms["e2e"]["mean"]


def test_extrapolation_is_marked() -> None:
    assert run_of().results["sync"].warnings == ()
    (told,) = run_of(max_batch_size=16, **{"workload.request_rate": None}).results["sync"].warnings
    assert told == "sync: batches (the table has those of 1..8): extrapolated to 12..16"
    load = {"workload.request_rate": 1e6, "workload.num_prompts": 320}
    told = run_of(profile="small", max_batch_size=16, schedules=["sync"], **load).results["sync"].warnings[-1]
    assert "decode (measured up to 8 rows): extrapolated to" in told


def test_what_cannot_run_is_refused() -> None:
    with pytest.raises(InputError, match="request 0 of 129 tokens, wanted at most 128, what tiny-encoder takes"):
        run_of(profile="small", **{"workload.input_len": 129})
    with pytest.raises(InputError, match=r"measured for llama-3\.2-1b, wanted one for tiny-encoder"):
        simulate(scenario({"profile": "small"}), service_profile(model="llama-3.2-1b"))
    profile = service_profile(loops={"sync/graph": service_profile().loops["sync/graph"]})
    with pytest.raises(RunError, match="holds no costs for async/graph; it has sync/graph"):
        simulate(scenario({"profile": "small"}), profile)

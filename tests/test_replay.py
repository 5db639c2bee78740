"""The replay of learned steps: equal to the simulated machine, and the laws of a host and in-order streams."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchsim.batching.continuous import ContinuousBatcher
from batchsim.learned import Copy, Direction, Kernels, Operation, StreamWait, Wait, Work
from batchsim.machine import Burst, Latencies
from batchsim.whatif.replay import Replayed, Scales, replay
from tests.costs import FixedCosts, run
from tests.requests import uniform_requests

STEPS = 6
COMPUTE, COPY_IN, COPY_OUT = 0, 1, 2


def traced(draws: int = 1, **changed: float) -> Scales:
    """Scales that leave traced times as they are."""
    neutral = {"host": 1, "event_ns": 0, "node_ns": 0, "device": 1, "gap_ns": 0, "added": 1, "throttle": 0, "timer": 1}
    arrays: dict[str, Any] = {name: np.full(draws, float(value)) for name, value in (neutral | changed).items()}
    return Scales(**arrays)


def work(ns: int) -> Work:
    return Work(phase="host", ns=ns, events=0)


def copy(direction: Direction, stream: int, host_ns: int, device_ns: int, *, waits: bool = False) -> Copy:
    return Copy(
        phase="host", stream=stream, direction=direction, bytes=8, pinned=True, waits=waits, host_ns=host_ns,
        events=0, device_ns=device_ns,
    )  # fmt: skip


def kernels(host_ns: list[int], device_ns: list[int], stream: int = COMPUTE) -> Kernels:
    return Kernels(phase="host", stream=stream, host_ns=host_ns, events=[0] * len(host_ns), device_ns=device_ns)


def graph(device_ns: int, stream: int = COMPUTE) -> Kernels:
    return kernels([0], [device_ns], stream).model_copy(update={"nodes": 10})


def wait(target: int, lag: int = 0) -> Wait:
    return Wait(phase="host", lag=lag, target=target, host_ns=0, events=0, waited_ns=0)


def stream_wait(stream: int, on: int, host_ns: int = 0) -> StreamWait:
    return StreamWait(phase="host", stream=stream, on=on, host_ns=host_ns, events=0)


def learned(costs: FixedCosts, schedule: str) -> list[list[Operation]]:
    """The steps that the two schedules make, as a trace of them would be learned."""
    host = costs.host

    def step(bursts: list[Burst]) -> list[Operation]:
        forward = [kernels(list(burst.host_ns), list(burst.device_ns)) for burst in bursts]
        one = schedule == "sync"
        streams = (COMPUTE, COMPUTE) if one else (COPY_IN, COPY_OUT)
        made: list[Operation] = [work(host["schedule"] + host["build_inputs"])]
        made.append(copy("h2d", streams[0], host["copy_in"], costs.copy))
        if not one:
            made += [work(host["record"]), stream_wait(COMPUTE, COPY_IN, host["stream_wait"])]
        made += forward
        if not one:
            made += [work(host["record"]), stream_wait(COPY_OUT, COMPUTE, host["stream_wait"])]
        made.append(copy("d2h", streams[1], host["copy_out"], costs.copy))
        made.append(work(host["record"]))
        made.append(wait(len(made) - 2, 0 if one else 1))
        return [*made, work(host["update"])]

    return [step(list(bursts)) for bursts in costs.forward]


times = st.integers(0, 400)
bursts = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 90)), min_size=1, max_size=6).map(
    lambda pairs: Burst(tuple(h for h, _ in pairs), tuple(d for _, d in pairs))
)


@st.composite
def costs(draw: st.DrawFn) -> FixedCosts:
    names = ("schedule", "build_inputs", "copy_in", "copy_out", "record", "stream_wait", "update")
    host = {name: draw(times) for name in names}
    forward = draw(st.lists(st.lists(bursts, min_size=1, max_size=3), min_size=1, max_size=3))
    # A replayed copy starts when its call has ended.
    host["copy_out"] = host["copy_in"]
    latencies = Latencies(launch_ns=draw(st.integers(0, 40)), copy_ns=host["copy_in"])
    return FixedCosts(host=host, forward=forward, copy=draw(st.integers(1, 200)), latencies=latencies)


@given(costs(), st.sampled_from(["sync", "async"]))
def test_the_replay_is_the_simulated_machine(costs: FixedCosts, schedule: str) -> None:
    steps = len(costs.forward)
    rounds = 8
    batcher = ContinuousBatcher(uniform_requests(1, 1, steps * rounds), max_num_seqs=1, max_num_batched_tokens=1)
    _, spans, _ = run(schedule, batcher, costs)
    # A forward began when its first kernel did; the rounds in the middle are steady.
    began = [span.end_ns for span in spans if span.lane == "copy_in"]
    last = rounds - 2
    period = (began[last * steps] - began[(last - 1) * steps]) / steps
    before = (began[(last - 1) * steps] - began[(last - 2) * steps]) / steps
    got = replay(learned(costs, schedule) * (rounds - 1), traced(), costs.latencies.launch_ns)
    assert period == before  # the machine is steady by then
    # Over whole rounds the host, which the replay counts by, and the device take as long.
    assert got.step_ns[0] == pytest.approx(period, abs=1e-6)


programs = st.lists(
    st.one_of(
        st.builds(work, times),
        st.builds(lambda pairs, stream: kernels([h for h, _ in pairs], [d for _, d in pairs], stream),
                  st.lists(st.tuples(st.integers(0, 50), st.integers(1, 90)), min_size=1, max_size=5),
                  st.integers(0, 2)),
        st.builds(graph, st.integers(1, 500), st.integers(0, 2)),
        st.builds(copy, st.sampled_from(["h2d", "d2h", "d2d"]), st.integers(0, 2), times, times, waits=st.booleans()),
        st.builds(stream_wait, st.integers(0, 2), st.integers(0, 2), times),
    ),
    min_size=1, max_size=10,
).map(lambda operations: [*operations, kernels([1], [1])])  # fmt: skip


def with_wait(operations: list[Operation], place: int, lag: int) -> list[Operation]:
    targets = [i for i, operation in enumerate(operations) if isinstance(operation, Kernels | Copy)]
    return [*operations, wait(targets[place % len(targets)], lag)]


loops = st.builds(with_wait, programs, st.integers(0, 20), st.integers(0, 2))


def step_ns(steps: list[list[Operation]], scales: Scales | None = None) -> float:
    # The replay tells of its second half: long enough for what waits for earlier steps to be steady by then.
    return float(replay(steps * 6, scales or traced(), 5).step_ns[0])


@given(st.lists(loops, min_size=1, max_size=3), st.floats(1, 5))
def test_no_loop_gets_faster_by_slower_parts(steps: list[list[Operation]], factor: float) -> None:
    before = step_ns(steps)
    assert step_ns(steps, traced(host=factor)) >= before - 1e-6
    assert step_ns(steps, traced(device=factor)) >= before - 1e-6
    assert step_ns(steps, replace(traced(), host_speed=factor)) <= before + 1e-6


@given(st.lists(loops, min_size=1, max_size=3))
def test_a_step_takes_the_host_its_work_at_least(steps: list[list[Operation]]) -> None:
    got = replay(steps, traced(), 5)
    assert got.step_ns[0] >= got.host_ns[0] - 1e-6
    assert 0 <= got.busy[0] <= 1


@given(st.lists(loops, min_size=1, max_size=3))
def test_waiting_a_step_later_never_takes_longer(steps: list[list[Operation]]) -> None:
    def later(step: list[Operation]) -> list[Operation]:
        *rest, last = step
        assert isinstance(last, Wait)
        return [*rest, last.model_copy(update={"lag": last.lag + 5})]

    # Beyond what the loop runs, nothing is waited for at all.
    assert step_ns([later(step) for step in steps]) <= step_ns(steps) + 1e-6


@given(st.lists(loops, min_size=1, max_size=3), st.lists(st.floats(0.1, 9), min_size=2, max_size=4))
def test_draws_are_replayed_as_each_alone(steps: list[list[Operation]], hosts: list[float]) -> None:
    together = replace(traced(len(hosts)), host=np.array(hosts))
    alone = [step_ns(steps, traced(host=host)) for host in hosts]
    np.testing.assert_allclose(replay(steps * 6, together, 5).step_ns, alone)


def total(got: Replayed, lane: str) -> float:
    return sum(moment.end_ns - moment.start_ns for moment in got.moments if moment.lane == lane)


@given(st.lists(loops, min_size=1, max_size=3))
def test_moments_account_for_the_host_wholly(steps: list[list[Operation]]) -> None:
    got = replay(steps, traced(), 5, moments_of=0)
    assert total(got, "host") == pytest.approx(got.step_ns[0] * len(steps), abs=1e-6)
    for stream in {moment.lane for moment in got.moments} - {"host"}:
        ordered = [m for m in got.moments if m.lane == stream]
        assert all(a.end_ns <= b.start_ns + 1e-6 for a, b in pairwise(ordered))

"""The device's side of the machine: streams against their definition, and the shortcuts against the long way."""

from __future__ import annotations

from itertools import pairwise

import simpy
from hypothesis import given
from hypothesis import strategies as st

from batchsim.machine import Burst, Latencies, SimulatedMachine
from batchsim.records import Span
from batchsim.schedules import SCHEDULES
from batchsim.streams import (
    Command,
    Copy,
    Engine,
    Environment,
    HostThreads,
    Kernels,
    LaunchQueue,
    Recording,
    Stream,
    Wait,
    Waiting,
)  # fmt: skip
from tests.costs import FixedCosts
from tests.test_machine import batcher_for, bursts, costs, requests


def kernel(step: int, ready_ns: int, duration_ns: int) -> Kernels:
    return Kernels(step, "decode", ready_ns, Burst((0,), (duration_ns,)), opens=True, closes=True)


def carried_out(pushes: list[tuple[int, str, Command]], latencies: Latencies = Latencies()) -> list[Span]:
    """The spans of commands pushed to streams at given times, in the order in which they are told of."""
    env, spans = Environment(), list[Span]()
    queue = LaunchQueue(env, 1000)
    streams = {name: Stream(env, latencies, queue, spans.append) for _, name, _ in pushes}

    def push() -> Waiting:
        for at, name, command in pushes:
            if at > env.now:
                yield simpy.Timeout(env, at - env.now)
            streams[name].push(command)

    env.process(push())
    env.run()
    return spans


@given(st.lists(bursts, min_size=1, max_size=5), st.integers(0, 60), st.integers(0, 9))
def test_a_forward_runs_kernel_by_kernel(forward: list[Burst], launch_ns: int, gap_ns: int) -> None:
    """The sums that a burst keeps give what its definition gives, one kernel after the other."""
    ready, pushes = launch_ns, list[tuple[int, str, Command]]()
    end, gap = launch_ns, 0
    for position, burst in enumerate(forward):
        opens, closes = position == 0, position == len(forward) - 1
        pushes.append((ready - launch_ns, "compute", Kernels(0, "decode", ready, burst, opens, closes)))
        for host_ns, device_ns in zip(burst.host_ns, burst.device_ns, strict=True):
            gap += max(ready - end, 0)
            end = max(end, ready) + device_ns
            ready += host_ns
    assert carried_out(pushes, Latencies(gap_ns=gap_ns)) == [Span(0, "compute", "decode", launch_ns, end, gap)]


def test_a_copy_engine_serves_whoever_is_ready_first() -> None:
    """The copy enqueued first is behind a kernel, so the other stream's goes before it; a third has to wait."""
    engine = Engine()
    spans = carried_out([
        (0, "a", kernel(0, 0, 100)),
        (1, "a", Copy(1, "copy_in", 1, 30, engine)),
        (2, "b", Copy(2, "copy_in", 20, 90, engine)),
        (3, "c", Copy(3, "copy_in", 105, 10, Engine())),
    ])  # fmt: skip
    assert {span.step: (span.start_ns, span.end_ns) for span in spans} == {
        0: (0, 100), 1: (110, 140), 2: (20, 110), 3: (105, 115),
    }  # fmt: skip


def test_a_wait_costs_its_latency_only_where_there_is_something_to_wait_for() -> None:
    latencies = Latencies(event_ns=7)
    for pushed, start in ((50, 107), (99, 107), (100, 100), (130, 130)):
        done = Recording()
        spans = carried_out(
            [
                (0, "a", kernel(0, 0, 100)),
                (1, "a", done),
                (pushed, "b", Wait(done)),
                (pushed, "b", kernel(1, 0, 5)),
            ],
            latencies,
        )
        assert spans[-1] == Span(1, "compute", "decode", start, start + 5)


def test_a_stream_waits_for_a_recording_that_is_not_settled_yet() -> None:
    """The copy's end is not known before it has its engine; the stream that waits goes on all the same."""
    copied = Recording()
    spans = carried_out(
        [
            (0, "in", Copy(0, "copy_in", 40, 10, Engine())),
            (1, "in", copied),
            (2, "compute", Wait(copied)),
            (3, "compute", kernel(0, 5, 20)),
            (4, "compute", kernel(1, 6, 20)),
        ],
        Latencies(event_ns=3, gap_ns=2),
    )
    assert [(span.start_ns, span.end_ns) for span in spans] == [(40, 50), (53, 73), (75, 95)]


@given(requests, st.integers(1, 4), costs, st.integers(1, 12), st.sampled_from(["sync", "async"]))
def test_time_that_is_skipped_passes_as_with_events(
    lengths: list[tuple[int, int]], seqs: int, costs: FixedCosts, depth: int, schedule: str
) -> None:
    """With a timeout for every phase the same happens, at the same time."""

    def told(with_events: bool) -> tuple[int, list[Span]]:
        spans: list[Span] = []
        machine = SimulatedMachine(batcher_for(lengths, seqs, 20), costs, spans.append, launch_queue_depth=depth)
        if with_events:
            machine.env.skip = lambda delay_ns: False  # type: ignore[method-assign]
        return machine.run(SCHEDULES[schedule]()), sorted(spans)

    assert told(with_events=True) == told(with_events=False)


def test_as_many_run_at_once_as_there_are_threads_in_the_order_in_which_they_came() -> None:
    env = Environment()
    threads = HostThreads(env, 2)
    log: list[tuple[str, str, int]] = []

    def work(name: str) -> Waiting:
        yield from threads.take()
        log.append((name, "starts", env.now))
        yield simpy.Timeout(env, 10)
        log.append((name, "ends", env.now))
        threads.give()

    for name in "abc":
        env.process(work(name))
    env.run()
    assert log == [
        ("a", "starts", 0), ("b", "starts", 0), ("a", "ends", 10), ("b", "ends", 10), ("c", "starts", 10),
        ("c", "ends", 20),
    ]  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 4)), min_size=1, max_size=12), st.integers(1, 8))
def test_the_launch_queue_never_holds_more_than_its_depth(taken: list[tuple[int, int]], depth: int) -> None:
    """Commands that start in turn, each `delay` after the last: places are taken no sooner and no later than free."""
    env = Environment()
    queue = LaunchQueue(env, depth)
    times: list[int] = []
    starts: list[int] = []

    def launch() -> Waiting:
        for delay, places in taken:
            if not queue.take(places):
                yield from queue.wait(places)
            times.append(env.now)
            starts.append(max(env.now, starts[-1] if starts else 0) + delay)
            queue.starts(starts[-1], places)

    env.process(launch())
    env.run()
    for i, (at, (_, places)) in enumerate(zip(times, taken, strict=True)):

        def held(now: int, before: int = i) -> int:
            return sum(taken[j][1] for j in range(before) if starts[j] > now)

        assert not held(at) or held(at) + places <= depth
        # Not a nanosecond late: until then the queue was too full, or the host was busy with the launch before.
        earliest = times[i - 1] if i else 0
        assert at == earliest or (held(at - 1) and held(at - 1) + places > depth)
    assert all(before <= after for before, after in pairwise(times))

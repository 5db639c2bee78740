"""Every idle nanosecond of the device has one cause: attribution against an oracle that asks each nanosecond."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchsim.batching.continuous import ContinuousBatcher
from batchsim.engine import WINDOW_STEPS, Window
from batchsim.errors import RunError
from batchsim.machine import Burst, Latencies
from batchsim.metrics import Metrics
from batchsim.records import Span
from batchsim.result import ScheduleResult
from tests.costs import FixedCosts, graph, run
from tests.requests import uniform_requests
from tests.test_machine import batcher_for, costs, requests


def served() -> ContinuousBatcher:
    """A batcher whose one request has been served."""
    batcher = ContinuousBatcher(uniform_requests(1, 1, 1), max_num_seqs=1, max_num_batched_tokens=1)
    batch = batcher.schedule()
    assert batch is not None
    batcher.update(batch)
    return batcher


def result_of(spans: Iterable[Span], total_ns: int) -> ScheduleResult:
    metrics = Metrics()
    for span in spans:
        metrics(span)
    return metrics.result("sync", total_ns, served())


def cause(spans: list[Span], forwards: list[Span], gap: int, now: int) -> str:
    """What the device waits for in the nanosecond that starts at `now`, before forward number `gap`."""
    running = [span for span in spans if span.start_ns <= now < span.end_ns]
    before_ns = forwards[gap - 1].end_ns if gap else 0
    if any(span.lane == "copy_in" for span in running):
        return "device_copy_in"
    host = next((span for span in running if span.lane == "host"), None)
    if gap < len(forwards):
        forward = forwards[gap]
        launches = [span for span in spans if span.stage == "launch" and span.step == forward.step]
        if host in launches:
            return "launch"
        if launches and now >= launches[0].end_ns:
            return "launch_latency"
        until_ns = forward.start_ns
    else:
        until_ns = max(span.end_ns for span in spans)
    if host is not None and host.stage != "wait":
        return host.stage
    outs = (s for s in spans if s.lane == "copy_out" and s.end_ns > now and s.end_ns > before_ns)
    return "device_copy_out" if any(span.start_ns < until_ns for span in outs) else "wake_up"


def oracle(spans: list[Span], total_ns: int) -> Counter[str]:
    """The idle time by cause, nanosecond by nanosecond."""
    forwards = sorted((span for span in spans if span.lane == "compute"), key=lambda span: span.start_ns)
    idle: Counter[str] = Counter()
    for now in range(total_ns):
        if not any(forward.start_ns <= now < forward.end_ns for forward in forwards):
            idle[cause(spans, forwards, sum(forward.start_ns <= now for forward in forwards), now)] += 1
    return idle


lengths = st.integers(0, 6)
phases = st.sampled_from(["schedule", "build_inputs", "copy_in", "record", "wait", "wait", "update"])


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[Span], int]:
    """Spans as a machine might tell of them: the host's tile the run, the lanes' are in order, anything may overlap."""
    spans: list[Span] = []
    now = 0
    launched: list[int] = []
    for step in range(draw(st.integers(1, 4))):
        before = draw(st.lists(st.tuples(phases, lengths), max_size=4))
        launches = [("launch", length) for length in draw(st.lists(lengths, min_size=1, max_size=3))]
        after = draw(st.lists(st.tuples(phases, lengths), max_size=4))
        for stage, length in [*before, *launches, *after, ("update", draw(lengths))]:
            if stage == "launch" and len(launched) == step:
                launched.append(now)
            spans.append(Span(step, "host", stage, now, now + length))
            now += length
    device = copy_in = copy_out = 0
    for step, launch_ns in enumerate(launched):
        arrives = max(copy_in, launch_ns - draw(lengths))
        copy_in = arrives + draw(lengths)
        start = max(device, launch_ns) + draw(lengths)
        device = start + 1 + draw(lengths)
        leaves = max(copy_out, device) + draw(lengths)
        copy_out = leaves + draw(lengths)
        spans += [
            Span(step, "copy_in", "copy_in", arrives, copy_in),
            Span(step, "compute", "decode", start, device),
            Span(step, "copy_out", "copy_out", leaves, copy_out),
        ]
    end = max(span.end_ns for span in spans)
    if end > now:
        spans.append(Span(step, "host", "wait", now, end))
    return spans, end


@given(runs())
def test_attribution_is_that_of_the_oracle(case: tuple[list[Span], int]) -> None:
    spans, total = case
    if not total:
        return
    result = result_of(sorted(spans, key=lambda span: (span.start_ns, span.end_ns)), total)
    assert result.idle_ns == oracle(spans, total)
    busy = sum(span.duration_ns for span in spans if span.lane == "compute")
    assert sum(result.idle_ns.values()) + busy == total


@given(requests, st.integers(1, 4), costs, st.integers(1, 12), st.sampled_from(["sync", "async"]))
def test_told_live_or_sorted_the_metrics_are_the_same(
    lengths: list[tuple[int, int]], seqs: int, costs: FixedCosts, depth: int, schedule: str
) -> None:
    """The simulator tells of a forward as it ends, the executor of all spans by their start, after the run."""
    batcher = batcher_for(lengths, seqs, 20)
    total, spans, live = run(schedule, batcher, costs, launch_queue_depth=depth)
    metrics = Metrics()
    for span in sorted(spans, key=lambda span: (span.start_ns, span.end_ns)):
        metrics(span)
    later = metrics.result(schedule, total, batcher)
    assert later == live
    busy = sum(span.duration_ns for span in spans if span.lane == "compute")
    assert live.device_busy_fraction == busy / total
    assert sum(live.idle_ns.values()) + busy == total
    waits = sum(span.duration_ns for span in spans if span.stage == "wait")
    assert live.host_busy_fraction == 1 - waits / total


def idle(spans: list[Span], total_ns: int) -> dict[str, int]:
    return result_of(spans, total_ns).idle_ns


def test_before_the_first_forward_and_after_the_last() -> None:
    spans = [
        Span(0, "host", "schedule", 0, 10),
        Span(0, "host", "build_inputs", 10, 30),
        Span(0, "host", "copy_in", 30, 35),
        Span(0, "copy_in", "copy_in", 33, 40),
        Span(0, "host", "launch", 35, 50),
        Span(0, "host", "wait", 50, 230),
        Span(0, "compute", "decode", 60, 200),
        Span(0, "copy_out", "copy_out", 202, 210),
        Span(0, "host", "update", 230, 240),
        Span(-1, "host", "schedule", 240, 245),
    ]
    assert idle(spans, 245) == {
        "schedule": 10 + 5, "build_inputs": 20, "copy_in": 3, "device_copy_in": 7, "launch": 10, "launch_latency": 10,
        "device_copy_out": 10, "wake_up": 20, "update": 10,
    }  # fmt: skip


def test_a_forward_that_was_queued_in_time_waits_for_its_launch_alone() -> None:
    """Async: whatever the host does meanwhile is no cause."""
    spans = [
        Span(0, "host", "launch", 0, 10),
        Span(0, "compute", "decode", 10, 100),
        Span(1, "host", "launch", 10, 20),
        Span(0, "host", "wait", 20, 105),
        Span(0, "copy_out", "copy_out", 101, 104),
        Span(0, "host", "update", 105, 150),
        Span(1, "compute", "decode", 103, 200),
        Span(1, "host", "wait", 150, 201),
        Span(1, "host", "update", 201, 202),
    ]
    assert idle(spans, 202) == {"launch": 10, "launch_latency": 3, "wake_up": 1, "update": 1}


def test_a_forward_that_starts_while_it_is_being_launched_waits_for_the_launches() -> None:
    """Kernel by kernel, whether the launches are told of one by one (simulated) or as one call (executed)."""
    one_by_one = [Span(0, "host", "launch", start, start + 10) for start in range(0, 100, 10)]
    for launches in (one_by_one, [Span(0, "host", "launch", 0, 100)]):
        spans = [*launches, Span(0, "compute", "decode", 25, 120), Span(0, "host", "update", 120, 130)]
        assert idle(sorted(spans, key=lambda span: span.start_ns), 130) == {"launch": 25, "update": 10}


def test_the_gap_inside_an_eager_forward_is_told_apart_from_idle_time() -> None:
    launches = FixedCosts({"launch": 0}, [[Burst((10, 10), (3, 3)), Burst((10, 10), (3, 3))]])
    batcher = ContinuousBatcher(uniform_requests(1, 1, 1), max_num_seqs=1, max_num_batched_tokens=1)
    total, _, result = run("sync", batcher, launches)
    assert total == 40
    # The device runs the kernels at 0, 10, 20 and 30, and waits for launches in between.
    assert result.device_busy_fraction == 33 / 40
    assert result.launch_gap_fraction == 21 / 40
    assert result.idle_ns == {"launch": 7}


def test_a_run_without_any_step_is_refused() -> None:
    with pytest.raises(RunError, match="nothing ran"):
        result_of([], 100)


def test_a_run_without_any_cost_is_refused() -> None:
    batcher = ContinuousBatcher(uniform_requests(1, 1, 1), max_num_seqs=1, max_num_batched_tokens=1)
    with pytest.raises(RunError, match="no time"):
        run("sync", batcher, FixedCosts(forward=[graph(0)]))


def test_a_run_that_leaves_requests_unserved_is_refused() -> None:
    batcher = ContinuousBatcher(
        uniform_requests(3, 100, 1), max_num_seqs=3, max_num_batched_tokens=100, num_kv_blocks=1
    )
    with pytest.raises(RunError, match="3 requests"):
        run("sync", batcher, FixedCosts({"schedule": 5}, [graph(10)]))


@pytest.mark.parametrize("schedule", ["sync", "async"])
@pytest.mark.parametrize("steps", [2, 5, 40])
def test_a_window_is_of_whole_steps(schedule: str, steps: int) -> None:
    batcher = ContinuousBatcher(uniform_requests(1, 1, steps), max_num_seqs=1, max_num_batched_tokens=1)
    latencies = Latencies(7, 5, 3, 2, 11)
    host = {"schedule": 20, "build_inputs": 50, "copy_in": 9, "copy_out": 8, "record": 2, "update": 30}
    _, spans, _ = run(schedule, batcher, FixedCosts(host, [graph(200, 15)], 6, latencies))
    first_step = 20
    for told in (spans, sorted(spans, key=lambda span: (span.start_ns, span.end_ns))):
        window = Window(first_step)
        for span in told:
            window(span)
        decisions = [span.start_ns for span in spans if span.stage == "schedule" and span.step >= 0]
        if steps > first_step + WINDOW_STEPS:
            start, end = decisions[first_step], decisions[first_step + WINDOW_STEPS]
        elif len(decisions) > WINDOW_STEPS:
            start, end = decisions[-1 - WINDOW_STEPS], decisions[-1]
        else:
            start, end = 0, spans[-1].end_ns + 1
        inside = [span for span in spans if span.start_ns < end and span.end_ns > start]
        assert sorted(window.spans()) == sorted(inside)

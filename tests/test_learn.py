"""What is learned from the trace of a loop is what the loop was made of, and what is predicted of it what it does."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchsim.learned import Copy, Kernels, LearnedProfile, Operation, StreamWait, Wait, Work
from batchsim.whatif import whatif
from batchsim.whatif.variants import is_overlapped, plain
from calibration.learn import learn
from tests.learn_traces import (
    COMPUTE,
    COPY_NS,
    GAP_NS,
    LAUNCH_NS,
    MAIN,
    SCHEDULES,
    Schedule,
    Step,
    Tracer,
    forward,
    overlapped,
    prepare,
    read,
    rotated,
    run,
    step_ns,
    sync,
)

T = TypeVar("T", Work, Kernels, Copy, StreamWait, Wait)

SIDE = 13  # a stream beside COMPUTE
SHORT_NS = 10_000  # of some calls, which a replay does not know any better
ALL_SCHEDULES = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
GRAPH_OR_NOT = pytest.mark.parametrize("graph", [False, True], ids=["launched", "graph"])


def learned(folder: Path, schedule: Schedule, step: Step, steps: int = 8, **how: Any) -> LearnedProfile:
    return learn(run(schedule, step, steps, **how)[0].traced(folder))


def of(operations: list[Operation], kind: type[T]) -> list[T]:
    return [operation for operation in operations if isinstance(operation, kind)]


def targets(profile: LearnedProfile) -> list[tuple[int, Operation]]:
    """How many steps back each of the loop's waits is, and for what; of the first steps' not all are known."""
    return [
        (wait.lag, profile.steps[number - wait.lag].operations[wait.target])
        for number, step in enumerate(profile.steps)
        for wait in of(step.operations, Wait)
        if number >= wait.lag
    ]


def same(profile: LearnedProfile) -> list[Operation]:
    """The operations of a profile's steps, all of which have the same."""
    first, *rest = [step.operations for step in profile.steps]
    assert all(operations == first for operations in rest)
    return first


# Where the steps are.


@ALL_SCHEDULES
@pytest.mark.parametrize(
    ("name", "found_by"),
    [
        ("ProfilerStep#{}", "ProfilerStep"), ("serve_step", "serve_step"), ("step {}", "step"), ("iter_{}", "iter"),
        ("decode-7b: {}", "decode-7b"), ("{}", "#"),
    ],
)  # fmt: skip
def test_steps_are_those_that_annotations_tell(tmp_path: Path, schedule: Schedule, name: str, found_by: str) -> None:
    tracer, began = run(schedule, Step(), 8, name=name)
    profile = learn(tracer.traced(tmp_path))
    assert (profile.found_by, profile.steps_in_trace) == (f"annotation {found_by!r}", 8)
    assert {step.traced_ns for step in profile.steps} == {step_ns(began)}


@ALL_SCHEDULES
@GRAPH_OR_NOT
def test_steps_without_annotations_are_found_by_their_period(tmp_path: Path, schedule: Schedule, graph: bool) -> None:
    tracer, began = run(schedule, Step(graph=graph), 9, name=None, phases=False)
    profile = learn(tracer.traced(tmp_path))
    assert profile.found_by.startswith("the period of ")
    assert profile.steps_in_trace in (7, 8)  # The last one is not seen to end, nor is a rotated one to begin.
    assert {step.traced_ns for step in profile.steps} == {step_ns(began)}
    assert profile.phases == ("host",)


@ALL_SCHEDULES
def test_steps_of_which_a_part_is_annotated_are_whole(tmp_path: Path, schedule: Schedule) -> None:
    tracer, began = run(schedule, Step(), 9, name=None)
    profile = learn(tracer.traced(tmp_path))
    assert profile.found_by == "annotation 'model'"
    assert profile.steps_in_trace in (7, 8)  # The last one is not seen to end, nor is a rotated one to begin.
    assert {step.traced_ns for step in profile.steps} == {step_ns(began)}


@pytest.mark.parametrize("known", ["annotated", "in part", "by their period"])
def test_it_does_not_matter_how_steps_are_found(tmp_path: Path, known: str) -> None:
    def learn_of(name: str | None, phases: bool) -> LearnedProfile:
        return learned(tmp_path, sync, Step(), 9, name=name, phases=phases)

    expected = same(learn_of("step", True))
    found = learn_of("step" if known == "annotated" else None, known == "in part")
    if known != "in part":
        expected = same(learn_of("step", False))
    assert [type(operation) for operation in same(found)] == [type(operation) for operation in expected]
    assert of(same(found), Copy) == [copy.model_copy(update={"phase": "host"}) for copy in of(expected, Copy)]


def test_annotations_of_another_thread_that_launches_nothing_are_no_steps(tmp_path: Path) -> None:
    """A worker of a data loader that calls its work what the loop calls its steps."""
    tracer, began = run(sync, Step(), 8, name="step")
    worker = Tracer(thread=MAIN + 7, now=began[0])
    for _ in range(40):
        with worker.around("step"):
            worker.work(300_000)
    tracer.events += worker.events
    profile = learn(tracer.traced(tmp_path))
    assert (profile.found_by, profile.steps_in_trace) == ("annotation 'step'", 8)
    assert {step.traced_ns for step in profile.steps} == {step_ns(began)}


# What a step consists of.


@pytest.mark.parametrize("schedule", [sync, rotated], ids=["sync", "rotated"])
def test_a_synchronous_step_begins_when_results_are_there(tmp_path: Path, schedule: Schedule) -> None:
    """Wherever its annotation begins: results are read, inputs prepared and copied, kernels launched, waited for."""
    step = Step(prepare=310_000, read=120_000, inputs=(1024, 70_000), results=640)
    operations = same(learned(tmp_path, schedule, step))
    kinds = [type(operation) for operation in operations]
    assert kinds == [Work, Work, Copy, Copy, Work, Kernels, Copy, Wait]
    work = {operation.phase: operation.ns for operation in of(operations, Work)}
    assert work == {"read": 120_000, "prepare": 310_000, "model": step.between}
    (kernels,) = of(operations, Kernels)
    assert (kernels.phase, kernels.nodes) == ("model", None)
    assert kernels.device_ns == [ns + GAP_NS for ns in step.kernels]
    copies = [(copy.direction, copy.bytes, copy.pinned, copy.waits) for copy in of(operations, Copy)]
    assert copies == [("h2d", 1024, False, True), ("h2d", 70_000, False, True), ("d2h", 640, False, False)]
    assert {copy.device_ns for copy in of(operations, Copy)} == {COPY_NS}


@GRAPH_OR_NOT
@pytest.mark.parametrize("lag", [1, 2, 3])
def test_an_overlapped_step_waits_for_one_before(tmp_path: Path, lag: int, graph: bool) -> None:
    schedule = partial(overlapped, lag=lag)
    profile = learned(tmp_path, schedule, Step(graph=graph, results=640), 12, before=30)
    assert is_overlapped(plain(profile.steps))
    assert len(targets(profile)) >= 5
    for steps_back, target in targets(profile):
        assert steps_back == lag
        assert isinstance(target, Copy) and (target.direction, target.bytes) == ("d2h", 640)


@pytest.mark.parametrize("call", ["poll", "event", "stream", "device"])
def test_a_synchronous_step_waits_for_what_it_launched(tmp_path: Path, call: str) -> None:
    """Whatever the host waits by, and if it asks again and again."""

    def schedule(tracer: Tracer, step: Step, steps: int) -> Iterator[None]:
        for _ in range(steps):
            yield
            prepare(tracer, step)
            forward(tracer, step)
            mark = tracer.record()
            match call:
                case "poll":
                    tracer.poll(mark)
                case "event":
                    tracer.wait(mark)
                case "stream":
                    tracer.synchronize()
                case "device":
                    tracer.synchronize("cudaDeviceSynchronize")
            read(tracer, step)

    profile = learned(tmp_path, schedule, Step())
    assert not is_overlapped(plain(profile.steps))
    assert {(steps_back, type(target)) for steps_back, target in targets(profile)} == {(0, Kernels)}
    assert len(of(same(profile), Wait)) == 1
    assert abs(profile.replay_error) < 0.02


@pytest.mark.parametrize("direction", ["h2d", "d2h"])
@pytest.mark.parametrize("operators", [True, False])
def test_blocking_copies_keep_the_host(tmp_path: Path, direction: str, operators: bool) -> None:
    """A copy from pageable memory and the wait for it in one operator, without operators, or as one call."""

    def schedule(tracer: Tracer, step: Step, steps: int, how: str = "copy_") -> Iterator[None]:
        for _ in range(steps):
            yield
            prepare(tracer, step)
            forward(tracer, step)
            if how == "cudaMemcpy":
                tracer.copy(direction, 512, ns=40_000)
            elif direction == "h2d":
                tracer.copy_in(512, ns=40_000)
            else:
                tracer.copy_out(512, ns=40_000)
            tracer.synchronize()

    for how in ("copy_", "cudaMemcpy"):
        tracer, _ = run(partial(schedule, how=how), Step(), phases=False)
        if not operators:
            tracer.events = [event for event in tracer.events if event["cat"] != "cpu_op"]
        profile = learn(tracer.traced(tmp_path))
        (copy,) = of(same(profile), Copy)
        assert (copy.direction, copy.bytes, copy.device_ns) == (direction, 512, 40_000)
        assert copy.waits == (direction == "h2d")
        if direction == "d2h":
            waits = [operation for operation in same(profile) if isinstance(operation, Wait) and not operation.lag]
            assert any(same(profile)[wait.target] == copy for wait in waits)
        assert abs(profile.replay_error) < 0.02


@ALL_SCHEDULES
def test_a_replayed_graph_is_one_launch(tmp_path: Path, schedule: Schedule) -> None:
    """Its time is from its first node to the end of its last, gaps as traced; the gap between two is told."""
    step = Step(graph=True, kernels=(30_000, 50_000, 40_000) * 9)
    profile = learned(tmp_path, schedule, step)
    (graph,) = of(same(profile), Kernels)
    assert (graph.nodes, graph.phase, len(graph.host_ns)) == (27, "model", 1)
    assert graph.device_ns == [step.device - GAP_NS]
    assert profile.graph_gap_ns == GAP_NS
    assert abs(profile.replay_error) < 0.02


def test_a_graph_is_what_a_step_waits_for(tmp_path: Path) -> None:
    """Its launch is on the critical path, not host work that nothing comes of."""
    profile = learned(tmp_path, sync, Step(graph=True))
    answer = whatif(profile)
    busy = Step().device / profile.steps[0].traced_ns
    assert answer.schedules["sync"].device_busy_fraction == pytest.approx(busy, rel=0.1)


def test_several_streams_wait_for_one_another(tmp_path: Path) -> None:
    def schedule(tracer: Tracer, step: Step, steps: int) -> Iterator[None]:
        for _ in range(steps):
            yield
            prepare(tracer, step)
            tracer.launch(100_000)
            tracer.stream_wait(SIDE, tracer.record())
            tracer.launch(200_000, stream=SIDE, name="beside")
            tracer.launch(120_000)
            tracer.stream_wait(COMPUTE, tracer.record(SIDE))
            tracer.launch(50_000, name="both")
            tracer.synchronize()

    profile = learned(tmp_path, schedule, Step())
    operations = same(profile)
    streams = {round(sum(kernels.device_ns), -4): kernels.stream for kernels in of(operations, Kernels)}
    main, side = streams[100_000], streams[200_000]
    assert main != side and streams == {100_000: main, 200_000: side, 120_000: main, 50_000: main}
    assert [(wait.stream, wait.on) for wait in of(operations, StreamWait)] == [(side, main), (main, side)]
    assert abs(profile.replay_error) < 0.02


def test_copies_on_streams_of_their_own_are_waited_for(tmp_path: Path) -> None:
    operations = same(learned(tmp_path, overlapped, Step()))
    inputs, results = of(operations, Copy)[0].stream, of(operations, Copy)[-1].stream
    (compute,) = {kernels.stream for kernels in of(operations, Kernels)}
    assert len({inputs, results, compute}) == 3
    assert [(wait.stream, wait.on) for wait in of(operations, StreamWait)] == [(compute, inputs), (results, compute)]
    assert not any(copy.waits for copy in of(operations, Copy)) and all(copy.pinned for copy in of(operations, Copy))


def test_launches_of_another_thread_are_launches(tmp_path: Path) -> None:
    """As those of autograd's, while the loop's own thread does nothing."""

    def schedule(tracer: Tracer, step: Step, steps: int, thread: int = MAIN) -> Iterator[None]:
        for _ in range(steps):
            yield
            prepare(tracer, step)
            for ns in step.kernels:
                tracer.thread = thread
                with tracer.op("backward"):
                    tracer.work(step.between)
                    tracer.launch(ns)
                tracer.thread = MAIN
            tracer.copy_out(step.results)

    alone = learned(tmp_path, schedule, Step())
    both = learned(tmp_path, partial(schedule, thread=MAIN + 1), Step())
    assert same(both) == same(alone)
    assert [note for note in both.notes if note not in alone.notes] == ["2 host threads launch; they are taken for one"]


def test_a_wait_midway_keeps_its_place(tmp_path: Path) -> None:
    """What is read to decide what to launch stays within the step, which begins behind the last wait."""

    def schedule(tracer: Tracer, step: Step, steps: int) -> Iterator[None]:
        for _ in range(steps):
            yield
            prepare(tracer, step)
            for _ in range(6):
                tracer.launch(100_000)
            tracer.copy_out(4)
            tracer.work(10_000)
            for _ in range(6):
                tracer.launch(100_000)
            tracer.copy_out(step.results)
            read(tracer, step)

    profile = learned(tmp_path, schedule, Step())
    operations = same(profile)
    kinds = [type(operation) for operation in operations if not isinstance(operation, Work)]
    assert kinds == [Kernels, Copy, Wait, Kernels, Copy, Wait]
    assert [copy.bytes for copy in of(operations, Copy)] == [4, 512]
    assert abs(profile.replay_error) < 0.02


def test_a_loop_that_never_waits_has_its_steps(tmp_path: Path) -> None:
    def schedule(tracer: Tracer, step: Step, steps: int) -> Iterator[None]:
        for _ in range(steps):
            yield
            for ns in step.kernels:
                tracer.work(30_000)
                tracer.launch(ns)

    profile = learned(tmp_path, schedule, Step(kernels=(5_000,) * 12))
    assert len(profile.steps) >= 4
    assert [len(kernels.device_ns) for kernels in of(same(profile), Kernels)] == [12]
    assert any("no call that waits for the device" in note for note in profile.notes)


def test_phases_are_told_even_where_they_begin_with_the_step(tmp_path: Path) -> None:
    def schedule(tracer: Tracer, step: Step, steps: int) -> Iterator[None]:
        for _ in range(steps):
            yield
            with tracer.phase("outer"):
                tracer.work(100_000)
                with tracer.phase("inner"):
                    tracer.work(50_000)
                tracer.work(30_000)
            tracer.work(20_000)
            forward(tracer, step)
            tracer.copy_out(8)

    work: dict[str, int] = {}
    for operation in of(same(learned(tmp_path, schedule, Step())), Work):
        work[operation.phase] = work.get(operation.phase, 0) + operation.ns
    assert work == {"outer": 130_000, "inner": 50_000, "host": 20_000, "model": Step().between}


def test_gaps_and_latencies_are_those_of_the_device(tmp_path: Path) -> None:
    profile = learned(tmp_path, sync, Step(kernels=(5_000,) * 8, between=30_000))
    assert profile.launch_ns == LAUNCH_NS
    profile = learned(tmp_path, sync, Step(kernels=(60_000,) * 8))
    assert profile.queued_gap_ns == GAP_NS


def test_the_same_trace_is_learned_the_same(tmp_path: Path) -> None:
    first, second = (learned(tmp_path, sync, Step(), jitter=0.3, seed=5) for _ in range(2))
    assert first.model_dump_json() == second.model_dump_json()
    assert whatif(first, 2.0).to_json() == whatif(second, 2.0).to_json()


# What is replayed and predicted.

MICROSECONDS = st.integers(20, 800).map(lambda us: us * 1000)
STEPS = st.builds(
    Step,
    prepare=MICROSECONDS,
    inputs=st.lists(st.sampled_from([256, 4096, 300_000]), min_size=1, max_size=4).map(tuple),
    kernels=st.lists(st.integers(20_000, 300_000), min_size=8, max_size=20).map(tuple),
    between=st.integers(2_000, 60_000),
    graph=st.booleans(),
    results=st.sampled_from([64, 4096, 1_000_000]),
    read=MICROSECONDS,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    STEPS, st.sampled_from([sync, rotated, overlapped]), st.sampled_from([None, "step {}"]),
    st.sampled_from([0, 1_000]), st.sampled_from([0.0, 0.2]), st.integers(0, 9),
)  # fmt: skip
def test_a_replay_of_the_traced_steps_takes_as_long_as_they_did(
    tmp_path: Path, step: Step, schedule: Schedule, name: str | None, event_ns: int, jitter: float, seed: int
) -> None:
    profile = learned(tmp_path, schedule, step, 10, name=name, event_ns=event_ns, jitter=jitter, seed=seed, before=20)
    traced_ns = sum(step.traced_ns for step in profile.steps) / len(profile.steps)
    # A host that is nearly as fast as the device, or that varies, is many steps ahead before it is kept waiting.
    limit = 0.05 if schedule is overlapped else 0.02
    assert abs(profile.replay_error) * traced_ns < max(limit * traced_ns, SHORT_NS)
    assert len({len(step.operations) for step in profile.steps}) == 1


LOOPS = {
    "bound by the device": Step(),
    "with graphs": Step(graph=True),
    "bound by the host": Step(prepare=3_000_000, kernels=(40_000,) * 24),
    "of long kernels": Step(kernels=(900_000,) * 4, prepare=1_500_000, read=700_000),
    "with much to copy": Step(inputs=(1024,) * 12, kernels=(70_000,) * 30),
}


@pytest.mark.parametrize("event_ns", [0, 1_300])
@pytest.mark.parametrize("name", LOOPS)
def test_async_is_predicted_as_the_same_loop_runs_overlapped(tmp_path: Path, name: str, event_ns: int) -> None:
    """From the synchronous loop's trace, with what the profiler adds, and its step without."""
    step = LOOPS[name]
    steady_ms, overlapped_ms = (step_ns(run(schedule, step)[1]) / 1e6 for schedule in (sync, overlapped))
    answer = whatif(learned(tmp_path, sync, step, event_ns=event_ns), steady_ms)
    predicted = answer.schedules["async"]
    assert answer.as_is == "sync"
    assert predicted.step_ms == pytest.approx(overlapped_ms, rel=0.05)
    low, high = predicted.step_ms_interval
    assert low <= overlapped_ms <= high
    assert answer.schedules["sync"].step_ms == pytest.approx(steady_ms)

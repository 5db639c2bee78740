"""Whatever a trace holds, it is refused by a sentence or answered by times that are some."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchsim.errors import InputError
from batchsim.learned import LearnedProfile, load_learned
from batchsim.whatif import Answer, whatif
from calibration.kineto import CATEGORIES, read_trace
from calibration.learn import learn
from tests.kineto_traces import Event
from tests.learn_traces import SCHEDULES, Step, Tracer, run

MANY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
STEP = Step(kernels=(60_000,) * 5, inputs=(1024,))


def unusual() -> list[Event]:
    """Polling, stray threads, waits midway, copies of every kind."""
    tracer = Tracer()
    for number in range(6):
        with tracer.around(f"step {number}"):
            tracer.work(100_000)
            tracer.pinned("h2d", 5000, 20)
            tracer.stream_wait(7, tracer.record(20))
            for kernel in range(4):
                tracer.launch(20_000, name=f"kernel_{kernel}", thread=99 if kernel == 2 else None)
            tracer.copy_out(4)
            tracer.work(30_000)
            tracer.graph([9_000, 7_000])
            tracer.poll(tracer.record())
            tracer.copy("d2h", 400)
            tracer.synchronize("cudaDeviceSynchronize")
    return tracer.events


BASES: list[list[Event]] = [
    run(schedule, step, 6, name=name, phases=phases)[0].events
    for schedule in SCHEDULES.values()
    for step, name, phases in ((STEP, "ProfilerStep#{}", True), (Step(graph=True), None, True), (STEP, None, False))
]
BASES.append(unusual())

STRANGE: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(
        [
            None, True, [], {}, "", "x", "1", "1e3", "0x10", "é", "\ud800", "\u202e", "#1", "火" * 50, 1 << 31, 1 << 53,
            1 << 62, (1 << 63) - 1, -(1 << 63), 1 << 64, 10**400, 1e300, -1e300, math.nan, math.inf, -math.inf, 4.6e15,
            "Memcpy DtoH (Device -> Pageable)", "cudaStreamSynchronize", "cudaGraphLaunch", "ProfilerStep#1",
        ]
    ),
    st.integers(-10, 10**10),
    st.floats(-1e7, 1e7),
    st.text(max_size=5),
)  # fmt: skip

# A change of a list of events: which of them, and how.
Change = Callable[[list[Event]], list[Event]]
SHARES = st.sampled_from([0.02, 0.1, 0.5, 1.0])


def some(share: float, offset: int, count: int) -> list[int]:
    """Places spread over `count`, that share of them, or one at least."""
    step = max(round(1 / share), 1)
    return list(range(offset % step, count, step)) or [offset % count]


@st.composite
def changes(draw: st.DrawFn) -> Change:
    share, offset = draw(SHARES), draw(st.integers(0, 10**4))
    category = draw(st.none() | st.sampled_from(["kernel", "gpu_memcpy", "cuda_runtime", "cpu_op", "user_annotation"]))
    how = draw(st.sampled_from(sorted(HOW)))
    values = draw(st.lists(STRANGE, min_size=1, max_size=2)), draw(st.floats(-1e4, 1e4)), draw(st.integers(0, 10**4))

    def change(events: list[Event]) -> list[Event]:
        own = [i for i, event in enumerate(events) if category is None or event.get("cat") == category]
        if not own:
            return events
        chosen = {own[i] for i in some(share, offset, len(own))}
        return HOW[how](events, chosen, *values[:2], Random(values[2]))

    return change


def edited(edit: Callable[[Event, int, list[Any], float, Random], Event]) -> Callable[..., list[Event]]:
    """A change of each chosen event for itself; those that another change has spoilt may stay as they are."""

    def change(events: list[Event], chosen: set[int], values: list[Any], us: float, random: Random) -> list[Event]:
        made = []
        for i, event in enumerate(events):
            try:
                made.append(edit({**event}, i, values, us, random) if i in chosen else event)
            except (TypeError, LookupError, ValueError, OverflowError):
                made.append(event)
        return made

    return change


def with_key(event: Event, place: int, values: list[Any], us: float, random: Random) -> Event:
    return event | {random.choice(sorted(event)): values[place % len(values)]}


def with_argument(event: Event, place: int, values: list[Any], us: float, random: Random) -> Event:
    return event | {"args": event["args"] | {random.choice(sorted(event["args"])): values[place % len(values)]}}


def without_key(event: Event, place: int, values: list[Any], us: float, random: Random) -> Event:
    del event[random.choice(sorted(event))]
    return event


def without_argument(event: Event, place: int, values: list[Any], us: float, random: Random) -> Event:
    lost = random.choice(sorted(event["args"]))
    return event | {"args": {key: value for key, value in event["args"].items() if key != lost}}


def dropped(events: list[Event], chosen: set[int], *_: Any) -> list[Event]:
    return [event for i, event in enumerate(events) if i not in chosen]


def twice(events: list[Event], chosen: set[int], *_: Any) -> list[Event]:
    return [*events, *(events[i] for i in sorted(chosen))]


def shuffled(events: list[Event], chosen: set[int], values: list[Any], us: float, random: Random) -> list[Event]:
    return random.sample(events, len(events))


def later(events: list[Event], chosen: set[int], values: list[Any], us: float, random: Random) -> list[Event]:
    """From some event on all are, as where a clock was set."""
    since = events[min(chosen)].get("ts")
    return edited(lambda event, *_: event | {"ts": event["ts"] + (us if event["ts"] >= since else 0)})(
        events, set(range(len(events))), values, us, random
    )


HOW: dict[str, Callable[..., list[Event]]] = {
    "key": edited(with_key),
    "argument": edited(with_argument),
    "no key": edited(without_key),
    "no argument": edited(without_argument),
    "dropped": dropped,
    "twice": twice,
    "shuffled": shuffled,
    "later": later,
    "moved": edited(lambda event, i, values, us, random: event | {"ts": event["ts"] + us}),
    "at one time": edited(lambda event, i, values, us, random: event | {"ts": BASES[0][0]["ts"] + 100}),
    "no time": edited(lambda event, i, values, us, random: event | {"dur": 0}),
    "longer": edited(lambda event, i, values, us, random: event | {"dur": event["dur"] * abs(us)}),
    "one id": edited(lambda event, i, values, us, random: event | {"args": event["args"] | {"correlation": 1010}}),
    "many streams": edited(lambda event, i, values, us, random: event | {"args": event["args"] | {"stream": i}}),
    "many threads": edited(lambda event, i, values, us, random: event | {"tid": i % 5}),
    "many devices": edited(lambda event, i, values, us, random: event | {"args": event["args"] | {"device": i % 3}}),
    "other category": edited(
        lambda event, i, values, us, random: event | {"cat": random.choice(sorted({*CATEGORIES, "ac2g"}))}
    ),
    "other call": edited(
        lambda event, i, values, us, random: (
            event
            | {"name": random.choice(["cudaEventQuery", "cudaStreamWaitEvent", "cudaMemcpy", "cudaLaunchKernel", "#"])}
        )
    ),
}


def check(answer: Answer) -> None:
    """Times are positive, in their intervals and finite, shares are shares, and all of it is JSON."""
    json.dumps(answer.to_json(), allow_nan=False).encode()
    assert answer.as_is in answer.schedules and answer.sentences
    for prediction in answer.schedules.values():
        low, high = prediction.step_ms_interval
        assert 0 < low <= prediction.step_ms <= high < math.inf
        worst, best = prediction.throughput_gain_interval
        assert -1 < worst <= best and -1 < prediction.throughput_gain < math.inf
        assert 0 <= prediction.device_busy_fraction <= 1 + 1e-9
        assert prediction.host_ms >= 0 and min(prediction.exposed_ms.values(), default=0) >= 0


def answered(path: Path) -> LearnedProfile | None:
    """The profile of what can be learned, from which an answer was made that holds; None: it was refused."""
    try:
        profile = learn(read_trace(path))
    except InputError as refused:
        (problem,) = refused.problems
        assert problem.found and problem.wanted and "\n" not in str(problem).removeprefix(str(path))
        return None
    check(whatif(profile))
    return profile


@settings(MANY, max_examples=250)
@given(st.sampled_from(BASES), st.lists(changes(), min_size=1, max_size=4))
def test_changed_traces_are_refused_or_answered(tmp_path: Path, events: list[Event], many: list[Change]) -> None:
    for change in many:
        events = change(events) or events
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    answered(path)


BYTES = [json.dumps({"traceEvents": events}).encode() for events in BASES]


@settings(MANY, max_examples=100)
@given(
    st.sampled_from(BYTES),
    st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(max_size=4) | st.sampled_from([b"9", b"-", b"e9"])),
        min_size=1, max_size=6,
    ),
)  # fmt: skip
def test_changed_bytes_are_refused_or_answered(
    tmp_path: Path, data: bytes, edits: list[tuple[float, int, bytes]]
) -> None:
    for place, length, new in edits:
        at = int(place * len(data))
        data = data[:at] + new + data[at + length :]
    path = tmp_path / "trace.json"
    path.write_bytes(data)
    answered(path)


@settings(MANY, max_examples=60)
@given(st.sampled_from(BASES), st.lists(st.tuples(st.floats(0, 1), st.integers(-9, 9)), min_size=1, max_size=8))
def test_changed_digits_are_refused_or_answered(
    tmp_path: Path, events: list[Event], edits: list[tuple[float, int]]
) -> None:
    """Traces whose numbers are others stay traces."""
    text = json.dumps({"traceEvents": events})
    digits = [i for i, character in enumerate(text) if character.isdigit() and text[i - 1].isdigit()]
    characters = list(text)
    for place, by in edits:
        at = digits[min(int(place * len(digits)), len(digits) - 1)]
        characters[at] = str((int(characters[at]) + by) % 10)
    path = tmp_path / "trace.json"
    path.write_text("".join(characters))
    answered(path)


@pytest.mark.parametrize("events", BASES, ids=range(len(BASES)))
def test_what_is_changed_is_answered_unchanged(tmp_path: Path, events: list[Event]) -> None:
    """And a profile that was written is read as it was."""
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    profile = answered(path)
    assert profile is not None
    out = tmp_path / "profile.json"
    out.write_text(profile.model_dump_json())
    assert load_learned(out) == profile


def many_streams() -> list[Event]:
    return [
        event | {"args": event["args"] | {"stream": 1000 * i}} if event["cat"] == "kernel" else event
        for i, event in enumerate(BASES[0])
    ]


def nested(count: int = 20_000) -> list[Event]:
    """Annotations in one another."""
    first = next(event for event in BASES[0] if event["cat"] == "user_annotation")
    return [first | {"name": f"part {i}", "ts": first["ts"] + i / 1000, "dur": 1e4 - i / 500} for i in range(count)]


def without_period() -> list[Event]:
    """Launches each of which comes again, and nothing else does."""
    tracer = Tracer()
    for i in range(12_000):
        tracer.launch(1_000, name=f"kernel {i * i % 2_503}")
    return tracer.events


def within_steps(crowd: Callable[[Tracer], None]) -> list[Event]:
    tracer = Tracer()
    for _ in range(6):
        with tracer.around("step"):
            tracer.launch(1_000_000)
            crowd(tracer)
            tracer.synchronize()
    return tracer.events


def crossing(tracer: Tracer) -> None:
    for i in range(800):
        tracer.stream_wait(i % 7, tracer.record(i % 5))


def waiting(tracer: Tracer) -> None:
    for _ in range(800):
        tracer.synchronize()


CROWDS: dict[str, Callable[[], list[Event]]] = {
    "streams": many_streams,
    "annotations in one another": lambda: BASES[0] + nested(),
    "annotations of one name": lambda: BASES[0] + [event | {"name": "part", "tid": event["ts"]} for event in nested()],
    "long names": lambda: [event | {"name": f"{event['name']} {i % 9}" * 3000} for i, event in enumerate(BASES[0])],
    "launches": without_period,
    "waits between streams": lambda: within_steps(crossing),
    "waits": lambda: within_steps(waiting),
}


@pytest.mark.parametrize("crowd", CROWDS)
def test_crowds_do_no_harm(tmp_path: Path, crowd: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(CROWDS[crowd]()))
    answered(path)

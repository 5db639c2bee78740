"""Damaged traces: an answer with sound figures or a sentence, never anything else."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchsim.errors import InputError
from batchsim.whatif import whatif
from calibration.kineto import read_trace
from calibration.learn import learn
from tests.kineto_traces import saved
from tests.learn_traces import SCHEDULES, Step, run

STEP = Step(prepare=100_000, kernels=(20_000,) * 4, read=40_000, graph=False)
DOCUMENTS = [run(schedule, STEP, 6)[0].document() for schedule in SCHEDULES.values()]

Event = dict[str, Any]
Change = Callable[[list[Event]], None]

numbers: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([0, -1, 1e300, -1e300, 2**63, 10**30, float("nan"), float("inf"), "12", "x", None, [], {}, True]),
    st.floats(-1e6, 1e13),
    st.integers(-(2**40), 2**53),
)
texts = st.one_of(st.text(max_size=8), st.sampled_from(["kernel", "cuda_runtime", "gpu_memcpy", "user_annotation"]))


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """One thing that can go wrong with a list of events."""
    share, at, other = draw(st.floats(0, 1)), draw(st.floats(0, 0.999)), draw(st.floats(0, 0.999))
    value, text = draw(numbers), draw(texts)
    key = draw(st.sampled_from(["ts", "dur", "pid", "tid", "ph"]))
    arg = draw(st.sampled_from(["correlation", "External id", "stream", "device", "bytes"]))

    def some(events: list[Event]) -> list[Event]:
        return events[int(at * len(events)) :][: 1 + int(share * 40)]

    def set_key(events: list[Event]) -> None:
        for event in some(events):
            event[key] = value

    def set_arg(events: list[Event]) -> None:
        for event in some(events):
            event.setdefault("args", {})[arg] = value

    def drop_key(events: list[Event]) -> None:
        for event in some(events):
            event.pop(key, None)

    def drop(events: list[Event]) -> None:
        first = int(at * len(events))
        del events[first : first + 1 + int(share * 60)]

    def twice(events: list[Event]) -> None:
        events += copy.deepcopy(some(events))

    def swap(events: list[Event]) -> None:
        i, j = int(at * len(events)), int(other * len(events))
        events[i]["ts"], events[j]["ts"] = events[j].get("ts"), events[i].get("ts")

    def rename(events: list[Event]) -> None:
        for event in some(events):
            event["name" if share < 0.5 else "cat"] = text

    def shift(events: list[Event]) -> None:
        for event in some(events):
            if isinstance(event.get("ts"), int | float):
                event["ts"] += draw_shift

    def same_time(events: list[Event]) -> None:
        for event in some(events):
            event["ts"], event["dur"] = events[0].get("ts"), 0

    draw_shift = draw(st.floats(-1e5, 1e5))
    change: Change = draw(st.sampled_from([set_key, set_arg, drop_key, drop, twice, swap, rename, shift, same_time]))
    return change


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(DOCUMENTS), st.lists(changes(), min_size=1, max_size=3), st.one_of(st.none(), st.floats(0.05, 5))
)
def test_a_damaged_trace_gives_sound_figures_or_a_sentence(
    tmp_path: Path, document: dict[str, Any], damage: list[Change], steady_step_ms: float | None
) -> None:
    damaged = copy.deepcopy(document)
    for change in damage:
        if damaged["traceEvents"]:
            change(damaged["traceEvents"])
    path = saved(tmp_path, damaged)
    refused: InputError | None = None
    try:
        answer = whatif(learn(read_trace(path)), steady_step_ms)
    except InputError as error:
        refused = error
    if refused is not None:
        assert str(refused).startswith(str(path)) and "\n" not in str(refused)
        return
    assert answer.sentences
    for name, prediction in answer.schedules.items():
        low, high = prediction.step_ms_interval
        figures = (prediction.step_ms, low, high, prediction.throughput_gain, prediction.host_ms)
        assert all(math.isfinite(figure) for figure in figures), name
        assert 0 < low <= high and prediction.step_ms > 0 and prediction.host_ms >= 0, name
        assert 0 <= prediction.device_busy_fraction <= 1, name


@pytest.mark.parametrize("document", DOCUMENTS, ids=SCHEDULES)
def test_an_undamaged_trace_is_learned(tmp_path: Path, document: dict[str, Any]) -> None:
    assert learn(read_trace(saved(tmp_path, document))).steps

"""Laws of traces: what they keep of the spans, and what trace viewers ask of them."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchsim.records import Span
from batchsim.result import Run
from batchsim.timeline import STREAMS, trace, write_trace
from tests.sample_runs import sample_runs

Event = dict[str, Any]


@pytest.fixture(scope="module")
def runs() -> tuple[Run, Run]:
    return sample_runs()


@pytest.fixture(scope="module")
def events(runs: tuple[Run, Run]) -> list[Event]:
    found: list[Event] = json.loads(json.dumps(trace(runs), allow_nan=False))["traceEvents"]
    return found


def groups(runs: tuple[Run, ...]) -> list[tuple[Span, ...]]:
    return [spans for run in runs for spans in run.windows.values()]


def test_every_span_is_an_event_with_its_times_to_the_nanosecond(runs: tuple[Run, Run], events: list[Event]) -> None:
    for index, spans in enumerate(groups(runs)):
        start = min(span.start_ns for span in spans)
        expected = sorted((span.stage, span.step, span.start_ns - start, span.duration_ns) for span in spans)
        mine = [e for e in events if e["pid"] in (index, 1000 + index) and "stage" in e.get("args", {})]
        found = sorted((e["args"]["stage"], e["args"]["step"], ns(e["ts"]), ns(e["dur"])) for e in mine)
        assert found == expected


@given(st.integers(0, 10**15))
def test_microseconds_keep_the_nanosecond_for_readers_that_round_and_that_cut_off(time_ns: int) -> None:
    spans = (Span(0, "compute", "decode", 0, 1), Span(1, "compute", "decode", time_ns + 1, 2 * time_ns + 2))
    *_, event = trace([Run("simulated", {}, {}, {"sync": spans}, {})])["traceEvents"]
    for us, expected in ((event["ts"], time_ns + 1), (event["dur"], time_ns + 1)):
        assert int(us * 1000) == round(us * 1000) == expected


def test_events_of_a_thread_lie_apart_or_inside_each_other(events: list[Event]) -> None:
    threads: defaultdict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            threads[event["pid"], event["tid"]].append(event)
    for on_thread in threads.values():
        work = sorted((e for e in on_thread if e["cat"] != "user_annotation"), key=lambda e: e["ts"])
        for before, after in pairwise(work):
            assert ns(before["ts"]) + ns(before["dur"]) <= ns(after["ts"])
        turns = sorted((e for e in on_thread if e["cat"] == "user_annotation"), key=lambda e: e["ts"])
        for before, after in pairwise(turns):
            assert ns(before["ts"]) + ns(before["dur"]) <= ns(after["ts"])
        for turn in turns:
            begin, end = ns(turn["ts"]), ns(turn["ts"]) + ns(turn["dur"])
            for event in work:
                assert (
                    end <= ns(event["ts"])
                    or ns(event["ts"]) + ns(event["dur"]) <= begin
                    or (begin <= ns(event["ts"]) and ns(event["ts"]) + ns(event["dur"]) <= end)
                )


def test_device_activity_has_the_correlation_of_the_call_that_launched_it(
    runs: tuple[Run, Run], events: list[Event]
) -> None:
    calls = {"compute": "launch", "copy_in": "copy_in", "copy_out": "copy_out"}
    lanes = {stream: lane for lane, stream in STREAMS.items()}
    linked = 0
    for index, spans in enumerate(groups(runs)):
        host = {e["args"]["correlation"]: e for e in of(events, 1000 + index) if "correlation" in e["args"]}
        launched = {(span.step, span.stage) for span in spans if span.lane == "host"}
        for event in of(events, index):
            call = host.get(event["args"]["correlation"])
            stage = calls[lanes[event["args"]["stream"]]]
            if (event["args"]["step"], stage) in launched:
                assert call is not None
                assert call["args"]["step"] == event["args"]["step"]
                assert call["args"]["stage"] == stage
                assert call["ts"] <= event["ts"]
                linked += 1
            else:
                assert call is None
    assert linked >= 4 * 3 * 5  # four windows, three lanes, the steps that lie whole in a window of six


def test_flows_lead_from_the_call_to_the_activity(events: list[Event]) -> None:
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert starts.keys() == ends.keys()
    work = {(e["pid"], e["tid"], e["ts"]): e for e in events if e["ph"] == "X" and e["cat"] != "user_annotation"}
    for number in starts:
        for flow in (starts[number], ends[number]):
            assert work[flow["pid"], flow["tid"], flow["ts"]]["args"]["correlation"] == number


def test_correlations_are_distinct_across_groups(events: list[Event]) -> None:
    host = [e["args"]["correlation"] for e in events if e.get("cat") == "cuda_runtime"]
    device = [e["args"]["correlation"] for e in events if e.get("cat") in ("kernel", "gpu_memcpy")]
    assert len(set(host)) == len(host)
    assert len(set(device)) == len(device)


def test_every_thread_and_process_is_named(runs: tuple[Run, Run], events: list[Event]) -> None:
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"} <= named
    names = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    for run in runs:
        for schedule in run.windows:
            assert f"{schedule} ({run.source}): host" in names
            assert f"{schedule} ({run.source}): device" in names


def test_launches_are_named_after_what_they_launch(runs: tuple[Run, Run]) -> None:
    graphs, _ = runs
    kernels = replace(graphs, scenario={**graphs.scenario, "cuda_graphs": False})
    assert launches(graphs) == {"cudaGraphLaunch"}
    assert launches(kernels) == {"cudaLaunchKernel"}
    spans = (Span(0, "host", "launch", 0, 5), Span(0, "compute", "prefill", 2, 9))
    assert launches(Run("simulated", {"cuda_graphs": True}, {}, {"sync": spans}, {})) == {"cudaLaunchKernel"}


def test_files_are_equal_for_equal_runs_and_compressed_on_request(runs: tuple[Run, Run], tmp_path: Path) -> None:
    plain, once, again = (tmp_path / name for name in ("a.json", "b.json.gz", "c.json.gz"))
    for path in (plain, once, again):
        write_trace(path, runs)
    assert once.read_bytes() == again.read_bytes()
    assert gzip.decompress(once.read_bytes()) == plain.read_bytes()
    assert json.loads(plain.read_bytes())["schemaVersion"] == 1
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.json", "b.json.gz", "c.json.gz"]


def test_a_run_without_windows_gives_an_empty_trace(runs: tuple[Run, Run]) -> None:
    assert trace([replace(runs[0], windows={})])["traceEvents"] == []


def ns(us: float) -> int:
    return round(us * 1000)


def of(events: list[Event], pid: int) -> list[Event]:
    return [e for e in events if e["ph"] == "X" and e["pid"] == pid and e["cat"] != "user_annotation"]


def launches(run: Run) -> set[str]:
    found = trace([run])["traceEvents"]
    return {e["name"] for e in found if e["ph"] == "X" and e["args"].get("stage") == "launch"}

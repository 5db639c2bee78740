"""Profiler traces are read as a naive reader would read them, whatever the window."""

from __future__ import annotations

import json
import tracemalloc
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from calibration import kineto
from calibration.kineto import CATEGORIES, DEVICE_KINDS, KINDS, MAX_EXTRA, read_trace
from tests.kineto_traces import START_NS, Event, Row, kernel, op, refusal, rows_of, saved

RELAXED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
EPOCH_NS = 1711111111111111111  # What torch wrote for a while: since 1970, more than a float64 holds.

# Against a naive reader.

NAMES = st.text(st.characters(exclude_characters="@", exclude_categories=["Cs"]), max_size=6) | st.sampled_from(
    ["aten::mm", "{lambda(int)#1}", '"},{"', "]}", "\\", 'a "b"\\', "}}", "[{", "é", "火", "😀", "inf", "\t\n"]
)
IDS = st.none() | st.integers(0, 1 << 40)
TIMES = st.integers(0, 10**9)


@st.composite
def events(draw: st.DrawFn) -> Event:
    """Of any phase and category; times are nanoseconds in marks, which `written` makes numbers of."""
    category = draw(st.sampled_from([*CATEGORIES, "gpu_user_annotation", "Trace", "ac2g"]))
    args = {
        key: value
        for key, value in {
            "External id": draw(IDS),
            "correlation": draw(IDS),
            "bytes": draw(IDS),
            "graph node id": draw(IDS),
            "device": draw(st.integers(0, 2)),
            "stream": draw(st.integers(-1, 2)),
            "Input Dims": draw(st.none() | st.just([[2, 3], [3, 4], []])),
            "Call stack": draw(NAMES),
            "est": {"nested": [draw(NAMES), 0.25, -1e-3, True, None]},
        }.items()
        if value is not None
    }
    event = {
        "ph": draw(st.sampled_from("XXXXXXsfiM")),
        "cat": category,
        "name": draw(NAMES),
        "pid": draw(st.sampled_from([1, 2, "1", "Spans"])),
        "tid": draw(st.sampled_from([0, 7, -1, "7", "x"])),
        "ts": f"@{draw(TIMES)}@",
        "dur": f"@{draw(st.integers(0, 10**7))}@",
        "args": args,
    }
    return {key: event[key] for key in draw(st.permutations(list(event)))}


def written(document: Any, origin_ns: int, indent: int | None, escaped: bool, quoted: bool = False) -> str:
    """JSON text; times are written from `origin_ns` on with three decimals, as torch writes them."""

    def timed(value: Any, key: str = "") -> Any:
        if isinstance(value, list):
            return [timed(item) for item in value]
        if isinstance(value, dict):
            return {name: timed(item, name) for name, item in value.items()}
        if isinstance(value, str) and value.startswith("@"):
            time_ns = int(value[1:-1]) + (origin_ns if key == "ts" else 0)
            return f"@{time_ns // 1000}.{time_ns % 1000:03d}@"
        return value

    text = json.dumps(timed(document), indent=indent, ensure_ascii=escaped)
    return text.replace("@", "") if quoted else text.replace('"@', "").replace('@"', "")


def naive(text: str) -> list[Row]:
    """The rows of a trace, by what `json` makes of all of it."""
    document = json.loads(text, parse_float=Decimal)
    rows = []
    for event in document["traceEvents"] if isinstance(document, dict) else document:
        kind = CATEGORIES.get(event["cat"])
        if event["ph"] != "X" or kind is None:
            continue
        args = event["args"]
        start_ns = int(Decimal(event["ts"]) * 1000)
        on_device = kind in DEVICE_KINDS
        row = Row(
            KINDS[kind],
            event["name"],
            start_ns,
            start_ns + int(Decimal(event["dur"]) * 1000),
            (args["device"], args["stream"]) if on_device else (str(event["pid"]), str(event["tid"])),
            args.get("correlation", -1),
            args.get("External id", -1),
            args.get("bytes", 0) if on_device else 0,
            args.get("graph node id", -1) if on_device else -1,
        )
        rows.append(row)
    first = min((row.start_ns for row in rows), default=0)
    rows = [row._replace(start_ns=row.start_ns - first, end_ns=row.end_ns - first) for row in rows]
    return sorted(rows, key=lambda row: (row.start_ns, -row.end_ns))


EXTRAS = {
    "schemaVersion": 1,
    "deviceProperties": [{"id": 1, "name": "B"}, {"id": 0, "name": "A"}],
    "text": 'traceEvents": [{"ph": "X"}]',
    "ratio": -1.5e3,
    "nothing": None,
    "traceName": "火}",
}


@settings(RELAXED, max_examples=300)
@given(
    st.lists(events(), max_size=12),
    st.permutations([*EXTRAS, "traceEvents"]),
    st.sampled_from([None, 0, 2]),
    st.sampled_from([START_NS, EPOCH_NS, 0]),
    st.integers(1, 40) | st.integers(100, 3000),
    *[st.booleans()] * 4,
)
def test_equals_a_naive_reader(
    tmp_path: Path,
    traced: list[Event],
    keys: list[str],
    indent: int | None,
    origin_ns: int,
    chunk: int,
    bare: bool,
    escaped: bool,
    quoted: bool,
    zipped: bool,
) -> None:
    document = {key: traced if key == "traceEvents" else EXTRAS[key] for key in keys}
    text = written(traced if bare else document, origin_ns, indent, escaped, quoted)
    path = saved(tmp_path, text, zipped=zipped)
    expected = naive(text)
    if not expected:
        assert "no events" in refusal(path) or "events, none of them" in refusal(path)
        return
    trace = read_trace(path, chunk=chunk)
    assert rows_of(trace) == expected
    assert trace.extra == ({} if bare else EXTRAS)
    assert trace.device_names == (() if bare else ("A", "B"))
    assert trace.source == str(path)
    ops = [event for event in traced if event["ph"] == "X" and CATEGORIES.get(event["cat"]) == KINDS.index("op")]
    products = [event for event in ops if event["name"] == "aten::mm"]
    shaped = {event["args"].get("External id") for event in products if "Input Dims" in event["args"]} - {None}
    assert trace.dims == dict.fromkeys(shaped, "[[2, 3], [3, 4], []]")


@RELAXED
@given(st.integers(0, 1 << 43), st.integers(0, 999), st.integers(0, 10**10))
@example(4398046511104, 1, 1)
@example((1 << 43) - 1, 999, 1)
@example((1 << 43) + 1, 1, 1)
def test_no_nanosecond_is_lost(tmp_path: Path, us: int, ns: int, later_ns: int) -> None:
    start = us * 1000 + ns
    text = written([op(ts="@0@", dur="@1@"), op(ts=f"@{later_ns}@", dur="@7@")], start, None, False)
    trace = read_trace(saved(tmp_path, text))
    assert (trace.start_ns[-1], sorted(trace.end_ns - trace.start_ns)) == (later_ns, [1, 7])


def test_events_that_start_together_come_longest_first_then_as_in_the_file(tmp_path: Path) -> None:
    traced = [op("later", 11), op("c", 10, 1), op("a", 10, 3), op("b", 10, 3)]
    assert [row.name for row in rows_of(read_trace(saved(tmp_path, traced)))] == ["a", "b", "c", "later"]


def test_pairs_of_a_thread_are_complete_events(tmp_path: Path) -> None:
    """B and E nest; what began before or ends after the recording has no duration and is left out."""

    def mark(phase: str, ts: float, name: str = "", category: str = "user_annotation", tid: int = 2) -> Event:
        return {"ph": phase, "cat": category, "name": name, "pid": 1, "tid": tid, "ts": ts}

    pairs = [
        mark("E", 1), mark("B", 2, "outer"), mark("B", 3, "inner", "cpu_op"), mark("B", 3, "other", tid=3),
        mark("B", 4, "dropped", "unknown"), mark("E", 5), mark("E", 6), mark("E", 7.5, tid=3), mark("E", 9),
        mark("B", 10, "open"),
    ]  # fmt: skip
    lane, other = ("1", "2"), ("1", "3")
    assert rows_of(read_trace(saved(tmp_path, pairs))) == [
        Row("annotation", "outer", 0, 7000, lane),
        Row("annotation", "other", 1000, 5500, other),
        Row("op", "inner", 1000, 4000, lane),
    ]


def test_early_torch(tmp_path: Path) -> None:
    """Categories with capitals, ids in lower case, no decimals, and a rate that C printed."""
    text = r"""[
        {"ph": "X", "cat": "Memcpy", "name": "inf -inf \" nan", "pid": 0, "tid": "stream 7", "ts": 1614800519473220,
         "dur": 0, "args": {"device": 0, "stream": 7, "correlation": 20002, "external id": 3981, "bytes": 200,
         "memory bandwidth (GB/s)": inf, "a": -inf, "b": nan, "c": [-nan]}},
        {"ph": "X", "cat": "Runtime", "name": "\\", "pid": 5, "tid": 6, "ts": 1614800519473218, "dur": 1}
    ]"""
    copy = Row("memcpy", 'inf -inf " nan', 2000, 2000, (0, 7), 20002, 3981, 200)
    expected = [Row("runtime", "\\", 0, 1000, ("5", "6")), copy]
    for chunk in (1, 2, 3, 7, 50, 10**6):
        assert rows_of(read_trace(saved(tmp_path, text), chunk=chunk)) == expected


def test_numbers_in_other_guises(tmp_path: Path) -> None:
    """Integers, in quotation marks, with a point; ids that are null or negative are none."""
    traced = [
        kernel(ts="20.001", dur="3", **{"correlation": "12", "bytes": None, "External id": 5.0}),
        kernel(ts=30, dur=0, **{"correlation": -4, "device": "1", "stream": 8.0, "graph node id": "3"}),
        {"ph": "X", "cat": "gpu_memset", "name": "Memset", "pid": 2, "tid": 9, "ts": 40, "dur": 1, "args": None},
    ]
    assert rows_of(read_trace(saved(tmp_path, traced))) == [
        Row("kernel", "gemm", 0, 3000, (0, 7), 12, 5),
        Row("kernel", "gemm", 9999, 9999, (1, 8), graph_node=3),
        Row("memset", "Memset", 19999, 20999, (2, 9)),
    ]


def test_shapes_of_other_operators_and_of_lists_of_tensors_are_not_kept(tmp_path: Path) -> None:
    shapes: list[tuple[str, Any]] = [
        ("aten::add", [[1]]), ("aten::mm", [[[1]]]), ("aten::mm", "[]"), ("aten::mm", [[True]]),
        ("aten::linear", [[8, 4096], [1024, 4096], []]),
    ]  # fmt: skip
    traced = [op(name, **{"External id": i, "Input Dims": dims}) for i, (name, dims) in enumerate(shapes)]
    trace = read_trace(saved(tmp_path, traced))
    assert {key: json.loads(text) for key, text in trace.dims.items()} == {4: [[8, 4096], [1024, 4096], []]}


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_what_torch_writes(tmp_path: Path, name: str) -> None:
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    left, right = torch.ones(2, 3), torch.ones(3, 4)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        for _ in range(3):
            with record_function("step {1}"):
                torch.mm(left, right)
    path = tmp_path / name
    recorded.export_chrome_trace(str(path))
    trace = read_trace(path)
    rows = rows_of(trace)
    steps = [row for row in rows if row.name == "step {1}"]
    products = [row for row in rows if row.name == "aten::mm"]
    assert [row.kind for row in steps + products] == ["annotation"] * 3 + ["op"] * 3
    for step, product in zip(steps, products, strict=True):
        assert step.start_ns <= product.start_ns <= product.end_ns <= step.end_ns
        assert step.lane == product.lane
        assert trace.dims[product.external] == "[[2, 3], [3, 4]]"
    timed = [event.time_range.elapsed_us() for event in recorded.events() or [] if event.name == "aten::mm"]
    assert [row.end_ns - row.start_ns for row in products] == pytest.approx([1000 * us for us in timed], abs=2)


def test_progress_counts_the_bytes_of_the_file(tmp_path: Path) -> None:
    for zipped in (False, True):
        counts: list[int] = []
        totals: set[int] = set()

        def progress(done: int, total: int, counts: list[int] = counts, totals: set[int] = totals) -> None:
            counts.append(done)
            totals.add(total)

        path = saved(tmp_path, [op(str(i)) for i in range(2000)], zipped=zipped)
        read_trace(path, progress, chunk=10_000)
        assert totals == {path.stat().st_size}
        assert len(counts) > 10 and counts == sorted(counts) and counts[-1] == path.stat().st_size


# What is passed over.


def test_large_values_are_passed_over_and_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kineto, "MAX_EXTRA", 1 << 12)
    frames = {str(i): {"name": f"f{i} }}]", "parent": [i, None, {"x": 1.5}]} for i in range(8_000)}
    lists = [[i, "]"] * 5 for i in range(8_000)]
    document = {"stackFrames": frames, "a": 1, "traceEvents": [kernel()], "lists": [lists, lists], "z": [2]}
    path = saved(tmp_path, document)
    del frames, lists, document
    size = path.stat().st_size
    tracemalloc.start()
    try:
        trace = read_trace(path, chunk=1 << 12)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert trace.extra == {"a": 1, "z": [2]}
    assert rows_of(trace) == [Row("kernel", "gemm", 0, 4000, (0, 7))]
    assert size > 10**6 and peak < size / 4


def test_a_value_is_kept_up_to_a_length_whatever_the_window(tmp_path: Path) -> None:
    fits, large = ["x" * (MAX_EXTRA - 4)], ["x" * (MAX_EXTRA - 3)]
    path = saved(tmp_path, {"fits": fits, "large": large, "traceEvents": [op()], "more": 12.5})
    for chunk in (1 << 12, 1 << 18, (1 << 18) + 3, 1 << 22):
        assert read_trace(path, chunk=chunk).extra == {"fits": fits, "more": 12.5}


def test_what_no_file_can_hold_is_replaced(tmp_path: Path) -> None:
    """Halves of surrogate pairs, NaN and infinity, which JSON text can spell, would stop whoever writes them again."""
    extra = '"\\ud800": [NaN, -Infinity, 1e999, "\\udc00"], "deviceProperties": [{"name": "\\ud800"}]'
    half = json.dumps(op("\ud83d"))
    trace = read_trace(saved(tmp_path, f'{{{extra}, "traceEvents": [{half}]}}'))
    assert trace.extra == {"?": [None, None, None, "?"], "deviceProperties": [{"name": "?"}]}
    assert (trace.names, trace.device_names) == (("?",), ("?",))

"""What is no profiler trace, or a broken one, is refused with a sentence; no bytes do anything else."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchsim.errors import InputError
from calibration import json_stream, kineto_events
from calibration.kineto import MAX_EXTRA, read_trace
from tests.kineto_traces import START_NS, kernel, op, refusal, rows_of, saved

MANY = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=400)

TRUNCATED = json.dumps(
    {"a": [1.5, "é\\"], "traceEvents": [op('{"\n'), kernel(x=[True, None, -1e-3])], "z": "火"}, indent=1
)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("escaped", [False, True])
def test_a_trace_that_ends_early_is_told_as_such_at_every_byte(tmp_path: Path, zipped: bool, escaped: bool) -> None:
    text = TRUNCATED if escaped else json.dumps(json.loads(TRUNCATED), ensure_ascii=False)
    data = gzip.compress(text.encode(), mtime=0) if zipped else text.encode()
    assert len(read_trace(saved(tmp_path, data))) == 2
    assert "found an empty file" in refusal(saved(tmp_path, b""))
    for length in range(2 if zipped else 1, len(data)):
        told = refusal(saved(tmp_path, data[:length]))
        assert "ends in the middle" in told and "wanted a whole trace" in told, data[:length]


TRACE = "a Chrome trace that torch.profiler's export_chrome_trace wrote, plain or gzipped"
REFUSED: dict[str, tuple[str | bytes | list[Any] | dict[str, Any], str]] = {
    "blank": (" \n", "an empty file"),
    "text": ("hello", "'hello' at character 1, which is no JSON"),
    "binary": (b"\x7fELF\x02\x01", "'\\x7fELF\\x02\\x01' at character 1, which is no JSON"),
    "binary bytes": (b"[\n\x80\x81", "byte 0x80 at byte 3, which is not UTF-8"),
    "UTF-16": ("[]".encode("utf-16"), "byte 0xff at byte 1, which is not UTF-8"),
    "after a mark": (b"\xef\xbb\xbf[\xff", "byte 0xff at byte 5, which is not UTF-8"),
    "zip": (b"PK\x03\x04abcdef", f"found a zip archive, wanted {TRACE}"),
    "zstd": (b"\x28\xb5\x2f\xfd0123", f"found a zstd file, wanted {TRACE}"),
    "number": ("12", f"found 12, wanted {TRACE}"),
    "string": ('"x"', "found the string 'x'"),
    "null": ("null", "found null"),
    "no trace": ({"steps": 3, "b": 1}, "a JSON object with the keys 'steps', 'b', no traceEvents"),
    "no keys": ({}, "a JSON object with no traceEvents"),
    "no list": ({"traceEvents": {"ph": "X"}}, "traceEvents: found a mapping, wanted a list of events"),
    "null list": ({"traceEvents": None}, "traceEvents: found null, wanted a list of events"),
    "twice": ('{"traceEvents": [], "traceEvents": []}', "traceEvents: found the key twice, wanted one list of events"),
    "none": ({"traceEvents": []}, "traceEvents: found no events, wanted those of a profiler: record with profile("),
    "bare none": ([], "found no events"),
    "none known": (
        {"traceEvents": [op() | {"cat": "Trace"}, op() | {"ph": "i"}]},
        "traceEvents: found 2 events, none of them an operator, launch or kernel",
    ),
    "no event": ({"traceEvents": [op(), 3]}, "traceEvents[1]: found 3, wanted an event, which is an object"),
    "bare no event": ([op(), op(), [1]], "[2]: found a list, wanted an event"),
    "trailing comma": (f"[{json.dumps(op())}, ]", "]' at character"),
    "no comma": (f"[{json.dumps(op())} {json.dumps(op())}]", "which is no JSON"),
    "no key": ('{"a": 1, 2: 3}', "'2: 3}' at character 10, which is no JSON"),
    "no colon": ('{"a" 1}', "'1}' at character 6, which is no JSON"),
    "two traces": (f"[{json.dumps(op())}]\n[1]", "'[1]' after the end of the trace, at character"),
    "control": ('[{"a": "b\nc"}]', "found '\\nc\"}]' at character 10, which is no JSON"),
    "decimal comma": (
        '[{"args": {"blocks per SM": 0,015152, "x": 1}}]',
        "a decimal comma before character 31, wanted points: record in a process whose locale (LC_NUMERIC) is C",
    ),
    "digits": (f"[{'1' * 5000}]", "a number of thousands of digits after character 2"),
    "no category": ([{"ph": "X", "name": "a"}], "[0].cat: found nothing, wanted a category"),
    "category": ([op() | {"cat": ["kernel"]}], "[0].cat: found a list, wanted a category"),
    "no time": ({"traceEvents": [op(), op(ts=None)]}, "traceEvents[1].ts: found nothing, wanted microseconds from -"),
    "time": ([op(ts="soon")], "[0].ts: found the string 'soon', wanted microseconds"),
    "true": ([op(ts=True)], "[0].ts: found true, wanted microseconds"),
    "NaN": ([op(ts=math.nan)], "[0].ts: found nan, wanted microseconds"),
    "late": ([op(ts=1e16)], "[0].ts: found 1e+16, wanted microseconds"),
    "huge": ([op(ts=10**400)], "[0].ts: found 1000"),
    "infinite": ([op(dur=math.inf)], "[0].dur: found inf, wanted microseconds from 0 to 4.6e+15"),
    "negative": ([op(), op(dur=-0.5)], "[1].dur: found -0.5, wanted microseconds from 0"),
    "no duration": ([{**op(), "dur": None}], "[0].dur: found nothing"),
    "days": (
        [op(ts=1e12 + i) for i in range(3)] + [op(ts=1.0)],
        "[3].ts: found a beginning 11.6 days from most others, wanted a recording of at most a day",
    ),
    "long": ([op(), op(dur=1e12)], "[1].dur: found an end 11.6 days from most others"),
    "name": ([op() | {"name": 7}], "[0].name: found 7, wanted a string"),
    "args": ([op() | {"args": [1]}], "[0].args: found a list, wanted an object"),
    "process": ([op() | {"pid": [1]}], "[0].pid: found a list, wanted a number or a string"),
    "thread": ([op() | {"tid": 1.5}], "[0].tid: found 1.5, wanted a number or a string"),
    "stream": ([kernel(stream="x")], "[0].args.stream: found the string 'x', wanted an integer of 64 bits"),
    "no stream": (
        [{"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "ts": 1, "dur": 1}],
        "[0].args.stream: found nothing, wanted an integer of 64 bits",
    ),
    "correlation": ([kernel(correlation=1 << 63)], "[0].args.correlation: found 9223372036854775808, wanted"),
    "external": ([op(**{"External id": "a"})], "[0].args.External id: found the string 'a', wanted an integer"),
    "bytes": ([kernel(bytes=1.5)], "[0].args.bytes: found 1.5, wanted an integer of 64 bits"),
    "backwards": (
        [op(ts=20) | {"ph": "B"}, op(ts=19.5) | {"ph": "E"}],
        "[1].ts: found an end 500 ns before its beginning, [0], wanted one after",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("zipped", [False, True])
def test_refused_with_a_sentence(tmp_path: Path, case: str, zipped: bool) -> None:
    data, sentence = REFUSED[case]
    if zipped and case in ("zip", "zstd"):
        return
    told = refusal(saved(tmp_path, data, zipped=zipped))
    assert sentence in told and ", wanted " in told and "\n" not in told


@pytest.mark.parametrize("place", ["%s", '{"a": %s, "traceEvents": []}', "[%s]", '[{"ph": "X", "args": %s}]'])
@pytest.mark.parametrize("whole", [False, True])
def test_deep_nesting_is_refused(tmp_path: Path, place: str, whole: bool) -> None:
    depth = 200_000
    text = place.replace("%s", "[" * depth + "]" * depth) if whole else place[: place.index("%")] + "[" * depth
    for chunk in (1000, 1 << 19):
        with pytest.raises(InputError, match="brackets nested too deeply"):
            read_trace(saved(tmp_path, text), chunk=chunk)


@pytest.mark.parametrize("depth", [100, 900, 970, 1000, 5000, 20_000])
def test_nesting_stops_nothing(tmp_path: Path, depth: int) -> None:
    """How deep the scanner goes is Python's affair; whatever it gives must do no harm later."""
    deep = "[" * depth + "]" * depth
    shapes = op("aten::mm", **{"External id": 1, "Input Dims": "deep"})
    text = json.dumps({"a": "deep", "deviceProperties": "deep", "traceEvents": [op(), shapes, kernel(x="deep")]})
    assert trace_or_refused(saved(tmp_path, text.replace('"deep"', deep)), 1 << 12) or depth > 800
    trace_or_refused(saved(tmp_path, json.dumps([op("deep")]).replace('"deep"', deep)), 1 << 12)


def test_deep_nesting_of_large_values_is_refused(tmp_path: Path) -> None:
    text = '{"a": ' + f'["{"x" * MAX_EXTRA}", ' * (json_stream.MAX_DEPTH + 1)
    assert "brackets nested too deeply" in refusal(saved(tmp_path, text))


def test_an_event_too_large_to_be_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, [op("x" * 5000)])
    assert len(read_trace(path, chunk=100)) == 1
    monkeypatch.setattr(json_stream.JsonStream.value, "__defaults__", (1000,))
    for data in ([op("x" * 5000)], [op(x=[1] * 5000)], {"x" * 5000: 1}):
        path = saved(tmp_path, data)
        with pytest.raises(InputError, match="a value of more than 1,000 characters at character 2"):
            read_trace(path, chunk=100)


def test_pairs_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kineto_events, "MAX_OPEN", 10)
    pair = [op() | {"ph": "B"}, op() | {"ph": "E"}]
    assert len(read_trace(saved(tmp_path, pair * 20))) == 20
    assert "[10].ph: found 11 events begun and not ended" in refusal(saved(tmp_path, pair[:1] * 20))


def test_damaged_gzip(tmp_path: Path) -> None:
    data = gzip.compress(json.dumps([op()]).encode())
    for damaged in (
        data[:-8] + b"\0" * 8,
        data[:20] + b"\xff\xff" + data[22:],
        data + b"more",
        b"\x1f\x8b" + b"\0" * 20,
    ):
        told = refusal(saved(tmp_path, damaged))
        assert "found a damaged gzip file, wanted a whole trace" in told or "ends in the middle" in told
    assert len(read_trace(saved(tmp_path, data + b"\0" * 100))) == 1


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "found a directory, wanted one of the traces in it" in refusal(tmp_path)
    assert "found no readable file (No such file or directory)" in refusal(tmp_path / "none.json")
    assert "found an impossible path" in refusal(Path("a\0b"))
    assert "found no readable file" in refusal(tmp_path / ("a" * 5000))


def test_errors_of_the_progress_are_its_own(tmp_path: Path) -> None:
    def broken(done: int, total: int) -> None:
        raise ValueError("not the file's fault")

    with pytest.raises(ValueError, match="not the file's fault"):
        read_trace(saved(tmp_path, [op()]), broken)


# Anything else is a trace or refused.

SMALL = json.dumps(
    {
        "deviceProperties": [{"id": 0, "name": "H"}],
        "traceEvents": [
            op("aten::mm", START_NS / 1000, **{"External id": 1, "Input Dims": [[1]]}),
            op(ts=f"{START_NS // 1000}.5") | {"ph": "B"},
            op(ts=START_NS // 1000 + 7) | {"ph": "E"},
            kernel('{"', START_NS / 1000 + 1.5, correlation=2, bytes=3, rate=math.inf),
        ],
        "z": ["é", "\ud83d\ude00"],
    },
    separators=(",", ":"),
)


def trace_or_refused(path: Path, chunk: int) -> bool:
    """Whether the file was read."""
    try:
        trace = read_trace(path, chunk=chunk)
    except InputError as error:
        told = str(error)
    else:
        rows_of(trace)
        return True
    assert told.startswith(f"{path}: ") and "\n" not in told
    return not told.encode()


@MANY
@given(
    st.lists(st.tuples(st.integers(0, len(SMALL)), st.integers(0, 3), st.binary(max_size=3)), min_size=1, max_size=4),
    st.integers(1, 300),
    st.booleans(),
)
def test_mutated_bytes(tmp_path: Path, edits: list[tuple[int, int, bytes]], chunk: int, zipped: bool) -> None:
    data = gzip.compress(SMALL.encode(), mtime=0) if zipped else SMALL.encode()
    for at, gone, new in edits:
        data = data[:at] + new + data[at + gone :]
    trace_or_refused(saved(tmp_path, data), chunk)


TOKENS = [
    '"',
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\\",
    "\\u",
    "e",
    "-",
    ".",
    "1" * 30,
    "inf",
    "NaN",
    "\0",
    " ",
    "é",
    "null",
    '"ts":',
]


@MANY
@given(
    st.lists(
        st.tuples(st.integers(0, len(SMALL)), st.integers(0, 20), st.sampled_from(TOKENS)), min_size=1, max_size=4
    ),
    st.integers(1, 300),
)
def test_mutated_text(tmp_path: Path, edits: list[tuple[int, int, str]], chunk: int) -> None:
    text = SMALL
    for at, gone, new in edits:
        text = text[:at] + new + text[at + gone :]
    path = saved(tmp_path, text)
    if trace_or_refused(path, chunk) and "inf" not in text:
        json.loads(text)  # What is read is JSON, but for numbers of C.


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


PLACES = [place for place in places(json.loads(SMALL)) if place]
STRANGE = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just({}) | st.just([])
    | st.sampled_from([10**19, -(10**30), 10**400, 1e300, "1e5", "9" * 25, "\ud800", "X", "B", "E", "kernel", [[[]]]])
)  # fmt: skip


@MANY
@given(st.lists(st.tuples(st.sampled_from(PLACES), STRANGE), min_size=1, max_size=3), st.integers(1, 300))
def test_mutated_values(tmp_path: Path, edits: list[tuple[tuple[Any, ...], Any]], chunk: int) -> None:
    document = json.loads(SMALL)
    for (*path, last), value in edits:
        at = document
        try:
            for key in path:
                at = at[key]
            at[last] = deepcopy(value)  # One value may go to places within itself.
        except (TypeError, KeyError, IndexError):
            continue
    trace_or_refused(saved(tmp_path, document), chunk)


def test_mutations_are_of_what_is_read(tmp_path: Path) -> None:
    trace = read_trace(saved(tmp_path, SMALL))
    assert [row.name for row in rows_of(trace)] == ["aten::add", "aten::mm", '{"']
    assert trace.dims == {1: "[[1]]"}

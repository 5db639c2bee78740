"""A trace is read to the integer, whatever its format, or refused by line and column."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchsim.errors import InputError
from batchsim.traces import MAX_LINE_BYTES, MAX_PROBLEMS, Trace, read_trace
from batchsim.workload import requests_of
from batchsim.workload_scenario import TraceFormat, TraceWorkload

Row = tuple[int, int, int, list[int]]  # Arrival in nanoseconds, prompt and output tokens, hash ids.

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURSTGPT = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
BURSTGPT_OLD = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
SPLITWISE = "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size\n"


def mooncake(time_ms: object, prompt: object, output: object, ids: object) -> str:
    return json.dumps({"timestamp": time_ms, "input_length": prompt, "output_length": output, "hash_ids": ids}) + "\n"


def seconds(time_ns: int) -> str:
    return f"{time_ns // 10**9}.{time_ns % 10**9:09d}"


def date_time(time_ns: int) -> str:
    whole = datetime(2023, 11, 16, 18, 17, 3, tzinfo=UTC) + timedelta(seconds=time_ns // 10**9)
    return f"{whole:%Y-%m-%d %H:%M:%S}.{time_ns % 10**9 // 100:07d}"


# How each format writes a request, and the nanoseconds that it counts in.
WRITERS: dict[TraceFormat, tuple[str, Callable[[int, Row], str], int]] = {
    "azure": (AZURE, lambda _, row: f"{date_time(row[0])},{row[1]},{row[2]}\n", 100),
    "burstgpt": (
        BURSTGPT,
        lambda i, row: f"{seconds(row[0])},{i},3,GPT-4,{row[1]},{row[2]},{row[1] + row[2]},API log\n",
        1,
    ),
    "mooncake": ("", lambda _, row: mooncake(row[0] // 10**6, *row[1:]), 10**6),
    "vidur": (VIDUR, lambda _, row: f"{seconds(row[0])},{row[1]},{row[2]}\n", 1),
    "splitwise": (SPLITWISE, lambda i, row: f"{i},2,0,{seconds(row[0])},1,{row[1]},{row[2]}\n", 1),
}
FORMATS = list(WRITERS)


def written(trace_format: TraceFormat, rows: list[Row]) -> str:
    header, write, _ = WRITERS[trace_format]
    return header + "".join(write(i, row) for i, row in enumerate(rows))


def saved(folder: Path, text: str | bytes) -> Path:
    path = folder / "trace"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def rows_of(trace: Trace) -> list[Row]:
    ids: list[list[int]] = [[] for _ in trace.arrival_ns]
    if trace.hash_tokens:
        assert len(trace.hash_starts) == len(trace.arrival_ns) + 1
        ids = [part.tolist() for part in np.split(trace.hash_ids, trace.hash_starts[1:-1])]
    else:
        assert not len(trace.hash_starts) and not len(trace.hash_ids)
    columns = (trace.arrival_ns, trace.prompt_tokens, trace.output_tokens)
    assert all(column.dtype == np.int64 for column in columns)
    return list(zip(*(column.tolist() for column in columns), ids, strict=True))


def in_order(rows: list[Row]) -> list[Row]:
    first = min(row[0] for row in rows)
    return [(row[0] - first, *row[1:]) for row in sorted(rows, key=lambda row: row[0])]


def refusal(path: Path, **options: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        read_trace(path, **options)
    return caught.value


# What is read.


def test_azure_2023(tmp_path: Path) -> None:
    text = AZURE + "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n"
    assert rows_of(read_trace(saved(tmp_path, text))) == [(0, 4808, 10, []), (52_000_000, 3180, 8, [])]


def test_azure_2024(tmp_path: Path) -> None:
    text = (
        AZURE
        + "2024-05-10 00:00:00.009930+00:00,2162,5\n"
        + "2024-05-10 00:00:01+00:00,2399,6\n"
        + "2024-05-10 02:00:01.5+02:00,7,8\n"
    )
    assert rows_of(read_trace(saved(tmp_path, text))) == [
        (0, 2162, 5, []),
        (990_070_000, 2399, 6, []),
        (1_490_070_000, 7, 8, []),
    ]


@pytest.mark.parametrize("session", [True, False])
def test_burstgpt(tmp_path: Path, session: bool) -> None:
    between = ",,12.5" if session else ""
    text = BURSTGPT if session else BURSTGPT_OLD
    text += f"5{between},ChatGPT,472,18,490,Conversation log\n45.0{between},GPT-4,1087,230,1317,API log\n"
    assert rows_of(read_trace(saved(tmp_path, text))) == [(0, 472, 18, []), (40 * 10**9, 1087, 230, [])]


def test_mooncake(tmp_path: Path) -> None:
    text = mooncake(27482, 1000, 52, [46, 47]) + mooncake(30535, 6472, 26, [46, 2353]) + mooncake(30535.5, 9, 1, [])
    trace = read_trace(saved(tmp_path, text))
    assert trace.hash_tokens == 512
    assert rows_of(trace) == [(0, 1000, 52, [46, 47]), (3_053_000_000, 6472, 26, [46, 2353]), (3_053_500_000, 9, 1, [])]


def test_vidur_in_other_order_and_with_other_columns(tmp_path: Path) -> None:
    text = (
        'num_decode_tokens,"id, quoted",num_prefill_tokens,arrived_at\n3,"a, b",40,1e-1\n4,c,50,0.30000000000000004\n'
    )
    assert rows_of(read_trace(saved(tmp_path, text))) == [(0, 40, 3, []), (200_000_000, 50, 4, [])]


def test_splitwise(tmp_path: Path) -> None:
    text = SPLITWISE + "0,2,0,0.25,1,100,20\n1,2,0,1.75,1,200,30\n"
    assert rows_of(read_trace(saved(tmp_path, text))) == [(0, 100, 20, []), (1_500_000_000, 200, 30, [])]


ROWS: list[Row] = [
    (7 * 10**9, 600, 3, [5, 9]),
    (8 * 10**9, 40, 1, [5]),
    (11 * 10**9, 1, 10, []),
    (12 * 10**9, 8, 9, []),
]


def plain(trace_format: TraceFormat, rows: list[Row]) -> list[Row]:
    """Without what the format does not keep."""
    return rows if trace_format == "mooncake" else [(*row[:3], []) for row in rows]


@pytest.mark.parametrize("trace_format", FORMATS)
@pytest.mark.parametrize(
    "encoded",
    [
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: (text + "\n  \n\n").encode(),
        lambda text: text.rstrip("\n").encode(),
        lambda text: gzip.compress(text.encode()),
    ],
    ids=["bom", "crlf", "blank lines at the end", "no end of line", "gzip"],
)
def test_ways_of_writing_a_file(tmp_path: Path, trace_format: TraceFormat, encoded: Callable[[str], bytes]) -> None:
    path = saved(tmp_path, encoded(written(trace_format, ROWS)))
    assert rows_of(read_trace(path)) == plain(trace_format, in_order(ROWS))


TIMES_100NS = st.integers(0, 10**11)
REQUESTS = st.lists(
    st.tuples(
        TIMES_100NS,
        st.integers(1, 10_000_000),
        st.integers(1, 10_000_000),
        st.lists(st.integers(0, 2**63 - 1), max_size=4),
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("trace_format", FORMATS)
@pytest.mark.parametrize("named", [True, False])
@given(requests=REQUESTS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read(tmp_path: Path, trace_format: TraceFormat, named: bool, requests: list[Row]) -> None:
    unit = WRITERS[trace_format][2]
    rows = [(time * 100 // unit * unit, p, o, ids[: -(-p // 512)]) for time, p, o, ids in requests]
    path = saved(tmp_path, written(trace_format, rows))
    trace = read_trace(path, trace_format if named else "auto")
    assert rows_of(trace) == plain(trace_format, in_order(rows))
    assert trace.dropped == 0


@pytest.mark.parametrize("trace_format", FORMATS)
def test_start_and_limit_count_lines_of_the_file(tmp_path: Path, trace_format: TraceFormat) -> None:
    rows = [ROWS[2], ROWS[0], ROWS[3], ROWS[1]]
    path = saved(tmp_path, written(trace_format, rows))
    for start in range(4):
        for limit in (1, 2, 3, 9, None):
            kept = rows[start:][:limit]
            assert rows_of(read_trace(path, start=start, limit=limit)) == plain(trace_format, in_order(kept))


def test_lines_beyond_the_limit_are_not_looked_at(tmp_path: Path) -> None:
    path = saved(tmp_path, VIDUR + "0,1,1\nnonsense\n1,2,3\n4,5,6\nnonsense\n")
    assert rows_of(read_trace(path, start=2, limit=2)) == [(0, 2, 3, []), (3 * 10**9, 5, 6, [])]


def test_requests_at_one_time_keep_their_order(tmp_path: Path) -> None:
    path = saved(tmp_path, VIDUR + "1,10,1\n0,20,1\n1,30,1\n0,40,1\n")
    assert read_trace(path).prompt_tokens.tolist() == [20, 40, 10, 30]


@pytest.mark.parametrize("trace_format", FORMATS)
def test_requests_without_tokens_are_dropped_on_demand_and_counted(tmp_path: Path, trace_format: TraceFormat) -> None:
    rows = [(5 * 10**9, 0, 4, []), *ROWS, (20 * 10**9, 0, 0, []), (21 * 10**9, 9, 0, [])]
    path = saved(tmp_path, written(trace_format, rows))
    trace = read_trace(path, no_output="drop")
    assert rows_of(trace) == plain(trace_format, in_order(ROWS))
    assert trace.dropped == 3
    problems = refusal(path).problems
    first = 1 if trace_format == "mooncake" else 2
    assert [problem.line for problem in problems] == [first, first + 5, first + 6]
    assert {problem.found for problem in problems} == {"0"}
    assert "no_output: drop" in problems[0].wanted
    assert problems[0].key == problems[1].key != problems[2].key


# What is refused.


@pytest.mark.parametrize(
    ("text", "key", "line", "found"),
    [
        (AZURE + "2023-11-16 18:17:03,1,1\n2023-11-16 18:17:03.9799600,4808\n", "", 3, "2 fields"),
        (AZURE + "2023-11-16 18:17:03,1,1,1\n", "", 2, "4 fields"),
        (AZURE + "\n2023-11-16 18:17:03,1,1\n", "", 2, "an empty line"),
        (AZURE + "2023-11-16,1,1\n", "TIMESTAMP", 2, "'2023-11-16'"),
        (AZURE + "2023-13-16 18:17:03,1,1\n", "TIMESTAMP", 2, "2023-13-16"),
        (AZURE + "2023-11-16 18:17:60,1,1\n", "TIMESTAMP", 2, "18:17:60"),
        (AZURE + "2023-11-16 18:17:03.,1,1\n", "TIMESTAMP", 2, "18:17:03."),
        (AZURE + "2023-11-16 18:17:03+99:00,1,1\n", "TIMESTAMP", 2, "+99:00"),
        (AZURE + "1969-12-31 23:59:59,1,1\n", "TIMESTAMP", 2, "1969"),
        (AZURE + "9999-12-31 23:59:59,1,1\n", "TIMESTAMP", 2, "9999"),
        (AZURE + "1700158623,1,1\n", "TIMESTAMP", 2, "1700158623"),
        (AZURE + ",1,1\n", "TIMESTAMP", 2, "''"),
        (AZURE + "2023-11-16 18:17:03,-1,1\n", "ContextTokens", 2, "'-1'"),
        (AZURE + "2023-11-16 18:17:03,1.5,1\n", "ContextTokens", 2, "'1.5'"),
        (AZURE + "2023-11-16 18:17:03,1_0,1\n", "ContextTokens", 2, "'1_0'"),
        (AZURE + "2023-11-16 18:17:03,\u0663,1\n", "ContextTokens", 2, "'\u0663'"),
        (AZURE + "2023-11-16 18:17:03,nan,1\n", "ContextTokens", 2, "'nan'"),
        (AZURE + "2023-11-16 18:17:03,,1\n", "ContextTokens", 2, "''"),
        (AZURE + "2023-11-16 18:17:03,1,10000001\n", "GeneratedTokens", 2, "10000001"),
        (AZURE + f"2023-11-16 18:17:03,1,{'9' * 10_000}\n", "GeneratedTokens", 2, "999..."),
        (AZURE + "2023-11-16 18:17:03,1,0\n", "GeneratedTokens", 2, "0"),
        (AZURE + "2023-11-16 18:17:03,0,1\n", "ContextTokens", 2, "0"),
        (AZURE + '2023-11-16 18:17:03,"1,1\n2023-11-16 18:17:03,1,1\n', "", 2, "a quotation mark"),
        (BURSTGPT_OLD + "5,ChatGPT,472,18,490,Conversation log\nx,ChatGPT,1,1,2,API log\n", "Timestamp", 3, "'x'"),
        (BURSTGPT_OLD + "5,ChatGPT,a,18,490,API log\n", "Request tokens", 2, "'a'"),
        (BURSTGPT_OLD + "5,ChatGPT,472,18.0,490,API log\n", "Response tokens", 2, "'18.0'"),
        (BURSTGPT_OLD + "5,ChatGPT,472,0,472,API log\n", "Response tokens", 2, "0"),
        (VIDUR + "-0.5,1,1\n", "arrived_at", 2, "'-0.5'"),
        (VIDUR + "nan,1,1\n", "arrived_at", 2, "'nan'"),
        (VIDUR + "inf,1,1\n", "arrived_at", 2, "'inf'"),
        (VIDUR + "1e999,1,1\n", "arrived_at", 2, "'1e999'"),
        (VIDUR + "1e9999999999,1,1\n", "arrived_at", 2, "'1e9999999999'"),
        (VIDUR + "4611686019,1,1\n", "arrived_at", 2, "'4611686019'"),
        (VIDUR + "0x10,1,1\n", "arrived_at", 2, "'0x10'"),
        (SPLITWISE + "0,2,0,zero,1,100,20\n", "arrival_timestamp", 2, "'zero'"),
        (SPLITWISE + "0,2,0,0.25,4,100,20\n", "batch_size", 2, "'4'"),
        (SPLITWISE + "0,2,0,0.25,1,100\n", "", 2, "6 fields"),
        (mooncake(0, 1, 1, []) + "{'timestamp': 0}\n", "", 2, "which is no JSON"),
        (mooncake(0, 1, 1, []) + "\n" + mooncake(0, 1, 1, []), "", 2, "an empty line"),
        (mooncake(0, 1, 1, []) + "[1, 2]\n", "", 2, "a list"),
        (mooncake(0, 1, 1, []) + "[" * 100_000 + "\n", "", 2, "which is no JSON"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n', "hash_ids", 1, "nothing"),
        ('{"input_length": 1, "output_length": 1, "hash_ids": []}\n', "timestamp", 1, "nothing"),
        (mooncake(0, 1, 1, []) + mooncake(-1, 1, 1, []), "timestamp", 2, "-1"),
        (mooncake("0", 1, 1, []), "timestamp", 1, "the string '0'"),
        (mooncake(True, 1, 1, []), "timestamp", 1, "true"),
        (mooncake(float("nan"), 1, 1, []), "", 1, "which is no JSON"),
        (mooncake(10**13, 1, 1, []), "timestamp", 1, "10000000000000"),
        (mooncake(0, 1.5, 1, []), "input_length", 1, "1.5"),
        (mooncake(0, 1, None, []), "output_length", 1, "null"),
        (mooncake(0, 1, 10**8, []), "output_length", 1, "100000000"),
        (mooncake(0, 0, 1, []), "input_length", 1, "0"),
        (mooncake(0, 600, 1, [1, -2]), "hash_ids", 1, "a list"),
        (mooncake(0, 600, 1, [2**63]), "hash_ids", 1, "a list"),
        (mooncake(0, 600, 1, 7), "hash_ids", 1, "7"),
        (mooncake(0, 1024, 1, [1, 2, 3]), "hash_ids", 1, "3 blocks for 1024 tokens"),
    ],
)
def test_a_malformed_line_is_named_by_number_and_column(
    tmp_path: Path, text: str, key: str, line: int, found: str
) -> None:
    path = saved(tmp_path, text)
    (problem,) = refusal(path).problems
    assert (problem.file, problem.key, problem.line) == (str(path), key, line)
    assert found in problem.found
    assert len(problem.sentence) < 400 + len(str(path))
    assert "\n" not in problem.sentence


def test_the_first_problems_are_told_together(tmp_path: Path) -> None:
    path = saved(tmp_path, VIDUR + "0,1,1\n" + "0,x,1\n" * 20)
    assert [problem.line for problem in refusal(path).problems] == list(range(3, 3 + MAX_PROBLEMS))


@pytest.mark.parametrize(
    ("text", "key", "found", "wanted"),
    [
        (b"", "", "an empty file", "a trace"),
        (b"\n\n", "", "the string '' as the header", "azure: TIMESTAMP, ContextTokens, GeneratedTokens"),
        (AZURE.encode(), "", "a header alone", "a line for each request"),
        (b"a,b,c\n1,2,3\n", "", "the string 'a,b,c' as the header", "or JSON lines for mooncake"),
        (b"2023-11-16 18:17:03,1,1\n", "", "as the header", "vidur: arrived_at"),
        (b"num_prefill_tokens,num_decode_tokens\n1,2\n", "arrived_at", "no such column", "without arrival times"),
        (b"Timestamp,Model,Request tokens\n1,a,2\n", "Response tokens", "no such column", "Response tokens"),
        (b"arrived_at,arrived_at,num_prefill_tokens,num_decode_tokens\n", "arrived_at", "the column twice", "columns"),
        (f"{AZURE.strip()},{VIDUR}".encode(), "", "columns of more than one format", "format: one of them"),
        (b"\x89PNG\r\n\x1a\n\0\0", "", "byte 0x89, which is not UTF-8", "UTF-8"),
        (b"\0\1\2\3", "", r"'\x00\x01\x02\x03' as the header", "azure"),
        (AZURE.encode("utf-16"), "", "which is not UTF-8", "UTF-8"),
        (AZURE.encode() + b"2023-11-16 18:17:03,1,\xff\n", "", "byte 0xff", "UTF-8"),
        (b"x" * (MAX_LINE_BYTES + 1), "", f"more than {MAX_LINE_BYTES} bytes", "in lines"),
        (b"\x1f\x8bnothing", "", "a damaged gzip file", "a trace"),
        (gzip.compress(VIDUR.encode() + b"0,1,1\n" * 99, mtime=0)[:-12], "", "a damaged gzip file", "a trace"),
        ((VIDUR + "0,0,0\n1,0,0\n").encode(), "", "2 requests, all of them without tokens", "one with tokens"),
    ],
    ids=range(17),
)
def test_a_file_that_is_no_trace_gets_a_sentence(
    tmp_path: Path, text: bytes, key: str, found: str, wanted: str
) -> None:
    path = saved(tmp_path, text)
    (problem,) = refusal(path, no_output="drop").problems
    assert (problem.file, problem.key) == (str(path), key)
    assert found in problem.found
    assert wanted in problem.wanted


def test_what_ends_the_reading_is_told_after_what_came_before(tmp_path: Path) -> None:
    path = saved(tmp_path, VIDUR.encode() + b"0,x,1\n0,1,1\n\xff\n")
    assert [problem.line for problem in refusal(path).problems] == [2, 4]


def test_a_path_to_no_file_gets_a_sentence(tmp_path: Path) -> None:
    assert "found no readable file (No such file" in str(refusal(tmp_path / "none.csv"))
    assert "found no readable file (Is a directory)" in str(refusal(tmp_path))
    assert "found an impossible path" in str(refusal(tmp_path / "a\0b"))


@pytest.mark.parametrize("trace_format", FORMATS)
def test_a_named_format_takes_no_other(tmp_path: Path, trace_format: TraceFormat) -> None:
    path = saved(tmp_path, written(trace_format, ROWS))
    for other in FORMATS:
        if other != trace_format:
            assert refusal(path, trace_format=other).line == 1


@pytest.mark.parametrize("trace_format", FORMATS)
def test_a_start_beyond_the_end_says_how_many_there_are(tmp_path: Path, trace_format: TraceFormat) -> None:
    path = saved(tmp_path, written(trace_format, ROWS))
    for start in (4, 100):
        error = refusal(path, start=start)
        assert (error.file, error.key) == (None, "workload.start")
        assert f"{start} with 4 requests in {path}" in error.found
        assert error.wanted == "at most 3"


@pytest.mark.parametrize("trace_format", FORMATS)
@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_corrupted_text_is_read_or_refused(tmp_path: Path, trace_format: TraceFormat, data: st.DataObject) -> None:
    text = written(trace_format, ROWS).encode()
    if packed := data.draw(st.booleans()):
        text = gzip.compress(text, mtime=0)
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 12)))
    alphabet = st.sampled_from(
        [b"\0", b"\n", b'"', b",", b"{", b"9" * 50, b"-", b"e9", b".", b"null", b"\xff", b"[" * 9]
    )
    middle = data.draw(st.lists(alphabet, max_size=4).map(b"".join) | st.binary(max_size=8))
    path = saved(tmp_path, text[:start] + middle + text[end:])
    drop = data.draw(st.booleans())
    try:
        trace = read_trace(path, no_output="drop" if drop else "refuse")
    except InputError as error:
        refused = error.problems
    else:
        refused = ()
        assert (np.diff(trace.arrival_ns) >= 0).all() and trace.arrival_ns[0] == 0
        assert trace.prompt_tokens.min() >= 1 and trace.output_tokens.min() >= 1
        assert len(trace.arrival_ns) + trace.dropped <= len(ROWS) + middle.count(b"\n") or packed
    assert all("\n" not in problem.sentence for problem in refused)
    assert all(problem.line or not problem.key for problem in refused)


def test_reading_stops_at_the_limit(tmp_path: Path) -> None:
    """A file is read no further than it has to be: here what follows is not even text."""
    filler = b"1,1,1\n" * 100_000
    path = saved(tmp_path, VIDUR.encode() + b"0,1,1\n1,2,2\n" + filler + b"\xff")
    assert len(read_trace(path, limit=2).arrival_ns) == 2
    assert refusal(path).line == 100_004


# Of a scenario.


def requests(path: Path, **keys: Any) -> Any:
    workload = TraceWorkload(kind="trace", path=path.name, **keys)
    return requests_of(workload, seed=1, replication=0, base=path.parent)


def test_a_workload_reads_a_trace_beside_it(tmp_path: Path) -> None:
    path = saved(tmp_path, written("mooncake", [ROWS[1], ROWS[0], *ROWS[2:], (30 * 10**9, 4, 0, [])]))
    read = requests(path, no_output="drop", max_concurrency=3, priorities=({"priority": 2, "share": 1.0},))
    trace = read_trace(path, no_output="drop")
    for name in ("arrival_ns", "prompt_tokens", "output_tokens", "hash_starts", "hash_ids"):
        assert np.array_equal(getattr(read, name), getattr(trace, name))
    assert (read.hash_tokens, read.dropped, len(read)) == (512, 1, 4)
    assert (read.closed, read.max_concurrency, set(read.priority)) == (False, 3, {2})


@pytest.mark.parametrize("rate_scale", [0.5, 2.0, 3.0])
def test_rate_scale_divides_times(tmp_path: Path, rate_scale: float) -> None:
    path = saved(tmp_path, written("vidur", ROWS))
    expected = [round(row[0] / rate_scale) for row in in_order(ROWS)]
    assert requests(path, rate_scale=rate_scale).arrival_ns.tolist() == expected


def test_start_and_limit_of_a_workload(tmp_path: Path) -> None:
    path = saved(tmp_path, written("azure", ROWS))
    read = requests(path, start=1, limit=2, format="azure")
    assert (read.arrival_ns.tolist(), read.prompt_tokens.tolist()) == ([0, 3 * 10**9], [40, 1])
    with pytest.raises(InputError) as caught:
        requests(path, start=9)
    assert "x.yaml: workload.start: found 9 with 4 requests" in str(caught.value.within("x.yaml"))


def test_times_that_no_clock_holds_once_scaled_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, VIDUR + "0,1,1\n4611686018,1,1\n")
    assert requests(path).arrival_ns[-1] == 4_611_686_018 * 10**9
    with pytest.raises(InputError, match=r"workload\.rate_scale: found a last arrival after 146,\d{3} years"):
        requests(path, rate_scale=0.001)


def test_many_lines_are_read_to_the_integer(tmp_path: Path) -> None:
    text = io.StringIO()
    text.write(BURSTGPT_OLD)
    for i in range(20_000):
        text.write(f"{i * 0.25},GPT-4,{i % 4000 + 1},{i % 300 + 1},1,API log\n")
    trace = read_trace(saved(tmp_path, gzip.compress(text.getvalue().encode(), 1)))
    assert trace.arrival_ns.tolist() == [i * 250_000_000 for i in range(20_000)]

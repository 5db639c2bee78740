"""Traces of requests, in the formats that they are published in, read into arrays.

- azure: CSV, TIMESTAMP (date and time), ContextTokens, GeneratedTokens: Azure LLM inference traces of 2023 and 2024,
  github.com/Azure/AzurePublicDataset.
- burstgpt: CSV, Timestamp (seconds), Request tokens, Response tokens: github.com/HPMLL/BurstGPT, with or without the
  columns Session ID and Elapsed time; failed requests have no response tokens.
- mooncake: JSON lines, timestamp (milliseconds), input_length, output_length, hash_ids (of blocks of 512 tokens):
  github.com/kvcache-ai/Mooncake.
- vidur: CSV, arrived_at (seconds), num_prefill_tokens, num_decode_tokens: github.com/microsoft/vidur.
- splitwise: CSV, arrival_timestamp (seconds), prompt_size, token_size: github.com/Mutinifni/splitwise-sim.

Columns are found by their names, in any order and among others. Files are UTF-8, with or without a byte order mark,
and may be gzipped. A date and time without a zone is taken for UTC.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from array import array
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from io import BufferedReader
from itertools import chain, islice
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import numpy.typing as npt

from batchsim.errors import InputError, shown
from batchsim.workload_scenario import MAX_TOKENS, TraceFormat

Int64 = npt.NDArray[np.int64]
Row = tuple[int, int, int, list[int]]

MAX_TIME_NS = 1 << 62
MAX_LINE_BYTES = 1 << 20
MAX_PROBLEMS = 5
MOONCAKE_BLOCK = 512

_WANTED_SECONDS = f"seconds from 0 to {MAX_TIME_NS // 10**9}"
_WANTED_MS = f"milliseconds from 0 to {MAX_TIME_NS // 10**6}"
_WANTED_TIME = "a time from 1970 to 2115 such as 2023-11-16 18:17:03.9799600"
_WANTED_TOKENS = f"an integer from 0 to {MAX_TOKENS}"
_WANTED_SOME = "at least 1, or no_output: drop to leave such requests out"
_NUMBER = re.compile(r"[+-]?(?:\d{1,30}(?:\.\d{0,60})?|\.\d{1,60})(?:[eE][+-]?\d{1,3})?", re.ASCII)
_TIME = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?", re.ASCII)


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """The requests of a trace in order of arrival, arrays of one length; the first arrives at 0.

    Hashes are as in `batchsim.workload.Requests`: `hash_tokens` is 0 and both their arrays are empty where the format
    has none. `dropped` counts the requests without tokens that were left out.
    """

    arrival_ns: Int64
    prompt_tokens: Int64
    output_tokens: Int64
    hash_starts: Int64
    hash_ids: Int64
    hash_tokens: int
    dropped: int


def read_trace(
    path: Path,
    trace_format: TraceFormat = "auto",
    *,
    start: int = 0,
    limit: int | None = None,
    no_output: Literal["refuse", "drop"] = "refuse",
) -> Trace:
    """Read the requests of the lines after the first `start`, at most `limit` of them, and sort them by time (stably).

    Lines before and after those are not looked at. A request without prompt or output tokens is refused, or with
    `no_output` "drop" left out.

    Raises:
        InputError: with the first problems that the file has, at most 5, each with its line and column.
    """
    file = str(path)
    with closing(_lines(path)) as lines:
        first = next(lines, None)
        if first is None:
            raise InputError(file, "", "an empty file", "a trace of requests")
        parse, body, layout = _parser(file, first, lines, trace_format)
        skipped = sum(1 for _ in islice(body, start))
        kept, dropped, problems = _Rows(), 0, []
        try:
            for number, line in islice(body, limit):
                try:
                    row = parse(line)
                    if row[1] and row[2]:
                        kept.add(row)
                    elif no_output == "drop":
                        dropped += 1
                    else:
                        raise InputError(None, layout.output if row[1] else layout.prompt, "0", _WANTED_SOME)
                except InputError as problem:
                    problem.file, problem.line = file, number
                    problems.append(problem)
                    if len(problems) == MAX_PROBLEMS:
                        break
        except InputError as problem:  # What the file cannot be read beyond.
            problems.append(problem)
    if problems:
        raise InputError.all_of(problems)
    if not kept.arrival_ns:
        if dropped:
            raise InputError(file, "", f"{dropped} requests, all of them without tokens", "one with tokens")
        if not skipped:
            raise InputError(file, "", "a header alone", "a line for each request")
        raise InputError(None, "workload.start", f"{start} with {skipped} requests in {file}", f"at most {skipped - 1}")
    return kept.trace(MOONCAKE_BLOCK if layout is MOONCAKE else 0, dropped)


class _Rows:
    """Requests in the order of the file."""

    def __init__(self) -> None:
        self.arrival_ns = array("q")
        self._prompt = array("q")
        self._output = array("q")
        self._ids = array("q")
        self._starts = array("q", [0])

    def add(self, row: Row) -> None:
        arrival_ns, prompt, output, ids = row
        self.arrival_ns.append(arrival_ns)
        self._prompt.append(prompt)
        self._output.append(output)
        if ids:
            self._ids.extend(ids)
        self._starts.append(len(self._ids))

    def trace(self, hash_tokens: int, dropped: int) -> Trace:
        arrival_ns, prompt, output, ids, starts = (
            np.array(column, dtype=np.int64)
            for column in (self.arrival_ns, self._prompt, self._output, self._ids, self._starts)
        )
        if not hash_tokens:
            starts = starts[:0]
        if (np.diff(arrival_ns) < 0).any():
            order = np.argsort(arrival_ns, kind="stable")
            arrival_ns, prompt, output = arrival_ns[order], prompt[order], output[order]
            if hash_tokens:
                counts, old = np.diff(starts)[order], starts[:-1][order]
                starts = np.concatenate([[0], np.cumsum(counts)])
                ids = ids[np.repeat(old - starts[:-1], counts) + np.arange(len(ids))]
        return Trace(arrival_ns - arrival_ns[0], prompt, output, starts, ids, hash_tokens, dropped)


def _lines(path: Path) -> Generator[tuple[int, str], None, None]:
    """Each line with its number from 1, without its end; empty ones at the end of the file are left out."""
    file = str(path)
    try:
        with path.open("rb") as raw:
            yield from _decoded(file, gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise InputError(file, "", "a damaged gzip file", "a trace of requests") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(file, "", f"no readable file ({reason})", "a trace of requests") from None
    except ValueError:
        raise InputError(ascii(file), "", "an impossible path", "a trace of requests") from None


def _decoded(file: str, stream: BufferedReader | gzip.GzipFile) -> Iterator[tuple[int, str]]:
    number = told = 0
    while data := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(data) > MAX_LINE_BYTES:
            found = f"a line of more than {MAX_LINE_BYTES} bytes"
            raise InputError(file, "", found, "a trace of requests, in lines", line=number)
        try:
            text = data.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            found = f"byte 0x{data[error.start]:02x}, which is not UTF-8"
            raise InputError(file, "", found, "a trace of requests, in UTF-8", line=number) from None
        if text.strip() or number == 1:
            # Empty lines turn out to be amid the others only now.
            while (told := told + 1) < number:
                yield told, ""
            yield number, text


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a format keeps what: the names of its columns or keys, and how its times are read."""

    arrival: str
    prompt: str
    output: str
    clock: Callable[[str, str], int]
    ones: str | None = None  # A column that, where there is one, holds 1.

    @property
    def columns(self) -> list[str]:
        return [self.arrival, self.prompt, self.output]


def _cells(line: str) -> list[str]:
    if '"' not in line:
        return line.split(",")
    try:
        return next(csv.reader([line], strict=True))
    except csv.Error:
        raise InputError(None, "", "a quotation mark without its other half", "cells, quoted or not") from None


@lru_cache(maxsize=1 << 16)
def _tokens(column: str, cell: str) -> int:
    text = cell.strip()
    if text.isascii() and text.isdigit() and len(text) <= 18 and (tokens := int(text)) <= MAX_TOKENS:
        return tokens
    raise InputError(None, column, shown(cell), _WANTED_TOKENS)


def _seconds(column: str, cell: str) -> int:
    """Nanoseconds."""
    text = cell.strip()
    if _NUMBER.fullmatch(text) and 0 <= (time_ns := int(Decimal(text).scaleb(9).to_integral_value())) <= MAX_TIME_NS:
        return time_ns
    raise InputError(None, column, shown(cell), _WANTED_SECONDS)


@lru_cache(maxsize=64)
def _epoch_s(text: str) -> int:
    time = datetime.fromisoformat(text)
    return int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp())


def _date_time(column: str, cell: str) -> int:
    """Nanoseconds since 1970."""
    if match := _TIME.fullmatch(cell.strip()):
        second, fraction, zone = match.groups(default="")
        try:
            time_ns = _epoch_s(second + zone) * 10**9 + int(fraction.ljust(9, "0"))
        except (ValueError, OverflowError):
            time_ns = -1
        if 0 <= time_ns <= MAX_TIME_NS:
            return time_ns
    raise InputError(None, column, shown(cell), _WANTED_TIME)


CSV_FORMATS: dict[str, _Layout] = {
    "azure": _Layout("TIMESTAMP", "ContextTokens", "GeneratedTokens", _date_time),
    "burstgpt": _Layout("Timestamp", "Request tokens", "Response tokens", _seconds),
    "vidur": _Layout("arrived_at", "num_prefill_tokens", "num_decode_tokens", _seconds),
    "splitwise": _Layout("arrival_timestamp", "prompt_size", "token_size", _seconds, ones="batch_size"),
}
MOONCAKE = _Layout("timestamp", "input_length", "output_length", _seconds)


def _parser(
    file: str, first: tuple[int, str], rest: Iterator[tuple[int, str]], trace_format: str
) -> tuple[Callable[[str], Row], Iterator[tuple[int, str]], _Layout]:
    """What reads a line, the lines that hold requests, and where each has what."""
    line = first[1]
    if trace_format == "mooncake" or (trace_format == "auto" and line.lstrip().startswith("{")):
        return _object, chain([first], rest), MOONCAKE
    try:
        header = [cell.strip() for cell in _cells(line)]
        layout = _layout(header, trace_format)
        for column in layout.columns:
            if header.count(column) != 1:
                found = "no such column in the header" if column not in header else "the column twice in the header"
                times = "; without arrival times a file of lengths is no trace" if column == layout.arrival else ""
                raise InputError(None, column, found, f"the columns {', '.join(layout.columns)}{times}")
    except InputError as error:
        error.file, error.line = file, first[0]
        raise
    return _row(header, layout), rest, layout


def _layout(header: list[str], trace_format: str) -> _Layout:
    if trace_format != "auto":
        return CSV_FORMATS[trace_format]
    having = {name: len(set(layout.columns) & set(header)) for name, layout in CSV_FORMATS.items()}
    best = max(having, key=having.__getitem__)
    if having[best] < 2:
        known = "; ".join(f"{name}: {', '.join(layout.columns)}" for name, layout in CSV_FORMATS.items())
        raise InputError(None, "", f"{shown(','.join(header))} as the header", f"{known}; or JSON lines for mooncake")
    if list(having.values()).count(3) > 1:
        raise InputError(None, "", "columns of more than one format in the header", "format: one of them")
    return CSV_FORMATS[best]


def _row(header: list[str], layout: _Layout) -> Callable[[str], Row]:
    width, clock = len(header), layout.clock
    arrival, prompt, output = layout.columns
    at_arrival, at_prompt, at_output = (header.index(column) for column in layout.columns)
    ones = header.index(layout.ones) if layout.ones in header else None

    def parse(line: str) -> Row:
        cells = _cells(line)
        if len(cells) != width:
            found = f"{len(cells)} fields" if line.strip() else "an empty line"
            raise InputError(None, "", found, f"{width} fields, as in the header")
        if ones is not None and cells[ones].strip() != "1":
            raise InputError(None, header[ones], shown(cells[ones]), "1: one request a line")
        time_ns = clock(arrival, cells[at_arrival])
        return time_ns, _tokens(prompt, cells[at_prompt]), _tokens(output, cells[at_output]), []

    return parse


def _no_number(text: str) -> NoReturn:
    raise ValueError(text)


def _object(line: str) -> Row:
    """A line of Mooncake's: a JSON object."""
    wanted = "a JSON object with timestamp, input_length, output_length and hash_ids"
    try:
        row = json.loads(line, parse_float=Decimal, parse_constant=_no_number)
    except (ValueError, RecursionError, InvalidOperation):
        raise InputError(None, "", f"{shown(line)}, which is no JSON" if line else "an empty line", wanted) from None
    if not isinstance(row, dict):
        raise InputError(None, "", shown(row), wanted)
    for key in ("timestamp", "input_length", "output_length", "hash_ids"):
        if key not in row:
            raise InputError(None, key, "nothing", wanted)
    time_ms = row["timestamp"]
    if type(time_ms) not in (int, Decimal) or not 0 <= time_ms <= MAX_TIME_NS // 10**6:
        raise InputError(None, "timestamp", _shown(time_ms), _WANTED_MS)
    for key in ("input_length", "output_length"):
        if type(row[key]) is not int or not 0 <= row[key] <= MAX_TOKENS:
            raise InputError(None, key, _shown(row[key]), _WANTED_TOKENS)
    tokens, ids = row["input_length"], row["hash_ids"]
    if not isinstance(ids, list) or not all(type(one) is int and 0 <= one < 1 << 63 for one in ids):
        raise InputError(None, "hash_ids", _shown(ids), f"a list of integers from 0 to {(1 << 63) - 1}")
    if len(ids) > (most := -(-tokens // MOONCAKE_BLOCK)):
        found = f"{len(ids)} blocks for {tokens} tokens"
        raise InputError(None, "hash_ids", found, f"at most {most}, of {MOONCAKE_BLOCK} tokens each")
    return int((Decimal(time_ms) * 10**6).to_integral_value()), tokens, row["output_length"], ids


def _shown(value: object) -> str:
    return str(value)[:60] if isinstance(value, Decimal) else shown(value)

"""Small profiler traces for tests: events as torch writes them, and what was read of them with its indices resolved."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from batchsim.errors import InputError
from calibration.kineto import DEVICE_KINDS, KINDS, Trace, read_trace

Event = dict[str, Any]

START_NS = 4355801512712805  # About what torch writes today: nanoseconds since some weeks ago.


class Row(NamedTuple):
    """An event, its indices resolved."""

    kind: str
    name: str
    start_ns: int
    end_ns: int
    lane: tuple[Any, Any]
    correlation: int = -1
    external: int = -1
    bytes: int = 0
    graph_node: int = -1


def rows_of(trace: Trace) -> list[Row]:
    """The events of a trace, of which also what must hold for any is asserted."""
    columns = (
        trace.kind, trace.name, trace.start_ns, trace.end_ns, trace.lane, trace.correlation, trace.external,
        trace.bytes, trace.graph_node,
    )  # fmt: skip
    assert {len(column) for column in columns} == {len(trace)} and len(trace) > 0
    assert [column.dtype.name for column in columns] == [
        "uint8", "int32", "int64", "int64", "int32", "int64", "int64", "int64", "int64",
    ]  # fmt: skip
    assert trace.start_ns[0] == 0 and (trace.end_ns >= trace.start_ns).all()
    assert (np.diff(trace.start_ns) >= 0).all()
    assert (np.diff(trace.end_ns)[np.diff(trace.start_ns) == 0] <= 0).all()
    assert (trace.correlation >= -1).all() and (trace.external >= -1).all() and (trace.bytes >= 0).all()
    assert len(set(trace.threads)) == len(trace.threads) and len(set(trace.streams)) == len(trace.streams)
    json.dumps(
        [trace.names, trace.threads, trace.device_names, trace.extra], ensure_ascii=False, allow_nan=False
    ).encode()
    rows = []
    for kind, name, start, end, lane, *numbers in zip(*(column.tolist() for column in columns), strict=True):
        lanes = trace.streams if kind in DEVICE_KINDS else trace.threads
        rows.append(Row(KINDS[kind], trace.names[name], start, end, lanes[lane], *numbers))
    return rows


def saved(folder: Path, data: str | bytes | list[Any] | dict[str, Any], *, zipped: bool = False) -> Path:
    path = folder / "trace.json"
    text = data if isinstance(data, str | bytes) else json.dumps(data)
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data, 1) if zipped else data)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_trace(path)
    return str(caught.value).removeprefix(f"{path}: ")


def op(name: Any = "aten::add", ts: Any = 10.0, dur: Any = 2.5, **args: Any) -> Event:
    return {"ph": "X", "cat": "cpu_op", "name": name, "pid": 1, "tid": 2, "ts": ts, "dur": dur, "args": args}


def kernel(name: Any = "gemm", ts: Any = 20.0, dur: Any = 4.0, **args: Any) -> Event:
    args = {"device": 0, "stream": 7} | args
    return {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": 7, "ts": ts, "dur": dur, "args": args}

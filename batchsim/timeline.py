"""Spans as Chrome trace events, in the form that torch's profiler (Kineto) writes.

Perfetto and chrome://tracing open them, and so do tools made for profiler traces. Every schedule of every run is
a pair of processes, host and device, whose times count from the start of its window, so that simulation and
execution lie under one another.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from batchsim.files import write_bytes
from batchsim.operations import CopyIn, CopyOut, Forward, Schedule
from batchsim.records import Lane, Span
from batchsim.result import Run
from batchsim.training_operations import LAUNCHED

Event = dict[str, Any]

# Streams as torch numbers them: the default one is 7, those from its pool follow.
STREAMS: dict[Lane, int] = {"compute": 7, "copy_in": 13, "copy_out": 17}

_RUNTIME_CALLS = {
    "copy_in": "cudaMemcpyAsync",
    "copy_out": "cudaMemcpyAsync",
    "record": "cudaEventRecord",
    "stream_wait": "cudaStreamWaitEvent",
    "wait": "cudaEventSynchronize",
}
# What a host phase launches: all that is on a lane, or in training one stage of the compute lane.
_LAUNCHES: dict[str, str] = {
    Forward.phase: "compute", CopyIn.phase: "copy_in", CopyOut.phase: "copy_out", **LAUNCHED,
}  # fmt: skip
_COPIES: dict[Lane, str] = {
    "copy_in": "Memcpy HtoD (Pinned -> Device)",
    "copy_out": "Memcpy DtoH (Device -> Pinned)",
}


def write_trace(path: Path, runs: Sequence[Run]) -> None:
    """Write the windows of `runs` to `path` as one trace, whole or not at all; `.gz` compresses it.

    The same runs give the same bytes.
    """
    text = json.dumps(trace(runs), allow_nan=False, separators=(",", ":")) + "\n"
    data = text.encode()
    write_bytes(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def trace(runs: Sequence[Run]) -> dict[str, Any]:
    """The trace as a JSON object. Device process `i` and host process `1000 + i` belong to the i-th schedule."""
    groups = [(run, schedule, spans) for run in runs for schedule, spans in run.windows.items() if spans]
    events: list[Event] = []
    correlations = itertools.count(1)
    for index, (run, schedule, spans) in enumerate(groups):
        ordered = sorted(spans, key=lambda span: (span.start_ns, span.end_ns))
        graphs = bool(run.scenario.get("cuda_graphs", True))
        group = _Group(index, f"{schedule} ({run.source})", ordered, graphs)
        events += group.events(correlations)
    return {
        "schemaVersion": 1,
        "deviceProperties": [
            {"id": index, "name": _device_name(run), "batchsim_source": run.source}
            for index, (run, _, _) in enumerate(groups)
        ],
        "displayTimeUnit": "ms",
        "traceEvents": events,
    }


class _Group:
    """The two processes of one schedule of one run."""

    def __init__(self, index: int, name: str, spans: list[Span], graphs: bool) -> None:
        self.device = index
        self.host = 1000 + index
        self.name = name
        self.spans = spans
        self.start_ns = spans[0].start_ns
        # Forwards with prompt tokens are launched kernel by kernel, whatever their shape.
        self.graphs = graphs
        self.prefills = {span.step for span in spans if span.stage == "prefill"}

    def events(self, correlations: Iterator[int]) -> Iterator[Event]:
        yield from self._metadata()
        yield from self._iterations()
        launches: defaultdict[tuple[int, str], deque[tuple[int, int]]] = defaultdict(deque)
        for span in self.spans:
            if span.lane == "host":
                correlation = next(correlations)
                if span.stage in _LAUNCHES:
                    launches[span.step, _LAUNCHES[span.stage]].append((correlation, span.start_ns))
                yield self._host_event(span, correlation)
        for span in self.spans:
            if span.lane != "host":
                # Launches before the window are not in the trace; their activity has a number of its own.
                stage = span.stage if span.stage in LAUNCHED.values() else span.lane
                calls = launches[span.step, stage]
                correlation, launched_ns = calls.popleft() if calls else (next(correlations), None)
                if launched_ns is not None:
                    yield self._flow("s", correlation, self.host, self.host, launched_ns)
                    yield self._flow("f", correlation, self.device, STREAMS[span.lane], span.start_ns)
                yield self._device_event(span, correlation)

    def _metadata(self) -> Iterator[Event]:
        lanes = {lane for lane in STREAMS if any(span.lane == lane for span in self.spans)}
        for pid, kind in ((self.host, "CPU"), (self.device, "GPU")):
            labels = f"{kind}, window starts at {self.start_ns / 1e6:.3f} ms"
            yield _metadata("process_name", pid, 0, name=f"{self.name}: {'host' if kind == 'CPU' else 'device'}")
            yield _metadata("process_labels", pid, 0, labels=labels)
            yield _metadata("process_sort_index", pid, 0, sort_index=2 * self.device + (kind == "GPU"))
        yield _metadata("thread_name", self.host, self.host, name="host")
        yield _metadata("thread_sort_index", self.host, self.host, sort_index=0)
        for order, lane in enumerate(("copy_in", "compute", "copy_out")):
            if lane in lanes:
                tid = STREAMS[lane]
                yield _metadata("thread_name", self.device, tid, name=f"stream {tid} {lane}")
                yield _metadata("thread_sort_index", self.device, tid, sort_index=order)

    def _iterations(self) -> Iterator[Event]:
        """One `ProfilerStep#N` around each turn of the serving loop, which begins by scheduling batch N."""
        host = [span for span in self.spans if span.lane == "host"]
        starts = [i for i, span in enumerate(host) if span.stage == Schedule.phase]
        for first, after in zip(starts, [*starts[1:], len(host)], strict=False):
            if host[first].step >= 0:
                begin, end = host[first].start_ns, max(span.end_ns for span in host[first:after])
                name = f"ProfilerStep#{host[first].step}"
                yield self._complete("user_annotation", name, self.host, self.host, begin, end, {})

    def _host_event(self, span: Span, correlation: int) -> Event:
        args = {"step": span.step, "stage": span.stage}
        if span.stage in _LAUNCHES or span.stage in _RUNTIME_CALLS:
            name, category = self._runtime_call(span), "cuda_runtime"
            args["correlation"] = correlation
        else:
            name, category = span.stage, "cpu_op"
        return self._complete(category, name, self.host, self.host, span.start_ns, span.end_ns, args)

    def _runtime_call(self, span: Span) -> str:
        if span.stage in LAUNCHED:
            return "cudaLaunchKernel"
        if span.stage == Forward.phase:
            return "cudaGraphLaunch" if self.graphs and span.step not in self.prefills else "cudaLaunchKernel"
        return _RUNTIME_CALLS[span.stage]

    def _device_event(self, span: Span, correlation: int) -> Event:
        stream = STREAMS[span.lane]
        args: Event = {"device": self.device, "context": 1, "stream": stream, "correlation": correlation}
        args |= {"step": span.step, "stage": span.stage}
        if span.lane == "compute":
            name, category = span.stage, "kernel"
            if span.gap_ns is not None:
                args["launch_gap_ns"] = span.gap_ns
        else:
            name, category = _COPIES[span.lane], "gpu_memcpy"
        return self._complete(category, name, self.device, stream, span.start_ns, span.end_ns, args)

    def _complete(self, category: str, name: str, pid: int, tid: int, start_ns: int, end_ns: int, args: Event) -> Event:
        return {
            "ph": "X", "cat": category, "name": name, "pid": pid, "tid": tid,
            "ts": _us(start_ns - self.start_ns), "dur": _us(end_ns - start_ns), "args": args,
        }  # fmt: skip

    def _flow(self, phase: str, correlation: int, pid: int, tid: int, time_ns: int) -> Event:
        event = {"ph": phase, "id": correlation, "pid": pid, "tid": tid, "ts": _us(time_ns - self.start_ns)}
        event |= {"cat": "ac2g", "name": "ac2g"}
        return event | {"bp": "e"} if phase == "f" else event


def _metadata(name: str, pid: int, tid: int, /, **args: Any) -> Event:
    return {"name": name, "ph": "M", "ts": 0, "pid": pid, "tid": tid, "args": args}


def _us(ns: int) -> float:
    """Microseconds that keep the nanosecond, for readers that round and for readers that cut off alike."""
    us = ns / 1000
    return us if int(us * 1000) == ns else math.nextafter(us, math.inf)


def _device_name(run: Run) -> str:
    name = run.provenance.get("device")
    return name if isinstance(name, str) else "unknown device"

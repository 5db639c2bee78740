"""Predicted timelines as Chrome trace events, in the form that torch's profiler (Kineto) writes.

Each schedule is a pair of processes, host and device, and begins at zero. A trace of one schedule is one that
`batchsim learn` reads like any other: steps are `ProfilerStep#N`, phases annotations, launches and what they put on
the device share a correlation id, and waits between streams and for the device are the calls that make them.
"""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from batchsim.files import write_bytes
from batchsim.learned import Kernels, LearnedProfile
from batchsim.whatif.answer import Answer
from batchsim.whatif.replay import Moment
from batchsim.whatif.variants import COPY_IN, COPY_OUT

Event = dict[str, Any]

NO_PHASE = "host"
MIN_STEPS = 8  # A trace of fewer has too few whole steps to learn from; the same ones follow again.
CALL_NS = 200  # A call that takes the host no time is drawn this long, out of what comes before it.
# Streams as torch numbers them: the default one is 7, others follow; and those that a schedule adds.
FIRST_STREAM = 7
ADDED_STREAMS = {COPY_IN: "copy in (added)", COPY_OUT: "copy out (added)"}
WAIT, SYNCHRONIZE = "wait", "cudaStreamSynchronize"
_CALLS = {"graph": "cudaGraphLaunch", "kernels": "cudaLaunchKernel"}
_COPIES = {
    "h2d": "Memcpy HtoD (Pinned -> Device)",
    "d2h": "Memcpy DtoH (Device -> Pinned)",
    "d2d": "Memcpy DtoD (Device -> Device)",
}


def write_predicted(path: Path, answer: Answer, schedules: Sequence[str]) -> None:
    """Write the steps of `schedules`, all of them in `answer`, to `path`, whole or not at all; `.gz` compresses it.

    The same answer gives the same bytes.
    """
    data = (json.dumps(predicted(answer, schedules), allow_nan=False, separators=(",", ":")) + "\n").encode()
    write_bytes(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def predicted(answer: Answer, schedules: Sequence[str]) -> dict[str, Any]:
    """The trace as a JSON object. Device process `i` and host process `1000 + i` belong to the i-th schedule."""
    events: list[Event] = []
    correlations = itertools.count(1)
    for index, name in enumerate(schedules):
        moments = repeated(answer.schedules[name].moments)
        if moments:
            events += _Group(index, f"{name} (predicted)", moments, answer.profile, correlations).events()
    device = f"{answer.profile.device} (predicted)"
    return {
        "schemaVersion": 1,
        "deviceProperties": [{"id": index, "name": device} for index in range(len(schedules))],
        "displayTimeUnit": "ms",
        "traceEvents": events,
    }


def repeated(moments: Sequence[Moment], least: int = MIN_STEPS) -> list[Moment]:
    """The moments of at least so many steps, numbered from 0 and from time zero, in the order of launches."""
    host = [moment for moment in moments if moment.lane == "host"]
    if not host:
        return []
    begin, first = host[0].start_ns, host[0].step
    period, steps = max(moment.end_ns for moment in host) - begin, host[-1].step - first + 1
    return [
        moment._replace(
            step=moment.step - first + turn * steps,
            start_ns=moment.start_ns - begin + turn * period,
            end_ns=moment.end_ns - begin + turn * period,
        )
        for turn in range(-(-least // steps))
        for moment in moments
    ]


@dataclass(frozen=True)
class _Span:
    """What the host does for a while: `call` a runtime call's name, empty for other work; `launches` an activity."""

    step: int
    phase: str
    start: int
    end: int
    call: str = ""
    launches: int = -1


class _Group:
    """The two processes of one schedule."""

    def __init__(
        self, index: int, name: str, moments: Sequence[Moment], profile: LearnedProfile, correlations: Iterator[int]
    ) -> None:
        self.device, self.host, self.name = index, 1000 + index, name
        self.device_moments = [moment for moment in moments if moment.lane != "host"]
        self.nodes = _nodes(profile, self.device_moments)
        self.correlation = [next(correlations) for _ in self.device_moments]
        self.spans = _hosts(moments, self._joins())

    def events(self) -> Iterator[Event]:
        yield from self._metadata()
        yield from self._steps()
        yield from self._phases()
        for span in self.spans:
            if not span.call:
                if span.phase == NO_PHASE:
                    yield self._on_host("cpu_op", "host", span)
                continue
            args = {"correlation": self.correlation[span.launches]} if span.launches >= 0 else {}
            yield self._on_host("cuda_runtime", span.call, span, **args)
        launched = {span.launches: span for span in self.spans if span.launches >= 0}
        for number, moment in enumerate(self.device_moments):
            correlation = self.correlation[number]
            if number in launched:
                yield self._flow("s", correlation, self.host, self.host, launched[number].start)
                yield self._flow("f", correlation, self.device, _stream(moment), round(moment.start_ns))
            yield from self._activity(moment, correlation, self.nodes[number])

    def _joins(self) -> set[int]:
        """Activities that began when one on another stream, launched before them, had ended: they waited for it."""
        joins: set[int] = set()
        for number, moment in enumerate(self.device_moments):
            before = self.device_moments[max(number - 8, 0) : number]
            if any(other.lane != moment.lane and other.end_ns == moment.start_ns for other in before) and not any(
                other.lane == moment.lane and other.end_ns == moment.start_ns for other in before
            ):
                joins.add(number)
        return joins

    def _metadata(self) -> Iterator[Event]:
        for pid, what, order in ((self.host, "host", 2 * self.device), (self.device, "device", 2 * self.device + 1)):
            yield _metadata("process_name", pid, 0, name=f"{self.name}: {what}")
            yield _metadata("process_labels", pid, 0, labels="CPU" if what == "host" else "GPU")
            yield _metadata("process_sort_index", pid, 0, sort_index=order)
        yield _metadata("thread_name", self.host, self.host, name="host")
        for order, lane in enumerate(dict.fromkeys(moment.lane for moment in self.device_moments)):
            number = int(lane.removeprefix("stream "))
            tid = _tid(number)
            yield _metadata(
                "thread_name", self.device, tid, name=f"stream {tid} {ADDED_STREAMS.get(number, '')}".strip()
            )
            yield _metadata("thread_sort_index", self.device, tid, sort_index=order)

    def _steps(self) -> Iterator[Event]:
        for step, group in itertools.groupby(self.spans, key=lambda span: span.step):
            spans = list(group)
            yield self._on_host("user_annotation", f"ProfilerStep#{step}", replace(spans[0], end=spans[-1].end))

    def _phases(self) -> Iterator[Event]:
        """An annotation around what follows one another in one phase."""
        step = -1
        for (number, phase), group in itertools.groupby(self.spans, key=lambda span: (span.step, span.phase)):
            spans = list(group)
            # A nanosecond tells the phase that a step begins with from the step.
            start, end = spans[0].start + (number != step), spans[-1].end
            step = number
            if phase != NO_PHASE and end > start:
                yield self._on_host("user_annotation", phase, replace(spans[0], start=start, end=end))

    def _activity(self, moment: Moment, correlation: int, nodes: int) -> Iterator[Event]:
        args: Event = {"device": self.device, "context": 1, "stream": _stream(moment), "correlation": correlation}
        start, end = round(moment.start_ns), round(moment.end_ns)
        if moment.what in _COPIES:
            yield self._on_device("gpu_memcpy", _COPIES[moment.what], start, end, moment, args)
        elif nodes == 1:
            yield self._on_device("kernel", moment.what, start, end, moment, args)
        else:
            # The replay knows a graph as a whole; its nodes are drawn alike, so that readers see that there are some.
            yield self._on_device("gpu_user_annotation", f"graph of {nodes} nodes", start, end, moment, args)
            bounds = [start + (end - start) * node // nodes for node in range(nodes + 1)]
            for node, (begin, until) in enumerate(itertools.pairwise(bounds)):
                yield self._on_device("kernel", "graph node", begin, until, moment, args | {"graph node id": node})

    def _on_device(self, category: str, name: str, start: int, end: int, moment: Moment, args: Event) -> Event:
        return _complete(category, name, self.device, _stream(moment), start, end, args)

    def _on_host(self, category: str, name: str, span: _Span, **args: Any) -> Event:
        return _complete(category, name, self.host, self.host, span.start, span.end, {"step": span.step, **args})

    def _flow(self, phase: str, correlation: int, pid: int, tid: int, time_ns: int) -> Event:
        event = {"ph": phase, "id": correlation, "pid": pid, "tid": tid, "ts": time_ns / 1000}
        event |= {"cat": "ac2g", "name": "ac2g"}
        return event | {"bp": "e"} if phase == "f" else event


def _nodes(profile: LearnedProfile, moments: Sequence[Moment]) -> list[int]:
    """How many kernels each activity is: of a graph its nodes, or as many as there were before there was a graph."""
    graphs = [[o.nodes for o in step.operations if isinstance(o, Kernels) and o.nodes] for step in profile.steps]
    single = [sum(len(o.device_ns) for o in step.operations if isinstance(o, Kernels)) for step in profile.steps]
    nodes: list[int] = []
    seen: dict[int, int] = {}
    for moment in moments:
        count = 1
        if moment.what == "graph":
            step = moment.step % len(graphs)
            order = seen[moment.step] = seen.get(moment.step, -1) + 1
            count = graphs[step][order] if order < len(graphs[step]) else single[step]
        nodes.append(max(min(count, round(moment.end_ns) - round(moment.start_ns)), 1))
    return nodes


def _hosts(moments: Sequence[Moment], joins: set[int]) -> list[_Span]:
    """The host's spans in order, without gaps: work, launches, waits between streams just before them, and waits.

    What a wait takes the host itself comes after it, and belongs to the call.
    """
    ends = {moment.end_ns for moment in moments if moment.lane != "host"}
    spans: list[_Span] = []
    free = False  # Whether the last span may be a launch.
    number = -1
    for place, moment in enumerate(moments):
        if moment.lane == "host":
            start, end = spans[-1].end if spans else round(moment.start_ns), round(moment.end_ns)
            if end <= start:
                continue
            waits = moment.what == WAIT
            if waits and spans and spans[-1].call == SYNCHRONIZE:
                spans[-1] = replace(spans[-1], end=end)
            elif waits:
                call = SYNCHRONIZE if moment.end_ns in ends else ""
                spans.append(_Span(moment.step, _phase_of_wait(moments, place), start, end, call))
            else:
                spans.append(_Span(moment.step, moment.what, start, end))
            free = not waits
            continue
        number += 1
        if not spans:
            continue
        if not free:
            spans += _carved(spans.pop(), CALL_NS)
        launch = spans.pop()
        if number in joins:
            waiting, launch = _halved(launch)
            spans.append(replace(waiting, call="cudaStreamWaitEvent"))
        spans.append(replace(launch, call=_CALLS.get(moment.what, "cudaMemcpyAsync"), launches=number))
        free = False
    return spans


def _carved(span: _Span, ns: int) -> list[_Span]:
    """The span, and its last nanoseconds on their own, as work of the same phase."""
    cut = max(span.end - ns, (span.start + span.end) // 2)
    return [replace(span, end=cut), replace(span, start=cut, call="", launches=-1)]


def _halved(span: _Span) -> tuple[_Span, _Span]:
    """The first nanoseconds of a span, and the rest."""
    cut = min(span.start + CALL_NS, (span.start + span.end) // 2)
    return replace(span, end=cut), replace(span, start=cut)


def _phase_of_wait(moments: Sequence[Moment], place: int) -> str:
    """That of the host work right after it, which is the call's own, or right before it."""
    step = moments[place].step
    for range_ in (range(place + 1, len(moments)), range(place - 1, -1, -1)):
        for other in range_:
            near = moments[other]
            if near.step != step:
                break
            if near.lane == "host" and near.what != WAIT:
                return near.what
    return NO_PHASE


def _stream(moment: Moment) -> int:
    return _tid(int(moment.lane.removeprefix("stream ")))


def _tid(number: int) -> int:
    return number if number in ADDED_STREAMS else FIRST_STREAM + number


def _complete(category: str, name: str, pid: int, tid: int, start: int, end: int, args: Event) -> Event:
    return {
        "ph": "X", "cat": category, "name": name, "pid": pid, "tid": tid, "ts": start / 1000,
        "dur": (end - start) / 1000, "args": args,
    }  # fmt: skip


def _metadata(name: str, pid: int, tid: int, /, **args: Any) -> Event:
    return {"name": name, "ph": "M", "ts": 0, "pid": pid, "tid": tid, "args": args}

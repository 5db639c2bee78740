"""A profiler trace of any loop, turned into a profile: which operations a step consists of, and who waits for whom.

Launches are linked to what they put on the device by correlation id, all nodes of a graph to its one launch. A
synchronising call is told apart into what it waited, until the activity that ended last before it returned, and
its own time. Steps are cut where the host has waited for most of a step's device work, so that what the host does after
it (reading results, preparing the next batch, launching it) stands in one step.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchsim.learned import Copy, Kernels, LearnedProfile, Operation, Step, StreamWait, Wait, Work
from calibration.kineto import KINDS, Trace
from calibration.steps import DEVICE_KINDS, MIN_STEPS, RUNTIME, Steps, find_steps, launches_of, refuse

MAX_STEPS = 8
OUTLIER = 2.0  # A step this many times as long as the median is not a steady one.
SKEW_NS = 2_000  # Host and device clocks differ by about this much in a trace.
STALLED_NS = 30_000  # A blocking copy that starts this long after its call has waited for other work.
WAKE_NS = 50_000  # A waiting host is awake this long after what it waited for, at the latest.
SHORT_NS = 20_000  # Host work this short after a wait is hardly any.
POLLS = 3  # So many queries of an event, one after the other, are a wait.
QUEUED_GAP_NS = 1_000  # Between kernels of a busy stream, where a trace shows none.
LAUNCH_NS = 5_000  # From a launch call to its kernel on an idle device, where a trace shows none.
NO_PHASE = "host"

# Matrix products name their tiles, as nvjet_sm90_tst_256x128_64x4 and ampere_bf16_s16816gemm_bf16_128x256_ldg8; tiles
# this large in both directions are those of products that compute rather than read memory.
_TILE = re.compile(r"(?<!\d)(\d{2,3})x(\d{2,3})(?!\d)")
DENSE_TILE = 128

OP, ANNOTATION, KERNEL, MEMCPY, MEMSET = map(KINDS.index, ("op", "annotation", "kernel", "memcpy", "memset"))


@dataclass
class _Call:
    """A runtime call: when, and the activities that it launched."""

    start: int
    end: int
    name: str
    activities: NDArray[np.int64]
    begin: int = 0  # of the framework's operator that only this call is made for
    until: int = 0


@dataclass
class _Placed:
    """An operation with the time it began and ended at, and its last activity's index (-1: none)."""

    start: int
    end: int
    operation: Operation
    activity: int = -1
    awaits: int = -1  # the activity that a wait waited for


@dataclass
class _Burst:
    phase: str
    stream: int
    starts: list[int] = field(default_factory=list)
    end: int = 0
    device_ns: list[int] = field(default_factory=list)
    activity: int = -1


def learn(trace: Trace) -> LearnedProfile:
    """The profile of the loop in `trace`.

    Raises:
        InputError: no steps, no device events, several devices, overlapping steps: what is missing and how to record it.
    """
    steps = find_steps(trace)
    if len(steps.starts_ns) - 1 < MIN_STEPS:
        wanted = f"at least {MIN_STEPS}: trace more steps"
        refuse(trace, f"{len(steps.starts_ns) - 1} steps ({steps.found_by})", wanted)
    reading = _Reading(trace, steps)
    placed = reading.operations()
    learned = _steps(trace, steps, placed)
    return LearnedProfile(
        source=trace.source,
        device=trace.device_names[0] if trace.device_names else "unknown device",
        found_by=steps.found_by,
        steps_in_trace=len(steps.starts_ns) - 1,
        launch_ns=reading.launch_ns,
        graph_gap_ns=reading.graph_gap_ns,
        replay_error=0.0,
        dense=reading.dense(),
        notes=reading.notes,
        provenance={},
        steps=learned,
    )


class _Reading:
    """The host's calls in order, and what each of them means."""

    def __init__(self, trace: Trace, steps: Steps) -> None:
        self.trace, self.steps = trace, steps
        self.notes: list[str] = []
        self.launches = launches_of(trace)
        self._window = int(steps.starts_ns[0]), int(steps.starts_ns[-1])
        self._link()
        self._phases()
        host = np.isin(trace.kind, (OP, ANNOTATION, RUNTIME))
        self._events = np.sort(trace.start_ns[host])
        self._gaps()

    def _link(self) -> None:
        """Activities by correlation id, and in the order in which they ended."""
        trace = self.trace
        activity = np.flatnonzero(np.isin(trace.kind, DEVICE_KINDS))
        self._by_correlation = activity[np.argsort(trace.correlation[activity], kind="stable")]
        self._correlations = trace.correlation[self._by_correlation]
        # Of a graph only the end counts, which is the end of the last of its nodes to end.
        ended = activity[np.lexsort((trace.end_ns[activity], trace.correlation[activity]))]
        last = ended[np.append(np.diff(trace.correlation[ended]) != 0, True)] if ended.size else ended
        self._by_end = last[np.argsort(trace.end_ns[last], kind="stable")]
        self._ends = trace.end_ns[self._by_end]
        launched = dict(
            zip(trace.correlation[self.launches].tolist(), trace.start_ns[self.launches].tolist(), strict=True)
        )
        self._launched_ns = launched

    def _activities(self, correlation: int) -> NDArray[np.int64]:
        if correlation < 0:
            return self._by_correlation[:0]
        first = np.searchsorted(self._correlations, correlation)
        last = np.searchsorted(self._correlations, correlation, side="right")
        return self._by_correlation[first:last]

    def _phases(self) -> None:
        """The innermost annotation at every moment, steps' own excepted, as boundaries and names."""
        trace = self.trace
        mine = np.flatnonzero((trace.kind == ANNOTATION) & (trace.lane == self.steps.thread))
        step_starts = set(self.steps.starts_ns.tolist())
        self._moments: list[int] = [0]
        self._names: list[str] = [NO_PHASE]
        open_: list[tuple[int, str]] = []

        def close(until: int) -> None:
            while open_ and open_[-1][0] <= until:
                end, _ = open_.pop()
                self._moments.append(end)
                self._names.append(open_[-1][1] if open_ else NO_PHASE)

        for i in mine.tolist():
            start, end = int(trace.start_ns[i]), int(trace.end_ns[i])
            if start in step_starts:
                continue
            close(start)
            open_.append((end, trace.names[trace.name[i]]))
            self._moments.append(start)
            self._names.append(open_[-1][1])
        close(2**62)

    def phase_at(self, time: int) -> str:
        return self._names[bisect_right(self._moments, time) - 1]

    def events_between(self, start: int, end: int) -> int:
        return int(np.searchsorted(self._events, end) - np.searchsorted(self._events, start))

    def _gaps(self) -> None:
        """Medians of what a stream's kernels have between them, within graphs and in a queue; of a launch's latency."""
        trace = self.trace
        in_graph: list[int] = []
        queued: list[int] = []
        latency: list[int] = []
        ended: dict[int, int] = {}
        inside = self.launches[trace.start_ns[self.launches] >= self._window[0]][:20_000]
        for launch in inside.tolist():
            own = self._activities(int(trace.correlation[launch]))
            lane = int(trace.lane[own[0]])
            before = ended.get(lane)
            start = int(trace.start_ns[own].min())
            if len(own) > 1:
                order = own[np.argsort(trace.start_ns[own], kind="stable")]
                reached = np.maximum.accumulate(trace.end_ns[order])
                in_graph += (trace.start_ns[order][1:] - reached[:-1]).clip(min=0).tolist()
            elif before is not None and before > trace.end_ns[launch]:
                queued.append(start - before)
            elif before is not None and before < trace.start_ns[launch] and trace.kind[own[0]] != MEMCPY:
                latency.append(start - int(trace.start_ns[launch]))
            ended[lane] = int(trace.end_ns[own].max())
        self.graph_gap_ns = max(int(median(in_graph)), 0) if in_graph else 0
        self.queued_gap_ns = max(int(median(queued)), 0) if queued else QUEUED_GAP_NS
        self.launch_ns = max(int(median(latency)), 0) if latency else LAUNCH_NS

    def dense(self) -> float:
        """The share of kernels' time in those whose names tell of large tiles."""
        trace = self.trace
        kernels = trace.kind == KERNEL
        time = np.bincount(trace.name[kernels], (trace.end_ns - trace.start_ns)[kernels], len(trace.names))
        tiles = (_TILE.search(name) for name in trace.names)
        large = [tile is not None and min(int(tile[1]), int(tile[2])) >= DENSE_TILE for tile in tiles]
        return float(time[large].sum() / max(time.sum(), 1))

    def _calls(self) -> list[_Call]:
        """The runtime calls of the loop's thread, and of others those that launch; no call within another.

        Some profilers file calls under another number of the same thread: a thread without a single operator or annotation.
        """
        trace = self.trace
        begin, end = self._window
        runtime = trace.kind == RUNTIME
        launching = np.zeros(len(trace.kind), bool)
        launching[self.launches] = True
        named = np.unique(trace.lane[np.isin(trace.kind, (OP, ANNOTATION))])
        mine = runtime & ((trace.lane == self.steps.thread) | launching | ~np.isin(trace.lane, named))
        chosen = np.flatnonzero(mine & (trace.start_ns >= begin) & (trace.start_ns < end))
        others = {int(lane) for lane in np.unique(trace.lane[chosen])} & set(named.tolist()) - {self.steps.thread}
        if others:
            self.notes.append(f"{1 + len(others)} host threads launch; they are taken for one")
        calls: list[_Call] = []
        for i in chosen.tolist():
            start, until = int(trace.start_ns[i]), int(trace.end_ns[i])
            own = self._activities(int(trace.correlation[i]))
            if calls and start < calls[-1].end:
                if len(own) and not len(calls[-1].activities):
                    calls[-1].activities = own
                continue
            calls.append(_Call(start, until, trace.names[trace.name[i]], own, start, until))
        self._widen(calls)
        return calls

    def _widen(self, calls: list[_Call]) -> None:
        """Give each copy the framework's operator around it, where that makes no other launch."""
        trace = self.trace
        ops = np.flatnonzero((trace.kind == OP) & (trace.lane == self.steps.thread))
        reached = np.maximum.accumulate(trace.end_ns[ops]) if ops.size else ops
        outer = ops[1:][trace.start_ns[ops][1:] >= reached[:-1]] if ops.size else ops
        outer = np.concatenate((ops[:1], outer)) if ops.size else ops
        starts, ends = trace.start_ns[outer], trace.end_ns[outer]
        launching = [call.start for call in calls if len(call.activities)]
        for call in calls:
            if not len(call.activities) or trace.kind[call.activities[0]] != MEMCPY:
                continue
            around = int(np.searchsorted(starts, call.start, side="right")) - 1
            if around < 0 or ends[around] < call.end:
                continue
            first, last = int(starts[around]), int(ends[around])
            if bisect_left(launching, last) - bisect_left(launching, first) == 1:
                call.begin, call.until = first, last

    def operations(self) -> list[_Placed]:
        """All operations from the first step to the last, in the host's order."""
        placed: list[_Placed] = []
        burst: _Burst | None = None
        reached = self._window[0]
        calls = self._calls()
        i = 0

        def close() -> None:
            nonlocal burst
            if burst is not None:
                placed.append(self._burst(burst))
                burst = None

        while i < len(calls):
            call = calls[i]
            i += 1
            if call.end <= reached:
                continue  # within the operator of a copy before it
            kernels = len(call.activities) and self.trace.kind[call.activities[0]] not in (MEMCPY, MEMSET)
            if kernels and len(call.activities) == 1:
                stream, phase = int(self.trace.lane[call.activities[0]]), self.phase_at(call.start)
                if burst is None or (burst.stream, burst.phase) != (stream, phase):
                    close()
                    placed += self._work(reached, call.start)
                    burst = _Burst(phase, stream)
                burst.starts.append(call.start)
                burst.end = reached = call.end
                burst.device_ns.append(self._duration(call.activities) + self.queued_gap_ns)
                burst.activity = int(call.activities[0])
                continue
            own = self._one(call, calls, i)
            if own is None:
                continue
            made, until, i = own
            close()
            placed += self._work(reached, made[0].start)
            placed += made
            reached = max(reached, until)
        close()
        placed += self._work(reached, self._window[1])
        return list(self._ordered(placed))

    def _ordered(self, placed: list[_Placed]) -> Iterator[_Placed]:
        """The streams of waits between streams, which a trace does not name.

        The one that waits is the next that something else is put on, and it waits for the one used last before. Where
        the trace shows that it did not, the wait is left out.
        """
        before: _Placed | None = None
        for place, item in enumerate(placed):
            if item.activity >= 0:
                before = item
            operation = item.operation
            if not isinstance(operation, StreamWait):
                yield item
                continue
            on = -1 if before is None else int(self.trace.lane[before.activity])
            after = next((i for i in placed[place + 1 :] if i.activity >= 0 and _stream(i.operation) != on), None)
            if before is not None and after is not None and self._began(after) >= self._ended(before) - SKEW_NS:
                item.operation = operation.model_copy(update={"stream": _stream(after.operation), "on": on})
                yield item
            else:
                yield self._working(item.start, item.end)

    def _began(self, item: _Placed) -> int:
        own = self._activities(int(self.trace.correlation[item.activity]))
        return int(self.trace.start_ns[own].min())

    def _ended(self, item: _Placed) -> int:
        return int(self.trace.end_ns[item.activity])

    def _one(self, call: _Call, calls: list[_Call], after: int) -> tuple[list[_Placed], int, int] | None:
        """The operations that a call other than a kernel's launch stands for, their end, and the next call's index."""
        if len(call.activities):
            kinds = set(self.trace.kind[call.activities].tolist())
            if kinds <= {MEMCPY, MEMSET} and len(call.activities) == 1:
                return self._copy(call, calls, after)
            return [self._graph(call)], call.end, after
        if "Synchronize" in call.name:
            return [self._wait(call.start, call.end)], call.end, after
        if "StreamWaitEvent" in call.name:
            stream_wait = StreamWait(
                phase=self.phase_at(call.start), stream=0, on=0, host_ns=call.end - call.start, events=1
            )
            return [_Placed(call.start, call.end, stream_wait)], call.end, after
        if "EventRecord" in call.name:
            return [self._working(call.start, call.end)], call.end, after
        if "EventQuery" in call.name or "StreamQuery" in call.name:
            last = after
            while last < len(calls) and calls[last].name == call.name:
                last += 1
            if last - after + 1 >= POLLS:
                return [self._wait(call.start, calls[last - 1].end)], calls[last - 1].end, last
        return None

    def _burst(self, burst: _Burst) -> _Placed:
        bounds = [*burst.starts, burst.end]
        kernels = Kernels(
            phase=burst.phase,
            stream=burst.stream,
            host_ns=[b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True)],
            events=[self.events_between(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)],
            device_ns=burst.device_ns,
        )
        return _Placed(burst.starts[0], burst.end, kernels, burst.activity)

    def _graph(self, call: _Call) -> _Placed:
        trace, own = self.trace, call.activities
        span = int(trace.end_ns[own].max() - trace.start_ns[own].min())
        kernels = Kernels(
            phase=self.phase_at(call.start),
            stream=int(trace.lane[own[0]]),
            host_ns=[call.end - call.start],
            events=[1],
            device_ns=[span],
            nodes=len(own),
        )
        return _Placed(call.start, call.end, kernels, int(own[trace.end_ns[own].argmax()]))

    def _copy(self, call: _Call, calls: list[_Call], after: int) -> tuple[list[_Placed], int, int]:
        """A copy with the synchronising call that follows it in the same operator: then it blocks the host."""
        trace, own = self.trace, int(call.activities[0])
        name = trace.names[trace.name[own]]
        direction = "h2d" if "HtoD" in name else "d2h" if "DtoH" in name else "d2d"
        begin, until = call.begin, call.until
        sync = after < len(calls) and "Synchronize" in calls[after].name and calls[after].start < until
        blocks = sync or (
            direction != "d2d" and "Async" not in call.name and call.end >= int(trace.end_ns[own]) - SKEW_NS
        )
        last = calls[after].end if sync else call.end
        start_ns, end_ns = int(trace.start_ns[own]), int(trace.end_ns[own])
        # What the call's thread spent asleep: for the device to come to the copy, and to make it.
        asleep = (
            max(min(end_ns, last) - max(call.end if not sync else calls[after].start, call.start), 0) if blocks else 0
        )
        if "Pageable" in name and direction == "d2h":
            asleep = max(min(end_ns, last) - call.start, 0) if blocks or call.end >= end_ns - SKEW_NS else 0
            blocks = blocks or asleep > 0
        host_ns = max(until - begin - asleep, 0)
        made: list[_Placed] = []
        waits = blocks and direction == "h2d"
        stalled = start_ns - call.start > STALLED_NS
        if waits:
            if stalled and (behind := self._wait(begin, start_ns, up_to=own)).operation.waited_ns:  # type: ignore[union-attr]
                made.append(behind)
                begin = start_ns
            host_ns = max(until - begin - max(min(end_ns, until) - max(start_ns, begin), 0), 0)
        copy = Copy(
            phase=self.phase_at(call.start),
            stream=int(trace.lane[own]),
            direction=direction,  # type: ignore[arg-type]
            bytes=int(trace.bytes[own]),
            pinned="Pinned" in name,
            waits=waits,
            host_ns=host_ns,
            events=self.events_between(begin, until),
            device_ns=end_ns - start_ns,
        )
        made.append(_Placed(begin, until, copy, own))
        if blocks and direction == "d2h":
            wait = Wait(phase=copy.phase, lag=0, target=0, host_ns=0, events=0, waited_ns=asleep)
            made.append(_Placed(until, until, wait, awaits=own))
        return made, max(until, last), after + (1 if sync else 0)

    def _wait(self, start: int, end: int, up_to: int = -1) -> _Placed:
        """A wait for the activity that ended last before it returned, of those launched before it began."""
        trace = self.trace
        target = -1
        for place in range(int(np.searchsorted(self._ends, end + SKEW_NS, side="right")) - 1, -1, -1):
            candidate = int(self._by_end[place])
            launched = self._launched_ns.get(int(trace.correlation[candidate]))
            if candidate == up_to or launched is None or launched >= start:
                continue
            if target < 0:
                target = candidate
            # While later kernels run, what a host waits for is the copy of results that has just ended.
            if trace.end_ns[candidate] < end - WAKE_NS:
                break
            if "DtoH" in trace.names[trace.name[candidate]]:
                target = candidate
                break
        waited = min(max(int(trace.end_ns[target]) - start, 0), end - start) if target >= 0 else 0
        wait = Wait(
            phase=self.phase_at(start), lag=0, target=0, host_ns=end - start - waited, events=1, waited_ns=waited
        )
        return _Placed(start, end, wait, awaits=target)

    def _work(self, start: int, end: int) -> Iterator[_Placed]:
        """What the host computes in `[start, end)`, by phase."""
        while start < end:
            at = bisect_right(self._moments, start)
            until = min(end, self._moments[at]) if at < len(self._moments) else end
            if until > start:
                yield self._working(start, until)
            start = max(until, start + 1) if until <= start else until

    def _working(self, start: int, end: int) -> _Placed:
        work = Work(phase=self.phase_at(start), ns=end - start, events=self.events_between(start, end))
        return _Placed(start, end, work)

    def _duration(self, own: NDArray[np.int64]) -> int:
        return int(self.trace.end_ns[own[0]] - self.trace.start_ns[own[0]])


def _stream(operation: Operation) -> int:
    return operation.stream if isinstance(operation, Kernels | Copy) else -1


def _steps(trace: Trace, steps: Steps, placed: list[_Placed]) -> list[Step]:
    """Cut into steps, with the targets of waits as indices of operations."""
    cuts = _cuts(steps, placed)
    cycles = [placed[a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    where: dict[int, tuple[int, int]] = {}
    for number, cycle in enumerate(cycles):
        for position, item in enumerate(cycle):
            if item.activity >= 0:
                where[item.activity] = number, position
    made: list[tuple[int, list[Operation]]] = []
    for number, cycle in enumerate(cycles):
        operations: list[Operation] = []
        for item in cycle:
            operation = item.operation
            if isinstance(operation, Wait):
                at = where.get(item.awaits)
                if at is None or at[0] > number:
                    operation = Work(
                        phase=operation.phase, ns=operation.host_ns + operation.waited_ns, events=operation.events
                    )
                else:
                    operation = operation.model_copy(update={"lag": number - at[0], "target": at[1]})
            operations.append(operation)
        made.append((cycle[-1].end - cycle[0].start, operations))
    usual = median(ns for ns, _ in made[1:] or made)
    kept = [Step(traced_ns=ns, operations=operations) for ns, operations in made[1:] if ns <= OUTLIER * usual]
    return kept[:MAX_STEPS]


def _cuts(steps: Steps, placed: list[_Placed]) -> list[int]:
    """Indices at which a step begins: after the wait that keeps the host most, or where it is annotated to begin.

    That is the one with most device work before it, since the wait before, and most host work behind it, up to the next
    launch of kernels: a wait midway, whose result decides what to launch, is followed by that launch at once.
    """
    bounds = steps.starts_ns.tolist()
    ahead = _host_ahead(placed)
    cuts: list[int] = []
    position = since = 0
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        best, most = -1, 0
        first = position
        while position < len(placed) and placed[position].start < end:
            operation = placed[position].operation
            if isinstance(operation, Kernels):
                since += sum(operation.device_ns)
            elif isinstance(operation, Copy):
                since += operation.device_ns
            elif isinstance(operation, Wait):
                kept = since * (ahead[position] + SHORT_NS)
                if kept > most:
                    best, most = position + 1, kept
                since = 0
            position += 1
        cuts.append(best if best >= 0 else first)
    return cuts


def _host_ahead(placed: list[_Placed]) -> list[int]:
    """Of each operation, how long the host works after it until it next launches kernels, nanoseconds."""
    ahead = [0] * len(placed)
    reached = 0
    for i in range(len(placed) - 1, -1, -1):
        ahead[i] = reached
        operation = placed[i].operation
        if isinstance(operation, Kernels):
            reached = 0
        elif isinstance(operation, Work):
            reached += operation.ns
        elif isinstance(operation, Copy):
            reached += operation.host_ns
    return ahead

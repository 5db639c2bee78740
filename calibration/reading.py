"""What the host's calls mean: work, launches, copies and waits, in the host's order.

A synchronising call is told apart into what it waited, until the activity that ended last before it returned, and its
own time. A copy is taken with the framework's operator around it, and one that blocks the host with the wait for it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from batchsim.learned import Copy, Direction, Kernels, Operation, StreamWait, Wait, Work
from calibration.linked import MEMCPY, MEMCPY_OUT, MEMSET, Call, Linked

SKEW_NS = 2_000  # Host and device clocks differ by about this much in a trace.
STALLED_NS = 30_000  # A blocking copy that starts this long after its call may have waited for other work.
WAKE_NS = 50_000  # A waiting host is awake this long after what it waited for, at the latest.
ADJOINING_NS = 2_000  # A framework's wait for a copy from pageable memory follows it within this time.
LOOKED_AT = 1_000  # What a wait is for is among so many that ended last.
POLLS = 3  # So many queries of an event, one after the other, are a wait.


@dataclass
class Placed:
    """An operation with the time it began and ended at; its last activity, and the one that it waited for (-1:
    none)."""

    start: int
    end: int
    operation: Operation
    activity: int = -1
    awaits: int = -1
    first: int = -1

    def __post_init__(self) -> None:
        if self.first < 0:
            self.first = self.activity


@dataclass
class _Burst:
    phase: str
    stream: int
    starts: list[int] = field(default_factory=list)
    end: int = 0
    device_ns: list[int] = field(default_factory=list)
    activity: int = -1
    first: int = -1


class Reading:
    """Reads the calls of a linked trace."""

    def __init__(self, linked: Linked) -> None:
        self.linked, self.trace = linked, linked.trace

    def operations(self) -> list[Placed]:
        """All operations from the first step to the last, in the host's order."""
        placed: list[Placed] = []
        burst: _Burst | None = None
        reached = waited = self.linked.window[0]
        calls = self.linked.calls()
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
                stream, phase = int(self.trace.lane[call.activities[0]]), self.linked.phase_at(call.start)
                same = burst is not None and (burst.stream, burst.phase) == (stream, phase)
                if burst is None or not same or self._a_step_later(burst.starts[-1], call.start, waited):
                    close()
                    placed += self._work(reached, call.start)
                    burst = _Burst(phase, stream)
                burst.starts.append(call.start)
                burst.end = reached = call.end
                burst.device_ns.append(self._duration(call.activities) + self.linked.queued_gap_ns)
                burst.activity = int(call.activities[0])
                burst.first = burst.activity if burst.first < 0 else burst.first
                continue
            own = self._one(call, calls, i)
            if own is None:
                continue
            made, until, i = own
            close()
            if any(isinstance(item.operation, Wait) for item in made):
                waited = call.start
            placed += self._work(reached, made[0].start)
            placed += made
            reached = max(reached, until)
        close()
        placed += self._work(reached, self.linked.window[1])
        return list(self._ordered(placed))

    def _a_step_later(self, before: int, now: int, waited: int) -> bool:
        """Whether a step has begun in between, in a loop that has not waited since the one before it began."""
        bounds = self.linked.steps.starts_ns
        last = int(np.searchsorted(bounds, now, side="right")) - 1
        return bool(before < bounds[last] and (last == 0 or waited < bounds[last - 1]))

    def _ordered(self, placed: list[Placed]) -> Iterator[Placed]:
        """The streams of waits between streams, which a trace does not name.

        The one that waits is that of the next launch, and it waits for the stream used last before, of those others
        that were done when it began; several waits before one launch are for several streams. Where there is none, the
        wait is left out.
        """
        latest: dict[int, Placed] = {}  # of each stream, the one used last at the end
        following = _following(placed)
        waited: set[tuple[int, int]] = set()
        for place, item in enumerate(placed):
            if item.activity >= 0:
                stream = _stream(item.operation)
                latest.pop(stream, None)
                latest[stream] = item
            operation = item.operation
            if not isinstance(operation, StreamWait):
                yield item
                continue
            after = following[place]
            on = None if after is None else self._awaited(after, latest, waited)
            if after is None or on is None:
                yield self._working(item.start, item.end)
            else:
                waited.add((after.activity, on))
                item.operation = operation.model_copy(update={"stream": _stream(after.operation), "on": on})
                yield item

    def _awaited(self, after: Placed, latest: dict[int, Placed], waited: set[tuple[int, int]]) -> int | None:
        """The stream that `after` waits for."""
        began = self._began(after) + SKEW_NS
        for on in reversed(latest):
            if (
                on != _stream(after.operation)
                and (after.activity, on) not in waited
                and self._ended(latest[on]) <= began
            ):
                return on
        return None

    def _began(self, item: Placed) -> int:
        return int(self.trace.start_ns[self.linked.activities(int(self.trace.correlation[item.first]))].min())

    def _ended(self, item: Placed) -> int:
        return int(self.trace.end_ns[item.activity])

    def _one(self, call: Call, calls: list[Call], after: int) -> tuple[list[Placed], int, int] | None:
        """The operations that a call other than a kernel's launch stands for, their end, and the next call's index."""
        if len(call.activities):
            kinds = set(self.trace.kind[call.activities].tolist())
            if kinds <= {MEMCPY, MEMSET} and len(call.activities) == 1:
                return self._copy(call, calls, after)
            return [self._graph(call)], call.end, after
        if "Synchronize" in call.name:
            return [self._wait(call.start, call.end, event="Event" in call.name)], call.end, after
        if "StreamWaitEvent" in call.name:
            stream_wait = StreamWait(
                phase=self.linked.phase_at(call.start), stream=0, on=0, host_ns=call.end - call.start, events=1
            )
            return [Placed(call.start, call.end, stream_wait)], call.end, after
        if "EventRecord" in call.name:
            return [self._working(call.start, call.end)], call.end, after
        if "EventQuery" in call.name or "StreamQuery" in call.name:
            last = after
            while last < len(calls) and calls[last].name == call.name:
                last += 1
            if last - after + 1 >= POLLS:
                return [self._wait(call.start, calls[last - 1].end, event=True)], calls[last - 1].end, last
        return None

    def _burst(self, burst: _Burst) -> Placed:
        bounds = [*burst.starts, burst.end]
        kernels = Kernels(
            phase=burst.phase,
            stream=burst.stream,
            host_ns=[b - a for a, b in pairwise(bounds)],
            events=[self.linked.events_between(a, b) for a, b in pairwise(bounds)],
            device_ns=burst.device_ns,
        )
        return Placed(burst.starts[0], burst.end, kernels, burst.activity, first=burst.first)

    def _graph(self, call: Call) -> Placed:
        trace, own = self.trace, call.activities
        span = int(trace.end_ns[own].max() - trace.start_ns[own].min())
        kernels = Kernels(
            phase=self.linked.phase_at(call.start),
            stream=int(trace.lane[own[0]]),
            host_ns=[call.end - call.start],
            events=[1],
            device_ns=[span],
            nodes=len(own),
        )
        return Placed(call.start, call.end, kernels, int(own[trace.end_ns[own].argmax()]))

    def _copy(self, call: Call, calls: list[Call], after: int) -> tuple[list[Placed], int, int]:
        """A copy, with the synchronising call that follows it in the same operator: then it blocks the host.

        One to the device that blocks is an operation that returns when it is done; one from there a copy and a wait.
        """
        trace, own = self.trace, int(call.activities[0])
        name = trace.names[trace.name[own]]
        direction = _direction(name)
        begin, until = call.begin, call.until
        # The call that waits for the copy is in the same operator; without operators, right behind it.
        within = max(until, call.end + ADJOINING_NS if "Pageable" in name else 0)
        sync = after < len(calls) and "Synchronize" in calls[after].name and calls[after].start < within
        last = calls[after].end if sync else call.end
        until = max(until, last) if sync else until
        start_ns, end_ns = int(trace.start_ns[own]), int(trace.end_ns[own])
        made: list[Placed] = []
        asleep, waits, blocks = 0, False, False
        if direction == "h2d":
            waits = sync or ("Async" not in call.name and call.end >= end_ns - SKEW_NS)
            if waits and start_ns - call.start > STALLED_NS:
                behind = self._wait(begin, start_ns, up_to=own)
                if isinstance(behind.operation, Wait) and behind.operation.waited_ns:
                    made.append(behind)
                    begin = min(start_ns, until)
            asleep = max(min(end_ns, until) - max(start_ns, begin), 0) if waits else 0
        elif direction == "d2h":
            # A call that copies into pageable memory returns when the copy is done, whatever its name says.
            returns_late = "Pageable" in name and call.end >= end_ns - SKEW_NS
            blocks = sync or returns_late or ("Async" not in call.name and call.end >= end_ns - SKEW_NS)
            asleep_from = call.start if "Pageable" in name or not sync else calls[after].start
            asleep = max(min(end_ns, last) - asleep_from, 0) if blocks else 0
        copy = Copy(
            phase=self.linked.phase_at(call.start),
            stream=int(trace.lane[own]),
            direction=direction,
            bytes=int(trace.bytes[own]),
            pinned="Pinned" in name,
            waits=waits,
            host_ns=max(until - begin - asleep, 0),
            events=self.linked.events_between(begin, until),
            device_ns=end_ns - start_ns,
        )
        made.append(Placed(begin, until, copy, own))
        if blocks:
            wait = Wait(phase=copy.phase, lag=0, target=0, host_ns=0, events=0, waited_ns=asleep)
            made.append(Placed(until, until, wait, awaits=own))
        return made, max(until, last), after + (1 if sync else 0)

    def _wait(self, start: int, end: int, up_to: int = -1, *, event: bool = False) -> Placed:
        """A wait for the activity that ended last before it returned, of those launched before it began.

        A wait for an event that has happened long ago tells nothing of which; results are what a loop waits for.
        """
        trace = self.trace
        target = -1
        last = int(np.searchsorted(self.linked.ends, end + SKEW_NS, side="right")) - 1
        for candidate in self.linked.by_end[max(last - LOOKED_AT, 0) : last + 1][::-1].tolist():
            if candidate == up_to or self._launched(candidate) >= start:
                continue
            if target < 0:
                target = candidate
            # While later kernels run, what a host waits for is the copy of results that has just ended.
            if trace.end_ns[candidate] < end - WAKE_NS:
                break
            if MEMCPY_OUT in trace.names[trace.name[candidate]]:
                target = candidate
                break
        if event and target >= 0 and trace.end_ns[target] <= start:
            target = self._results(start, target)
        waited = min(max(int(trace.end_ns[target]) - start, 0), end - start) if target >= 0 else 0
        wait = Wait(
            phase=self.linked.phase_at(start), lag=0, target=0, host_ns=end - start - waited, events=1, waited_ns=waited
        )
        return Placed(start, end, wait, awaits=target)

    def _results(self, start: int, otherwise: int) -> int:
        """The copy of results that ended last before `start`, of those launched before."""
        trace, out = self.trace, self.linked.copies_out
        last = int(np.searchsorted(trace.end_ns[out], start, side="right")) - 1
        for candidate in out[max(last - LOOKED_AT, 0) : last + 1][::-1].tolist():
            if self._launched(candidate) < start:
                return int(candidate)
        return otherwise

    def _launched(self, activity: int) -> int:
        """When an activity was launched; what the trace has no launch of was so before the recording."""
        return int(self.linked.launched_ns.get(int(self.trace.correlation[activity]), -1))

    def _work(self, start: int, end: int) -> Iterator[Placed]:
        """What the host computes in `[start, end)`, by phase."""
        while start < end:
            at = bisect_right(self.linked.moments, start)
            until = min(end, self.linked.moments[at]) if at < len(self.linked.moments) else end
            if until > start:
                yield self._working(start, until)
            start = max(until, start + 1) if until <= start else until

    def _working(self, start: int, end: int) -> Placed:
        work = Work(phase=self.linked.phase_at(start), ns=end - start, events=self.linked.events_between(start, end))
        return Placed(start, end, work)

    def _duration(self, own: NDArray[np.int64]) -> int:
        return int(self.trace.end_ns[own[0]] - self.trace.start_ns[own[0]])


def _following(placed: list[Placed]) -> list[Placed | None]:
    """Of each operation, the next after it that puts something on a stream."""
    following: list[Placed | None] = []
    near: Placed | None = None
    for item in reversed(placed):
        following.append(near)
        near = item if item.activity >= 0 else near
    return following[::-1]


def _direction(name: str) -> Direction:
    return "h2d" if "HtoD" in name else "d2h" if "DtoH" in name else "d2d"


def _stream(operation: Operation) -> int:
    return operation.stream if isinstance(operation, Kernels | Copy) else -1

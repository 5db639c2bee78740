"""A trace with what belongs together linked: launches and what they put on the device, moments and phases."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from calibration.kineto import KINDS, Trace
from calibration.steps import ACTIVITIES, RUNTIME, Steps, launches_of

QUEUED_GAP_NS = 1_000  # Between kernels of a busy stream, where a trace shows none.
LAUNCH_NS = 5_000  # From a launch call to its kernel on an idle device, where a trace shows none.
SAMPLED = 20_000  # So many launches tell what is usual.
NO_PHASE = "host"
MEMCPY_OUT = "DtoH"

# Matrix products name their tiles, as nvjet_sm90_tst_256x128_64x4 and ampere_bf16_s16816gemm_bf16_128x256_ldg8; tiles
# this large in both directions are those of products that compute rather than read memory.
_TILE = re.compile(r"(?<!\d)(\d{2,3})x(\d{2,3})(?!\d)")
DENSE_TILE = 128
_ATTENTION = re.compile(r"attn|attention|flash|fmha|sdpa|paged|_decode_", re.IGNORECASE)

OP, ANNOTATION, KERNEL, MEMCPY, MEMSET = map(KINDS.index, ("op", "annotation", "kernel", "memcpy", "memset"))


@dataclass
class Call:
    """A runtime call: when, and the activities that it launched.

    `begin` to `until` is the framework's operator around it, where that makes no other launch.
    """

    start: int
    end: int
    name: str
    activities: NDArray[np.int64]
    begin: int
    until: int


class Linked:
    """A trace's steps with their calls in order, phases, and what of a launch or a gap is usual."""

    def __init__(self, trace: Trace, steps: Steps) -> None:
        self.trace, self.steps = trace, steps
        self.notes: list[str] = []
        self.launches = launches_of(trace)
        self.window = int(steps.starts_ns[0]), int(steps.starts_ns[-1])
        self._link()
        self._phases()
        host = np.isin(trace.kind, (OP, ANNOTATION, RUNTIME))
        self._events = np.sort(trace.start_ns[host])
        self._usual()

    def _link(self) -> None:
        """Activities by correlation id, and in the order in which they ended."""
        trace = self.trace
        activity = np.flatnonzero(np.isin(trace.kind, ACTIVITIES))
        self._by_correlation = activity[np.argsort(trace.correlation[activity], kind="stable")]
        self._correlations = trace.correlation[self._by_correlation]
        # Of a graph only the end counts, which is the end of the last of its nodes to end.
        ended = activity[np.lexsort((trace.end_ns[activity], trace.correlation[activity]))]
        last = ended[np.append(np.diff(trace.correlation[ended]) != 0, True)] if ended.size else ended
        self.by_end = last[np.argsort(trace.end_ns[last], kind="stable")]
        self.ends = trace.end_ns[self.by_end]
        out = [MEMCPY_OUT in trace.names[name] for name in trace.name[self.by_end]]
        self.copies_out = self.by_end[np.array(out, bool)]
        launched = dict(
            zip(trace.correlation[self.launches].tolist(), trace.start_ns[self.launches].tolist(), strict=True)
        )
        self.launched_ns = launched

    def activities(self, correlation: int) -> NDArray[np.int64]:
        if correlation < 0:
            return self._by_correlation[:0]
        first = np.searchsorted(self._correlations, correlation)
        last = np.searchsorted(self._correlations, correlation, side="right")
        return self._by_correlation[first:last]

    def _phases(self) -> None:
        """The innermost annotation at every moment, steps' own excepted, as boundaries and names."""
        trace = self.trace
        mine = np.flatnonzero((trace.kind == ANNOTATION) & (trace.lane == self.steps.thread))
        self.moments: list[int] = [0]
        self._names: list[str] = [NO_PHASE]
        open_: list[tuple[int, str]] = []

        def close(until: int) -> None:
            while open_ and open_[-1][0] <= until:
                end, _ = open_.pop()
                self.moments.append(end)
                self._names.append(open_[-1][1] if open_ else NO_PHASE)

        for i in mine.tolist():
            start, end = int(trace.start_ns[i]), int(trace.end_ns[i])
            if i in self.steps.marks:
                continue
            close(start)
            open_.append((end, trace.names[trace.name[i]]))
            self.moments.append(start)
            self._names.append(open_[-1][1])
        close(2**62)

    def phase_at(self, time: int) -> str:
        return self._names[bisect_right(self.moments, time) - 1]

    def events_between(self, start: int, end: int) -> int:
        return int(np.searchsorted(self._events, end) - np.searchsorted(self._events, start))

    def _usual(self) -> None:
        """Medians of what a stream's kernels have between them, within graphs and in a queue; of a launch's latency."""
        trace = self.trace
        in_graph: list[int] = []
        queued: list[int] = []
        latency: list[int] = []
        ended: dict[int, int] = {}  # where the last activity of a stream was a kernel
        reached = 0  # by all streams: a kernel that starts late on an idle one may have waited for another
        inside = self.launches[trace.start_ns[self.launches] >= self.window[0]][:SAMPLED]
        for launch in inside.tolist():
            own = self.activities(int(trace.correlation[launch]))
            lane = int(trace.lane[own[0]])
            before, idle = ended.pop(lane, None), reached < trace.start_ns[launch]
            reached = max(reached, int(trace.end_ns[own].max()))
            if trace.kind[own[0]] != KERNEL and len(own) == 1:
                continue
            start = int(trace.start_ns[own].min())
            if len(own) > 1:
                order = own[np.argsort(trace.start_ns[own], kind="stable")]
                done = np.maximum.accumulate(trace.end_ns[order])
                in_graph += (trace.start_ns[order][1:] - done[:-1]).clip(min=0).tolist()
            elif before is not None and before > trace.end_ns[launch]:
                queued.append(start - before)
            elif before is not None and idle:
                latency.append(start - int(trace.start_ns[launch]))
            ended[lane] = int(trace.end_ns[own].max())
        self.graph_gap_ns = max(int(median(in_graph)), 0) if in_graph else 0
        # A longer gap is a wait for another stream.
        self.queued_gap_ns = min(max(int(median(queued)), 0), QUEUED_GAP_NS) if queued else QUEUED_GAP_NS
        self.launch_ns = max(int(median(latency)), 0) if latency else LAUNCH_NS

    def dense(self) -> float:
        """The share of kernels' time in those whose names tell of large tiles."""
        trace = self.trace
        tiles = (_TILE.search(name) for name in trace.names)
        large = [tile is not None and min(int(tile[1]), int(tile[2])) >= DENSE_TILE for tile in tiles]
        return self._share(large)

    def attention(self) -> float:
        """The share of kernels' time in attention, whose contexts grow as sequences do, by their names."""
        return self._share([_ATTENTION.search(name) is not None for name in self.trace.names])

    def _share(self, names: Sequence[bool]) -> float:
        trace = self.trace
        kernels = trace.kind == KERNEL
        time = np.bincount(trace.name[kernels], (trace.end_ns - trace.start_ns)[kernels], len(trace.names))
        return float(time[np.array(names, bool)].sum() / max(time.sum(), 1))

    def calls(self) -> list[Call]:
        """The runtime calls of the loop's thread, and of others those that launch; no call within another.

        Some profilers file calls under another number of the same thread: a thread without a single operator or
        annotation.
        """
        trace = self.trace
        begin, end = self.window
        runtime = trace.kind == RUNTIME
        launching = np.zeros(len(trace.kind), bool)
        launching[self.launches] = True
        named = np.unique(trace.lane[np.isin(trace.kind, (OP, ANNOTATION))])
        mine = runtime & ((trace.lane == self.steps.thread) | launching | ~np.isin(trace.lane, named))
        chosen = np.flatnonzero(mine & (trace.start_ns >= begin) & (trace.start_ns < end))
        others = {int(lane) for lane in np.unique(trace.lane[chosen])} & set(named.tolist()) - {self.steps.thread}
        if others:
            self.notes.append(f"{1 + len(others)} host threads launch; they are taken for one")
        calls: list[Call] = []
        for i in chosen.tolist():
            start, until = int(trace.start_ns[i]), int(trace.end_ns[i])
            own = self.activities(int(trace.correlation[i]))
            if calls and start < calls[-1].end:
                if len(own) and not len(calls[-1].activities):
                    calls[-1].activities = own
                continue
            calls.append(Call(start, until, trace.names[trace.name[i]], own, start, until))
        self._widen(calls)
        return calls

    def _widen(self, calls: list[Call]) -> None:
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

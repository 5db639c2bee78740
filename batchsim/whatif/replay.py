"""Learned steps replayed on a host and in-order streams: a max-plus recurrence, evaluated for many draws at once.

The rules are those of the simulated machine (`batchsim.machine`): what a call puts on a stream starts when the call has
reached the device and the stream is free, and a wait ends when its target has. Times are arrays with an entry a draw,
nanoseconds as floats; a test holds the replay equal to the simulated machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchsim.learned import Copy, Kernels, Operation, StreamWait, Wait, Work

Array = NDArray[np.float64]

GRAPH_CALL_NS = 8_000  # Host time of launching a graph, its nodes apart.
FLOOR = 0.1  # However many events were recorded meanwhile, this share of a traced time is the host's own.
# The phase of host work that a schedule adds; its times are assumptions, not traced, and have no events in them.
ADDED = "added"
LAUNCHED = "launched one by one"


@dataclass(frozen=True)
class Scales:
    """How traced times become true ones; arrays have an entry a draw.

    Host time of an operation: `host` x (traced - `event_ns` x events); of a graph's launch, which a profiler makes many
    times as long, `host` x (`GRAPH_CALL_NS` + `node_ns` x nodes); of what a schedule adds, `host` x `added` x what is
    assumed. Times of phases in `known` are untraced ones, true but for a factor `timer`. All are divided by
    `host_speed`. Device time: `device` x (traced - `gap_ns` x nodes of a graph). `throttle`: how much longer dense
    matrix products take on a device that never rests than on one that does.
    """

    host: Array
    event_ns: Array
    node_ns: Array
    device: Array
    gap_ns: Array
    added: Array
    throttle: Array
    timer: Array
    known: frozenset[str] = frozenset()
    host_speed: float = 1.0

    def host_of(self, phase: str, ns: float | Array, events: int | Array) -> Array:
        traced = np.asarray(ns, float)[..., None]
        if phase in self.known:
            return np.asarray(self.timer / self.host_speed * traced)
        if phase == ADDED:
            return np.asarray(self.host * self.added / self.host_speed * traced)
        if phase == LAUNCHED:  # half as uncertain, as a logarithm
            return np.asarray(self.host * np.sqrt(self.added) / self.host_speed * traced)
        net = traced - self.event_ns * np.asarray(events, float)[..., None]
        return np.asarray(self.host / self.host_speed * np.maximum(net, FLOOR * traced))

    def graph_of(self, graph: Kernels) -> Array:
        if graph.phase in self.known:
            return self.host_of(graph.phase, graph.host_ns[0], 0)
        return self.host / self.host_speed * (GRAPH_CALL_NS + self.node_ns * (graph.nodes or 0))

    def device_of(self, ns: float | Array, nodes: int = 0) -> Array:
        traced = np.asarray(ns, float)[..., None]
        # The gaps that a profiler makes cannot be all of a graph's time.
        return self.device * np.maximum(traced - self.gap_ns * nodes, 0.5 * traced)


class Moment(NamedTuple):
    """One activity of one draw: what it is (a phase of the host, or what is on a stream), nanoseconds."""

    step: int
    lane: str
    what: str
    start_ns: float
    end_ns: float


@dataclass(frozen=True)
class Replayed:
    """`step_ns`: a step; `busy`: the share of it in which kernels or graphs were under way; `host_ns`: what the host
    worked in it, waits left out; arrays with an entry a draw. `moments` of one draw, where asked for."""

    step_ns: Array
    busy: Array
    host_ns: Array
    moments: tuple[Moment, ...] = ()


def replay(
    steps: Sequence[Sequence[Operation]], scales: Scales, launch_ns: int, *, moments_of: int | None = None
) -> Replayed:
    """Replay `steps` twice over, and tell of the second time; of draw `moments_of` with all that happened."""
    run = _Run(scales, launch_ns, moments_of)
    for _ in range(2):
        began, run.busy, run.worked, run.moments = run.now, np.zeros_like(run.now), np.zeros_like(run.now), []
        for operations in steps:
            run.step(operations)
    lasted = run.now - began
    return Replayed(
        lasted / len(steps), np.minimum(run.busy / lasted, 1.0), run.worked / len(steps), tuple(run.moments)
    )


class _Run:
    def __init__(self, scales: Scales, launch_ns: int, moments_of: int | None) -> None:
        self.scales = scales
        self.launch_ns = launch_ns
        self.now = np.zeros_like(scales.host)
        self.busy = np.zeros_like(scales.host)
        self.worked = np.zeros_like(scales.host)
        self.moments: list[Moment] = []
        self._moments_of = moments_of
        self._free: dict[int, Array] = {}  # when each stream has nothing left to do
        self._kernels_end = np.zeros_like(scales.host)
        self._ends: list[dict[int, Array]] = []  # of each step, when what an operation put on a stream ends

    def step(self, operations: Sequence[Operation]) -> None:
        """One step; the host goes on from where it is."""
        self._ends.append({})
        for place, operation in enumerate(operations):
            if isinstance(operation, Work):
                self._spend(operation.phase, self.scales.host_of(operation.phase, operation.ns, operation.events))
            elif isinstance(operation, Kernels):
                self._launch(place, operation)
            elif isinstance(operation, Copy):
                self._copy(place, operation)
            elif isinstance(operation, StreamWait):
                self._spend(operation.phase, self._call(operation))
                free = np.maximum(self._free_at(operation.stream), self._free_at(operation.on))
                self._free[operation.stream] = free
            else:
                self._wait(operation)

    def _free_at(self, stream: int) -> Array:
        return self._free.get(stream, np.zeros_like(self.now))

    def _call(self, operation: Copy | StreamWait | Wait) -> Array:
        return self.scales.host_of(operation.phase, operation.host_ns, operation.events)

    def _spend(self, what: str, ns: Array) -> None:
        self._tell("host", what, self.now, self.now + ns)
        self.now = self.now + ns
        self.worked = self.worked + ns

    def _tell(self, lane: str, what: str, start: Array, end: Array) -> None:
        if (draw := self._moments_of) is not None and end[draw] > start[draw]:
            self.moments.append(Moment(len(self._ends) - 1, lane, what, float(start[draw]), float(end[draw])))

    def _launch(self, place: int, kernels: Kernels) -> None:
        """The first kernel starts when it is launched and the stream is free; the host goes on after the last call."""
        scales, free = self.scales, self._free_at(kernels.stream)
        if kernels.nodes is not None:
            self._spend(kernels.phase, scales.graph_of(kernels))
            start = np.maximum(self.now, free)
            end = start + scales.device_of(kernels.device_ns[0], kernels.nodes)
        else:
            host = scales.host_of(kernels.phase, np.array(kernels.host_ns, float), np.array(kernels.events))
            device = scales.device_of(np.array(kernels.device_ns, float))
            launched = self.now + self.launch_ns + np.cumsum(host, axis=0) - host
            from_here = np.cumsum(device[::-1], axis=0)[::-1]  # a kernel and all that follow
            start = np.maximum(launched[0], free)
            end = np.maximum((launched + from_here).max(axis=0), free + from_here[0])
            self._spend(kernels.phase, host.sum(axis=0))
        self.busy = self.busy + np.maximum(end - np.maximum(start, self._kernels_end), 0)
        self._kernels_end = np.maximum(self._kernels_end, end)
        self._put(place, kernels.stream, "graph" if kernels.nodes else "kernels", start, end)

    def _copy(self, place: int, copy: Copy) -> None:
        self._spend(copy.phase, self._call(copy))
        start = np.maximum(self.now, self._free_at(copy.stream))
        end = start + copy.device_ns
        self._put(place, copy.stream, copy.direction, start, end)
        if copy.waits:
            self._tell("host", "wait", self.now, end)
            self.now = end

    def _put(self, place: int, stream: int, what: str, start: Array, end: Array) -> None:
        self._free[stream] = self._ends[-1][place] = end
        self._tell(f"stream {stream}", what, start, end)

    def _wait(self, wait: Wait) -> None:
        if wait.lag < len(self._ends) and (target := self._ends[-1 - wait.lag].get(wait.target)) is not None:
            until = np.maximum(self.now, target)
            self._tell("host", "wait", self.now, until)
            self.now = until
        self._spend(wait.phase, self._call(wait))

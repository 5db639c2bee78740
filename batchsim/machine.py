"""The simulated machine: host threads, in-order streams, events, copy engines and a bounded launch queue.

It carries out the operations that a schedule yields in virtual time, integer nanoseconds, at costs that a
`Costs` gives. What it does is what CUDA documents: operations of one stream run in order; `StreamWait` waits for
the latest recording made before it; a copy needs the engine of its direction; a launch finds the queue full when
`launch_queue_depth` commands are waiting to start, and then blocks the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import simpy

from batchsim.batching.continuous import Batch, ContinuousBatcher
from batchsim.operations import (
    CopyIn, CopyOut, Forward, Program, Record, Schedule, StreamWait, Synchronize, Update,
)  # fmt: skip
from batchsim.records import Lane, Observer, Span

Process = Generator[simpy.Event, Any, Any]


@dataclass(frozen=True, slots=True)
class Burst:
    """Kernels launched one after the other: what each costs the host, and for how long each runs on the device.

    A captured graph is a burst of one. The burst takes as many places of the launch queue as it has kernels,
    until the last of them has started.
    """

    host_ns: tuple[int, ...]
    device_ns: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Latencies:
    """Fixed delays of the machine, nanoseconds.

    `launch_ns`: from the start of a launch call to the earliest start of its kernel; `copy_ns`: the same for a
    copy; `event_ns`: from an event's completion to the start of a stream that waited for it; `gap_ns`: between
    the end of one command and the start of the next on a busy stream; `wake_up_ns`: from an event's completion
    to the return of the host's synchronising call.
    """

    launch_ns: int = 0
    copy_ns: int = 0
    event_ns: int = 0
    gap_ns: int = 0
    wake_up_ns: int = 0


class Costs(Protocol):
    """What things cost on the simulated machine, nanoseconds."""

    @property
    def latencies(self) -> Latencies: ...

    def host_ns(self, phase: str, batch: Batch | None) -> int:
        """Host time of one phase; for `schedule` the batch that it formed. `launch` is asked of `launch`."""
        ...

    def copy_ns(self, phase: str, batch: Batch) -> int:
        """Device time of the copy `copy_in` or `copy_out` for this batch."""
        ...

    def launch(self, batch: Batch) -> Sequence[Burst]:
        """The launches of one forward, in order."""
        ...


@dataclass(slots=True)
class _Command:
    """Something on a stream. Kernels carry a burst, copies a duration; events are signalled or waited for."""

    ready_ns: int = 0
    duration_ns: int = 0
    burst: Burst | None = None
    places: int = 0
    opens: bool = False
    closes: bool = False
    engine: simpy.Resource | None = None
    signal: simpy.Event | None = None
    wait: simpy.Event | None = None
    lane: Lane = "compute"
    stage: str = ""
    step: int = -1


class SimulatedMachine:
    """Runs programs against a batcher; every span of activity is told to `observe` as soon as its end is known."""

    def __init__(
        self,
        batcher: ContinuousBatcher,
        costs: Costs,
        observe: Observer,
        *,
        host_threads: int = 1,
        launch_queue_depth: int = 1024,
    ) -> None:
        self.env = simpy.Environment(initial_time=0)
        self.batcher = batcher
        self.costs = costs
        self.observe = observe
        self.launch_queue_depth = launch_queue_depth
        self._threads = simpy.Resource(self.env, capacity=host_threads)
        self._engines = {"copy_in": simpy.Resource(self.env), "copy_out": simpy.Resource(self.env)}
        self._streams = {name: _Stream(self, name) for name in ("compute", "copy_in", "copy_out")}
        self._events: dict[str, simpy.Event] = {}
        self._queued = 0
        self._space: simpy.Event | None = None

    def run(self, program: Program) -> int:
        """Run `program` to its end and return the time that took, nanoseconds."""
        done = self.env.process(self._drive(program))
        self.env.run(until=done)
        return int(self.env.now)

    def _drive(self, program: Program) -> Process:
        env, costs, observe = self.env, self.costs, self.observe
        thread = self._threads.request()
        yield thread
        answer: Batch | None = None
        while True:
            try:
                operation = program.send(answer)
            except StopIteration:
                break
            answer = None
            kind = type(operation)
            if kind is Synchronize:
                thread = yield from self._synchronize(operation, thread)
                continue
            if kind is Forward:
                yield from self._launch(operation)
                continue
            if kind is Schedule:
                batch = answer = self.batcher.schedule()
            else:
                batch = getattr(operation, "batch", None)
                if kind is Update:
                    self.batcher.update(operation.batch)
                elif kind is CopyIn or kind is CopyOut:
                    yield from self._copy(operation)
                elif kind is Record:
                    event = self._events[operation.event] = env.event()
                    self._streams[operation.stream].push(_Command(signal=event))
                elif kind is StreamWait:
                    self._streams[operation.stream].push(_Command(wait=self._events[operation.event]))
            cost = costs.host_ns(operation.phase, batch)
            now = env.now
            observe(Span(-1 if batch is None else batch.index, "host", operation.phase, now, now + cost))
            if cost:
                yield env.timeout(cost)
        self._threads.release(thread)

    def _copy(self, operation: CopyIn | CopyOut) -> Process:
        phase, batch = operation.phase, operation.batch
        yield from self._take_places(1, batch.index)
        self._streams[operation.stream].push(
            _Command(
                ready_ns=self.env.now + self.costs.latencies.copy_ns,
                duration_ns=self.costs.copy_ns(phase, batch),
                places=1,
                engine=self._engines[phase],
                lane="copy_in" if phase == "copy_in" else "copy_out",
                stage=phase,
                step=batch.index,
            )
        )

    def _launch(self, operation: Forward) -> Process:
        batch = operation.batch
        bursts = self.costs.launch(batch)
        stage = "prefill" if batch.prefill_tokens else "decode"
        last = len(bursts) - 1
        for position, burst in enumerate(bursts):
            places = len(burst.device_ns)
            yield from self._take_places(places, batch.index)
            start = self.env.now
            self._streams["compute"].push(
                _Command(
                    ready_ns=start + self.costs.latencies.launch_ns,
                    burst=burst,
                    places=places,
                    opens=position == 0,
                    closes=position == last,
                    stage=stage,
                    step=batch.index,
                )
            )
            cost = sum(burst.host_ns)
            self.observe(Span(batch.index, "host", "launch", start, start + cost))
            if cost:
                yield self.env.timeout(cost)

    def _take_places(self, places: int, step: int) -> Process:
        """Block the host until the launch queue has room (a burst longer than the queue waits for an empty one)."""
        start = self.env.now
        while self._queued and self._queued + places > self.launch_queue_depth:
            self._space = self.env.event()
            yield self._space
        self._queued += places
        if self.env.now > start:
            self.observe(Span(step, "host", "wait", start, self.env.now))

    def free_places(self, places: int) -> None:
        """Give places of the launch queue back: their commands have started."""
        self._queued -= places
        if self._space is not None and not self._space.triggered:
            self._space.succeed()

    def _synchronize(self, operation: Synchronize, thread: Any) -> Process:
        """Wait for an event as CUDA's synchronising calls do; the interpreter is free for others meanwhile."""
        start = self.env.now
        event = self._events[operation.event]
        self._threads.release(thread)
        call = self.env.timeout(self.costs.host_ns("wait", operation.batch))
        if not event.processed:
            yield event
            if self.costs.latencies.wake_up_ns:
                yield self.env.timeout(self.costs.latencies.wake_up_ns)
        if not call.processed:
            yield call
        thread = self._threads.request()
        yield thread
        self.observe(Span(operation.batch.index, "host", "wait", start, self.env.now))
        return thread


class _Stream:
    """An in-order queue of commands, and the process that works it off."""

    def __init__(self, machine: SimulatedMachine, name: str) -> None:
        self.machine = machine
        self.name = name
        self.commands: deque[_Command] = deque()
        self._more = machine.env.event()
        self._end_ns = -1_000_000_000  # long ago: the first command pays no gap
        self._opened_ns = 0
        self._gap_ns = 0
        machine.env.process(self._work())

    def push(self, command: _Command) -> None:
        self.commands.append(command)
        if not self._more.triggered:
            self._more.succeed()

    def _work(self) -> Process:
        env = self.machine.env
        while True:
            if not self.commands:
                self._more = env.event()
                yield self._more
            command = self.commands.popleft()
            if command.wait is not None:
                if not command.wait.triggered:
                    yield command.wait
                    yield env.timeout(self.machine.costs.latencies.event_ns)
            elif command.signal is not None:
                command.signal.succeed()
            elif command.burst is not None:
                yield from self._run_burst(command, command.burst)
            else:
                yield from self._copy(command)

    def _copy(self, command: _Command) -> Process:
        env = self.machine.env
        assert command.engine is not None
        yield from self._until(max(command.ready_ns, self._end_ns + self.machine.costs.latencies.gap_ns))
        with command.engine.request() as engine:
            yield engine
            self.machine.free_places(command.places)
            start = env.now
            end = start + command.duration_ns
            self.machine.observe(Span(command.step, command.lane, command.stage, start, end))
            yield from self._until(end)
        self._end_ns = env.now

    def _run_burst(self, command: _Command, burst: Burst) -> Process:
        """Run the kernels of a burst: each starts when it has been launched and its predecessor has ended."""
        env = self.machine.env
        gap = self.machine.costs.latencies.gap_ns if command.opens else 0
        yield from self._until(max(command.ready_ns, self._end_ns + gap))
        start = end = env.now
        if command.opens:
            self._opened_ns, self._gap_ns = start, 0
        else:
            self._gap_ns += start - self._end_ns
        ready = command.ready_ns
        for host_ns, device_ns in zip(burst.host_ns, burst.device_ns, strict=True):
            if ready > end:
                self._gap_ns += ready - end
                end = ready
            last_start = end
            end += device_ns
            ready += host_ns
        yield from self._until(last_start)
        self.machine.free_places(command.places)
        yield from self._until(end)
        self._end_ns = end
        if command.closes:
            span = Span(command.step, "compute", command.stage, self._opened_ns, end, self._gap_ns)
            self.machine.observe(span)

    def _until(self, time_ns: int) -> Process:
        env = self.machine.env
        if time_ns > env.now:
            yield env.timeout(time_ns - env.now)

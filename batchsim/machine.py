"""The simulated machine: host threads, in-order streams, events, copy engines and a bounded launch queue.

It carries out the operations that a schedule yields in virtual time, integer nanoseconds, at costs that a
`Costs` gives. What it does is what CUDA documents: operations of one stream run in order; `StreamWait` waits for
the latest recording made before it; a copy needs the engine of its direction; a launch finds the queue full when
`launch_queue_depth` commands are waiting to start, and then blocks the host.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import simpy

from batchsim.batching.batch import AnyBatch, BatchLog, Batcher
from batchsim.operations import (
    BuildInputs, CopyIn, CopyOut, Forward, KernelSync, Program, Record, Schedule, StreamWait, Synchronize, Update,
)  # fmt: skip
from batchsim.records import Lane, Observer, Span
from batchsim.streams import (
    Burst, Copy, Device, Environment, HostThreads, Kernels, Latencies, LaunchQueue, Recording, Stream, Wait,
    Waiting,
)  # fmt: skip

__all__ = ["Burst", "Costs", "Latencies", "SimulatedMachine"]

COPIES = (CopyIn, CopyOut)


class Costs(Protocol):
    """What things cost on the simulated machine, nanoseconds."""

    @property
    def latencies(self) -> Latencies: ...

    def host_ns(self, phase: str, batch: AnyBatch | None) -> int:
        """Host time of one phase; for `schedule` the batch that it formed. `launch` is asked of `launch`."""
        ...

    def copy_ns(self, phase: str, batch: AnyBatch) -> int:
        """Device time of the copy `copy_in` or `copy_out` for this batch."""
        ...

    def launch(self, batch: AnyBatch, kernels: KernelSync) -> Sequence[Burst]:
        """The launches of one forward, in order; its kernels synchronised by `kernels`."""
        ...


class SimulatedMachine:
    """Runs programs against a batcher.

    `observe` is told of host spans and copies as they begin, and of forwards as they end; `log` of decisions and
    updates. `env` is the environment of machines that serve together, each with a batcher of its own (`deliver`) or all
    of them with one; `device` and `threads` are what they share, where they share a device and the host's threads.
    """

    def __init__(
        self,
        batcher: Batcher,
        costs: Costs,
        observe: Observer,
        *,
        host_threads: int = 1,
        launch_queue_depth: int = 1024,
        log: BatchLog | None = None,
        env: Environment | None = None,
        device: Device | None = None,
        threads: HostThreads | None = None,
    ) -> None:
        self.env = env or Environment()
        self.log = log
        self.batcher = batcher
        self.costs = costs
        self.observe = observe
        self._threads = threads or HostThreads(self.env, host_threads)
        self._queue = LaunchQueue(self.env, launch_queue_depth)
        self._streams = {
            name: Stream(self.env, costs.latencies, self._queue, observe) for name in ("compute", "copy_in", "copy_out")
        }
        self._device = device or Device()
        self._recordings: dict[str, Recording] = {}
        self._in_flight = 0
        self._delivered: simpy.Event | None = None
        self.expects_more = False  # whether requests may still be delivered
        self._effects: dict[type, Callable[[Any], AnyBatch | None]] = {
            BuildInputs: self._build_inputs, CopyIn: self._copy, CopyOut: self._copy,
            Record: self._record, StreamWait: self._stream_wait,
        }  # fmt: skip

    def run(self, program: Program) -> int:
        """Run `program` to its end and return the time that took, nanoseconds."""
        self.env.run(until=self.start(program))
        return self.env.now

    def start(self, program: Program) -> simpy.Process:
        """Begin to run `program`; the process ends with the time that it took."""
        return simpy.Process(self.env, self._drive(program))

    def deliver(self, request: Any) -> None:
        """A request arrives now, by a router."""
        self.batcher.submit(request)
        self._wake()

    def close(self) -> None:
        """No request will be delivered any more."""
        self.expects_more = False
        self._wake()

    def _wake(self) -> None:
        """Let a host go on that waits for a router."""
        if self._delivered is not None:
            self._delivered.succeed()
            self._delivered = None

    def _drive(self, program: Program) -> Generator[simpy.Event, Any, int]:
        """One host thread: every operation takes effect as it begins, and then costs its time."""
        env, host_ns, observe, effects = self.env, self.costs.host_ns, self.observe, self._effects
        yield from self._threads.take()
        answer: AnyBatch | None = None
        while True:
            try:
                operation = program.send(answer)
            except StopIteration:
                break
            answer = None
            if isinstance(operation, Forward):
                yield from self._launch(operation)
                continue
            if isinstance(operation, Synchronize):
                yield from self._synchronize(operation)
                continue
            if isinstance(operation, Schedule):
                answer = yield from self._decide()
                continue
            if isinstance(operation, Update):
                yield from self._update(operation)
                continue
            if isinstance(operation, COPIES) and not self._queue.take(1):
                yield from self._await_places(1, operation)
            batch = effects[type(operation)](operation)
            phase, start = operation.phase, env.now
            cost = host_ns(phase, batch)
            observe(Span(-1 if batch is None else batch.index, "host", phase, start, start + cost))
            if cost and not env.skip(cost):
                yield simpy.Timeout(env, cost)
        self._threads.give()
        return env.now

    def _decide(self) -> Generator[simpy.Event, Any, AnyBatch | None]:
        """Ask the batcher; where there is nothing to run and nothing to read, wait for the next request."""
        env, batcher = self.env, self.batcher
        batch: AnyBatch | None = batcher.schedule(env.now)
        start = env.now
        while batch is None and not self._in_flight:
            if not self.expects_more and (batcher.next_decision_ns or 0) <= env.now:
                break
            yield from self._await_request()
            batch = batcher.schedule(env.now)
        if env.now > start:
            self.observe(Span(-1, "host", "no_requests", start, env.now))
            if self.log is not None:
                self.log.idle(start)
        start = env.now
        if batch is not None and self.log is not None:
            self.log.scheduled(batch, start, batcher)
        cost = self.costs.host_ns("schedule", batch)
        self.observe(Span(-1 if batch is None else batch.index, "host", "schedule", start, start + cost))
        if cost and not env.skip(cost):
            yield simpy.Timeout(env, cost)
        return batch

    def _await_request(self) -> Waiting:
        self._threads.give()
        if (due_ns := self.batcher.next_decision_ns) is None:
            self._delivered = simpy.Event(self.env)
            yield self._delivered
        elif not self.env.skip(due_ns - self.env.now):
            yield simpy.Timeout(self.env, due_ns - self.env.now)
        yield from self._threads.take()

    def _build_inputs(self, operation: BuildInputs) -> AnyBatch:
        return operation.batch

    def _copy(self, operation: CopyIn | CopyOut) -> AnyBatch:
        batch = operation.batch
        lane: Lane = "copy_in" if isinstance(operation, CopyIn) else "copy_out"
        ready_ns = self.env.now + self.costs.latencies.copy_ns
        command = Copy(batch.index, lane, ready_ns, self.costs.copy_ns(lane, batch), self._device.engines[lane])
        self._streams[operation.stream].push(command)
        return batch

    def _record(self, operation: Record) -> None:
        recording = self._recordings[operation.event] = Recording()
        self._streams[operation.stream].push(recording)

    def _stream_wait(self, operation: StreamWait) -> None:
        self._streams[operation.stream].push(Wait(self._recordings[operation.event]))

    def _update(self, operation: Update) -> Waiting:
        env, batch = self.env, operation.batch
        self._in_flight -= 1
        self.batcher.update(batch)
        start, cost = env.now, self.costs.host_ns("update", batch)
        if self.log is not None:
            self.log.updated(batch, start + cost)
        self.observe(Span(batch.index, "host", "update", start, start + cost))
        if cost and not env.skip(cost):
            yield simpy.Timeout(env, cost)

    def _launch(self, operation: Forward) -> Waiting:
        env, compute, launch_ns = self.env, self._streams["compute"], self.costs.latencies.launch_ns
        batch = operation.batch
        self._in_flight += 1
        bursts = self.costs.launch(batch, operation.kernels)
        shared = self._device.compute
        last = len(bursts) - 1
        for position, burst in enumerate(bursts):
            if not self._queue.take(len(burst.device_ns)):
                yield from self._await_places(len(burst.device_ns), operation)
            start, cost = env.now, burst.launch_ns
            command = Kernels(
                batch.index, batch.stage, start + launch_ns, burst, position == 0, position == last, shared
            )
            compute.push(command)
            self.observe(Span(batch.index, "host", "launch", start, start + cost))
            if cost and not env.skip(cost):
                yield simpy.Timeout(env, cost)

    def _await_places(self, places: int, operation: CopyIn | CopyOut | Forward) -> Waiting:
        """The host is blocked until it has taken places of the launch queue."""
        start = self.env.now
        yield from self._queue.wait(places)
        if self.env.now > start:
            self.observe(Span(operation.batch.index, "host", "wait", start, self.env.now))

    def _synchronize(self, operation: Synchronize) -> Waiting:
        """Wait for an event as CUDA's synchronising calls do; the interpreter is free for others meanwhile."""
        env, recording, start = self.env, self._recordings[operation.event], self.env.now
        end = start + self.costs.host_ns("wait", operation.batch)
        self._threads.give()
        if not recording.settled:
            yield recording.settlement(env)
        if (completed := recording.completed_ns) > start:
            end = max(end, completed + self.costs.latencies.wake_up_ns)
        if end > env.now and not env.skip(end - env.now):
            yield simpy.Timeout(env, end - env.now)
        yield from self._threads.take()
        self.observe(Span(operation.batch.index, "host", "wait", start, env.now))

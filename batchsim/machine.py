"""The simulated machine: host threads, in-order streams, events, copy engines and a bounded launch queue.

It carries out the operations that a schedule yields in virtual time, integer nanoseconds, at costs that a
`Costs` gives. What it does is what CUDA documents: operations of one stream run in order; `StreamWait` waits for
the latest recording made before it; a copy needs the engine of its direction; a launch finds the queue full when
`launch_queue_depth` commands are waiting to start, and then blocks the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import simpy

from batchsim.batching.continuous import Batch, ContinuousBatcher
from batchsim.operations import (
    BuildInputs, CopyIn, CopyOut, Forward, KernelSync, Program, Record, Schedule, StreamWait, Synchronize, Update,
)  # fmt: skip
from batchsim.records import Lane, Observer, Span
from batchsim.streams import (
    Burst, Copy, Engine, Environment, HostThreads, Kernels, Latencies, LaunchQueue, Waiting, Recording, Stream, Wait,
)  # fmt: skip

__all__ = ["Burst", "Costs", "Latencies", "SimulatedMachine"]

COPIES = (CopyIn, CopyOut)


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

    def launch(self, batch: Batch, kernels: KernelSync) -> Sequence[Burst]:
        """The launches of one forward, in order; its kernels synchronised by `kernels`."""
        ...


class SimulatedMachine:
    """Runs programs against a batcher.

    `observe` is told of host spans and copies as they begin, and of forwards as they end.
    """

    def __init__(
        self,
        batcher: ContinuousBatcher,
        costs: Costs,
        observe: Observer,
        *,
        host_threads: int = 1,
        launch_queue_depth: int = 1024,
    ) -> None:
        self.env = Environment()
        self.batcher = batcher
        self.costs = costs
        self.observe = observe
        self._threads = HostThreads(self.env, host_threads)
        self._queue = LaunchQueue(self.env, launch_queue_depth)
        self._streams = {
            name: Stream(self.env, costs.latencies, self._queue, observe) for name in ("compute", "copy_in", "copy_out")
        }
        self._engines: dict[Lane, Engine] = {"copy_in": Engine(), "copy_out": Engine()}
        self._recordings: dict[str, Recording] = {}
        self._effects: dict[type, Callable[[Any], Batch | None]] = {
            Schedule: self._schedule, BuildInputs: self._build_inputs, CopyIn: self._copy, CopyOut: self._copy,
            Record: self._record, StreamWait: self._stream_wait, Update: self._update,
        }  # fmt: skip

    def run(self, program: Program) -> int:
        """Run `program` to its end and return the time that took, nanoseconds."""
        self.env.run(until=simpy.Process(self.env, self._drive(program)))
        return self.env.now

    def _drive(self, program: Program) -> Waiting:
        """One host thread: every operation takes effect as it begins, and then costs its time."""
        env, host_ns, observe, effects = self.env, self.costs.host_ns, self.observe, self._effects
        yield from self._threads.take()
        answer: Batch | None = None
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
            if isinstance(operation, COPIES) and not self._queue.take(1):
                yield from self._await_places(1, operation)
            batch = effects[type(operation)](operation)
            if isinstance(operation, Schedule):
                answer = batch
            phase, start = operation.phase, env.now
            cost = host_ns(phase, batch)
            observe(Span(-1 if batch is None else batch.index, "host", phase, start, start + cost))
            if cost and not env.skip(cost):
                yield simpy.Timeout(env, cost)
        self._threads.give()

    def _schedule(self, _operation: Schedule) -> Batch | None:
        return self.batcher.schedule()

    def _build_inputs(self, operation: BuildInputs) -> Batch:
        return operation.batch

    def _copy(self, operation: CopyIn | CopyOut) -> Batch:
        batch = operation.batch
        lane: Lane = "copy_in" if isinstance(operation, CopyIn) else "copy_out"
        ready_ns = self.env.now + self.costs.latencies.copy_ns
        command = Copy(batch.index, lane, ready_ns, self.costs.copy_ns(lane, batch), self._engines[lane])
        self._streams[operation.stream].push(command)
        return batch

    def _record(self, operation: Record) -> None:
        recording = self._recordings[operation.event] = Recording()
        self._streams[operation.stream].push(recording)

    def _stream_wait(self, operation: StreamWait) -> None:
        self._streams[operation.stream].push(Wait(self._recordings[operation.event]))

    def _update(self, operation: Update) -> Batch:
        self.batcher.update(operation.batch)
        return operation.batch

    def _launch(self, operation: Forward) -> Waiting:
        env, compute, launch_ns = self.env, self._streams["compute"], self.costs.latencies.launch_ns
        batch = operation.batch
        bursts = self.costs.launch(batch, operation.kernels)
        stage = "prefill" if batch.prefill_tokens else "decode"
        last = len(bursts) - 1
        for position, burst in enumerate(bursts):
            if not self._queue.take(len(burst.device_ns)):
                yield from self._await_places(len(burst.device_ns), operation)
            start, cost = env.now, burst.launch_ns
            compute.push(Kernels(batch.index, stage, start + launch_ns, burst, position == 0, position == last))
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

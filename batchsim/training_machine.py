"""The simulated machine that trains: one host, in-order streams, a copy engine and a bounded launch queue.

Its device's side is that of the serving machine (`batchsim.streams`), and so are the rules that it keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import simpy

from batchsim.batching.accumulation import MicroBatch
from batchsim.operations import Record, StreamWait
from batchsim.records import Observer, Span
from batchsim.streams import Burst, Copy, Engine, Environment, Kernels, Latencies, LaunchQueue, Recording, Stream, Wait
from batchsim.training_operations import (
    LAUNCHED,
    Backward,
    CopyIn,
    Forward,
    NextMicroBatch,
    OptimizerStep,
    Prepare,
    ReadLoss,
    Synchronize,
    TrainingProgram,
)

Process = Iterator[simpy.Event]
PREFETCHED = 2  # micro-batches that a loader has ready at most


class Costs(Protocol):
    """What things cost on the simulated machine, nanoseconds."""

    @property
    def latencies(self) -> Latencies: ...

    def host_ns(self, phase: str, micro: MicroBatch | None) -> int: ...
    def copy_ns(self, micro: MicroBatch) -> int: ...
    def forward(self, micro: MicroBatch) -> Sequence[Burst]: ...
    def backward(self, micro: MicroBatch) -> Sequence[Burst]: ...
    def optimizer(self) -> tuple[int, Sequence[Burst], int]: ...


class TrainingMachine:
    """Runs a program over micro-batches.

    `observe` is told of host spans and copies as they begin, and of what the compute stream ran as it ends; `update`
    ends an optimiser step. With a `loader`, another thread or process prepares up to two micro-batches ahead.
    """

    def __init__(
        self, batches: Iterator[MicroBatch], costs: Costs, observe: Observer, *, launch_queue_depth: int = 1024,
        loader: bool = False,
    ) -> None:  # fmt: skip
        self.env = Environment()
        self.costs, self.observe = costs, observe
        self._batches = batches
        self._queue = LaunchQueue(self.env, launch_queue_depth)
        self._streams = {
            name: Stream(self.env, costs.latencies, self._queue, observe) for name in ("compute", "copy_in")
        }
        self._engine = Engine()
        self._recordings: dict[str, Recording] = {}
        self._loader = Loader() if loader else None

    def run(self, program: TrainingProgram) -> int:
        """Run `program` to its end and return the time that took, nanoseconds."""
        self.env.run(until=simpy.Process(self.env, self._drive(program)))  # type: ignore[arg-type]
        return self.env.now

    def _drive(self, program: TrainingProgram) -> Process:
        answer: MicroBatch | None = None
        while True:
            try:
                operation = program.send(answer)
            except StopIteration:
                return
            answer = None
            match operation:
                case NextMicroBatch():
                    answer = next(self._batches, None)
                    if answer is not None:
                        yield from self._work("schedule", answer)
                case Prepare(micro=micro):
                    yield from self._prepare(micro)
                case CopyIn(micro=micro, stream=stream):
                    yield from self._places(1, micro)
                    ready_ns = self.env.now + self.costs.latencies.copy_ns
                    copy = Copy(micro.index, "copy_in", ready_ns, self.costs.copy_ns(micro), self._engine)
                    self._streams[stream].push(copy)
                    yield from self._work("copy_in", micro)
                case Forward(micro=micro):
                    yield from self._launch(operation.phase, micro, self.costs.forward(micro))
                case Backward(micro=micro):
                    yield from self._launch(operation.phase, micro, self.costs.backward(micro))
                case OptimizerStep(micro=micro):
                    before_ns, bursts, after_ns = self.costs.optimizer()
                    yield from self._spend(operation.phase, micro, before_ns)
                    yield from self._launch(operation.phase, micro, bursts)
                    yield from self._spend(operation.phase, micro, after_ns)
                case Record(event=event, stream=stream):
                    recording = self._recordings[event] = Recording()
                    self._streams[stream].push(recording)
                    yield from self._work("record", None)
                case StreamWait(stream=stream, event=event):
                    self._streams[stream].push(Wait(self._recordings[event]))
                    yield from self._work("stream_wait", None)
                case Synchronize(event=event, micro=micro):
                    yield from self._synchronize(self._recordings[event], micro)
                case ReadLoss(micro=micro):
                    yield from self._work("read_loss", micro)
                    if micro.last:
                        self.observe(Span(micro.index, "host", "update", self.env.now, self.env.now))

    def _work(self, phase: str, micro: MicroBatch | None) -> Process:
        yield from self._spend(phase, micro, self.costs.host_ns(phase, micro))

    def _spend(self, phase: str, micro: MicroBatch | None, cost: int) -> Process:
        env = self.env
        self.observe(Span(-1 if micro is None else micro.index, "host", phase, env.now, env.now + cost))
        if cost and not env.skip(cost):
            yield simpy.Timeout(env, cost)

    def _prepare(self, micro: MicroBatch) -> Process:
        cost = self.costs.host_ns("prepare", micro)
        if self._loader is not None:
            cost = self._loader.take(self.env.now, cost)
        yield from self._spend("prepare", micro, cost)

    def _launch(self, phase: str, micro: MicroBatch, bursts: Sequence[Burst]) -> Process:
        """Each burst is on its way as its launching begins."""
        env, compute, launch_ns = self.env, self._streams["compute"], self.costs.latencies.launch_ns
        last = len(bursts) - 1
        for i, burst in enumerate(bursts):
            yield from self._places(len(burst.device_ns), micro)
            compute.push(Kernels(micro.index, LAUNCHED[phase], env.now + launch_ns, burst, i == 0, i == last))
            yield from self._spend(phase, micro, burst.launch_ns)

    def _places(self, places: int, micro: MicroBatch) -> Process:
        """Places of the launch queue, which the host may have to wait for."""
        if not self._queue.take(places):
            start = self.env.now
            yield from self._queue.wait(places)
            if self.env.now > start:
                self.observe(Span(micro.index, "host", "wait", start, self.env.now))

    def _synchronize(self, recording: Recording, micro: MicroBatch) -> Process:
        env, start = self.env, self.env.now
        end = start + self.costs.host_ns("wait", micro)
        if not recording.settled:
            yield recording.settlement(env)
        if recording.completed_ns > start:
            end = max(end, recording.completed_ns + self.costs.latencies.wake_up_ns)
        if end > env.now and not env.skip(end - env.now):
            yield simpy.Timeout(env, end - env.now)
        self.observe(Span(micro.index, "host", "wait", start, env.now))


class Loader:
    """Prepares micro-batches ahead, one after the other, as long as fewer than `PREFETCHED` are ready."""

    def __init__(self) -> None:
        self._ready_ns = 0
        self._taken_ns = [0] * PREFETCHED

    def take(self, now_ns: int, cost_ns: int) -> int:
        """How long the host waits for the next one, of which the preparation takes `cost_ns`."""
        self._ready_ns = max(self._ready_ns, self._taken_ns[0]) + cost_ns
        waits = max(self._ready_ns - now_ns, 0)
        self._taken_ns = [*self._taken_ns[1:], now_ns + waits]
        return waits

"""The real machine: carries out a schedule's operations with torch streams and events, and times them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch

from batchsim.batching.batch import AnyBatch, Batcher
from batchsim.operations import (
    BuildInputs,
    CopyIn,
    CopyOut,
    Forward,
    Operation,
    Program,
    Record,
    Schedule,
    StreamWait,
    Synchronize,
    Update,
)
from batchsim.records import Lane, Span
from calibration.executor.streams import CpuStreams, CudaStreams, Streams

# A sleep may end that much late; the rest of the time until a decision is due, the host polls the clock.
SLEEP_SLACK_NS = 200_000

Move = tuple[torch.Tensor, torch.Tensor]  # destination and source of a copy


class Worker(Protocol):
    """A model on the device: what it takes to carry out one batch, told of each operation in order."""

    def build_inputs(self, operation: BuildInputs) -> None:
        """Write the batch's inputs into the pinned buffer of its slot."""
        ...

    def copy_in(self, operation: CopyIn) -> Move:
        """What brings them to the device."""
        ...

    def forward(self, operation: Forward) -> None:
        """Launch the forward, with a stamp at its beginning and its end, on the current stream."""
        ...

    def copy_out(self, operation: CopyOut) -> Move:
        """What brings stamps and results to the host."""
        ...

    def update(self, operation: Update) -> tuple[str, int, int]:
        """Read the results and tell the batcher; returns the forward's stage and its two stamps."""
        ...


class Machine:
    """One run of a program: drives it against a batcher, and keeps the times.

    Copies of the first `timed_steps` steps are timed; later ones have no span. `decided` is told of each batch right
    after the batcher has formed it. `gap_ns` is what is known of the launch gaps in a forward (None: nothing). A host
    that has nothing to do sleeps until `poll_ns` before it has to decide, and from then on polls the clock.
    """

    def __init__(
        self, streams: Streams, batcher: Batcher, worker: Worker, *, timed_steps: int, gap_ns: int | None,
        decided: Callable[[Any], None] | None = None, poll_ns: int = SLEEP_SLACK_NS,
    ) -> None:  # fmt: skip
        self.streams, self.batcher, self.worker = streams, batcher, worker
        self.timed_steps, self.gap_ns, self.decided, self.poll_ns = timed_steps, gap_ns, decided, poll_ns
        self.steps = 0
        self.host: list[tuple[int, str, int, int]] = []
        self._in_flight = 0
        self._forwards: list[tuple[int, str, int, int]] = []
        self._copies: list[tuple[int, Lane]] = []
        self._handlers: dict[type, Callable[[Any], None]] = {
            BuildInputs: self._build_inputs, CopyIn: self._copy_in, Forward: self._forward, CopyOut: self._copy_out,
            Record: self._record, StreamWait: self._stream_wait, Synchronize: self._synchronize, Update: self._update,
        }  # fmt: skip

    def run(self, program: Program) -> tuple[int, int]:
        """Carry out all operations; the moment of the start on the host's clock, and the nanoseconds it took."""
        with torch.inference_mode(), _no_collection():
            self.streams.begin()
            try:
                return self._drive(program)
            finally:
                self.streams.finish()

    def spans(self, start_ns: int) -> list[Span]:
        """All spans of the run, sorted, relative to its start."""
        host_time = self.streams.host_time
        spans = [Span(step, "host", phase, a - start_ns, b - start_ns) for step, phase, a, b in self.host]
        for step, stage, begin, end in self._forwards:
            a, b = host_time(begin) - start_ns, host_time(end) - start_ns
            spans.append(Span(step, "compute", stage, a, b, None if stage == "prefill" else self.gap_ns))
        for (step, lane), (a, b) in zip(self._copies, self.streams.copies(), strict=True):
            spans.append(Span(step, lane, lane, a - start_ns, b - start_ns))
        return sorted(spans, key=lambda span: (span.start_ns, span.end_ns))

    def _drive(self, program: Program) -> tuple[int, int]:
        handlers, host, clock = self._handlers, self.host, time.perf_counter_ns
        answer: AnyBatch | None = None
        step = -1
        start = now = clock()
        while True:
            try:
                operation: Operation = program.send(answer)
            except StopIteration:
                return start, now - start
            if type(operation) is Schedule:
                answer, now = self._decide(start, now)
                step = -1 if answer is None else answer.index
            else:
                answer = None
                handlers[type(operation)](operation)
                if (batch := cast(AnyBatch | None, getattr(operation, "batch", None))) is not None:
                    step = batch.index
            then, now = now, clock()
            host.append((step, operation.phase, then, now))

    def _decide(self, start: int, now: int) -> tuple[AnyBatch | None, int]:
        """Ask the batcher; where there is nothing to run and nothing to read, wait until it is to be asked again.

        Returns its batch, and when it was asked for that.
        """
        batcher, began = self.batcher, now
        batch = batcher.schedule(now - start)
        while batch is None and not self._in_flight and (due_ns := batcher.next_decision_ns) is not None:
            if start + due_ns <= now:
                break  # it is held back by others, which will never end
            now = _wait_until(start + due_ns, self.poll_ns)
            batch = batcher.schedule(now - start)
        if now > began:
            self.host.append((-1, "no_requests", began, now))
        if batch is not None:
            self.steps += 1
            if self.decided is not None:
                self.decided(batch)
        return batch, now

    def _build_inputs(self, operation: BuildInputs) -> None:
        self._in_flight += 1
        self.worker.build_inputs(operation)

    def _copy_in(self, operation: CopyIn) -> None:
        self._copy(operation, "copy_in", *self.worker.copy_in(operation))

    def _forward(self, operation: Forward) -> None:
        self.streams.launch(lambda: self.worker.forward(operation))

    def _copy_out(self, operation: CopyOut) -> None:
        self._copy(operation, "copy_out", *self.worker.copy_out(operation))

    def _copy(self, operation: CopyIn | CopyOut, lane: Lane, destination: torch.Tensor, source: torch.Tensor) -> None:
        timed = self.steps <= self.timed_steps
        self.streams.copy(operation.stream, destination, source, timed)
        if timed:
            self._copies.append((operation.batch.index, lane))

    def _record(self, operation: Record) -> None:
        self.streams.record(operation.event, operation.stream)

    def _stream_wait(self, operation: StreamWait) -> None:
        self.streams.wait(operation.stream, operation.event)

    def _synchronize(self, operation: Synchronize) -> None:
        self.streams.synchronize(operation.event)

    def _update(self, operation: Update) -> None:
        stage, begin, end = self.worker.update(operation)
        self._in_flight -= 1
        self._forwards.append((operation.batch.index, stage, begin, end))


def streams_of(device: torch.device, timed_steps: int, *, sleeps: bool = False) -> Streams:
    """Streams for runs on `device`, of which `timed_steps` steps' copies are timed; `sleeps` as `CudaStreams`."""
    if device.type != "cuda":
        return CpuStreams()
    from calibration.executor.kernels import stamp

    return CudaStreams(device, stamp, 2 * timed_steps, sleeps=sleeps)


def _wait_until(deadline_ns: int, poll_ns: int) -> int:
    """Return at `deadline_ns` of the clock, or a little later; the time then."""
    clock = time.perf_counter_ns
    if (early := deadline_ns - clock() - poll_ns) > 0:
        time.sleep(early / 1e9)
    while (now := clock()) < deadline_ns:
        pass
    return now


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector out of the run. A run makes no cycles: what piles up is what it keeps."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

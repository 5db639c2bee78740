"""The real machine: carries out a schedule's operations with torch streams and events, and times them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch

from batchsim.batching.continuous import Batch, ContinuousBatcher
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
from batchsim.records import Lane, Observer, Span
from batchsim.request_log import Decision, RequestLog
from calibration.executor.buffers import Int64
from calibration.executor.decoder import Decoder
from calibration.executor.inputs import InputBuilder, Plan
from calibration.executor.streams import CpuStreams, CudaStreams, Streams

OnTokens = Callable[[Int64, Int64], None]

# A sleep may end that much late; the rest of the time until a request arrives, the host polls the clock.
SLEEP_SLACK_NS = 200_000


@dataclass(frozen=True, slots=True)
class Execution:
    """What a run did: spans sorted by start, in nanoseconds since the run began.

    The host spans tile `[0, total_ns)` without a hole; in `no_requests` the host waits for one to arrive. Device
    spans may end a little after it, by the error of the clocks' alignment (microseconds). `tokens` maps each request
    to its tokens, if they were asked for.
    """

    spans: list[Span]
    total_ns: int
    steps: int
    output_tokens: int
    wasted_tokens: int
    tokens: dict[int, list[int]] | None = None


class Executor:
    """Runs programs on a decoder's device, with CUDA graphs for decoding batches or kernel by kernel.

    On the CPU each operation is complete when it returns and `graphs` is ignored: the same tokens, no overlap.
    Copies of the first `timed_steps` steps of a run are timed; later ones have no span.

    Why two slots are enough. A program touches a slot again only after it has synchronised on the copy out of the
    slot's last step and read its tokens (`async_`: Synchronize and Update of N precede the Schedule of N+2; `sync`:
    of N+1, with one slot). The copy out of N follows the forward of N, and that the copy in of N. So no pinned buffer
    is written while a copy of it is in flight, no device input while a forward reads it, no sampled token before it
    was copied out and read. The compute stream alone orders the rest: sampled tokens of N that N+1 carries over, the
    activations, and cache blocks passed on while their last owner still computes a wasted token. An event is recorded
    anew only after the wait on its last recording was enqueued.
    """

    def __init__(self, decoder: Decoder, *, graphs: bool, timed_steps: int = 4096) -> None:
        self.decoder, self.graphs = decoder, graphs and decoder.device.type == "cuda"
        self.timed_steps = timed_steps
        self.streams: Streams = (
            CudaStreams(decoder.device, decoder.ops.stamp, 2 * timed_steps)
            if decoder.device.type == "cuda"
            else CpuStreams()
        )

    def run(
        self, program: Program, batcher: ContinuousBatcher, *, observe: Observer | None = None,
        on_tokens: OnTokens | None = None, keep_tokens: bool = False, log: RequestLog | None = None,
    ) -> Execution:  # fmt: skip
        """Drive `program` to its end. Warm the decoder up, and capture its graphs, before a run that counts.

        Requests arrive as the clock passes their `arrival_ns`, counted from the start of the run. `on_tokens` gets the
        request ids and tokens of each batch as its results are read (arrays that it may keep). After the run `observe`
        gets the spans, in order, and `log` is told of decisions, made when their phase began, and updates. Raises
        ValueError if a request does not fit the decoder or if the batcher's blocks are not the decoder's.
        """
        if batcher.block_size != self.decoder.block_size:
            raise ValueError(
                f"block_size is {batcher.block_size} in the batcher, {self.decoder.block_size} in the decoder"
            )
        run = _Run(self, batcher, on_tokens, {} if keep_tokens else None, logs=log is not None)
        with torch.inference_mode(), _no_collection():
            self.streams.begin()
            try:
                start_ns, total_ns = run.drive(program)
            finally:
                self.streams.finish()
        spans = run.spans(start_ns)
        if log is not None:
            run.tell(log, start_ns)
        if observe:
            for span in spans:
                observe(span)
        return Execution(spans, total_ns, run.steps, batcher.output_tokens, batcher.wasted_tokens, run.tokens)


class _Run:
    """One run's state: the plans in flight and the times taken so far."""

    def __init__(
        self, executor: Executor, batcher: ContinuousBatcher, on_tokens: OnTokens | None,
        tokens: dict[int, list[int]] | None, *, logs: bool,
    ) -> None:  # fmt: skip
        self.executor, self.batcher, self.on_tokens, self.tokens = executor, batcher, on_tokens, tokens
        self.decoder, self.streams, self.buffers = executor.decoder, executor.streams, executor.decoder.buffers
        preempts = not batcher.reserve and batcher.pool.num_blocks is not None
        self.builder = InputBuilder(executor.decoder, preempts=preempts)
        self.steps = 0
        self._plans: dict[int, Plan] = {}
        self._host: list[tuple[int, str, int, int]] = []
        self._forwards: list[tuple[int, str, int, int]] = []
        self._copies: list[tuple[int, Lane]] = []
        # What a log is told, kept until the run has ended: that costs a step less than a microsecond.
        self._logs = logs
        self._decisions: list[Decision] = []
        self._reads: list[Int64] = []
        self._handlers: dict[type, Callable[[Any], None]] = {
            BuildInputs: self._build_inputs, CopyIn: self._copy_in, Forward: self._forward, CopyOut: self._copy_out,
            Record: self._record, StreamWait: self._stream_wait, Synchronize: self._synchronize, Update: self._update,
        }  # fmt: skip

    def drive(self, program: Program) -> tuple[int, int]:
        """Carry out all operations; the moment of the start, and the nanoseconds it took."""
        handlers, host, clock = self._handlers, self._host, time.perf_counter_ns
        answer: Batch | None = None
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
                if (batch := cast(Batch | None, getattr(operation, "batch", None))) is not None:
                    step = batch.index
            then, now = now, clock()
            host.append((step, operation.phase, then, now))

    def spans(self, start_ns: int) -> list[Span]:
        """All spans of the run, sorted, relative to its start."""
        host_time = self.streams.host_time
        spans = [Span(step, "host", phase, a - start_ns, b - start_ns) for step, phase, a, b in self._host]
        gap_ns = 0 if self.executor.graphs else None
        for step, stage, begin, end in self._forwards:
            a, b = host_time(begin) - start_ns, host_time(end) - start_ns
            spans.append(Span(step, "compute", stage, a, b, gap_ns if stage == "decode" else None))
        for (step, lane), (a, b) in zip(self._copies, self.streams.copies(), strict=True):
            spans.append(Span(step, lane, lane, a - start_ns, b - start_ns))
        return sorted(spans, key=lambda span: (span.start_ns, span.end_ns))

    def tell(self, log: RequestLog, start_ns: int) -> None:
        """Tell `log` of the run, in the order in which it went."""
        decisions, reads = iter(self._decisions), iter(self._reads)
        for step, phase, begin, end in self._host:
            if phase == "schedule" and step >= 0:
                log.decided(next(decisions), begin - start_ns)
            elif phase == "update":
                log.read(next(reads).tolist(), end - start_ns)
            elif phase == "no_requests":
                log.idle(begin - start_ns)

    def _decide(self, start: int, now: int) -> tuple[Batch | None, int]:
        """Ask the batcher; where there is nothing to run and nothing to read, wait for the next request.

        Returns its batch, and when it was asked for that.
        """
        batcher, began = self.batcher, now
        batch = batcher.schedule(now - start)
        while batch is None and not self._plans and (arrival_ns := batcher.next_arrival_ns) is not None:
            if start + arrival_ns <= now:
                break  # it is held back by others, which will never end
            now = _wait_until(start + arrival_ns)
            batch = batcher.schedule(now - start)
        if now > began:
            self._host.append((-1, "no_requests", began, now))
        if batch is not None:
            self.steps += 1
            if self._logs:
                self._decisions.append(Decision.of(batch, batcher))
        return batch, now

    def _build_inputs(self, operation: BuildInputs) -> None:
        previous = self._plans[operation.previous.index] if operation.previous else None
        self._plans[operation.batch.index] = self.builder.build(operation.batch, operation.slot, previous)

    def _copy_in(self, operation: CopyIn) -> None:
        plan = self._plans[operation.batch.index]
        destination, source = self.buffers.copy_in(plan.slot, plan.geometry, plan.table_lines)
        self._copy(operation, "copy_in", destination, source)

    def _forward(self, operation: Forward) -> None:
        plan = self._plans[operation.batch.index]
        graph, kernels = self.executor.graphs, operation.kernels
        self.streams.launch(lambda: self.decoder.forward(plan.slot, plan.geometry, graph=graph, kernels=kernels))

    def _copy_out(self, operation: CopyOut) -> None:
        plan = self._plans[operation.batch.index]
        destination, source = self.buffers.copy_out(plan.slot, len(plan.ids))
        self._copy(operation, "copy_out", destination, source)

    def _copy(self, operation: CopyIn | CopyOut, lane: Lane, destination: torch.Tensor, source: torch.Tensor) -> None:
        timed = self.steps <= self.executor.timed_steps
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
        batch = operation.batch
        plan = self._plans.pop(batch.index)
        begin, end, sampled = self.buffers.results(plan.slot, len(plan.ids))
        self._forwards.append((batch.index, "prefill" if batch.prefill_tokens else "decode", begin, end))
        ids, tokens = self.builder.read(plan, sampled)
        if self.tokens is not None:
            for request, token in zip(ids.tolist(), tokens.tolist(), strict=True):
                self.tokens.setdefault(request, []).append(token)
        if self.on_tokens:
            self.on_tokens(ids, tokens.copy())
        if self._logs:
            self._reads.append(ids)
        for request in self.batcher.update(batch):
            self.builder.retire(request)


def _wait_until(deadline_ns: int) -> int:
    """Return at `deadline_ns` of the clock, or a little later; the time then."""
    clock = time.perf_counter_ns
    if (early := deadline_ns - clock() - SLEEP_SLACK_NS) > 0:
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

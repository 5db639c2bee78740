"""Decoding for real: runs of a decoder against a continuous batcher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from batchsim.batching.continuous import Batch, ContinuousBatcher
from batchsim.operations import BuildInputs, CopyIn, CopyOut, Forward, Program, Update
from batchsim.records import Observer, Span
from batchsim.request_log import Decision, RequestLog
from calibration.executor.buffers import Int64
from calibration.executor.decoder import Decoder
from calibration.executor.inputs import InputBuilder, Plan
from calibration.executor.machine import Machine, Move, streams_of

OnTokens = Callable[[Int64, Int64], None]


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
    Copies of the first `timed_steps` steps of a run are timed; later ones have no span. With `sleeps` the host
    leaves its core to others while it waits for the device.

    Why two slots are enough. A program touches a slot again only after it has synchronised on the copy out of the
    slot's last step and read its tokens (`async_`: Synchronize and Update of N precede the Schedule of N+2; `sync`:
    of N+1, with one slot). The copy out of N follows the forward of N, and that the copy in of N. So no pinned buffer
    is written while a copy of it is in flight, no device input while a forward reads it, no sampled token before it
    was copied out and read. The compute stream alone orders the rest: sampled tokens of N that N+1 carries over, the
    activations, and cache blocks passed on while their last owner still computes a wasted token. An event is recorded
    anew only after the wait on its last recording was enqueued.
    """

    def __init__(self, decoder: Decoder, *, graphs: bool, timed_steps: int = 4096, sleeps: bool = False) -> None:
        self.decoder, self.graphs = decoder, graphs and decoder.device.type == "cuda"
        self.timed_steps, self.sleeps = timed_steps, sleeps
        self.streams = streams_of(decoder.device, timed_steps, sleeps=sleeps)

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
        worker = _Decoding(self, batcher, on_tokens, {} if keep_tokens else None, logs=log is not None)
        machine = Machine(
            self.streams, batcher, worker, timed_steps=self.timed_steps, gap_ns=0 if self.graphs else None,
            decided=worker.decided if log is not None else None,
        )  # fmt: skip
        start_ns, total_ns = machine.run(program)
        spans = machine.spans(start_ns)
        if log is not None:
            worker.tell(log, machine, start_ns)
        if observe:
            for span in spans:
                observe(span)
        return Execution(spans, total_ns, machine.steps, batcher.output_tokens, batcher.wasted_tokens, worker.tokens)


class _Decoding:
    """One run's plans in flight, and what a log is told of it."""

    def __init__(
        self, executor: Executor, batcher: ContinuousBatcher, on_tokens: OnTokens | None,
        tokens: dict[int, list[int]] | None, *, logs: bool,
    ) -> None:  # fmt: skip
        self.executor, self.batcher, self.on_tokens, self.tokens = executor, batcher, on_tokens, tokens
        self.decoder, self.buffers = executor.decoder, executor.decoder.buffers
        preempts = not batcher.reserve and batcher.pool.num_blocks is not None
        self.builder = InputBuilder(executor.decoder, preempts=preempts)
        self._plans: dict[int, Plan] = {}
        # What a log is told, kept until the run has ended: that costs a step less than a microsecond.
        self._logs = logs
        self._decisions: list[Decision] = []
        self._reads: list[Int64] = []

    def decided(self, batch: Batch) -> None:
        self._decisions.append(Decision.of(batch, self.batcher))

    def tell(self, log: RequestLog, machine: Machine, start_ns: int) -> None:
        """Tell `log` of the run, in the order in which it went."""
        decisions, reads = iter(self._decisions), iter(self._reads)
        for step, phase, begin, end in machine.host:
            if phase == "schedule" and step >= 0:
                log.decided(next(decisions), begin - start_ns)
            elif phase == "update":
                log.read(next(reads).tolist(), end - start_ns)
            elif phase == "no_requests":
                log.idle(begin - start_ns)

    def build_inputs(self, operation: BuildInputs) -> None:
        previous = self._plans[operation.previous.index] if operation.previous else None
        batch = cast(Batch, operation.batch)
        self._plans[batch.index] = self.builder.build(batch, operation.slot, previous)

    def copy_in(self, operation: CopyIn) -> Move:
        plan = self._plans[operation.batch.index]
        return self.buffers.copy_in(plan.slot, plan.geometry, plan.table_lines)

    def forward(self, operation: Forward) -> None:
        plan = self._plans[operation.batch.index]
        self.decoder.forward(plan.slot, plan.geometry, graph=self.executor.graphs, kernels=operation.kernels)

    def copy_out(self, operation: CopyOut) -> Move:
        plan = self._plans[operation.batch.index]
        return self.buffers.copy_out(plan.slot, len(plan.ids))

    def update(self, operation: Update) -> tuple[str, int, int]:
        batch = cast(Batch, operation.batch)
        plan = self._plans.pop(batch.index)
        begin, end, sampled = self.buffers.results(plan.slot, len(plan.ids))
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
        return batch.stage, begin, end

"""The real machine that trains: carries out the operations of a training schedule with torch."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from batchsim.batching.accumulation import MicroBatch, micro_batches
from batchsim.operations import Record, StreamWait
from batchsim.records import Span
from batchsim.training_operations import (
    Backward,
    CopyIn,
    Forward,
    NextMicroBatch,
    OptimizerStep,
    Prepare,
    ReadLoss,
    Synchronize,
    TrainingOperation,
    TrainingProgram,
)
from calibration.training.streams import CpuTrainingStreams, CudaTrainingStreams, TrainingStreams
from calibration.training.trainer import Trainer

CORPUS_TOKENS = 1 << 22
# A part of a micro-batch, and whether of a step's first. In the order in which they are launched: layers, head,
# head_backward, layers_backward, and after a step's last micro-batch optimizer, zero_grad.
Part = tuple[str, bool]
ENDS = {"head": "forward", "layers_backward": "backward", "optimizer": "optimizer"}  # the device's stages


@dataclass(frozen=True, slots=True)
class Work:
    """`steps` optimiser steps of `accumulation_steps` micro-batches."""

    steps: int
    accumulation_steps: int
    micro_batch: int
    sequence_length: int
    prepare_ms_per_sequence: float | None = None

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.micro_batch * self.sequence_length

    def micro_batches(self) -> Iterator[MicroBatch]:
        return micro_batches(self.steps, self.accumulation_steps, self.micro_batch, self.sequence_length)


@dataclass(slots=True)
class Execution:
    """What a run took, nanoseconds.

    `steps_ns` last from the end of one optimiser step to that of the next. `host_ns` holds every call of a phase.
    `parts_host_ns` and, of a timed run, `parts_device_ns` hold the parts, by their name and whether they are of a
    step's first micro-batch. `spans` are those of the host and, of a timed run, of the device; `losses` those of the
    steps.
    """

    total_ns: int = 0
    steps_ns: list[int] = field(default_factory=list)
    host_ns: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    parts_host_ns: dict[Part, list[int]] = field(default_factory=lambda: defaultdict(list))
    parts_device_ns: dict[Part, list[int]] = field(default_factory=lambda: defaultdict(list))
    spans: list[Span] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class TrainingExecutor:
    """Runs training programs with a trainer, on random tokens that wait in the host's memory."""

    def __init__(self, trainer: Trainer, *, seed: int = 0) -> None:
        self.trainer = trainer
        self.device = trainer.device
        self.streams: TrainingStreams = (
            CudaTrainingStreams(trainer.device) if trainer.device.type == "cuda" else CpuTrainingStreams()
        )
        generator = torch.Generator().manual_seed(seed)
        self._corpus = torch.randint(trainer.model.shape.vocab_size, (CORPUS_TOKENS,), generator=generator)

    def run(
        self, program: TrainingProgram, work: Work, *, timed: bool = False, ahead_ns: Sequence[int] = (0, 0, 0),
        seed: int = 0,
    ) -> Execution:  # fmt: skip
        """Carry out `program` over `work`, on tokens drawn by `seed`.

        With `timed`, events tell the device's times; they cost the host a few microseconds each. `ahead_ns` keeps the
        device asleep for so long before each forward, backward and optimiser step, so that their kernels wait for it
        and not it for them.
        """
        return _Run(self, work, timed, ahead_ns, seed).carry_out(program)

    def offsets(self, work: Work, seed: int) -> list[int]:
        """Where in the corpus each sequence of `work` begins."""
        count = work.steps * work.accumulation_steps * work.micro_batch
        highest = CORPUS_TOKENS - work.sequence_length
        return np.random.default_rng(seed).integers(0, highest, count).tolist()  # type: ignore[no-any-return]

    def sequence(self, offset: int, length: int) -> Tensor:
        """A sequence and the token after it."""
        return self._corpus[offset : offset + length + 1]


class _Run:
    """One run of a program."""

    def __init__(self, executor: TrainingExecutor, work: Work, timed: bool, ahead_ns: Sequence[int], seed: int) -> None:
        self.executor, self.trainer, self.streams = executor, executor.trainer, executor.streams
        self.work, self.timed, self.ahead_ns = work, timed, ahead_ns
        self.found = Execution()
        self._slot = 0
        self._offsets = executor.offsets(work, seed)
        shape, cuda = (work.micro_batch, work.sequence_length + 1), executor.device.type == "cuda"
        self._host = [torch.zeros(shape, dtype=torch.int64, pin_memory=cuda) for _ in range(2)]
        self._tokens = [torch.zeros(shape, dtype=torch.int64, device=executor.device) for _ in range(2)]
        self._losses = [torch.zeros((), pin_memory=cuda) for _ in range(2)]
        self._loss: Tensor | None = None
        self._micro_batches = work.micro_batches()
        self._first = True
        self._began = self._marked_ns = 0

    def carry_out(self, program: TrainingProgram) -> Execution:
        found, clock = self.found, time.perf_counter_ns
        answer: MicroBatch | None = None
        self._began = ended = end = self.streams.begin()
        while True:
            try:
                operation = program.send(answer)
            except StopIteration:
                break
            start = self._marked_ns = end  # one after the other, so that nothing is left over between them
            answer = self._effect(operation)
            end = clock()
            if isinstance(operation, NextMicroBatch) and answer is None:
                continue
            found.host_ns[operation.phase].append(end - start)
            micro = answer or getattr(operation, "micro", None)
            index = -1 if micro is None else micro.index
            self._tell(index, operation.phase, start, end)
            if isinstance(operation, ReadLoss) and operation.micro.last:
                found.steps_ns.append(end - ended)
                ended = end
                self._tell(index, "update", end, end)
        found.total_ns = clock() - self._began
        self.streams.finish()
        if self.timed:
            self._read_device()
        return found

    def _effect(self, operation: TrainingOperation) -> MicroBatch | None:
        match operation:
            case NextMicroBatch():
                return next(self._micro_batches, None)
            case Prepare(micro=micro, slot=slot):
                self._prepare(micro, slot)
            case CopyIn(slot=slot, stream=stream):
                self.streams.copy(stream, self._tokens[slot], self._host[slot], timed=self.timed)
            case Forward(micro=micro, slot=slot):
                self._first = micro.first
                self._begin(0)
                self._loss = self.trainer.forward(self._tokens[slot], micro.of, self._mark)
            case Backward(micro=micro):
                self._slot = micro.index % 2
                self._backward()
            case OptimizerStep():
                self._optimizer_step()
            case Record(event=event, stream=stream):
                self.streams.record(event, stream)
            case StreamWait(event=event, stream=stream):
                self.streams.wait(stream, event)
            case Synchronize(event=event):
                self.streams.synchronize(event)
            case ReadLoss(micro=micro):
                loss = float(self._losses[micro.index % 2])
                if micro.first:
                    self.found.losses.append(0.0)
                self.found.losses[-1] += loss
        return None

    def _prepare(self, micro: MicroBatch, slot: int) -> None:
        """Collate the sequences; where preparing one is said to take so long, work as long as that."""
        if (ms := self.work.prepare_ms_per_sequence) is not None:
            until = time.perf_counter_ns() + round(ms * 1e6 * micro.sequences)
            while time.perf_counter_ns() < until:
                pass
        offsets = self._offsets[micro.index * micro.sequences :][: micro.sequences]
        torch.stack([self.executor.sequence(each, micro.sequence_length) for each in offsets], out=self._host[slot])

    def _backward(self) -> None:
        loss, self._loss = self._loss, None
        assert loss is not None
        self._begin(1)
        self.trainer.backward(loss)
        # Behind the gradients, so that it can be read when they are there and later kernels are not.
        self._losses[self._slot].copy_(loss.detach(), non_blocking=True)
        self._mark("layers_backward")

    def _optimizer_step(self) -> None:
        self._begin(2)
        self.trainer.optimizer.step()
        self._mark("optimizer")
        self.trainer.optimizer.zero_grad(set_to_none=True)
        self._mark("zero_grad")

    def _begin(self, number: int) -> None:
        if self.ahead_ns[number]:
            self.streams.sleep(self.ahead_ns[number])
        if self.timed:
            self.streams.mark("begin")
            self._marked_ns = time.perf_counter_ns()

    def _mark(self, part: str) -> None:
        """A part has been launched."""
        now = time.perf_counter_ns()
        self.found.parts_host_ns[part, self._first].append(now - self._marked_ns)
        self._marked_ns = now
        if self.timed and part != "zero_grad":
            self.streams.mark(part)
            self._marked_ns = time.perf_counter_ns()

    def _tell(self, index: int, phase: str, start: int, end: int) -> None:
        self.found.spans.append(Span(index, "host", phase, start - self._began, end - self._began))

    def _read_device(self) -> None:
        """From the events to the parts' times and the device's spans."""
        found, micros = self.found, self.work.micro_batches()
        micro, begun, before = next(micros), 0, 0
        for part, at in self.streams.marks():
            if part == "begin":
                begun = before = at
                continue
            found.parts_device_ns[part, micro.first].append(at - before)
            before = at
            if part in ENDS:
                found.spans.append(Span(micro.index, "compute", ENDS[part], begun, at, None))
            if part == ("optimizer" if micro.last else "layers_backward"):
                micro = next(micros, micro)
        for index, (start, end) in enumerate(self.streams.copies()):
            found.spans.append(Span(index, "copy_in", "copy_in", start, end))
        found.spans.sort(key=lambda span: (span.start_ns, span.end_ns))

"""An open-loop server: carries out a schedule's operations on a service, for batches of a dynamic batcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from batchsim.batching.dynamic import DynamicBatch, DynamicBatcher
from batchsim.operations import BuildInputs, CopyIn, CopyOut, Forward, Program, Update
from batchsim.records import Span
from calibration.executor.machine import Machine, Move, streams_of
from calibration.services.service import Array, Service

# Told of a batch and its answers, (requests, values), which it may keep.
OnAnswers = Callable[[DynamicBatch, npt.NDArray[np.float32]], None]

# Different payloads of a run, as many as do not fit a core's caches; requests take them in turn.
PAYLOADS = 256
# A host that slept finds its caches cold: after a few milliseconds of sleep its phases were seen to take half as long
# again. So this server polls for requests, as servers do that are made for low latency.
POLL_NS = 50_000_000


@dataclass(frozen=True, slots=True)
class ServedRun:
    """What a run did: spans sorted by start, in nanoseconds since it began, and the batches in their order.

    The host spans tile `[0, total_ns)` without a hole; in `no_requests` the host waits until it has to decide.
    """

    spans: list[Span]
    total_ns: int
    batches: list[DynamicBatch]


class Server:
    """Runs programs on a service, with CUDA graphs or kernel by kernel.

    On the CPU each operation is complete when it returns and `graphs` is ignored: the same answers, no overlap.
    Copies of the first `timed_steps` steps of a run are timed. Why two slots are enough, and no buffer is written
    before it has been read: see `calibration.executor.decoding.Executor`.
    """

    def __init__(self, service: Service, *, graphs: bool, timed_steps: int = 16_384) -> None:
        self.service, self.graphs = service, graphs and service.device.type == "cuda"
        self.timed_steps = timed_steps
        self.streams = streams_of(service.device, timed_steps)
        longest = service.lengths[-1]
        self._payloads = [service.network.payload(number, longest) for number in range(PAYLOADS)]

    def payload(self, number: int, tokens: int) -> Array:
        """What request `number` carries."""
        payload = self._payloads[number % PAYLOADS]
        return payload[:tokens] if self.service.network.splits_lengths else payload

    def run(
        self, program: Program, batcher: DynamicBatcher, payloads: Sequence[Array], *,
        on_answers: OnAnswers | None = None,
    ) -> ServedRun:  # fmt: skip
        """Drive `program` to its end. Warm the service up, and capture its graphs, before a run that counts.

        Requests arrive as the clock passes their `arrival_ns`, counted from the start of the run, whatever the server
        does; `payloads` are theirs by id.
        """
        worker = _Serving(self, batcher, payloads, on_answers)
        machine = Machine(
            self.streams, batcher, worker, timed_steps=self.timed_steps, gap_ns=0 if self.graphs else None,
            decided=worker.batches.append, poll_ns=POLL_NS,
        )  # fmt: skip
        start_ns, total_ns = machine.run(program)
        return ServedRun(machine.spans(start_ns), total_ns, worker.batches)


class _Plan(NamedTuple):
    """A built batch: its slot, its requests, and what they are padded to."""

    slot: int
    num_seqs: int
    size: int
    length: int


class _Serving:
    """One run's batches: those in flight, and all that were formed."""

    def __init__(
        self, server: Server, batcher: DynamicBatcher, payloads: Sequence[Array], on_answers: OnAnswers | None
    ) -> None:
        self.service, self.graphs = server.service, server.graphs
        self.batcher, self.payloads, self.on_answers = batcher, payloads, on_answers
        self.batches: list[DynamicBatch] = []
        self._plans: dict[int, _Plan] = {}

    def build_inputs(self, operation: BuildInputs) -> None:
        batch, service = _batch(operation), self.service
        requests, payloads = batch.requests, self.payloads
        count, length = len(requests), service.length(batch.padded_len)
        items = service.host_items(operation.slot, count, length)
        service.network.collate(items, [payloads[request.id] for request in requests])
        self._plans[batch.index] = _Plan(operation.slot, count, service.size(count), length)

    def copy_in(self, operation: CopyIn) -> Move:
        plan = self._plans[operation.batch.index]
        return self.service.copy_in(plan.slot, plan.num_seqs, plan.length)

    def forward(self, operation: Forward) -> None:
        plan = self._plans[operation.batch.index]
        self.service.forward(plan.slot, plan.size, plan.length, graph=self.graphs)

    def copy_out(self, operation: CopyOut) -> Move:
        plan = self._plans[operation.batch.index]
        return self.service.copy_out(plan.slot, plan.num_seqs)

    def update(self, operation: Update) -> tuple[str, int, int]:
        batch = _batch(operation)
        plan = self._plans.pop(batch.index)
        begin, end, answers = self.service.results(plan.slot, plan.num_seqs)
        kept = answers.copy()  # the slot's next batch overwrites the buffer
        if self.on_answers is not None:
            self.on_answers(batch, kept)
        self.batcher.update(batch)
        return "forward", begin, end


def _batch(operation: BuildInputs | Update) -> DynamicBatch:
    return cast(DynamicBatch, operation.batch)

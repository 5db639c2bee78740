"""The cells of a service's calibration: the loops, over every batch size and padded length, without and with rests.

A cell is one loop over batches of one size. `busy`, the next batch always waits, as beyond the server's capacity;
`paced`, batches come at times that leave the host and the device some rest before each, as below it. A host that was
asleep is slower, and a device that was never idle may be, so a profile that serves all loads is fitted to both.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

from batchsim.batching.dynamic import DynamicBatch, DynamicBatcher, Requested
from batchsim.operations import HOST_PHASES
from batchsim.records import Span
from batchsim.schedules import LOOPS, loop_name
from calibration.cells import Samples

PAUSES_NS = (500_000, 5_000_000)  # least and longest rest before a paced batch
BUSY_STEPS, PACED_STEPS = 40, 8  # steps of a cell in a run
# A busy run's first steps fill the pipeline and warm the caches, and in the last ones there is no next batch.
FIRST, LAST = 5, 3
NEVER_NS = 1 << 62

Kind = tuple[bool, int, int]  # of a batch: with graphs, requests, tokens of each


@dataclass(frozen=True, slots=True)
class Cell:
    """One loop over batches of `num_seqs` requests of `length` tokens each (0: images), with rests or without."""

    schedule: str
    graphs: bool
    paced: bool
    num_seqs: int
    length: int

    @property
    def key(self) -> str:
        """A name for files and residuals."""
        return f"{self.loop}/{'paced' if self.paced else 'busy'}/{self.num_seqs}/{self.length}"

    @property
    def loop(self) -> str:
        return loop_name(self.schedule, graphs=self.graphs)

    @property
    def kind(self) -> Kind:
        return self.graphs, self.num_seqs, self.length

    @property
    def num_tokens(self) -> int:
        """Tokens of the padded batch."""
        return self.num_seqs * self.length

    @property
    def holds(self) -> dict[str, float]:
        """What a batch holds, by the cost in `PhaseFit` that multiplies it."""
        holds: dict[str, float] = {"step_ns": 1, "seq_ns": self.num_seqs}
        return {**holds, "token_ns": self.num_tokens} if self.length else holds


def of_any_length(key: str) -> str:
    """A cell's key without the length: a larger batch leaves colder caches, in which every call takes longer."""
    return key.rsplit("/", 1)[0]


@dataclass(frozen=True, slots=True)
class Drill:
    """One run of a loop: a busy one of its only cell, a paced one of all its cells' batches in random order."""

    cells: tuple[Cell, ...]

    @property
    def key(self) -> str:
        return self.cells[0].key

    def batches(self, seed: int) -> list[Cell]:
        """The run's batches, in order."""
        if not self.cells[0].paced:
            return list(self.cells) * BUSY_STEPS
        order = list(self.cells) * PACED_STEPS
        random.Random(seed).shuffle(order)
        return order

    def batcher(self, seed: int, expected_ns: Mapping[Kind, float]) -> DynamicBatcher:
        """Requests that form these batches; a paced one comes when the one before it, which takes `expected_ns`, has
        been answered and a rest has passed."""
        size = max(cell.num_seqs for cell in self.cells)
        rng, now_ns = random.Random(seed), 0.0
        requests: list[Requested] = []
        for cell in self.batches(seed):
            first = len(requests)
            requests += [Requested(first + i, round(now_ns), cell.length, 0) for i in range(cell.num_seqs)]
            if cell.paced:
                least, longest = PAUSES_NS
                now_ns += expected_ns[cell.kind] + least * (longest / least) ** rng.random()
        if self.cells[0].paced:
            return DynamicBatcher(requests, max_batch_size=size, length_bucket=1)
        return _Backlog(requests, max_batch_size=size, length_bucket=1)

    def read(self, spans: Sequence[Span], batches: Sequence[DynamicBatch]) -> dict[Cell, Samples]:
        """What a run tells of each of its cells."""
        cells = {(cell.num_seqs, max(cell.length, 1)): cell for cell in self.cells}
        end = len(batches) - (LAST if len(self.cells) == 1 else 0)
        read = {b.index: cells.get((b.num_seqs, b.padded_len)) for b in batches[FIRST:end]}
        found: defaultdict[Cell, defaultdict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for step, samples in read_steps(spans).items():
            if (cell := read.get(step)) is not None:
                for stage, values in samples.items():
                    found[cell][stage].extend(values)
        return {cell: dict(samples) for cell, samples in found.items()}


class _Backlog(DynamicBatcher):
    """At every decision as many requests come as go: the next batch always waits, and no queue grows."""

    def __init__(self, requests: Sequence[Requested], *, max_batch_size: int, length_bucket: int) -> None:
        self._to_come = iter(requests[max_batch_size:])
        for request in requests[max_batch_size:]:
            request.arrival_ns = NEVER_NS
        super().__init__(requests, max_batch_size=max_batch_size, length_bucket=length_bucket)

    def schedule(self, now_ns: int = 0) -> DynamicBatch | None:
        for request in islice(self._to_come, self.max_batch_size):
            request.arrival_ns = now_ns
        return super().schedule(now_ns)


def read_steps(spans: Sequence[Span]) -> dict[int, Samples]:
    """What each step of a run tells: nanoseconds of every host phase and device stage.

    Beside the stages of `batchsim.records` there are: `copy_latency`, from the start of the call to the start of the
    copy in; `launch_latency`, from the start of the launch call to the start of a forward that waited for little
    else; `after_copy`, from the end of the copy in to the start of a forward that waited for it; `gap`, the same from
    the end of the forward before; `collect`, from the end of the copy out to the host's return from waiting for it,
    and the time between forward and copy out.
    """
    steps: dict[int, Samples] = {}
    before: Span | None = None
    by_step = groupby(sorted((s for s in spans if s.step >= 0), key=lambda s: s.step), key=lambda s: s.step)
    for step, found in by_step:
        lanes: dict[str, Span] = {}
        samples: defaultdict[str, list[int]] = defaultdict(list)
        for span in found:
            if span.lane == "host":
                first = lanes.get(span.stage, span)
                lanes[span.stage] = first._replace(end_ns=span.end_ns)
                if span.stage in HOST_PHASES and span.stage != "wait":
                    samples[span.stage].append(span.duration_ns)
            else:
                lanes[f"device_{span.lane}"] = span
                samples[span.stage if span.lane == "compute" else f"device_{span.stage}"].append(span.duration_ns)
        samples["launch"] = [sum(samples["launch"])]
        forward, into, out = (lanes.get(f"device_{lane}") for lane in ("compute", "copy_in", "copy_out"))
        if forward is not None and into is not None and out is not None:
            launch, wait = lanes["launch"], lanes.get("wait")
            samples["copy_latency"].append(into.start_ns - lanes["copy_in"].start_ns)
            free_ns = before.end_ns if before is not None else 0
            if launch.end_ns <= free_ns and into.end_ns <= free_ns:
                samples["gap"].append(forward.start_ns - free_ns)
            elif launch.end_ns <= into.end_ns and free_ns <= into.end_ns:
                samples["after_copy"].append(forward.start_ns - into.end_ns)
            elif forward.start_ns - max(free_ns, into.end_ns) > (forward.start_ns - launch.start_ns) / 2:
                samples["launch_latency"].append(forward.start_ns - launch.start_ns)
            if wait is not None and wait.start_ns < out.end_ns:
                samples["collect"].append(wait.end_ns - forward.end_ns - out.duration_ns)
            elif wait is not None:
                samples["wait"].append(wait.duration_ns)
        before = forward
        steps[step] = dict(samples)
    return steps


def plan(*, sizes: Sequence[int], lengths: Sequence[int], eager: bool = True) -> list[Drill]:
    """The runs of a calibration: the loops with graphs; without, a few sizes at the shortest and the middle length."""
    drills: list[Drill] = []
    for schedule in LOOPS:
        for graphs in (True, False) if eager else (True,):
            few = slice(None) if graphs else slice(None, None, 3)
            for length in lengths if graphs else sorted({lengths[0], lengths[len(lengths) // 2]}):
                drills += [Drill((Cell(schedule, graphs, False, size, length),)) for size in sizes[few]]
                drills.append(Drill(tuple(Cell(schedule, graphs, True, size, length) for size in sizes[few])))
    return drills

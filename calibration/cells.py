"""The cells of a calibration: which loops are run, and what is read off their spans.

A cell is one loop (schedule, with or without graphs) over one kind of batch. Its samples are read off the spans
of a run, so that the reading can be checked against a simulated machine whose costs are known.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from batchsim.batching.continuous import ContinuousBatcher, Request
from batchsim.operations import HOST_PHASES
from batchsim.records import Span
from batchsim.schedules import SCHEDULES

Samples = dict[str, list[int]]

# Steps at the beginning of a run (pipeline not yet full, caches cold) and at its end that are not read.
SKIP_FIRST, SKIP_LAST = 4, 2

# Contexts of the decode cells, as shares of the way from MIN_CONTEXT to the longest that fits.
CONTEXT_SHARES = (0.0, 0.06, 0.25, 0.55, 1.0)
MIN_CONTEXT = 32


@dataclass(frozen=True, slots=True)
class Cell:
    """One loop over one kind of batch.

    `num_seqs` requests with `context` cached tokens each decode for `steps` steps; or, where `chunk` is not 0,
    each step prefills `num_seqs` fresh requests by `chunk` tokens after `context` cached ones.
    """

    schedule: str
    graphs: bool
    num_seqs: int
    context: int
    chunk: int = 0
    steps: int = 20

    @property
    def key(self) -> str:
        """A name for files and residuals."""
        what = f"prefill/{self.num_seqs}x{self.chunk}" if self.chunk else f"decode/{self.num_seqs}"
        return f"{self.loop}/{what}/{self.context}"

    @property
    def loop(self) -> str:
        return f"{self.schedule}/{'graph' if self.graphs else 'eager'}"

    @property
    def kv_tokens(self) -> int:
        """Mean over the steps that are read of the tokens attended to by decoding rows, summed over rows."""
        middle = (SKIP_FIRST + self.steps - SKIP_LAST - 1) / 2
        return 0 if self.chunk else round(self.num_seqs * (self.context + 1 + middle))

    @property
    def num_tokens(self) -> int:
        return self.num_seqs * (self.chunk or 1)

    @property
    def pairs(self) -> int:
        """(query, key) pairs of a prefilling step."""
        return self.num_seqs * (self.chunk * self.context + self.chunk * (self.chunk + 1) // 2)

    @property
    def peak_tokens(self) -> int:
        """Tokens of KV cache that the cell needs at once."""
        return self.num_seqs * (self.context + max(self.chunk, self.steps) + 2)

    def batcher(self, *, block_size: int, num_kv_blocks: int) -> ContinuousBatcher:
        """Requests whose context counts as cached, in a batcher that forms the cell's batch at every step."""
        waves = self.steps if self.chunk else 1
        output = 1 if self.chunk else self.steps
        requests = [
            Request(i, self.context + self.chunk, output, scheduled=self.context) for i in range(self.num_seqs * waves)
        ]
        return ContinuousBatcher(
            requests,
            max_num_seqs=self.num_seqs,
            max_num_batched_tokens=max(self.num_tokens, self.num_seqs),
            block_size=block_size,
            num_kv_blocks=num_kv_blocks,
        )


def read_samples(spans: Sequence[Span]) -> Samples:
    """What one run of a cell tells: nanoseconds of every host phase and device stage, a sample a step.

    Beside the stages of `batchsim.records` there are: `launch_latency`, from the start of the launch call to the
    start of the forward; `copy_latency`, the same for the copy in; `collect`, from the end of the forward to the
    host's return from waiting for it; `gap`, from the end of one forward to the start of the next where that had
    been launched in time. Host phases that occur several times a step (`record`) give a sample each time.
    """
    host: dict[tuple[int, str], Span] = {}
    compute: dict[int, Span] = {}
    samples: defaultdict[str, list[int]] = defaultdict(list)
    launch_ns: Counter[int] = Counter()
    last = max(span.step for span in spans)
    step = -1
    for span in spans:
        # Recording and waiting for events belong to the batch that the host dealt with last.
        step = span.step if span.step >= 0 or span.lane != "host" else step
        if not SKIP_FIRST <= step <= last - SKIP_LAST:
            continue
        if span.lane == "host":
            host.setdefault((span.step, span.stage), span)
            if span.stage == "launch":
                launch_ns[span.step] += span.duration_ns
            elif span.stage in HOST_PHASES and span.stage != "wait":
                samples[span.stage].append(span.duration_ns)
        elif span.lane == "compute":
            compute[span.step] = span
            samples[span.stage].append(span.duration_ns)
        else:
            samples[f"device_{span.stage}"].append(span.duration_ns)
            if span.stage == "copy_in" and (call := host.get((span.step, "copy_in"))):
                samples["copy_latency"].append(span.start_ns - call.start_ns)
    for step, forward in compute.items():
        launch, wait, before = host.get((step, "launch")), host.get((step, "wait")), compute.get(step - 1)
        if before is not None and launch is not None:
            if launch.end_ns <= before.end_ns:
                samples["gap"].append(forward.start_ns - before.end_ns)
            elif launch.start_ns >= before.end_ns:
                samples["launch_latency"].append(forward.start_ns - launch.start_ns)
        if wait is not None and wait.start_ns < forward.end_ns:
            samples["collect"].append(wait.end_ns - forward.end_ns)
        elif wait is not None:
            samples["wait"].append(wait.duration_ns)
    return dict(samples) | {"launch": list(launch_ns.values())}


def plan(*, kv_tokens: int, sizes: tuple[int, ...], max_context: int, prefill_tokens: tuple[int, ...]) -> list[Cell]:
    """The cells of a calibration, given how many tokens of KV cache the device holds."""
    cells: list[Cell] = []
    for schedule in SCHEDULES:
        for size in sizes:
            longest = min(max_context, kv_tokens // size - 64)
            contexts = [round(MIN_CONTEXT + share * (longest - MIN_CONTEXT)) for share in CONTEXT_SHARES]
            cells += [Cell(schedule, True, size, context) for context in contexts]
            if size in sizes[::3]:
                cells += [Cell(schedule, False, size, contexts[i]) for i in (1, 3)]
    for tokens in prefill_tokens:
        # Whole prompts of 64 to 256 tokens, and a chunk of one long prompt: the two give attention's share.
        short = next(n for n in (256, 128, 64) if tokens % n == 0)
        cells += [
            Cell("sync", False, tokens // short, 0, chunk=short, steps=10),
            Cell("sync", False, 1, min(max_context // 2, max_context - tokens), chunk=tokens, steps=10),
        ]
    return [cell for cell in cells if cell.peak_tokens <= kv_tokens]

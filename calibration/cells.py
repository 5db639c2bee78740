"""The cells of a calibration: which loops are run, and what is read off their spans.

A cell is one loop (schedule, with or without graphs) over one kind of batch. Its samples are read off the spans
of a run, so that the reading can be checked against a simulated machine whose costs are known.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from batchsim.batching.continuous import ContinuousBatcher, Request, attended_pairs
from batchsim.operations import HOST_PHASES
from batchsim.records import Span
from batchsim.schedules import LOOPS, loop_name

Samples = dict[str, list[int]]

# Contexts of the decode cells, as shares of the way from MIN_CONTEXT to the longest that fits.
CONTEXT_SHARES = (0.0, 0.06, 0.25, 0.55, 1.0)
MIN_CONTEXT = 32
# Prompt tokens that a prefill cell computes in all, at least 8 and at most 32 steps of them.
PREFILL_TOKENS_RUN = 32_768


@dataclass(frozen=True, slots=True)
class Cell:
    """One loop over one kind of batch.

    `num_seqs` requests with `context` cached tokens each decode for `steps` steps. Or, where `chunk` is not 0, each
    step prefills `num_seqs` fresh requests by `chunk` tokens after `context` cached ones, while `decodes` others
    with `decode_context` cached tokens each decode.
    """

    schedule: str
    graphs: bool
    num_seqs: int
    context: int
    chunk: int = 0
    decodes: int = 0
    decode_context: int = 0
    steps: int = 20

    @property
    def key(self) -> str:
        """A name for files and residuals."""
        what = f"prefill/{self.num_seqs}x{self.chunk}" if self.chunk else f"decode/{self.num_seqs}"
        mixed = f"+{self.decodes}x{self.decode_context}" if self.decodes else ""
        return f"{self.loop}/{what}/{self.context}{mixed}"

    @property
    def loop(self) -> str:
        return loop_name(self.schedule, graphs=self.graphs)

    @property
    def read_steps(self) -> tuple[int, int]:
        """First and last step that is read: not while the pipeline fills and caches are cold, nor at the end."""
        return (self.steps // 4, self.steps - 1) if self.chunk else (4, self.steps - 3)

    @property
    def kv_tokens(self) -> int:
        """Tokens attended to by decoding rows, summed over them; mean over the steps that are read."""
        rows, context = (self.decodes, self.decode_context) if self.chunk else (self.num_seqs, self.context)
        return round(rows * (context + 1 + sum(self.read_steps) / 2))

    @property
    def num_tokens(self) -> int:
        return self.num_seqs * (self.chunk or 1) + self.decodes

    @property
    def holds(self) -> dict[str, float]:
        """What a step's batch holds, by the cost in `PhaseFit` that multiplies it."""
        prompts = self.num_seqs if self.chunk else 0
        seqs = self.num_seqs + self.decodes if self.chunk else self.num_seqs
        return {"step_ns": 1, "seq_ns": seqs, "prefill_token_ns": prompts * self.chunk, "admitted_ns": prompts}

    def pairs(self, tile: int) -> int:
        """(query, key) pairs of the prompts of a step, in whole tiles of `tile` queries."""
        return self.num_seqs * attended_pairs(self.context, self.chunk, tile)

    @property
    def peak_tokens(self) -> int:
        """Tokens of KV cache that the cell needs at once, blocks' rounding included."""
        prompts = self.num_seqs * (self.context + max(self.chunk, self.steps) + 32)
        return prompts + self.decodes * (self.decode_context + self.steps + 32)

    def batcher(self, *, block_size: int, num_kv_blocks: int) -> ContinuousBatcher:
        """Requests whose context counts as cached, in a batcher that forms the cell's batch at every step."""
        decoding, context = (self.decodes, self.decode_context) if self.chunk else (self.num_seqs, self.context)
        requests = [Request(i, context, self.steps, scheduled=context) for i in range(decoding)]
        if self.chunk:
            prompts = range(decoding, decoding + self.num_seqs * self.steps)
            requests += [Request(i, self.context + self.chunk, 1, scheduled=self.context) for i in prompts]
        return ContinuousBatcher(
            requests,
            max_num_seqs=self.num_seqs + self.decodes,
            max_num_batched_tokens=self.num_tokens,
            block_size=block_size,
            num_kv_blocks=num_kv_blocks,
            reserve=True,
        )


def read_samples(spans: Sequence[Span], cell: Cell) -> Samples:
    """What one run of `cell` tells: nanoseconds of every host phase and device stage, a sample a step.

    Beside the stages of `batchsim.records` there are: `launch_latency`, from the start of the launch call to the
    start of the forward; `copy_latency`, the same for the copy in; `collect`, from the end of the forward to the
    host's return from waiting for it; `gap`, from the end of one forward to the start of the next where that had
    been launched in time. Host phases that occur several times a step (`record`) give a sample each time.
    """
    host: dict[tuple[int, str], Span] = {}
    compute: dict[int, Span] = {}
    samples: defaultdict[str, list[int]] = defaultdict(list)
    launch_ns: Counter[int] = Counter()
    first, last = cell.read_steps
    step = -1
    for span in spans:
        # Recording and waiting for events belong to the batch that the host dealt with last.
        step = span.step if span.step >= 0 or span.lane != "host" else step
        if not first <= step <= last:
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
    for size in sizes:
        longest = min(max_context, kv_tokens // size - 64)
        contexts = [round(MIN_CONTEXT + share * (longest - MIN_CONTEXT)) for share in CONTEXT_SHARES]
        cells += [Cell("async", True, size, context) for context in contexts]
        cells += [Cell("sync", True, size, context) for context in contexts[::2]]
    for size in sizes[::3]:
        longest = min(max_context, kv_tokens // size - 64)
        contexts = [round(longest * share) for share in (0.06, 0.4)]
        cells += [Cell(schedule, False, size, c, steps=40) for schedule in LOOPS for c in contexts]
    for tokens in prefill_tokens:
        # Whole prompts of 64 to 256 tokens, and a chunk of one long prompt: the two give attention's share.
        short = next(n for n in (256, 128, 64) if tokens % n == 0)
        long = min(max_context // 2, max_context - tokens)
        # Enough steps for the clocks to settle under the load: prompts draw all the power that a device may have.
        steps = min(max(8, PREFILL_TOKENS_RUN // tokens), 32)
        cells += [
            Cell("sync", False, tokens // short, 0, chunk=short, steps=steps),
            Cell("sync", False, 1, long, chunk=tokens, steps=steps),
        ]
    tokens = prefill_tokens[len(prefill_tokens) // 2]
    for decodes in (sizes[len(sizes) // 3], sizes[2 * len(sizes) // 3], sizes[-1] - 1):
        for context in (max_context // 32, max_context // 4):
            if decodes < tokens:
                cells += [Cell("sync", False, 1, 0, tokens - decodes, decodes, context, steps=24)]
    return [cell for cell in cells if cell.peak_tokens <= kv_tokens]

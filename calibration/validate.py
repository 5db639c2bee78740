"""Run scenarios for real, and set what was predicted beside what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from batchsim.engine import Window, batcher_of, steady_step, with_gains
from batchsim.errors import RunError
from batchsim.metrics import Metrics
from batchsim.model import MODELS
from batchsim.operations import HOST_PHASES
from batchsim.profile import Profile
from batchsim.records import Span
from batchsim.result import Run, ScheduleResult
from batchsim.scenario import Scenario
from batchsim.schedules import SCHEDULES
from calibration.cells import Cell, read_samples
from calibration.executor import Decoder, Executor, build
from calibration.fit import split_outliers
from calibration.predict import predict
from calibration.provenance import QuietCore, provenance

Progress = Callable[[float], None]
WARM_UP_TOKENS = 24
# On a GPU a decoder is built with room for scenarios to come.
ROOMY_TOKENS, ROOMY_LEN = 8192, 9472
# The batch that tells the host's speed.
PROBE_SEQS, PROBE_CONTEXT, PROBE_STEPS = 32, 32, 30
MACHINE_KEYS = ("device", "driver", "host_cpu", "host_cores")


class Bench:
    """A decoder on a device, kept from one scenario to the next as long as it serves."""

    def __init__(self, device: str) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise RunError("no CUDA device was found; validate on a machine with one, or use --device cpu")
        if device == "cpu":
            # The model is tiny: threads would spend more time waiting for each other than computing.
            torch.set_num_threads(1)
        self.device = device
        self._decoder: Decoder | None = None
        self._serves: tuple[Any, ...] = ()

    def executor(self, scenario: Scenario, profile: Profile) -> tuple[Executor, int]:
        """An executor that serves `scenario`, and the number of its KV blocks."""
        shape = MODELS[scenario.model]
        workload = scenario.workload
        length = workload.input_len + workload.output_len + 1
        running = min(workload.num_prompts, scenario.max_num_seqs)
        probe = PROBE_SEQS * -(-(PROBE_CONTEXT + PROBE_STEPS + 1) // scenario.block_size)
        blocks = max(running * -(-length // scenario.block_size), probe)
        sizes = tuple(curve.size for curve in profile.device.decode)
        if self._decoder is not None:
            model, block_size, have_sizes, have_blocks, seqs, tokens, longest = self._serves
            fits = blocks <= have_blocks and running <= seqs and length <= longest
            same = (model, block_size, have_sizes) == (scenario.model, scenario.block_size, sizes)
            if not (same and fits and scenario.max_num_batched_tokens <= tokens):
                self._decoder = None
        if self._decoder is None:
            if self.device == "cuda":
                torch.cuda.empty_cache()
            seqs = max(running, sizes[-1], PROBE_SEQS)
            block_bytes = shape.kv_bytes_per_token * scenario.block_size
            have_blocks = max(blocks, self._room(shape.parameters * shape.dtype_bytes, block_bytes))
            tokens = max(scenario.max_num_batched_tokens, seqs)
            longest = max(length, PROBE_CONTEXT + PROBE_STEPS + 1)
            if self.device == "cuda":
                tokens, longest = max(tokens, ROOMY_TOKENS), max(longest, ROOMY_LEN)
            self._decoder = build(
                shape,
                self.device,
                num_kv_blocks=have_blocks,
                block_size=scenario.block_size,
                max_num_seqs=seqs,
                max_num_batched_tokens=tokens,
                max_model_len=longest,
                graph_sizes=sizes,
            ).decoder
            self._serves = (scenario.model, scenario.block_size, sizes, have_blocks, seqs, tokens, longest)
        return Executor(self._decoder, graphs=scenario.cuda_graphs), self._serves[3]

    def _room(self, weight_bytes: int, block_bytes: int) -> int:
        """KV blocks that fit comfortably beside the weights: scenarios to come may need more than this one."""
        if self.device != "cuda":
            return 0
        free, _ = torch.cuda.mem_get_info()
        return max(int(((free - weight_bytes) * 0.8 - (6 << 30)) / block_bytes), 0)


def validate(
    scenario: Scenario,
    profile: Profile,
    device: str,
    *,
    repeats: int = 3,
    progress: Progress | None = None,
    bench: Bench | None = None,
) -> tuple[Run, Run]:
    """(predicted, measured): simulate `scenario` at the costs of `profile`, and execute it on `device`.

    Schedules are interleaved over `repeats`; of each the repeat with the median throughput counts. The profile's
    host costs are scaled by the median of the speeds that this host showed before and after the repeats of both.
    """
    bench = bench or Bench(device)
    executor, num_kv_blocks = bench.executor(scenario, profile)
    warm = scenario.workload.model_copy(update={"output_len": min(scenario.workload.output_len, WARM_UP_TOKENS)})
    for schedule in scenario.schedules:
        executor.run(SCHEDULES[schedule](), batcher_of(scenario.model_copy(update={"workload": warm}), num_kv_blocks))
    runs: dict[str, list[_Repeat]] = {name: [] for name in scenario.schedules}
    with QuietCore(move=device == "cuda") as core:
        for repeat in range(repeats):
            for position, schedule in enumerate(scenario.schedules):
                core.settle()
                before = host_speed(executor, profile, schedule, num_kv_blocks)
                batcher = batcher_of(scenario, num_kv_blocks)
                execution = executor.run(SCHEDULES[schedule](), batcher)
                after = host_speed(executor, profile, schedule, num_kv_blocks)
                metrics, window = Metrics(), Window(steady_step(scenario))
                for span in execution.spans:
                    metrics(span)
                    window(span)
                result = metrics.result(schedule, execution.total_ns, batcher)
                runs[schedule].append(_Repeat(result, window.spans(), (round(before, 4), round(after, 4))))
                if progress is not None:
                    progress((repeat + (position + 1) / len(scenario.schedules)) / repeats)
    for repeated in runs.values():
        repeated.sort(key=lambda run: run.result.throughput_tokens_per_s)
    middle = {schedule: repeated[len(repeated) // 2] for schedule, repeated in runs.items()}
    # Rounded as it is stored, so that what is stored gives the same prediction again.
    speed = round(median(speed for repeated in runs.values() for run in repeated for speed in run.host_speeds), 4)
    simulated = predict(scenario, profile, speed)
    facts = provenance(device, f"batchsim validate --device {device}") | {
        "host_speed": speed,
        "repeats": {
            schedule: [
                {"tokens_per_s": round(run.result.throughput_tokens_per_s, 1), "host_speeds": run.host_speeds}
                for run in repeated
            ]
            for schedule, repeated in runs.items()
        },
    }
    facts["same_machine_as_profile"] = all(facts.get(key) == profile.provenance.get(key) for key in MACHINE_KEYS)
    executed = Run(
        source="executed",
        scenario=simulated.scenario,
        results=with_gains({schedule: run.result for schedule, run in middle.items()}),
        windows={schedule: run.window for schedule, run in middle.items()},
        provenance=facts,
    )
    return simulated, executed


@dataclass(frozen=True, slots=True)
class _Repeat:
    result: ScheduleResult
    window: tuple[Span, ...]
    host_speeds: tuple[float, float]


def host_speed(executor: Executor, profile: Profile, schedule: str, num_kv_blocks: int) -> float:
    """Speed of this host at this moment, relative to the profile's, in one schedule's loop.

    What the profile expects of the host phases of one small decode batch, over what they take here and now. The
    batch is the same whatever the scenario to be predicted: this measures the host, not the scenario.
    """
    rows = min(PROBE_SEQS, executor.decoder.graph_sizes[-1])
    cell = Cell(schedule, executor.graphs, rows, PROBE_CONTEXT, steps=PROBE_STEPS)
    batcher = cell.batcher(block_size=executor.decoder.block_size, num_kv_blocks=num_kv_blocks)
    samples = read_samples(executor.run(SCHEDULES[schedule](), batcher).spans, cell)
    loop = profile.loops[cell.loop]
    expected = dict.fromkeys(HOST_PHASES, 0.0)
    expected |= {phase: fit.mean_ns(rows) for phase, fit in loop.phases.items()}
    if not executor.graphs:
        launches = profile.kernels.total(executor.decoder.padded(rows))
        expected["launch"] = loop.kernel_launch.mean_ns(rows) * launches
    # On the CPU a launch computes the forward, which says nothing of the interpreter.
    ignored = {"wait"} if executor.decoder.device.type == "cuda" else {"wait", "launch"}
    phases = [phase for phase in HOST_PHASES if samples.get(phase) and phase not in ignored]
    took = sum(float(split_outliers(samples[phase])[0].mean()) for phase in phases)
    return sum(expected[phase] for phase in phases) / took

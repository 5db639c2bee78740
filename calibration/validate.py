"""Run scenarios for real, and set what was predicted beside what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from batchsim.engine import Window, batcher_of, simulate, steady_step, with_gains
from batchsim.errors import RunError
from batchsim.metrics import Metrics
from batchsim.model import MODELS
from batchsim.operations import HOST_PHASES
from batchsim.profile import Profile
from batchsim.records import Span
from batchsim.result import Run, ScheduleResult
from batchsim.scenario import Scenario
from batchsim.schedules import SCHEDULES
from calibration.cells import Cell, Samples, read_samples
from calibration.executor import Decoder, Executor, build
from calibration.fit import QUANTILES
from calibration.provenance import host_yardstick_ns, provenance

Progress = Callable[[float], None]
WARM_UP_TOKENS = 24
# On a GPU a decoder is built with room for scenarios to come.
ROOMY_TOKENS, ROOMY_LEN = 8192, 9472
# The cell that tells the host's speed: the one of about this many requests, and how often it is run.
PROBE_SEQS, PROBE_RUNS = 32, 4


class Bench:
    """A decoder on a device, kept from one scenario to the next as long as it serves."""

    def __init__(self, device: str) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise RunError("no CUDA device was found; validate on a machine with one, or use --device cpu")
        self.device = device
        self._decoder: Decoder | None = None
        self._serves: tuple[Any, ...] = ()

    def executor(self, scenario: Scenario, profile: Profile) -> tuple[Executor, int]:
        """An executor that serves `scenario`, and the number of its KV blocks."""
        shape = MODELS[scenario.model]
        workload = scenario.workload
        length = workload.input_len + workload.output_len + 1
        running = min(workload.num_prompts, scenario.max_num_seqs)
        blocks = running * -(-length // scenario.block_size) + 1
        sizes = tuple(curve.size for curve in next(iter(profile.device.values())).decode)
        if self._decoder is not None:
            model, block_size, have_sizes, have_blocks, seqs, tokens, longest = self._serves
            fits = blocks <= have_blocks and running <= seqs and length <= longest
            same = (model, block_size, have_sizes) == (scenario.model, scenario.block_size, sizes)
            if not (same and fits and scenario.max_num_batched_tokens <= tokens):
                self._decoder = None
        if self._decoder is None:
            if self.device == "cuda":
                torch.cuda.empty_cache()
            seqs = max(running, sizes[-1])
            block_bytes = shape.kv_bytes_per_token * scenario.block_size
            have_blocks = max(blocks, self._room(shape.parameters * shape.dtype_bytes, block_bytes))
            tokens, longest = scenario.max_num_batched_tokens, length
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

    The profile's host costs are scaled by the speed that this host shows at the moment (`host_speed`). Schedules are
    interleaved over `repeats`; of each schedule the repeat with the median throughput counts.
    """
    bench = bench or Bench(device)
    yardstick = host_yardstick_ns()
    executor, num_kv_blocks = bench.executor(scenario, profile)
    runs: dict[str, list[tuple[ScheduleResult, tuple[Span, ...]]]] = {name: [] for name in scenario.schedules}
    warm = scenario.workload.model_copy(update={"output_len": min(scenario.workload.output_len, WARM_UP_TOKENS)})
    for schedule in scenario.schedules:
        executor.run(SCHEDULES[schedule](), batcher_of(scenario.model_copy(update={"workload": warm}), num_kv_blocks))
    speed = host_speed(executor, profile, num_kv_blocks)
    for repeat in range(repeats):
        for position, schedule in enumerate(scenario.schedules):
            batcher = batcher_of(scenario, num_kv_blocks)
            execution = executor.run(SCHEDULES[schedule](), batcher)
            metrics, window = Metrics(), Window(steady_step(scenario))
            for span in execution.spans:
                metrics(span)
                window(span)
            runs[schedule].append((metrics.result(schedule, execution.total_ns, batcher), window.spans()))
            if progress is not None:
                progress((repeat + (position + 1) / len(scenario.schedules)) / repeats)
    for measured in runs.values():
        measured.sort(key=lambda run: run[0].throughput_tokens_per_s)
    middle = {schedule: measured[len(measured) // 2] for schedule, measured in runs.items()}
    facts = provenance(device, f"batchsim validate --device {device}")
    spread = {
        schedule: [round(result.throughput_tokens_per_s, 1) for result, _ in measured]
        for schedule, measured in runs.items()
    }
    executed = Run(
        source="executed",
        scenario=scenario.model_dump(mode="json"),
        results=with_gains({schedule: result for schedule, (result, _) in middle.items()}),
        windows={schedule: spans for schedule, (_, spans) in middle.items()},
        provenance=facts
        | {
            "repeats_tokens_per_s": spread,
            "host_speed": round(speed, 4),
            "host_yardstick_ns": yardstick,
            "same_machine_as_profile": _same_machine(facts, profile),
        },
    )
    here = scenario.model_copy(update={"host_speed": scenario.host_speed * speed})
    return replace(simulate(here, profile), scenario=executed.scenario), executed


def host_speed(executor: Executor, profile: Profile, num_kv_blocks: int) -> float:
    """Speed of this host relative to the profile's: one cell of the calibration, run again here and now.

    The ratio of what a step's host phases took then, summed over the schedules, to what they take. It says
    nothing of the scenario to be predicted: the cell is the same for all.
    """
    then = now = 0.0
    for schedule in SCHEDULES:
        cells = [entry for entry in profile.cells if _probes(entry["cell"], schedule, executor.graphs)]
        if not cells:
            continue
        entry = min(cells, key=lambda entry: (abs(entry["cell"]["num_seqs"] - PROBE_SEQS), entry["cell"]["context"]))
        cell = Cell(**entry["cell"])
        samples: Samples = {}
        for _ in range(PROBE_RUNS):
            batcher = cell.batcher(block_size=executor.decoder.block_size, num_kv_blocks=num_kv_blocks)
            for stage, values in read_samples(executor.run(SCHEDULES[schedule](), batcher).spans).items():
                samples.setdefault(stage, []).extend(values)
        for phase in HOST_PHASES:
            if phase in entry["stages"] and phase in samples and phase != "wait":
                then += entry["stages"][phase]["quantiles_ns"][QUANTILES.index(0.5)]
                now += float(np.median(samples[phase]))
    return then / now if now else 1.0


def _probes(cell: dict[str, Any], schedule: str, graphs: bool) -> bool:
    return cell["schedule"] == schedule and cell["graphs"] == graphs and not cell["chunk"]


def _same_machine(facts: dict[str, Any], profile: Profile) -> bool:
    """Whether device, host processor and driver are those of the profile."""
    return all(facts.get(key) == profile.provenance.get(key) for key in ("device", "host_cpu", "driver"))

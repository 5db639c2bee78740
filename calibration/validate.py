"""Run scenarios for real, and set what was predicted beside what was measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from batchsim.batching.continuous import kv_blocks
from batchsim.engine import (
    Window,
    batcher_of,
    is_open_loop,
    requests_of,
    slo_of,
    tile_level_of,
    window_of,
    with_gains,
)
from batchsim.errors import InputError
from batchsim.hardware import device_of
from batchsim.latency import request_figures
from batchsim.metrics import Metrics
from batchsim.model import MODELS
from batchsim.operation import tell_all
from batchsim.operations import HOST_PHASES
from batchsim.profile import Profile
from batchsim.records import Span
from batchsim.request_log import RequestLog
from batchsim.result import Run, ScheduleResult
from batchsim.scenario import Scenario, check_requests, num_kv_blocks
from batchsim.schedules import SCHEDULES
from batchsim.served import Served
from batchsim.workload import Requests
from calibration.cells import Cell, read_samples
from calibration.device import kv_room_bytes, prepare
from calibration.executor import Decoder, Executor, build
from calibration.executor.partition import limited_to, part_of
from calibration.fit import split_outliers
from calibration.predict import predict
from calibration.provenance import MACHINE_KEYS, QuietCore, provenance

Progress = Callable[[float], None]
WARM_UP_TOKENS = 24
# On a GPU a decoder is built with room for scenarios to come.
ROOMY_TOKENS, ROOMY_LEN = 8192, 9472
# The batch that tells the host's speed.
PROBE_SEQS, PROBE_CONTEXT, PROBE_STEPS = 32, 32, 30
# Where the loop shares its core, others have it for milliseconds at a time: more steps, to see enough of that.
SHARED_STEPS = 150


class Bench:
    """A decoder on a device, kept from one scenario to the next as long as it serves; `sleeps` as `Executor`."""

    def __init__(self, device: str, *, sleeps: bool = False) -> None:
        prepare(device, "validate")
        self.device, self.sleeps = device, sleeps
        self.sms: int | None = None  # multiprocessors that the decoder is limited to; None: it has all
        self._decoder: Decoder | None = None

    def executor(self, scenario: Scenario, profile: Profile, requests: Requests) -> Executor:
        """An executor that serves `scenario`, and the probe of the host's speed.

        Where the scenario's hardware is a part of the device at hand, it runs on such a part.

        Raises:
            InputError: without a file; the scenario's hardware is not to be had here.
        """
        sms = part_at_hand(scenario, self.device)
        with nullcontext() if sms is None else limited_to(sms):
            return self._executor(scenario, profile, requests, sms)

    def _executor(self, scenario: Scenario, profile: Profile, requests: Requests, sms: int | None) -> Executor:
        block_size = scenario.block_size
        lengths = requests.prompt_tokens + requests.output_tokens + 1
        length, probe_length = int(lengths.max()), PROBE_CONTEXT + (SHARED_STEPS if self.sleeps else PROBE_STEPS) + 1
        running = min(len(requests), scenario.max_num_seqs)
        # Where not all that may run fits, they take turns, on the device as in the simulation.
        most = min(running * kv_blocks(length, block_size), num_kv_blocks(scenario, profile.device_memory_bytes))
        blocks = max(most, PROBE_SEQS * kv_blocks(probe_length, block_size))
        sizes = [curve.size for curve in profile.device.decode]
        decoder = self._decoder
        if not (
            decoder is not None
            and (decoder.shape.name, decoder.block_size, self.sms) == (scenario.model, block_size, sms)
            and decoder.graph_sizes == sorted({*sizes, decoder.max_num_seqs})
            and blocks <= decoder.num_kv_blocks
            and running <= decoder.max_num_seqs
            and length <= decoder.max_model_len
            and scenario.max_num_batched_tokens <= decoder.max_num_batched_tokens
        ):
            decoder = self._decoder = None  # what it holds of the device is needed for the next
            decoder = self._decoder = self._build(scenario, sizes, running, max(length, probe_length), blocks)
            self.sms = sms
        if scenario.cuda_graphs:
            most = decoder.padded(min(max(running, PROBE_SEQS), decoder.max_num_seqs))
            decoder.capture([size for size in decoder.graph_sizes if size <= most])
        decoder.tiles = tile_level_of(scenario, profile)
        return Executor(decoder, graphs=scenario.cuda_graphs, sleeps=self.sleeps)

    def _build(self, scenario: Scenario, sizes: Sequence[int], running: int, length: int, blocks: int) -> Decoder:
        shape, block_size = MODELS[scenario.model], scenario.block_size
        seqs = max(running, sizes[-1], PROBE_SEQS)
        tokens = max(scenario.max_num_batched_tokens, seqs)
        if self.device == "cuda":
            torch.cuda.empty_cache()
            # Scenarios to come may need more than this one.
            blocks = max(blocks, int(kv_room_bytes(shape) / (shape.kv_bytes_per_token * block_size)))
            tokens, length = max(tokens, ROOMY_TOKENS), max(length, ROOMY_LEN)
        return build(
            shape,
            self.device,
            num_kv_blocks=blocks,
            block_size=block_size,
            max_num_seqs=seqs,
            max_num_batched_tokens=tokens,
            max_model_len=length,
            graphs=False,  # those that a scenario needs are captured for it
            graph_sizes=sizes,
        ).decoder


def part_at_hand(scenario: Scenario, device: str) -> int | None:
    """Of how many multiprocessors of the device at hand the scenario's hardware is; None: of all of them.

    Raises:
        InputError: without a file; it is no part of this device.
    """
    if scenario.hardware is None:
        return None
    if device != "cuda":
        raise InputError(None, "hardware", scenario.hardware.device().name, "none: only a GPU's parts are executed")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    here = device_of({"device": properties.name})
    sms = part_of(scenario.hardware.device(), here, properties.multi_processor_count)
    if sms is not None and "tile" in scenario.schedules:
        # Its blocks wait for each other, and are as many as the whole device holds.
        raise InputError(None, "schedules", "tile", "sync and async on a part of a device")
    return sms


def validate(
    scenario: Scenario,
    profile: Profile,
    device: str,
    *,
    repeats: int = 3,
    progress: Progress | None = None,
    bench: Bench | None = None,
    base: Path = Path(),
) -> tuple[Run, Run]:
    """(predicted, measured): simulate `scenario` at the costs of `profile`, and execute it on `device`.

    As `execute`; the profile's host costs are scaled by the speed that the host showed beside the executions.
    """
    measured = execute(scenario, profile, device, repeats=repeats, progress=progress, bench=bench, base=base)
    facts = measured.provenance
    simulated = predict(scenario, profile, facts["host_speed"], num_kv_blocks=facts["num_kv_blocks"], base=base)
    return simulated, measured


def execute(
    scenario: Scenario,
    profile: Profile,
    device: str,
    *,
    repeats: int = 3,
    progress: Progress | None = None,
    bench: Bench | None = None,
    base: Path = Path(),
) -> Run:
    """Execute every schedule of `scenario` on `device`; `profile` gives the sizes of its graphs and its host's speed.

    Schedules are interleaved over `repeats`; of each the repeat with the median throughput counts, or where requests
    arrive at their own pace that with the median time from arrival to the last token. The run's provenance says how
    fast the host was: the median of the speeds that it showed before and after the repeats that count. A trace's path
    is relative to `base`.
    """
    if scenario.replicas > 1:
        raise InputError(None, "replicas", f"{scenario.replicas}", "1: this machine is one replica")
    if scenario.tensor_parallel > 1:
        wanted = "1: `python -m calibration.hardware.tensor_parallel run` executes models that devices share"
        raise InputError(None, "tensor_parallel", f"{scenario.tensor_parallel}", wanted)
    bench = bench or Bench(device)
    requests = requests_of(scenario, base)
    blocks = num_kv_blocks(scenario, profile.device_memory_bytes)
    check_requests(scenario, requests, blocks)
    executor = bench.executor(scenario, profile, requests)
    blocks = min(blocks, executor.decoder.num_kv_blocks)
    for schedule in scenario.schedules:
        executor.run(SCHEDULES[schedule](), batcher_of(scenario, warm_up_of(requests, scenario.max_num_seqs), blocks))
    runs: dict[str, list[_Repeat]] = {name: [] for name in scenario.schedules}
    with QuietCore(move=device == "cuda") as core:
        for repeat in range(repeats):
            for position, schedule in enumerate(scenario.schedules):
                core.settle()
                before = host_speed(executor, profile, schedule)
                batcher = batcher_of(scenario, requests, blocks)
                metrics, window = Metrics(), Window(*window_of(scenario, requests))
                log = RequestLog(warm_up_ns=round(scenario.warm_up_s * 1e9))
                began, worked = time.perf_counter_ns(), time.thread_time_ns()
                execution = executor.run(SCHEDULES[schedule](), batcher, observe=tell_all([metrics, window]), log=log)
                share = (time.thread_time_ns() - worked) / (time.perf_counter_ns() - began)
                after = host_speed(executor, profile, schedule)
                served = log.served(batcher, execution.total_ns)
                result = metrics.result(schedule, execution.total_ns, batcher).with_requests(
                    request_figures(served, slo_of(scenario), open_loop=is_open_loop(scenario))
                )
                speeds = (round(before, 4), round(after, 4))
                runs[schedule].append(_Repeat(result, window.spans(), served, speeds, round(share, 3)))
                if progress is not None:
                    progress((repeat + (position + 1) / len(scenario.schedules)) / repeats)
    timed = is_open_loop(scenario)
    for repeated in runs.values():
        repeated.sort(key=lambda run: run.result.latency_ms["e2e"]["mean"] if timed else -run.result.total_s)
    middle = {schedule: repeated[len(repeated) // 2] for schedule, repeated in runs.items()}
    # Rounded as it is stored, so that what is stored gives the same prediction again.
    speed = round(median(speed for run in middle.values() for speed in run.host_speeds), 4)
    facts = provenance(device, f"batchsim validate --device {device}") | {
        "host_speed": speed,
        "num_kv_blocks": blocks,
        "repeats": {
            schedule: [
                {
                    "tokens_per_s": round(run.result.throughput, 1),
                    "host_speeds": run.host_speeds,
                    "host_share": run.host_share,
                }
                for run in repeated
            ]
            for schedule, repeated in runs.items()
        },
    }
    facts["same_machine_as_profile"] = all(facts.get(key) == profile.provenance.get(key) for key in MACHINE_KEYS)
    if bench.sms is not None:
        facts["limited_to_multiprocessors"] = bench.sms
    return Run(
        source="executed",
        scenario=scenario.model_dump(mode="json"),
        results=with_gains({schedule: run.result for schedule, run in middle.items()}),
        windows={schedule: run.window for schedule, run in middle.items()},
        served={schedule: run.served for schedule, run in middle.items()},
        slo=slo_of(scenario),
        provenance=facts,
    )


def warm_up_of(requests: Requests, most: int) -> Requests:
    """Some of the requests, all there at the start and of few tokens, to have run everything once."""
    some = slice(0, most)
    return replace(
        requests,
        arrival_ns=np.zeros_like(requests.arrival_ns[some]),
        prompt_tokens=requests.prompt_tokens[some],
        output_tokens=np.minimum(requests.output_tokens[some], WARM_UP_TOKENS),
        priority=requests.priority[some],
        hash_starts=requests.hash_starts[: most + 1],
        max_concurrency=None,
        closed=False,
    )


@dataclass(frozen=True, slots=True)
class _Repeat:
    result: ScheduleResult
    window: tuple[Span, ...]
    served: Served
    host_speeds: tuple[float, float]
    host_share: float
    """Of a core, that the loop's thread had: less than one where it shared one with others."""


def host_speed(executor: Executor, profile: Profile, schedule: str) -> float:
    """Speed of this host at this moment, relative to the profile's, in one schedule's loop.

    What the profile expects of the host phases of one small decode batch, over what they take here and now. The
    batch is the same whatever the scenario to be predicted: this measures the host, not the scenario. Rare
    interruptions are left out; where the loop shares its core (it `sleeps`) they are the rule, like late wake-ups.
    """
    decoder, shares = executor.decoder, executor.sleeps
    rows = min(PROBE_SEQS, decoder.graph_sizes[-1])
    steps = SHARED_STEPS if shares else PROBE_STEPS
    cell = Cell(schedule, executor.graphs, rows, PROBE_CONTEXT, steps=steps)
    batcher = cell.batcher(block_size=decoder.block_size, num_kv_blocks=decoder.num_kv_blocks)
    samples = read_samples(executor.run(SCHEDULES[schedule](), batcher).spans, cell)
    loop = profile.loops[cell.loop]
    expected = dict.fromkeys(HOST_PHASES, 0.0)
    expected |= {phase: fit.mean_ns(rows) for phase, fit in loop.phases.items()}
    if not executor.graphs:
        launches = profile.kernels.total(decoder.padded(rows))
        expected["launch"] = loop.kernel_launch.mean_ns(rows) * launches
    # On the CPU a launch computes the forward, which says nothing of the interpreter.
    ignored = {"wait"} if decoder.device.type == "cuda" else {"wait", "launch"}
    phases = [phase for phase in HOST_PHASES if samples.get(phase) and phase not in ignored]
    if shares:
        expected["collect"] = loop.copy_out_device_ns + loop.wake_up_ns
        phases += ["collect"] if samples.get("collect") else []
    took = sum(float(np.mean(samples[phase] if shares else split_outliers(samples[phase])[0])) for phase in phases)
    return sum(expected[phase] for phase in phases) / took

"""What one rank of a tensor-parallel group does: build its shard, execute scenarios with the others, check tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from batchsim.batching.continuous import ContinuousBatcher, Request, kv_blocks
from batchsim.engine import batcher_of, requests_of, slo_of, with_gains
from batchsim.errors import RunError
from batchsim.latency import request_figures
from batchsim.metrics import Metrics
from batchsim.model import MODELS, ModelShape
from batchsim.profile import Profile
from batchsim.request_log import RequestLog
from batchsim.result import Run, ScheduleResult
from batchsim.scenario import Scenario
from batchsim.schedules import SCHEDULES
from calibration.executor import Decoder, Executor, build
from calibration.executor.parallel import AllReduce, JointStreams, Shard
from calibration.provenance import MACHINE_KEYS, QuietCore, provenance
from calibration.validate import PROBE_CONTEXT, PROBE_SEQS, PROBE_STEPS, host_speed, warm_up_of

# Prompt and output tokens of the requests whose tokens are compared: some share steps, some wait for others to end.
COMPARED = ((5, 12), (33, 9), (1, 14), (70, 11), (16, 6), (40, 17))


@dataclass(frozen=True, slots=True)
class Rank:
    """One of `size` processes and its device."""

    number: int
    size: int
    device: torch.device
    all_reduce: AllReduce

    @property
    def shard(self) -> Shard:
        return Shard(self.number, self.size, self.all_reduce)

    def everyones(self, values: Sequence[float]) -> list[list[float]]:
        """What each rank says, by rank; all of them say as much."""
        every = torch.zeros((self.size, len(values)), dtype=torch.float64, device=self.device)
        every[self.number] = torch.tensor(values, dtype=torch.float64)
        self.all_reduce(every)
        found: list[list[float]] = every.tolist()
        return found

    def facts(self, command: str) -> dict[str, Any]:
        """The provenance of what this rank measures."""
        facts = provenance(self.device.type, command) | {"devices": self.size}
        if self.device.type == "cuda":
            version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
            others = set(range(self.size)) - {self.number}
            facts["nccl"] = ".".join(map(str, version))
            facts["peer_access"] = all(torch.cuda.can_device_access_peer(self.number, other) for other in others)
        return facts

    def executor(self, decoder: Decoder, *, graphs: bool) -> Executor:
        """An executor whose runs begin when all ranks are there."""
        executor = Executor(decoder, graphs=graphs)
        if self.device.type == "cuda":
            from calibration.executor.kernels import stamp

            executor.streams = JointStreams(self.device, stamp, 2 * executor.timed_steps, self.all_reduce)
        return executor


def decoder_for(scenarios: Sequence[Scenario], profile: Profile, rank: Rank) -> Decoder:
    """This rank's shard of a model, large enough for all of `scenarios` and for the probe of the host's speed."""
    block_size = scenarios[0].block_size
    running, longest, blocks = PROBE_SEQS, PROBE_CONTEXT + PROBE_STEPS + 1, 0
    for scenario in scenarios:
        requests = requests_of(scenario)
        length = int((requests.prompt_tokens + requests.output_tokens).max()) + 1
        at_once = min(len(requests), scenario.max_num_seqs)
        running, longest = max(running, at_once), max(longest, length)
        blocks = max(blocks, at_once * kv_blocks(length, block_size))
    sizes = [curve.size for curve in profile.device.decode]
    # The size that the largest batch is padded to, as where all sizes are there.
    seqs = next((size for size in sizes if size >= running), running)
    return build(
        MODELS[scenarios[0].model], str(rank.device), share=rank.shard, graph_sizes=sizes, max_num_seqs=seqs,
        max_num_batched_tokens=max(seqs, *(scenario.max_num_batched_tokens for scenario in scenarios)),
        max_model_len=longest, block_size=block_size,
        num_kv_blocks=max(blocks, PROBE_SEQS * kv_blocks(PROBE_CONTEXT + PROBE_STEPS + 1, block_size)),
    ).decoder  # fmt: skip


def execute(scenario: Scenario, profile: Profile, decoder: Decoder, rank: Rank, *, repeats: int, command: str) -> Run:
    """Execute `scenario` together with the other ranks, as `calibration.validate` does on one device.

    The host's speed is the slowest rank's, for which the others wait in every step. All probes run as graphs: what a
    launch of collectives one by one costs, a profile of one device does not know.
    """
    requests = requests_of(scenario)
    executor, probe = (rank.executor(decoder, graphs=graphs) for graphs in (scenario.cuda_graphs, True))
    # Enough for all that run at once, so that none is ever preempted.
    batcher = partial(batcher_of, scenario, num_kv_blocks=decoder.num_kv_blocks)
    for schedule in scenario.schedules:
        executor.run(SCHEDULES[schedule](), batcher(requests=warm_up_of(requests, scenario.max_num_seqs)))
    found: dict[str, list[ScheduleResult]] = {name: [] for name in scenario.schedules}
    speeds: dict[str, list[list[list[float]]]] = {name: [] for name in scenario.schedules}
    with QuietCore(move=rank.device.type == "cuda") as core:
        for _ in range(repeats):
            for schedule in scenario.schedules:
                core.settle()
                before = host_speed(probe, profile, schedule)
                served, metrics, log = batcher(requests=requests), Metrics(), RequestLog(warm_up_ns=0)
                execution = executor.run(SCHEDULES[schedule](), served, observe=metrics, log=log)
                after = host_speed(probe, profile, schedule)
                figures = request_figures(log.served(served, execution.total_ns), slo_of(scenario), open_loop=False)
                found[schedule].append(metrics.result(schedule, execution.total_ns, served).with_requests(figures))
                speeds[schedule].append(rank.everyones([before, after]))
    of_ranks = [
        round(median(speed for repeated in speeds.values() for each in repeated for speed in each[number]), 4)
        for number in range(rank.size)
    ]
    facts = rank.facts(command) | {
        "host_speed": min(of_ranks),
        "rank_host_speeds": of_ranks,
        "num_kv_blocks": decoder.num_kv_blocks,
        "repeats": {
            schedule: [
                {
                    "tokens_per_s": round(result.throughput, 1),
                    "host_speeds": [round(min(each), 4) for each in zip(*by_rank, strict=True)],
                }
                for result, by_rank in zip(found[schedule], speeds[schedule], strict=True)
            ]
            for schedule in scenario.schedules
        },
    }
    facts["same_machine_as_profile"] = all(facts.get(key) == profile.provenance.get(key) for key in MACHINE_KEYS)
    middle = {
        schedule: sorted(results, key=lambda result: -result.total_s)[len(results) // 2]
        for schedule, results in found.items()
    }
    return Run("executed", scenario.model_dump(mode="json"), with_gains(middle), windows={}, provenance=facts)


def compare(shape: ModelShape, rank: Rank) -> None:
    """Check that the ranks' shards of one model generate, in float32, the tokens that the whole of it generates.

    Raises:
        RunError: they do not.
    """

    def decoder(**options: Any) -> Decoder:
        made = Decoder(
            shape, device=rank.device, dtype=torch.float32, seed=7, num_kv_blocks=64, max_num_seqs=4,
            max_num_batched_tokens=48, max_model_len=100, graph_sizes=(1, 2), **options,
        )  # fmt: skip
        made.warm_up()
        made.capture()
        return made

    def tokens(executor: Executor, schedule: str) -> dict[int, list[int]] | None:
        requests = [Request(number, prompt, output) for number, (prompt, output) in enumerate(COMPARED)]
        batcher = ContinuousBatcher(
            requests, max_num_seqs=4, max_num_batched_tokens=48, block_size=16, num_kv_blocks=64
        )
        return executor.run(SCHEDULES[schedule](), batcher, keep_tokens=True).tokens

    whole = tokens(Executor(decoder(), graphs=False), "sync")
    shard = decoder(share=rank.shard)
    for schedule in ("sync", "async"):
        for graphs in (False, True):
            if tokens(rank.executor(shard, graphs=graphs), schedule) != whole:
                raise RunError(f"rank {rank.number}, {schedule}, graphs {graphs}: other tokens than the whole model's")

"""What the scenarios of every kind need of a device's memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from batchsim.batching.accumulation import divisors
from batchsim.batching.continuous import kv_blocks
from batchsim.errors import InputError
from batchsim.memory import services, serving, training
from batchsim.memory.allocator import fits
from batchsim.memory.breakdown import Breakdown, Need, break_down, framework_of, largest, usage_of
from batchsim.memory.overheads import Library
from batchsim.memory.tape import Tape
from batchsim.model import SERVICES, TRAINED, EncoderShape
from batchsim.scenario import Scenario, num_kv_blocks
from batchsim.service_times import MAX_BATCH
from batchsim.workload import requests_of

if TYPE_CHECKING:
    from batchsim.dynamic_scenario import DynamicScenario
    from batchsim.training_scenario import TrainingScenario

MOST = 65_536
MOST_LENGTHS = 16  # whose graphs are looked at, where a small bucket makes more
GRAPH_SIZES = 18  # captured batches of a decoder: calibration.calibrate.GRAPH_SIZES
FEWER_TOKENS = 2048


def breakdown(
    scenario: Scenario | DynamicScenario | TrainingScenario,
    device_memory_bytes: int,
    library: Library,
    base: Path = Path(),
) -> Breakdown:
    """Where the memory of a scenario goes on a device with `device_memory_bytes`; a trace's path is relative to `base`.

    Raises:
        InputError: without a file; a scenario that says nothing of its model, or one whose weights alone do not fit.
    """
    return break_down(need_of(scenario, device_memory_bytes, library, base), device_memory_bytes)


def peak_bytes(
    scenario: Scenario | DynamicScenario | TrainingScenario,
    device_memory_bytes: int,
    library: Library,
    base: Path = Path(),
) -> int:
    """All that a scenario takes of a device at its peak; more than the device has, just where it does not fit.

    The total of `breakdown`, without its searches.
    """
    need = need_of(scenario, device_memory_bytes, library, base)
    return usage_of(need, device_memory_bytes)[0].reserved + need.framework


def need_of(
    scenario: Scenario | DynamicScenario | TrainingScenario,
    device_memory_bytes: int,
    library: Library,
    base: Path = Path(),
) -> Need:
    """The program that a scenario describes, and its batch; otherwise as `breakdown`."""
    if isinstance(scenario, Scenario):
        return _serving(scenario, device_memory_bytes, library, base)
    if scenario.kind == "training":
        return _training(scenario, library)
    return _dynamic(scenario, library, base)


def _serving(scenario: Scenario, device_bytes: int, library: Library, base: Path) -> Need:
    """`max_num_seqs` requests, each as long as the longest, whose keys and values are all there at once.

    The KV cache of the scenario itself has the size that it is given; else it has room for the requests that may run,
    or where they take turns, what is left.
    """
    requests = requests_of(scenario.workload, seed=scenario.seed, replication=scenario.replication, base=base)
    tokens = int((requests.prompt_tokens + requests.output_tokens).max()) + 1
    shape, running = scenario.shard, min(-(-len(requests) // scenario.replicas), scenario.max_num_seqs)
    given = scenario.kv_cache_bytes is not None or scenario.gpu_memory_utilization is not None
    kernels = 0
    if scenario.cuda_graphs:
        kernels = serving.SLOTS * GRAPH_SIZES * (5 + 10 * shape.num_layers)
    framework = framework_of(library, kernels)

    def of(seqs: int, length: int = tokens, batched: int = scenario.max_num_batched_tokens) -> serving.Serving:
        return serving.Serving(
            shape, seqs * kv_blocks(length, scenario.block_size), seqs, batched, length, scenario.block_size,
            scenario.cuda_graphs, library,
        )  # fmt: skip

    def fitting(blocks: int) -> bool:
        return fits(serving.tape(replace(own, num_kv_blocks=blocks)), device_bytes - framework)

    own = replace(of(running), max_num_seqs=scenario.max_num_seqs)
    if given:
        own = replace(own, num_kv_blocks=num_kv_blocks(scenario, device_bytes))
    elif not scenario.all_at_once:
        least = kv_blocks(tokens, scenario.block_size)
        own = replace(own, num_kv_blocks=max(least, largest(fitting, own.num_kv_blocks)))
    relief: dict[str, Callable[[int], Tape]] = {
        "requests of half the tokens": lambda seqs: serving.tape(of(seqs, max(1, tokens // 2)))
    }
    if scenario.max_num_batched_tokens > FEWER_TOKENS:
        relief[f"max_num_batched_tokens = {FEWER_TOKENS}"] = lambda seqs: serving.tape(of(seqs, batched=FEWER_TOKENS))
    return Need(
        scenario.name, "max_num_seqs", scenario.max_num_seqs, range(1, MOST + 1), serving.tape(own),
        lambda seqs: serving.tape(of(seqs)), framework, relief,
    )  # fmt: skip


def _dynamic(scenario: DynamicScenario, library: Library, base: Path) -> Need:
    if scenario.model is None:
        raise InputError(None, "costs", "a table of service times", "a model: a table says nothing of memory")
    shape = SERVICES[scenario.model]
    lengths: tuple[int, ...] = (1,)
    if isinstance(shape, EncoderShape):
        workload, seed, replication = scenario.workload, scenario.seed, scenario.replication
        requests = requests_of(workload, seed=seed, replication=replication, base=base)
        longest = max(1, int(requests.prompt_tokens.max()))
        bucket = scenario.length_bucket
        lengths = tuple(min(length, shape.max_length) for length in range(bucket, longest + bucket, bucket))
        # A lower bound where a small bucket makes more lengths than that: nobody captures hundreds.
        lengths = lengths[:: -1 * max(1, len(lengths) // MOST_LENGTHS)][::-1]

    def of(size: int) -> services.Service:
        return services.Service(shape, size, lengths, scenario.cuda_graphs, scenario.instances, library)

    relief: dict[str, Callable[[int], Tape]] = {}
    if scenario.instances > 1:
        relief["instances = 1"] = lambda size: services.tape(replace(of(size), instances=1))
    if len(lengths) > 1:
        relief["requests of half the tokens"] = lambda size: services.tape(
            replace(of(size), lengths=lengths[: len(lengths) // 2])
        )
    return Need(
        scenario.name, "max_batch_size", scenario.max_batch_size, range(1, MAX_BATCH + 1),
        services.tape(of(scenario.max_batch_size)), lambda size: services.tape(of(size)), framework_of(library), relief,
    )  # fmt: skip


def _training(scenario: TrainingScenario, library: Library) -> Need:
    def of(micro_batch: int) -> training.Training:
        return training.Training(
            TRAINED[scenario.model], scenario.sequence_length, micro_batch, -(-scenario.global_batch // micro_batch),
            scenario.optimizer, scenario.precision, scenario.checkpointing, library,
        )  # fmt: skip

    changes: dict[str, Callable[[training.Training], training.Training]] = {}
    if scenario.checkpointing == "none":
        changes["checkpointing = full"] = lambda shape: replace(shape, checkpointing="full")
    if scenario.precision != "bf16":
        changes["precision = bf16"] = lambda shape: replace(shape, precision="bf16")
    if scenario.optimizer == "adamw":
        changes["optimizer = momentum"] = lambda shape: replace(shape, optimizer="momentum")

    def changed(change: Callable[[training.Training], training.Training]) -> Callable[[int], Tape]:
        return lambda micro_batch: training.tape(change(of(micro_batch)))

    return Need(
        scenario.name, "micro_batch", scenario.micro_batch, divisors(scenario.global_batch),
        training.tape(of(scenario.micro_batch)), lambda micro_batch: training.tape(of(micro_batch)),
        framework_of(library), {name: changed(change) for name, change in changes.items()},
    )  # fmt: skip

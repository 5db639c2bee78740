"""What a user may write in a scenario file, and what a wrong line gets told."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, TypeAdapter, model_validator

from batchsim import fields, yaml_loader
from batchsim.batching.continuous import kv_blocks, max_tokens
from batchsim.errors import InputError, shown
from batchsim.fields import Milliseconds, Model, Text, distinct, key_of
from batchsim.hardware.device import HardwareKey, TensorParallel
from batchsim.model import MODELS, ModelShape
from batchsim.refusal import Override, Refusals, refused
from batchsim.router import ROUTERS
from batchsim.schedules import SCHEDULES
from batchsim.workload_scenario import FixedWorkload as FixedWorkload
from batchsim.workload_scenario import Workload

if TYPE_CHECKING:
    from batchsim.workload import Requests


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise refused(shown(value), "a power of two of at least 16")
    return value


ModelName = Annotated[str, AfterValidator(key_of(MODELS)), Field(json_schema_extra={"enum": list(MODELS)})]
RouterName = Annotated[
    str, AfterValidator(key_of(dict.fromkeys(ROUTERS))), Field(json_schema_extra={"enum": list(ROUTERS)})
]
ScheduleName = Annotated[str, AfterValidator(key_of(SCHEDULES)), Field(json_schema_extra={"enum": list(SCHEDULES)})]


class Objectives(Model):
    """Service level objectives: what a request has to meet to count as good."""

    ttft_ms: Milliseconds | None = None
    """Time to first token at most, milliseconds."""
    tpot_ms: Milliseconds | None = None
    """Mean time per output token after the first at most, milliseconds."""
    e2e_ms: Milliseconds | None = None
    """Time from arrival to the last token at most, milliseconds."""


class Scenario(Model):
    """A serving loop: a model, a machine's measured costs, requests, and the limits of the batcher.

    Frozen and strict. `load` reads one from a file; constructed directly it raises pydantic's ValidationError.
    """

    kind: Literal["serving"]
    """What is simulated: a serving loop."""
    name: Text
    """A title for tables and reports."""
    model: ModelName
    """The model's shape."""
    profile: Text
    """Measured costs: the name of a shipped profile, or the path of a JSON file relative to the scenario's."""
    tile_profile: Text | None = None
    """For the tile schedule, measured costs of tiles: a shipped name or a path; without it those of the same device."""
    hardware: HardwareKey = None
    """The device and host to predict for: a name of the catalogue, or a mapping; without it the profile's own."""
    tensor_parallel: TensorParallel = 1
    """Devices that share each replica: its heads, the columns of its MLPs, and its KV cache are divided among them."""
    workload: Workload
    """The requests, and when they arrive."""
    schedules: Annotated[
        tuple[ScheduleName, ...], Field(strict=False, min_length=1), AfterValidator(distinct("each schedule once"))
    ] = (
        "sync",
        "async",
    )
    """Schedules to run, in this order."""
    cuda_graphs: bool = True
    """Launch each decode forward as one captured graph; false: kernel by kernel."""
    max_num_seqs: Annotated[int, Field(ge=1, le=65_536)] = 256
    """Requests in one batch at most."""
    max_num_batched_tokens: Annotated[int, Field(ge=1, le=10_000_000)] = 8192
    """Tokens in one batch at most; longer prompts are split. At least max_num_seqs."""
    chunked_prefill: bool = True
    """Split prompts over batches as the tokens of a batch allow; false: each prompt is computed in one batch."""
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    """Which waiting request goes first: the one that came first, or the one with the lowest priority value."""
    block_size: Annotated[int, Field(ge=16, le=65_536), AfterValidator(_power_of_two)] = 16
    """Tokens in one block of the KV cache: a power of two."""
    kv_cache_bytes: Annotated[int, Field(ge=1, le=10**15)] | None = None
    """Size of the KV cache; without it, what the weights leave of the device's memory."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    """Share of the device's memory for weights and KV cache together, in place of kv_cache_bytes."""
    preemption: Literal["recompute", "none"] = "recompute"
    """When the KV cache is full: take the blocks of the request that came last and compute it anew later; or none,
    and reserve each request's blocks for its whole length when it is admitted."""
    prefix_caching: bool = False
    """Keep the blocks of prompts, and compute none again that is still there."""
    replicas: Annotated[int, Field(ge=1, le=1024)] = 1
    """Copies of the model, each with a device and a host loop of its own."""
    router: RouterName = "round_robin"
    """Which replica serves a request: each in turn, the one with the fewest unfinished, or one that has its prefix."""
    host_threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """Host threads that may run at once; 1: one Python interpreter."""
    host_speed: Annotated[float, Field(ge=0.001, le=1000, allow_inf_nan=False)] = 1.0
    """Speed of one host thread relative to the profile's host; 2.0: host work takes half the time."""
    launch_queue_depth: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    """Launches that wait for the device at most; the host blocks when the queue is full."""
    jitter: bool = True
    """Draw host costs from their measured distributions; false: use their means."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Seed of all random draws."""
    replication: Annotated[int, Field(ge=0, le=2**30)] = 0
    """Which of many independent repetitions under the same seed."""
    replications: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Repetitions from that one on; figures are then their means, with intervals."""
    warm_up_s: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 0.0
    """Seconds at the start whose arrivals and tokens do not count in latencies and in rates of requests."""
    slo: Objectives | None = None
    """What a request has to meet to count towards goodput."""
    level: Literal["iteration", "operation"] = "iteration"
    """How finely to simulate, with the same results to the nanosecond; operation: an event for every host call."""

    @model_validator(mode="after")
    def _decodes_fit(self) -> Self:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise refused(
                f"{self.max_num_batched_tokens}, less than max_num_seqs = {self.max_num_seqs}",
                f"at least {self.max_num_seqs}, one token for every running request",
                "max_num_batched_tokens",
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kv_cache_bytes is not None and self.gpu_memory_utilization is not None:
            raise refused("gpu_memory_utilization beside kv_cache_bytes", "one of the two", "gpu_memory_utilization")
        if self.replicas > 1 and self.workload.max_concurrency is not None:
            wanted = "1, or a workload without max_concurrency: clients are not held back across replicas"
            raise refused(f"{self.replicas} with max_concurrency", wanted, "replicas")
        return self

    @model_validator(mode="after")
    def _divided(self) -> Self:
        shape, devices = MODELS[self.model], self.tensor_parallel
        sizes = {
            "heads": shape.num_heads,
            "key and value heads": shape.num_kv_heads,
            "columns": shape.intermediate_size,
        }
        for what, size in sizes.items():
            if size % devices:
                found = f"{devices}, which does not divide the {size} {what} of {self.model}"
                raise refused(found, "a divisor of it", "tensor_parallel")
        return self

    @property
    def shard(self) -> ModelShape:
        """What one device holds of the model."""
        return MODELS[self.model].shard(self.tensor_parallel)

    @property
    def all_at_once(self) -> bool:
        """Whether equal requests are all there at the start."""
        workload = self.workload
        return (
            isinstance(workload, FixedWorkload) and workload.request_rate is None and workload.max_concurrency is None
        )


def load(path: Path | str, sets: Iterable[str | Override] = ()) -> Scenario:
    """Read a scenario from a YAML (or JSON) file; `sets` are `PATH=VALUE` texts, the values written as in YAML.

    Raises:
        InputError: with everything that is wrong, a line each.
    """
    path = Path(path)
    return fields.read(Scenario, _refusals(), yaml_loader.load(path), str(path), sets)


def parse(text: str, file: str = "scenario", sets: Iterable[str | Override] = ()) -> Scenario:
    """As `load`, from text; `file` is what errors name."""
    return fields.read(Scenario, _refusals(), yaml_loader.parse(text, file), file, sets)


def scenario_json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a scenario, a sweep or a plan, for editors and other programs."""
    from batchsim.dynamic_scenario import DynamicScenario
    from batchsim.plan.spec import Plan
    from batchsim.sweep.spec import SweepSpec
    from batchsim.tiles.scenario import TilesScenario
    from batchsim.training_scenario import TrainingScenario

    kinds = Scenario | DynamicScenario | TrainingScenario | TilesScenario | SweepSpec | Plan
    every: TypeAdapter[Any] = TypeAdapter(Annotated[kinds, Field(discriminator="kind")])
    return {**fields.DRAFT, **every.json_schema(), "title": "BatchSim scenario"}


def num_kv_blocks(scenario: Scenario, device_memory_bytes: int) -> int:
    """Blocks of each replica's KV cache, of which each of its devices holds a share.

    `kv_cache_bytes` of a scenario is what one device gives for it.

    Raises:
        InputError: without a file; `InputError.within` adds it. The weights alone exceed the device, or nothing is left
            for the cache.
    """
    model = scenario.shard
    device, block = f"the device's {_gb(device_memory_bytes)}", scenario.block_size * model.kv_bytes_per_token
    if model.weight_bytes > device_memory_bytes:
        found = f"{model.name} with {_gb(model.weight_bytes)} of weights"
        raise InputError(None, "model", found, f"a model that fits {device}")
    left = device_memory_bytes - model.weight_bytes
    key, room = "model", left
    if scenario.kv_cache_bytes is not None:
        key, room = "kv_cache_bytes", scenario.kv_cache_bytes
        if room > left:
            wanted = f"at most {left:,}: {_gb(left)} are left of {device} beside {_gb(model.weight_bytes)} of weights"
            raise InputError(None, key, f"{room:,}", wanted)
    elif scenario.gpu_memory_utilization is not None:
        key = "gpu_memory_utilization"
        room = int(device_memory_bytes * scenario.gpu_memory_utilization) - model.weight_bytes
    if room < block:
        raise InputError(
            None,
            key,
            f"room for no block of {block:,} bytes of KV cache",
            f"more memory, or less than {device} for weights",
        )
    return room // block


def check_memory(scenario: Scenario, device_memory_bytes: int) -> None:
    """Refuse equal requests, all there at the start, of which as many as may run at once exceed the device's memory.

    A request's blocks hold its prompt, its output and one token more, which a loop that reads results late writes.
    Where the size of the KV cache is given, or requests arrive over time, they take turns instead.

    Raises:
        InputError: without a file; `InputError.within` adds it.
    """
    blocks = num_kv_blocks(scenario, device_memory_bytes)
    workload = scenario.workload
    given = scenario.kv_cache_bytes is not None or scenario.gpu_memory_utilization is not None
    if given or not (scenario.all_at_once and isinstance(workload, FixedWorkload)):
        return
    model = scenario.shard
    need = kv_blocks(max_tokens(workload.input_len, workload.output_len), scenario.block_size)
    request = need * scenario.block_size * model.kv_bytes_per_token
    running = min(-(-workload.num_prompts // scenario.replicas), scenario.max_num_seqs)
    if running * need <= blocks:
        return
    have, fitting = f"the device's {_gb(device_memory_bytes)}", blocks // need
    found = f"{running} requests at once: {_gb(model.weight_bytes)} of weights and {_gb(running * request)} of KV cache"
    if fitting < 1:
        raise InputError(None, "workload", f"one request of {_gb(request)} of KV cache", f"requests that fit {have}")
    key = "max_num_seqs" if scenario.max_num_seqs <= workload.num_prompts else "workload.num_prompts"
    raise InputError(None, key, found, f"what fits {have}: max_num_seqs of at most {fitting}")


def check_requests(scenario: Scenario, requests: Requests, blocks: int) -> None:
    """Refuse requests of which one could never run: it would be waited for for ever.

    Raises:
        InputError: without a file; names the request by its number and lengths.
    """

    def named(i: int) -> str:
        return f"request {i:,} of {requests.prompt_tokens[i]:,} + {requests.output_tokens[i]:,} tokens"

    tokens = requests.prompt_tokens + requests.output_tokens + 1
    longest = int(tokens.argmax())
    need = kv_blocks(int(tokens[longest]), scenario.block_size)
    if need > blocks:
        found = f"{named(longest)}, which needs {need:,} blocks of KV cache"
        raise InputError(None, "workload", found, f"requests that fit the {blocks:,} that there are")
    if not scenario.chunked_prefill:
        prefill = requests.prompt_tokens + (requests.output_tokens if scenario.preemption == "recompute" else 0)
        longest = int(prefill.argmax())
        if prefill[longest] > scenario.max_num_batched_tokens:
            found = f"{scenario.max_num_batched_tokens:,} without chunked_prefill, and {named(longest)}"
            wanted = f"at least {prefill[longest]:,}, what it may have to compute in one batch"
            raise InputError(None, "max_num_batched_tokens", found, wanted)


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:,.3g} GB" if size_bytes < 1e12 else f"{size_bytes / 1e9:,.0f} GB"


@cache
def _refusals() -> Refusals:
    return fields.refusals_of(Scenario)

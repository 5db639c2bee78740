"""What a user may write in a scenario file, and what a wrong line gets told."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, TypeAdapter, model_validator

from batchsim import fields, yaml_loader
from batchsim.batching.continuous import kv_blocks, max_tokens
from batchsim.errors import InputError, shown
from batchsim.fields import Count, Model, Text, key_of
from batchsim.model import MODELS
from batchsim.refusal import Override, Refusals, refused
from batchsim.schedules import SCHEDULES

# Keys of workloads with an arrival process, which this version does not have.
ARRIVAL_KEYS = frozenset({"request_rate", "burstiness", "max_concurrency"})


def _distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise refused(f"{value} twice", "each schedule once")
    return values


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise refused(shown(value), "a power of two of at least 16")
    return value


ModelName = Annotated[str, AfterValidator(key_of(MODELS)), Field(json_schema_extra={"enum": list(MODELS)})]
ScheduleName = Annotated[str, AfterValidator(key_of(SCHEDULES)), Field(json_schema_extra={"enum": list(SCHEDULES)})]


class FixedWorkload(Model):
    """Equal requests, all present at the start."""

    kind: Literal["fixed"]
    num_prompts: Count
    """Requests in all."""
    input_len: Count
    """Prompt tokens of each request."""
    output_len: Count
    """Tokens that each request is continued by."""


# Workloads with arrivals join this as further kinds: Annotated[FixedWorkload | ..., Field(discriminator="kind")].
Workload = FixedWorkload


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
    workload: Workload
    """The requests."""
    schedules: Annotated[tuple[ScheduleName, ...], Field(strict=False, min_length=1), AfterValidator(_distinct)] = (
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
    block_size: Annotated[int, Field(ge=16, le=65_536), AfterValidator(_power_of_two)] = 16
    """Tokens in one block of the KV cache: a power of two."""
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
    replication: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Which of many independent repetitions under the same seed."""

    @model_validator(mode="after")
    def _decodes_fit(self) -> Self:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise refused(
                f"{self.max_num_batched_tokens}, less than max_num_seqs = {self.max_num_seqs}",
                f"at least {self.max_num_seqs}, one token for every running request",
                "max_num_batched_tokens",
            )
        return self


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
    """The JSON schema (draft 2020-12) of a scenario file of any kind, for editors and other programs."""
    from batchsim.tiles.scenario import TilesScenario

    every: TypeAdapter[Any] = TypeAdapter(Annotated[Scenario | TilesScenario, Field(discriminator="kind")])
    return {**fields.DRAFT, **every.json_schema(), "title": "BatchSim scenario"}


def check_memory(scenario: Scenario, device_memory_bytes: int) -> None:
    """Refuse a scenario whose weights, and KV cache of all requests that may run at once, exceed the device.

    A request's blocks hold its prompt, its output and one token more, which a loop that reads results late writes.

    Raises:
        InputError: without a file; `InputError.within` adds it.
    """
    model, workload = MODELS[scenario.model], scenario.workload
    weights = model.weight_bytes
    blocks = kv_blocks(max_tokens(workload.input_len, workload.output_len), scenario.block_size)
    request = blocks * scenario.block_size * model.kv_bytes_per_token
    running = min(workload.num_prompts, scenario.max_num_seqs)
    if weights + running * request <= device_memory_bytes:
        return
    have = f"the device's {_gb(device_memory_bytes)}"
    fitting = (device_memory_bytes - weights) // request
    if weights > device_memory_bytes:
        raise InputError(None, "model", f"{model.name} with {_gb(weights)} of weights", f"a model that fits {have}")
    found = f"{running} requests at once: {_gb(weights)} of weights and {_gb(running * request)} of KV cache"
    if fitting < 1:
        raise InputError(None, "workload", f"one request of {_gb(request)} of KV cache", f"requests that fit {have}")
    key = "max_num_seqs" if scenario.max_num_seqs <= workload.num_prompts else "workload.num_prompts"
    raise InputError(None, key, found, f"what fits {have}: max_num_seqs of at most {fitting}")


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:,.3g} GB" if size_bytes < 1e12 else f"{size_bytes / 1e9:,.0f} GB"


@cache
def _refusals() -> Refusals:
    arrivals = (
        "a key of an arrival process, which this version does not have",
        "kind: fixed with num_prompts, input_len and output_len: all requests present at the start",
    )
    return fields.refusals_of(Scenario, dict.fromkeys(ARRIVAL_KEYS, arrivals))

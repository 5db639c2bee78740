"""What a user may write of dynamic batching: a service, its requests, and the queue before it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from batchsim import fields, yaml_loader
from batchsim.batching.dynamic import DynamicBatcher, Requested
from batchsim.dynamic_workload import DynamicWorkload
from batchsim.errors import InputError
from batchsim.fields import Count, Milliseconds, Model, Text, distinct, key_of
from batchsim.hardware.device import HardwareKey
from batchsim.model import SERVICES, EncoderShape
from batchsim.refusal import Override, Refusals, refused
from batchsim.service_times import MAX_BATCH, TableService
from batchsim.workload import Requests

SCHEDULES = ("sync", "async")


def _no_tiles(value: str) -> str:
    if value == "tile":
        raise refused("tile, which is for generating models", "sync or async")
    return value


ServiceName = Annotated[str, AfterValidator(key_of(SERVICES)), Field(json_schema_extra={"enum": list(SERVICES)})]
ScheduleName = Annotated[
    str,
    AfterValidator(_no_tiles),
    AfterValidator(key_of(dict.fromkeys(SCHEDULES))),
    Field(json_schema_extra={"enum": list(SCHEDULES)}),
]
BatchSize = Annotated[int, Field(ge=1, le=MAX_BATCH)]
Microseconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]


class AnswerObjectives(Model):
    """Service level objectives: what a request has to meet to count as good."""

    queue_ms: Milliseconds | None = None
    """Time in the queue at most, milliseconds."""
    e2e_ms: Milliseconds | None = None
    """Time from arrival to the answer at most, milliseconds."""


class DynamicScenario(Model):
    """A server that batches the requests of many clients: its costs, the requests, and its queue.

    Frozen and strict. `load` reads one from a file; constructed directly it raises pydantic's ValidationError.
    """

    kind: Literal["dynamic"]
    """What is simulated: cross-request (dynamic) batching."""
    name: Text
    """A title for tables and reports."""
    model: ServiceName | None = None
    """What is served, at a profile's costs."""
    profile: Text | None = None
    """Measured costs: the name of a shipped profile, or the path of a JSON file relative to the scenario's."""
    hardware: HardwareKey = None
    """The device and host to predict for: a name of the catalogue, or a mapping; without it the profile's own."""
    costs: TableService | None = None
    """A table of service times, in place of model and profile."""
    workload: DynamicWorkload
    """The requests, and when they arrive."""
    schedules: Annotated[
        tuple[ScheduleName, ...], Field(strict=False, min_length=1), AfterValidator(distinct("each once"))
    ] = (
        "sync",
        "async",
    )
    """Schedules to run, in this order; without it both, of a table sync alone."""
    cuda_graphs: bool = True
    """Launch each forward as one captured graph; false: kernel by kernel."""
    max_batch_size: BatchSize = 32
    """Requests in one batch at most."""
    max_queue_delay_us: Microseconds = 0.0
    """How long the oldest request waits for others to fill a batch at most, microseconds; 0: not at all."""
    preferred_batch_sizes: Annotated[
        tuple[BatchSize, ...], Field(strict=False), AfterValidator(distinct("each once"))
    ] = ()
    """Sizes of which a batch goes at once when the queue fills it; without it max_batch_size."""
    queue_timeout_us: Microseconds | None = None
    """A request that waits longer is late, microseconds; without it none is."""
    late: Literal["drop", "serve"] = "drop"
    """What becomes of late requests: dropped at that moment, or served after all that are in time."""
    max_queue_size: Count | None = None
    """Requests in the queue at most; one that finds so many is refused. Without it there is no bound."""
    max_priority_wait_us: Microseconds | None = None
    """A request in time that has waited longer goes before all classes, microseconds; without it none does."""
    instances: Annotated[int, Field(ge=1, le=64)] = 1
    """Copies of the service that share the queue: with a profile on one device and with the host's threads in common;
    with a table each a server of its own."""
    length_bucket: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """Requests of a batch are padded to the longest one's tokens, rounded up to a multiple of this."""
    host_threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """Host threads that may run at once; 1: one Python interpreter."""
    host_speed: Annotated[float, Field(ge=0.001, le=1000, allow_inf_nan=False)] = 1.0
    """Speed of one host thread relative to the profile's host; 2.0: host work takes half the time."""
    launch_queue_depth: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    """Launches that wait for the device at most; the host blocks when the queue is full."""
    jitter: bool = True
    """Draw costs from their distributions; false: use their means."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Seed of all random draws."""
    replication: Annotated[int, Field(ge=0, le=2**30)] = 0
    """Which of many independent repetitions under the same seed."""
    replications: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Repetitions from that one on; figures are then their means, with intervals."""
    warm_up_s: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 0.0
    """Seconds at the start whose arrivals do not count in latencies and in rates of requests."""
    slo: AnswerObjectives | None = None
    """What a request has to meet to count towards goodput."""
    level: Literal["iteration", "operation"] = "iteration"
    """How finely to simulate, with the same results to the nanosecond; operation: an event for every host call."""

    @model_validator(mode="before")
    @classmethod
    def _schedules_of_a_table(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("costs") is not None and "schedules" not in data:
            return {**data, "schedules": ("sync",)}
        return data

    @model_validator(mode="after")
    def _costs(self) -> Self:
        if self.costs is not None:
            for key in ("model", "profile", "hardware"):
                if getattr(self, key) is not None:
                    wanted = "one of the two: costs take the place of a model's profile"
                    raise refused(f"{key} beside costs", wanted, key)
        for key in ("model", "profile"):
            if self.costs is None and getattr(self, key) is None:
                raise refused("nothing", "model and profile, or costs: {kind: table, batch_ms: {1: 4.2, 8: 9}}", key)
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for size in self.preferred_batch_sizes:
            if size > self.max_batch_size:
                found = f"{size}, more than max_batch_size = {self.max_batch_size}"
                raise refused(found, f"at most {self.max_batch_size}", "preferred_batch_sizes")
        timeout_us = self.queue_timeout_us
        if self.late == "drop" and timeout_us is not None and timeout_us < self.max_queue_delay_us:
            found = f"{self.max_queue_delay_us:g}, more than queue_timeout_us = {timeout_us:g}"
            wanted = f"at most {timeout_us:g}: a request would be dropped before its batch goes"
            raise refused(found, wanted, "max_queue_delay_us")
        clients = self.workload.max_concurrency
        if clients is not None and self.instances > 1:
            wanted = "1, or a workload without max_concurrency: clients are not held back across instances"
            raise refused(f"{self.instances} with max_concurrency", wanted, "instances")
        if clients is not None and self.max_queue_size is not None and self.max_queue_size < clients:
            found = f"{self.max_queue_size}, less than max_concurrency = {clients}"
            wanted = f"at least {clients}: a client that is refused would come again at once"
            raise refused(found, wanted, "max_queue_size")
        return self


def batcher_of(scenario: DynamicScenario, requests: Requests, *, made: bool = False) -> DynamicBatcher:
    """A fresh batcher with the requests of a scenario: each made as it arrives, or with `made` all of them now."""
    stream = _stream(requests)
    return DynamicBatcher(
        list(stream) if made else stream,
        max_batch_size=scenario.max_batch_size,
        max_queue_delay_ns=nanoseconds(scenario.max_queue_delay_us) or 0,
        preferred_batch_sizes=scenario.preferred_batch_sizes,
        queue_timeout_ns=nanoseconds(scenario.queue_timeout_us),
        late=scenario.late,
        max_queue_size=scenario.max_queue_size,
        max_priority_wait_ns=nanoseconds(scenario.max_priority_wait_us),
        length_bucket=scenario.length_bucket,
        max_concurrency=requests.max_concurrency,
        closed=requests.closed,
    )


def nanoseconds(time_us: float | None) -> int | None:
    """Whole nanoseconds; None as it is."""
    return None if time_us is None else round(time_us * 1000)


def _stream(requests: Requests) -> Iterator[Requested]:
    for i in range(len(requests)):
        arrival, tokens, priority = requests.arrival_ns[i], requests.prompt_tokens[i], requests.priority[i]
        yield Requested(i, int(arrival), int(tokens), int(priority))


def check_lengths(scenario: DynamicScenario, requests: Requests) -> None:
    """Refuse requests that are longer than the model takes.

    Raises:
        InputError: without a file; names the request by its number and length.
    """
    shape = SERVICES.get(scenario.model or "")
    longest = int(requests.prompt_tokens.argmax())
    if isinstance(shape, EncoderShape) and requests.prompt_tokens[longest] > shape.max_length:
        found = f"request {longest:,} of {requests.prompt_tokens[longest]:,} tokens"
        raise InputError(None, "workload", found, f"at most {shape.max_length}, what {shape.name} takes")


def load(path: Path | str, sets: Iterable[str | Override] = ()) -> DynamicScenario:
    """Read a scenario from a YAML (or JSON) file; `sets` are `PATH=VALUE` texts, the values written as in YAML.

    Raises:
        InputError: with everything that is wrong, a line each.
    """
    path = Path(path)
    return fields.read(DynamicScenario, _refusals(), yaml_loader.load(path), str(path), sets)


def parse(text: str, file: str = "scenario", sets: Iterable[str | Override] = ()) -> DynamicScenario:
    """As `load`, from text; `file` is what errors name."""
    return fields.read(DynamicScenario, _refusals(), yaml_loader.parse(text, file), file, sets)


@cache
def _refusals() -> Refusals:
    return fields.refusals_of(DynamicScenario)

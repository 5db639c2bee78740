"""What a user may write in a scenario of training, and what a wrong line gets told."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from batchsim import fields, yaml_loader
from batchsim.batching.accumulation import divisors
from batchsim.errors import one_of
from batchsim.fields import Model, Text, distinct, key_of
from batchsim.model import TRAINED
from batchsim.refusal import Override, Refusals, refused
from batchsim.schedules.training import TRAINING_SCHEDULES

ModelName = Annotated[str, AfterValidator(key_of(TRAINED)), Field(json_schema_extra={"enum": list(TRAINED)})]
ScheduleName = Annotated[
    str, AfterValidator(key_of(TRAINING_SCHEDULES)), Field(json_schema_extra={"enum": list(TRAINING_SCHEDULES)})
]
Sequences = Annotated[int, Field(ge=1, le=1_000_000)]
Positive = Annotated[float, Field(gt=0, le=1e18, allow_inf_nan=False)]


class Data(Model):
    """Where the tokens come from."""

    prepare_ms_per_sequence: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] | None = None
    """Host time to prepare a sequence, milliseconds, such as tokenising it; without it, what the profile measured
    for collating ready tokens."""


class CriticalBatch(Model):
    """How many steps a target loss takes at other batch sizes, by McCandlish et al. 2018, "An Empirical Model of
    Large-Batch Training": S = S_min (1 + B_crit / B), E = E_min (1 + B / B_crit), with E_min = S_min B_crit."""

    critical_batch_tokens: Positive
    """B_crit, the batch at which steps and tokens are both twice their least, tokens."""
    min_steps: Positive | None = None
    """S_min, the optimiser steps that the target takes with batches without end."""
    min_tokens: Positive | None = None
    """E_min, the tokens that it takes with the smallest batches; one of the two."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.min_steps is None) == (self.min_tokens is None):
            found = "min_steps beside min_tokens" if self.min_steps else "neither min_steps nor min_tokens"
            raise refused(found, "one of the two; the other follows from critical_batch_tokens", "min_steps")
        return self

    def steps(self, batch_tokens: float) -> float:
        """S, the optimiser steps to the target with batches of so many tokens."""
        least = self.min_steps if self.min_steps is not None else (self.min_tokens or 0.0) / self.critical_batch_tokens
        return least * (1 + self.critical_batch_tokens / batch_tokens)

    def tokens(self, batch_tokens: float) -> float:
        """E = S B, the tokens to the target."""
        return self.steps(batch_tokens) * batch_tokens


class TrainingScenario(Model):
    """Training one model on one device with gradient accumulation: optimiser steps made of micro-batches.

    Frozen and strict. `load` reads one from a file; constructed directly it raises pydantic's ValidationError.
    """

    kind: Literal["training"]
    """What is simulated: a training loop."""
    name: Text
    """A title for tables and reports."""
    model: ModelName
    """The model's shape."""
    profile: Text
    """Measured costs of training: a shipped profile's name, or the path of a JSON file relative to the scenario's."""
    sequence_length: Annotated[int, Field(ge=1, le=1_000_000)]
    """Tokens in a sequence."""
    global_batch: Sequences
    """Sequences of an optimiser step."""
    micro_batch: Sequences
    """Sequences of one forward and backward pass; it divides global_batch."""
    optimizer: Literal["sgd", "momentum", "adamw"] = "adamw"
    """The optimiser: stochastic gradient descent, the same with momentum, or AdamW."""
    precision: Literal["bf16", "mixed", "fp32"] = "mixed"
    """All in bfloat16; weights, gradients and state in float32 and computing in bfloat16; or all in float32."""
    checkpointing: Literal["none", "full"] = "none"
    """Keep every layer's activations for the backward pass, or only each layer's input and compute the rest anew."""
    schedules: Annotated[
        tuple[ScheduleName, ...], Field(strict=False, min_length=1), AfterValidator(distinct("each schedule once"))
    ] = (
        "sync",
        "async",
    )
    """Schedules to run, in this order: a plain loop, and one that prefetches."""
    data: Data = Data()
    """What preparing the data costs the host."""
    steps: Annotated[int, Field(ge=1, le=100_000)] = 20
    """Optimiser steps to simulate."""
    critical_batch: CriticalBatch | None = None
    """With it, also the time to a target loss."""
    host_threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """Host threads that may run at once; with two or more, the async schedule's data are prepared beside the loop."""
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

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.global_batch % self.micro_batch:
            sizes = divisors(self.global_batch)
            below = max((size for size in sizes if size < self.micro_batch), default=None)
            above = min((size for size in sizes if size > self.micro_batch), default=None)
            nearest = [str(size) for size in (below, above) if size is not None]
            wanted = f"a divisor of it; the nearest: {one_of(nearest)}"
            raise refused(
                f"{self.micro_batch}, which does not divide global_batch = {self.global_batch}", wanted, "micro_batch"
            )
        return self

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of an optimiser step."""
        return self.global_batch // self.micro_batch

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimiser step."""
        return self.global_batch * self.sequence_length


def load(path: Path | str, sets: Iterable[str | Override] = ()) -> TrainingScenario:
    """Read a scenario from a YAML (or JSON) file; `sets` are `PATH=VALUE` texts, the values written as in YAML.

    Raises:
        InputError: with everything that is wrong, a line each.
    """
    path = Path(path)
    return fields.read(TrainingScenario, _refusals(), yaml_loader.load(path), str(path), sets)


def parse(text: str, file: str = "scenario", sets: Iterable[str | Override] = ()) -> TrainingScenario:
    """As `load`, from text; `file` is what errors name."""
    return fields.read(TrainingScenario, _refusals(), yaml_loader.parse(text, file), file, sets)


_FOLLOWS = ("a figure that follows from others", "micro_batch: global_batch / accumulation_steps")
_HINTS = {
    "batch_size": ("a key of other programs", "global_batch and micro_batch"),
    "accumulation_steps": _FOLLOWS,
    "gradient_accumulation_steps": _FOLLOWS,
}


@cache
def _refusals() -> Refusals:
    return fields.refusals_of(TrainingScenario, _HINTS)

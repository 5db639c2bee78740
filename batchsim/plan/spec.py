"""What a user may write in a plan's file, and what a wrong line gets told."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from batchsim import fields
from batchsim.errors import shown
from batchsim.fields import Model, OneOrMore, Text, distinct
from batchsim.plan.objectives import Objective, parse
from batchsim.refusal import Override, Refusals, refused
from batchsim.yaml_loader import Document

MAX_REPLICAS = 1024
# What the other keys of candidates say.
_OWN_KEYS = {
    "hardware": "hardware", "schedules": "schedules", "max_num_seqs": "max_num_seqs", "replicas": "replicas",
    "tensor_parallel": "tensor_parallel",
}  # fmt: skip


class Range(Model):
    """All numbers of replicas from one to another."""

    min: Annotated[int, Field(ge=1, le=MAX_REPLICAS)] = 1
    """The fewest."""
    max: Annotated[int, Field(ge=1, le=MAX_REPLICAS)]
    """The most."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max < self.min:
            raise refused(f"{self.max}, less than min = {self.min}", f"at least {self.min}", "max")
        return self


def _objectives(value: object) -> object:
    if not isinstance(value, dict) or not value:
        raise refused(shown(value), 'a mapping of figures to bounds, such as p99_ttft_ms: "<=500"')
    for key, bound in value.items():
        if not isinstance(bound, Objective):
            parse(key, bound)
    return value


def _replicas(value: object) -> object:
    """A number, a list of numbers or a range, as numbers that rise."""
    if isinstance(value, dict):
        from batchsim.workload_scenario import specified

        found = specified(Range, value)
        return list(range(found.min, found.max + 1))
    values = value if isinstance(value, list | tuple) else [value]
    for number in values:
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= MAX_REPLICAS:
            wanted = f"an integer from 1 to {MAX_REPLICAS}, a list of such, or a mapping with min and max"
            raise refused(shown(number), wanted)
    if not values:
        raise refused(shown(value), "at least one number of replicas")
    if len(set(values)) < len(values):
        raise refused("a number twice", "each number of replicas once")
    return sorted(values)


def _values(value: object) -> object:
    if not isinstance(value, dict):
        raise refused(shown(value), "a mapping of the scenario's keys to lists of values")
    for key, values in value.items():
        if key in _OWN_KEYS:
            raise refused(f"{key} among fields", f"candidates.{_OWN_KEYS[key]}", key)
        if not isinstance(values, list | tuple) or not values:
            raise refused(shown(values), "a list of values", key)
    return value


Once = AfterValidator(distinct("each once"))


class Candidates(Model):
    """What to choose from: every combination. What is left out is as the scenario has it."""

    hardware: Annotated[OneOrMore[Text | dict[str, Any]], Once] | None = None
    """Devices of the catalogue, or mappings as a scenario's hardware takes them; each needs a price per hour."""
    schedules: Annotated[OneOrMore[Text], Once] | None = None
    """Schedules; without it those of the scenario."""
    max_num_seqs: Annotated[OneOrMore[int], Once] | None = None
    """Requests in one batch at most."""
    replicas: (
        Annotated[
            tuple[int, ...],
            BeforeValidator(_replicas),
            Field(strict=False, json_schema_extra={"description": "A number, a list, or a range {min, max}."}),
        ]
        | None
    ) = None
    """How many replicas: a number, a list, or a mapping with max and perhaps min."""
    tensor_parallel: Annotated[OneOrMore[int], Once] | None = None
    """Devices of one replica."""
    fields: Annotated[dict[str, Any], BeforeValidator(_values)] = Field(default_factory=dict)
    """Further keys of the scenario, dotted, and lists of their values."""


class Plan(Model):
    """What to plan for: traffic, objectives, candidates.

    Frozen and strict. `read` reads one from a file; constructed directly it raises pydantic's ValidationError.
    """

    kind: Literal["plan"]
    """What this is: a plan."""
    name: Text
    """A title for tables and reports."""
    scenario: Text | dict[str, Any]
    """The traffic and all that is fixed: the path of a scenario relative to this file, or a scenario."""
    objectives: Annotated[dict[str, Any], BeforeValidator(_objectives)]
    """Figures and their bounds: p99_ttft_ms: "<=500", goodput_requests_per_s: ">=9.5"."""
    confidence: Annotated[float, Field(ge=0.5, le=0.99, allow_inf_nan=False)] = 0.9
    """How sure it has to be that each objective is met: one half takes predictions as they are."""
    candidates: Candidates
    """What to choose from."""

    @property
    def bounds(self) -> tuple[Objective, ...]:
        """The objectives, as they were read."""
        return tuple(parse(key, value) for key, value in self.objectives.items())


def read(document: Document, file: str, sets: Iterable[str | Override] = ()) -> Plan:
    """The plan that `document` holds; `file` is what errors name, `sets` are `PATH=VALUE` texts put over its values.

    Raises:
        InputError: with everything that is wrong, a line each.
    """
    return fields.read(Plan, _refusals(), document, file, sets)


@cache
def _refusals() -> Refusals:
    return Refusals(Plan.model_json_schema(), {})

"""What a plan chooses from, and what a simulation said of one choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from batchsim.intervals import bound
from batchsim.plan.objectives import Objective
from batchsim.result import Run, ScheduleResult, figures

SECONDS = 3600.0


@dataclass(frozen=True)
class Configuration:
    """A candidate but for how many replicas it has.

    `hardware` is the label in tables; `overrides` are the values, by dotted paths of the scenario, that make a scenario
    one of this configuration; `price_per_hour` is that of one device, USD. `order` is its place among all
    configurations of the plan, the first in the file first.
    """

    order: int
    hardware: str
    tensor_parallel: int
    schedule: str
    price_per_hour: float
    overrides: Mapping[str, Any] = field(hash=False)
    max_num_seqs: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def words(self) -> str:
        parts = [self.schedule, *([f"max_num_seqs {self.max_num_seqs}"] if self.max_num_seqs is not None else [])]
        parts += [f"{key} {value}" for key, value in self.fields.items()]
        return ", ".join(parts)


@dataclass(frozen=True)
class Candidate:
    """A configuration and its replicas: what can be rented."""

    configuration: Configuration
    replicas: int

    @property
    def devices(self) -> int:
        return self.replicas * self.configuration.tensor_parallel

    @property
    def cost_per_hour(self) -> float:
        """USD, of all devices."""
        return round(self.devices * self.configuration.price_per_hour, 9)

    @property
    def words(self) -> str:
        """`3 x h100-sxm, async, max_num_seqs 64`; of tensor-parallel ones `2 x (2 h100-sxm)`."""
        of = self.configuration
        device = f"({of.tensor_parallel} {of.hardware})" if of.tensor_parallel > 1 else of.hardware
        return f"{self.replicas} x {device}, {of.words}"

    def to_json(self) -> dict[str, Any]:
        of = self.configuration
        return {
            "hardware": of.hardware, "tensor_parallel": of.tensor_parallel, "schedule": of.schedule,
            "max_num_seqs": of.max_num_seqs, "fields": dict(of.fields), "replicas": self.replicas,
            "devices": self.devices, "price_per_hour": of.price_per_hour, "cost_per_hour": self.cost_per_hour,
        }  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One candidate, simulated: its result with `draws` draws of what is uncertain, or why it cannot run at all.

    `bounds` are the values that the objectives' figures stay on the right side of with the plan's confidence; without
    draws there are none. Where not all draws were made (`complete`), they are nearer to the predictions than they would
    be with all.
    """

    candidate: Candidate
    objectives: tuple[Objective, ...]
    confidence: float
    draws: int = 0
    result: ScheduleResult | None = None
    refused: str | None = None
    complete: bool = True
    run: Run | None = field(default=None, repr=False, compare=False)

    @cached_property
    def figures(self) -> dict[str, float]:
        return {} if self.result is None else figures(self.result)

    @cached_property
    def values(self) -> dict[str, float | None]:
        """The point prediction of each objective's figure."""
        found = {each.key: self.figures.get(each.figure) for each in self.objectives}
        return {key: None if value is None else float(value) for key, value in found.items()}

    @cached_property
    def bounds(self) -> dict[str, float | None]:
        result = self.result
        if not self.draws or result is None:
            return {}
        return {
            each.key: float(bound(result, each.figure, self.confidence, upper=each.at_most))
            if each.figure in self.figures
            else None
            for each in self.objectives
        }

    @property
    def stable(self) -> bool:
        return self.result is not None and self.result.unstable is None

    @cached_property
    def margins(self) -> dict[str, float]:
        """How far each point prediction is inside its limit, as a share of it; negative outside."""
        return {each.key: each.margin(self.values[each.key]) for each in self.objectives}

    @cached_property
    def confident_margins(self) -> dict[str, float]:
        """As `margins`, of the values that hold with the plan's confidence."""
        return {each.key: each.margin(self.bounds.get(each.key, self.values[each.key])) for each in self.objectives}

    @property
    def passes(self) -> bool:
        """Whether the point predictions meet all objectives, and no queue grows."""
        return self.stable and min(self.margins.values()) >= 0

    @property
    def meets(self) -> bool:
        """Whether they do with the plan's confidence; without draws it is not known, and so said not to be."""
        return self.draws > 0 and self.complete and self.passes and min(self.confident_margins.values()) >= 0

    @property
    def merit(self) -> tuple[float, float, int]:
        """Lower is better: the cost; then the larger least margin of the point predictions; then the file's order."""
        return self.candidate.cost_per_hour, -min(self.margins.values()), self.candidate.configuration.order

    @property
    def cost_per_million_tokens(self) -> float | None:
        """USD for a million output tokens at the rate of this run; None where it generates none."""
        if self.result is None or not self.result.throughput_tokens_per_s:
            return None
        return self.candidate.cost_per_hour / (self.result.throughput_tokens_per_s * SECONDS) * 1e6

    @property
    def tightest(self) -> Objective:
        """The objective with the least margin, at the plan's confidence where that is known."""
        return min(self.objectives, key=lambda each: self.confident_margins[each.key])

    @property
    def why_not(self) -> str | None:
        """What is wrong with it, in words; None where nothing is."""
        if self.refused is not None:
            return self.refused
        if not self.stable:
            return "it does not serve the load: the queue grows"
        missed = self.tightest
        margin = self.confident_margins[missed.key]
        if margin >= 0:
            return None
        if self.values[missed.key] is None:
            return f"it has no {missed.words}"
        kept = "" if self.margins[missed.key] < 0 else f" at a confidence of {self.confidence:.0%}"
        least = "" if self.complete else "at least "
        return f"it misses {missed.words} by {least}{-margin:.0%}{kept}"

    def to_json(self) -> dict[str, Any]:
        return {
            **self.candidate.to_json(),
            "cost_per_million_tokens": self.cost_per_million_tokens,
            "meets": self.meets, "passes": self.passes, "stable": self.stable, "draws": self.draws,
            "complete": self.complete,
            "why_not": self.why_not,
            "objectives": {
                each.key: {
                    "value": self.values[each.key], "bound": self.bounds.get(each.key), "limit": each.limit,
                    "margin": _finite(self.confident_margins[each.key]),
                }
                for each in self.objectives
            },
            "figures": self.figures,
            "interval_90": {} if self.result is None else {k: list(v) for k, v in self.result.interval_90.items()},
        }  # fmt: skip


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None

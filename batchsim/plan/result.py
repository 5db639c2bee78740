"""What a plan found: the cheapest candidate that meets the objectives, and what else is worth knowing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from batchsim.errors import need_pandas
from batchsim.plan.candidate import Trial
from batchsim.plan.objectives import Objective

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Change:
    """Something that would change the answer, or how far the answer holds, as a sentence and as figures."""

    kind: str  # near_miss, price, traffic, floor
    text: str
    figures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "text": self.text, **self.figures}


@dataclass(frozen=True, repr=False)
class PlanResult:
    """The answer to a plan.

    `best` is the cheapest candidate that meets all objectives with the wanted confidence, among equally cheap ones that
    with the largest least margin; `runner_up` the best on other hardware (where there is none, of another
    configuration). `frontier` are simulated candidates that no other beats in both cost per million output tokens and
    `latency`, the objective that it is drawn against, the cheapest first. `binds` is the objective of `best` with the
    least margin. `evaluated` holds all that was simulated, each at the most draws that it had, and a candidate of each
    configuration that cannot run. `simulations` counts every run, each draw of what is uncertain as one;
    `search_simulations` are those of them that finding `best` took. `partial` says where it was interrupted.
    """

    name: str
    plan: dict[str, Any]
    objectives: tuple[Objective, ...]
    confidence: float
    candidates: int
    best: Trial | None
    runner_up: Trial | None
    frontier: tuple[Trial, ...]
    latency: Objective | None
    binds: Objective | None
    would_change: tuple[Change, ...]
    evaluated: tuple[Trial, ...]
    simulations: int
    search_simulations: int
    partial: str | None = None

    @property
    def sentences(self) -> list[str]:
        """The answer: what to take, what that costs, what binds, and what is next."""
        from batchsim.plan.sentences import sentences

        return sentences(self)

    def to_json(self) -> dict[str, Any]:
        """As `batchsim plan --json` prints it: the same for the same plan, profile and version."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "plan",
            "name": self.name,
            "plan": self.plan,
            "answer": self.sentences,
            "objectives": [each.to_json() for each in self.objectives],
            "confidence": self.confidence,
            "candidates": self.candidates,
            "simulations": self.simulations,
            "search_simulations": self.search_simulations,
            "best": None if self.best is None else self.best.to_json(),
            "runner_up": None if self.runner_up is None else self.runner_up.to_json(),
            "binds": None if self.binds is None else self.binds.key,
            "frontier_latency": None if self.latency is None else self.latency.key,
            "frontier": [trial.to_json() for trial in self.frontier],
            "would_change": [change.to_json() for change in self.would_change],
            "evaluated": [trial.to_json() for trial in self.evaluated],
            "partial": self.partial,
        }

    def rows(self) -> list[dict[str, Any]]:
        """A flat row for each simulated candidate, the best first, then by cost."""
        ordered = sorted(self.evaluated, key=lambda trial: (trial is not self.best, trial.merit))
        return [self._row(trial) for trial in ordered]

    def frame(self) -> pd.DataFrame:
        """`rows` as a pandas frame."""
        need_pandas()
        import pandas as pd

        return pd.DataFrame(self.rows())

    def figure(self) -> go.Figure:
        """Cost per million output tokens (or per hour) against the frontier's latency."""
        from batchsim.plan.figure import frontier_figure

        return frontier_figure(self)

    def __repr__(self) -> str:
        return "\n".join([f"<PlanResult {self.name!r}>", *self.sentences])

    def _repr_html_(self) -> str:
        from batchsim.plan.figure import as_html

        return as_html(self)

    def _row(self, trial: Trial) -> dict[str, Any]:
        role = "best" if trial is self.best else "runner-up" if trial is self.runner_up else ""
        bounds = {f"{key}.bound": value for key, value in trial.bounds.items()}
        fixed = {key: value for key, value in trial.candidate.to_json().items() if key != "fields"}
        return {
            "role": role or ("frontier" if any(trial is each for each in self.frontier) else ""),
            **fixed,
            **trial.candidate.configuration.fields,
            "cost_per_million_tokens": trial.cost_per_million_tokens,
            "meets": trial.meets,
            "draws": trial.draws,
            "throughput_tokens_per_s": trial.figures.get("throughput_tokens_per_s"),
            **trial.values,
            **bounds,
            "why_not": trial.why_not,
        }

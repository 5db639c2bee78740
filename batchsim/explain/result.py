"""What each stage of a step is worth: what a run gains when the stage alone gets faster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from batchsim.errors import need_pandas

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

SCHEMA_VERSION = 1
ALL = "everything"
# A gain below this share of the speed-up is not worth the name.
NEGLIGIBLE = 0.01


@dataclass(frozen=True, slots=True)
class Gain:
    """What one schedule gains by one faster stage, as shares: more throughput, less of a latency.

    `throughput` is that of a closed loop, or of an open one whose requests always wait. `latency` has keys such as
    `ttft.p99`; where it is a mean over replications, `half_width` is half of its 95% interval. `share` is the stage's
    share of the mean step, where it is known; shares of stages that overlap sum to more than one.
    """

    stage: str
    side: str
    text: str
    throughput: float
    latency: dict[str, float] = field(default_factory=dict)
    half_width: dict[str, float] = field(default_factory=dict)
    share: float | None = None

    def at(self, measure: str) -> float:
        """The gain in `throughput` or in one of the latencies."""
        return self.throughput if measure.startswith("throughput") else self.latency.get(measure, 0.0)

    def sure(self, measure: str) -> float:
        """As `at`, but 0 where chance may explain it."""
        gain = self.at(measure)
        return gain if abs(gain) > self.half_width.get(measure, 0.0) else 0.0


@dataclass(frozen=True, slots=True)
class Explained:
    """One schedule: what it reaches now, and what it gains by each stage, the one that helps most first.

    `measure` is what stages are ordered by: `throughput`, `throughput at full load`, or a key of `Gain.latency`;
    `everything` the gain when all are faster at once.
    """

    schedule: str
    measure: str
    now: dict[str, float]
    gains: tuple[Gain, ...]
    everything: Gain


@dataclass(frozen=True, repr=False)
class Explanation:
    """Virtual speed-ups of a scenario: every stage of it run at (1 + `by`) times its speed, one at a time.

    All runs see the same requests and the same draws. `simulations` counts the runs of a schedule. `partial` says where
    it was interrupted: what is there is whole.
    """

    name: str
    by: float
    scenario: dict[str, Any]
    provenance: Mapping[str, Any]
    schedules: dict[str, Explained]
    simulations: int
    partial: str | None = None

    @property
    def sentences(self) -> list[str]:
        """What to work on first, a sentence or two for each schedule."""
        from batchsim.explain.sentences import sentences

        return sentences(self)

    def to_json(self) -> dict[str, Any]:
        """As `batchsim explain --json` prints it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "explanation",
            "name": self.name,
            "by": self.by,
            "answer": self.sentences,
            "scenario": self.scenario,
            "schedules": {name: asdict(each) for name, each in self.schedules.items()},
            "simulations": self.simulations,
            "partial": self.partial,
            "provenance": dict(self.provenance),
        }

    def rows(self) -> list[dict[str, Any]]:
        """A flat row for each schedule and stage, gains as shares; `everything` is the last of each schedule."""
        return [
            {
                "schedule": name, "stage": gain.stage, "side": gain.side, "share_of_step": gain.share,
                "throughput": gain.throughput, **gain.latency,
                **{f"{key}.half_width": width for key, width in gain.half_width.items()},
            }
            for name, each in self.schedules.items()
            for gain in (*each.gains, each.everything)
        ]  # fmt: skip

    def frame(self) -> pd.DataFrame:
        """`rows` as a pandas frame."""
        need_pandas()
        import pandas as pd

        return pd.DataFrame(self.rows())

    def figure(self) -> go.Figure:
        """Bars: what each stage gains in each schedule, in what its stages are ordered by."""
        from batchsim.explain.figure import gains_figure
        from batchsim.report.figures import on_white

        return on_white(gains_figure(self))

    def __repr__(self) -> str:
        return "\n".join([f"<Explanation {self.name!r}>", *self.sentences])

    def _repr_html_(self) -> str:
        told = "".join(f"<li>{escape(text)}</li>" for text in self.sentences)
        rows = self.rows()
        columns = [key for key in dict.fromkeys(key for row in rows for key in row) if not key.endswith(".half_width")]
        head = "".join(f"<th>{escape(column)}</th>" for column in columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(_cell(row.get(column)))}</td>" for column in columns) + "</tr>"
            for row in rows
        )
        return f"<h3>{escape(self.name)}</h3><ul>{told}</ul><table><tr>{head}</tr>{body}</table>"


def _cell(value: object) -> str:
    return f"{value:+.2%}" if isinstance(value, float) else "" if value is None else str(value)

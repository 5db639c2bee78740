"""What a page holds of some of its runs only: distributions of latencies, and timelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from batchsim.report.explore.columns import Column, Row
from batchsim.report.figures import LANES

# More would make the page slow to open, and no one looks at so many.
MAX_DETAILS = 200
# A window of six steps has some sixty spans; one of many replicas may have any number.
MAX_SPANS = 600

_Bar = tuple[str, int, int, int, int]  # stage, number of the lane, step, start and length in nanoseconds


@dataclass(frozen=True, slots=True)
class Detail:
    """One run close up: 101 quantiles of each latency in ms, and a window whose times count from a forward's end."""

    cdf: Mapping[str, Sequence[float]] = field(default_factory=dict)
    bars: Sequence[_Bar] = ()
    end_ns: int = 0

    def to_json(self, stages: Sequence[str]) -> dict[str, Any]:
        """For the page; the bars name their stage by its place in `stages`."""
        cdf = {name: [float(f"{value:.5g}") for value in values] for name, values in self.cdf.items() if values}
        bars = [[stages.index(stage), *rest] for stage, *rest in self.bars]
        return {"cdf": cdf, "window": bars, "end_ns": self.end_ns}


def detail_of(cdf: Mapping[str, Sequence[float]] | None, window: Sequence[Sequence[Any]] | None) -> Detail:
    """A run's quantiles, and its window of `[step, lane, stage, start_ns, end_ns]` as it is drawn.

    Times count from the end of the first forward, and what comes after the last of them is cut.
    """
    spans = sorted(window or (), key=lambda span: (span[3], span[4]))[:MAX_SPANS]
    forwards = [span for span in spans if span[1] == "compute"]
    if not forwards:
        return Detail(cdf or {})
    origin = min(span[4] for span in forwards)
    ends = [max(span[4] for span in some) for some in (forwards, [span for span in spans if span[1] == "host"]) if some]
    bars = [
        (stage, LANES.index(lane), step, start - origin, end - start)
        for step, lane, stage, start, end, *_ in spans
        if lane in LANES and end > start
    ]
    return Detail(cdf or {}, bars, min(ends) - origin)


def interesting(rows: Sequence[Row], columns: Sequence[Column], first: Sequence[int] = ()) -> list[int]:
    """At most `MAX_DETAILS` rows to show close up: `first`, the best by each figure in turn, and then the rest.

    Failed rows have nothing to show.
    """
    figures = [column for column in columns if column.kind == "figure" and column.better and column.shown]
    ranked = [_ranked(rows, column) for column in figures]
    able = [index for index, row in enumerate(rows) if not row.get("error")]
    turns = [ranking[place] for place in range(len(rows)) for ranking in ranked if place < len(ranking)]
    every = dict.fromkeys([*first, *turns, *able])
    return sorted(list(every)[:MAX_DETAILS])


def _ranked(rows: Sequence[Row], column: Column) -> list[int]:
    have = [index for index, row in enumerate(rows) if row.get(column.key) is not None and not row.get("error")]
    sign = -1 if column.better == "high" else 1
    return sorted(have, key=lambda index: (sign * rows[index][column.key], index))

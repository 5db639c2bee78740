"""Cumulative distributions, and the axes that they share with other pictures of latencies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import ceil, floor, log10
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from batchsim.latency import Float64
from batchsim.report.figures import ACROSS, layout
from batchsim.report.html import plot
from batchsim.result import Run
from batchsim.served import Int64

# A curve of so many points looks the same as one of a million, and a page stays small.
MAX_POINTS = 400
PANEL_PX = 320

_MARKED = (0.5, 0.99)
_SLO_COLOUR = "#d9483b"

Times = tuple[Float64, Float64]  # ms, and the shares that are no longer


class Line(NamedTuple):
    """One schedule of one run, and how it is drawn."""

    name: str
    schedule: str
    colour: str
    dash: str
    run: Run


def lines_of(predicted: Run, measured: Run | None) -> Iterator[Line]:
    """The schedules in their order, of each what was predicted and what was measured."""
    for colour, schedule in zip(ACROSS * len(predicted.results), predicted.results, strict=False):
        for run, dash in ((predicted, "solid"), (measured, "dash")):
            if run is not None and (schedule in run.served or schedule in run.answered):
                name = schedule if measured is None else f"{schedule}, {run.source}"
                yield Line(name, schedule, colour, dash, run)


def cumulative(lines: Sequence[Line], found: Sequence[Times], title: str, bound_ms: float | None) -> go.Figure | None:
    """One picture, one line a schedule and run; None where nothing was measured."""
    figure = go.Figure()
    for line, (times, shares) in zip(lines, found, strict=True):
        if not len(times):
            continue
        marked = times[np.searchsorted(shares, _MARKED)]
        figure.add_scatter(
            name=line.name, legendgroup=line.name, mode="lines",
            x=rounded(np.append(times[:1], times)), y=[0.0, *rounded(shares)],
            line={"color": line.colour, "dash": line.dash, "width": 2, "shape": "hv"},
            hovertemplate=f"{line.name}<br>%{{y:.2%}} within %{{x:,.4g}} ms<extra></extra>",
        )  # fmt: skip
        figure.add_scatter(
            mode="markers", x=rounded(marked), y=_MARKED, hoverinfo="skip",
            legendgroup=line.name, showlegend=False, marker={"color": line.colour, "size": 7},
        )  # fmt: skip
    if not figure.data:
        return None
    if bound_ms is not None:
        add_bound(figure, [bound_ms, bound_ms], [0, 1], bound_ms)
    figure.update_layout(**layout(height=PANEL_PX))
    figure.update_xaxes(type="log", title=title, **ticks(line.x for line in figure.data))
    figure.update_yaxes(tickformat=".0%", range=[-0.02, 1.03], zeroline=False, fixedrange=True)
    return figure


def distribution(values_ns: Int64 | Float64, counts: Int64 | None = None) -> Times:
    """At most `MAX_POINTS` times in ms and the shares of `values_ns`, each `counts` times, that are no longer.

    The points lie densest at the upper end, where the tail is. Zeros, which a logarithmic scale has no place for, are
    left out of the points but counted.
    """
    order = np.argsort(values_ns)
    ordered = np.asarray(values_ns, np.float64)[order] / 1e6
    if not len(ordered):
        return ordered, ordered
    ends = np.arange(1, len(ordered) + 1) if counts is None else np.cumsum(counts[order])
    total = int(ends[-1])
    if len(ordered) > MAX_POINTS:
        # Half of the points evenly, half towards the largest value in equal ratios of what is left.
        rest = np.concatenate([np.linspace(1, 0, MAX_POINTS // 2), np.geomspace(1, 1 / total, MAX_POINTS // 2)])
        kept = np.unique(np.searchsorted(ends, np.ceil((1 - rest) * total).clip(1, total)))
        ordered, ends = ordered[kept], ends[kept]
    drawn = ordered > 0
    return ordered[drawn], ends[drawn] / total


def ticks(columns: Iterable[Sequence[float]]) -> dict[str, Any]:
    """Range and labels of a logarithmic axis, also of one that spans less than a decade."""
    values = [value for column in columns for value in column if value > 0]
    least, most = min(values), max(values)
    decades = range(floor(log10(least)), ceil(log10(most)) + 1)
    marks = [digit * 10.0**decade for decade in decades for digit in ((1, 2, 5) if len(decades) <= 4 else (1,))]
    if sum(least <= mark <= most for mark in marks) < 3:
        step = 10.0 ** floor(log10(most - least)) if most > least else most
        step *= next((factor for factor in (0.2, 0.5, 1, 2) if (most - least) / (step * factor) <= 6), 5)
        marks = [step * number for number in range(floor(least / step), ceil(most / step) + 1) if number > 0]
    margin = max(0.03 * log10(most / least), 0.002)
    return {
        "tickvals": marks, "ticktext": [f"{mark:,.6g}" for mark in marks],
        "range": [log10(least) - margin, log10(most) + margin],
    }  # fmt: skip


def add_bound(figure: go.Figure, x: list[float], y: list[float], bound_ms: float) -> None:
    """A line at a service objective."""
    figure.add_scatter(
        name=f"SLO, {bound_ms:,g} ms", x=x, y=y, mode="lines", hoverinfo="skip",
        line={"color": _SLO_COLOUR, "width": 1.5, "dash": "dashdot"},
    )  # fmt: skip


def pair(plots: Iterable[str]) -> str:
    """The pictures of these names beside one another, as far as there is room."""
    return f'<div class="pair">{"".join(plot(name) for name in plots)}</div>'


def rounded(values: Int64 | Float64) -> list[float]:
    """Six digits of each, which is more than a picture shows."""
    return [float(f"{value:.6g}") for value in values.tolist()]

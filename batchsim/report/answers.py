"""What became of the requests of dynamic batching, in pictures: latencies, what they are made of, sizes of batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from batchsim.latency import Slo
from batchsim.report.cumulative import PANEL_PX, Line, cumulative, distribution, lines_of, pair
from batchsim.report.figures import layout
from batchsim.report.html import plot, section
from batchsim.report.shown import LATENCY_NAMES
from batchsim.result import Run

_LATENCY_NOTE = "The share of answered requests that took no longer. Dots mark p50 and p99."
_PARTS_NOTE = "What the latency of a mean request is made of, and that of the slowest hundredth."
_SIZES_NOTE = "How many batches had so many requests, as a share of all."
_SLOWEST = 0.99
# Parts of a latency: waiting is grey or red, work has the colours of the timeline.
_PART_COLOURS = {
    "queue": "#c0392b", "host": "#d55e00", "copy_in": "#e69f00", "device_queue": "#98a2b3", "compute": "#0072b2",
    "copy_out": "#d9c615",
}  # fmt: skip


def sections(predicted: Run, measured: Run | None) -> tuple[dict[str, go.Figure], list[str]]:
    """The pictures by their names, and the parts of the page that show them."""
    lines = list(lines_of(predicted, measured))
    plots: dict[str, go.Figure] = {}
    parts: list[str] = []
    slo = predicted.slo or Slo()
    samples = [line.run.answered[line.schedule] for line in lines]
    found = [table.latencies(table.after_warm_up()) for table in samples]
    distributions: dict[str, go.Figure] = {}
    for name, bound in (("e2e", slo.e2e_ms), ("queue", slo.queue_ms)):
        times = [distribution(each[name]) for each in found]
        if figure := cumulative(lines, times, f"{LATENCY_NAMES[name]}, ms", bound):
            distributions[f"latency-{name}"] = figure
    if distributions:
        plots |= distributions
        parts.append(section("Latency of requests", _LATENCY_NOTE, pair(distributions)))
        plots["latency-parts"] = latency_parts(lines, found)
        parts.append(section("What latencies are made of", _PARTS_NOTE, plot("latency-parts")))
        plots["batch-sizes"] = batch_sizes(lines)
        parts.append(section("Sizes of batches", _SIZES_NOTE, plot("batch-sizes")))
    return plots, parts


def latency_parts(lines: Sequence[Line], found: Sequence[dict[str, np.ndarray]]) -> go.Figure:
    """Stacked bars: the mean latency of all requests and of the slowest, by its parts."""
    figure = go.Figure()
    rows: list[str] = []
    values: dict[str, list[float]] = {name: [] for name in _PART_COLOURS}
    for line, each in zip(lines, found, strict=True):
        total = each["e2e"]
        if not len(total):
            continue
        slowest = total >= np.quantile(total, _SLOWEST)
        for title, some in (("mean", slice(None)), ("slowest 1%", slowest)):
            rows.append(f"{line.name}, {title}")
            for name in values:
                values[name].append(float(each[name][some].mean()) / 1e6)
    for name, colour in _PART_COLOURS.items():
        figure.add_bar(
            name=LATENCY_NAMES[name], orientation="h", x=values[name], y=rows, marker={"color": colour},
            hovertemplate="%{y}<br><b>" + LATENCY_NAMES[name] + "</b> %{x:,.4g} ms<extra></extra>",
        )  # fmt: skip
    figure.update_layout(**layout(height=len(rows) * 36 + 110), barmode="stack", bargap=0.3)
    figure.update_xaxes(title="ms", rangemode="tozero")
    figure.update_yaxes(autorange="reversed", fixedrange=True, ticksuffix="  ", showgrid=False)
    return figure


def batch_sizes(lines: Sequence[Line]) -> go.Figure:
    """The share of batches by the number of requests in them."""
    figure = go.Figure()
    for line in lines:
        counts = line.run.answered[line.schedule].batch_sizes[1:]
        look = {"pattern": {"shape": "/", "fillmode": "overlay"}} if line.dash == "dash" else {}
        figure.add_bar(
            name=line.name, x=list(range(1, len(counts) + 1)), y=(counts / max(counts.sum(), 1)).tolist(),
            marker={"color": line.colour, **look},
            hovertemplate=f"{line.name}<br>%{{y:.2%}} of batches have %{{x}} requests<extra></extra>",
        )  # fmt: skip
    figure.update_layout(**layout(height=PANEL_PX), barmode="group", bargap=0.15)
    figure.update_xaxes(title="requests in a batch", zeroline=False)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero", fixedrange=True)
    return figure

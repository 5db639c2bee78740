"""What became of the requests, in pictures: distributions of latencies, the queue over time, latency against load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from batchsim.latency import Slo, after_warm_up, request_latencies
from batchsim.report import answers
from batchsim.report.cumulative import (
    PANEL_PX,
    Line,
    add_bound,
    cumulative,
    distribution,
    lines_of,
    pair,
    rounded,
    ticks,
)
from batchsim.report.figures import ACROSS, layout
from batchsim.report.html import plot, section
from batchsim.report.shown import LATENCY_NAMES
from batchsim.result import LoadCurve, LoadPoint, Run

_DRAWN = ("ttft", "tpot", "itl", "e2e")
_LATENCY_NOTE = "The share of requests, for ITL of gaps between tokens, that took no longer. Dots mark p50 and p99."
_TIME_NOTE = (
    "The state after decisions: requests in the batch, requests that wait, and the share of the KV cache in use."
)
_LOAD_NOTE = (
    "Each point is a run at one rate of arrival. Crosses are unstable: latencies there grow with the length of the run."
)


def sections(predicted: Run, measured: Run | None) -> tuple[dict[str, go.Figure], list[str]]:
    """The pictures by their names, and the parts of the page that show them; nothing where there is nothing to show."""
    plots: dict[str, go.Figure] = {}
    parts: list[str] = []
    if predicted.answered:
        plots, parts = answers.sections(predicted, measured)
    lines = [line for line in lines_of(predicted, measured) if line.schedule in line.run.served]
    if distributions := latencies(lines, predicted.slo):
        plots |= distributions
        parts.append(section("Latency of requests", _LATENCY_NOTE, pair(distributions)))
    if any(len(line.run.served[line.schedule].series.time_ns) > 1 for line in lines):
        plots["over-time"] = over_time(lines)
        parts.append(section("Requests over time", _TIME_NOTE, plot("over-time")))
    if predicted.load_curve is not None:
        curves = load(predicted.load_curve, predicted.slo)
        plots |= curves
        parts.append(section("As load grows", _LOAD_NOTE, pair(curves)))
    return plots, parts


def latencies(lines: Sequence[Line], slo: Slo | None) -> dict[str, go.Figure]:
    """Cumulative distributions, one picture a latency, one line a schedule and run."""
    served = [line.run.served[line.schedule] for line in lines]
    samples = [request_latencies(table, after_warm_up(table)) for table in served]
    plots = {}
    for latency in _DRAWN:
        found = [
            distribution(table.itl_ns, table.itl_count) if latency == "itl" else distribution(sample[latency])
            for table, sample in zip(served, samples, strict=True)
        ]
        bound = getattr(slo, f"{latency}_ms", None)
        if figure := cumulative(lines, found, f"{LATENCY_NAMES[latency]}, ms", bound):
            plots[f"latency-{latency}"] = figure
    return plots


def over_time(lines: Sequence[Line]) -> go.Figure:
    """Running requests, waiting requests, and where it is bounded the use of the KV cache, below one another."""
    panels = ["requests running", "requests waiting"]
    if any(line.run.served[line.schedule].kv_blocks for line in lines):
        panels.append("KV cache in use")
    figure = go.Figure()
    look: dict[str, Any] = layout(height=190 * len(panels) + 90)
    figure.update_layout(**look)
    for number, title in enumerate(panels):
        axis = "y" if number == 0 else f"y{number + 1}"
        for line in lines:
            served = line.run.served[line.schedule]
            series = served.series
            columns = (series.running, series.waiting, series.kv_blocks / max(served.kv_blocks, 1))
            form = ".1%" if number == 2 else ",d"
            figure.add_scatter(
                name=line.name, legendgroup=line.name, showlegend=number == 0, yaxis=axis, mode="lines",
                x=rounded(series.time_ns / 1e9), y=rounded(columns[number]),
                line={"color": line.colour, "dash": line.dash, "width": 1.5, "shape": "hv"},
                hovertemplate=f"{line.name}, %{{x:,.4g}} s<br>%{{y:{form}}} {title}<extra></extra>",
            )  # fmt: skip
        top = 1 - number / len(panels)
        figure.layout[axis.replace("y", "yaxis")] = {
            **look["yaxis"], "domain": [top - 0.86 / len(panels), top - 0.06 / len(panels)], "title": title,
            "rangemode": "tozero", "fixedrange": True, "anchor": "x", "nticks": 6,
            "tickformat": ".0%" if number == 2 else "",
        }  # fmt: skip
    figure.update_xaxes(title="seconds since the run began", zeroline=False, anchor=axis, rangemode="tozero")
    return figure


def load(curve: LoadCurve, slo: Slo | None) -> dict[str, go.Figure]:
    """Throughput against the rate of arrival, and latencies against throughput; one line a schedule."""
    slo = slo or Slo()
    unit, throughput = "tokens/s", "throughput_tokens_per_s"
    if not curve.of_tokens:
        unit, throughput = "requests/s", "throughput_requests_per_s"
    asked: dict[str, tuple[str, tuple[tuple[str, str], ...], float | None]] = {
        "load-throughput": (unit, (("", throughput),), None),
        "load-ttft": ("TTFT, ms", (("p50", "ttft_p50_ms"), ("p99", "ttft_p99_ms")), slo.ttft_ms),
        "load-tpot": ("TPOT p50, ms", (("", "tpot_p50_ms"),), slo.tpot_ms),
        "load-e2e": ("E2E, ms", (("p50", "e2e_p50_ms"), ("p99", "e2e_p99_ms")), slo.e2e_ms),
    }
    plots = {}
    for key, (title, statistics, bound) in asked.items():
        figure = go.Figure()
        offered = key == "load-throughput"
        across = "offered_requests_per_s" if offered else throughput
        for colour, (schedule, points) in zip(ACROSS * len(curve.points), curve.points.items(), strict=False):
            for statistic, field in statistics:
                some = [point for point in points if getattr(point, field) is not None]
                name = f"{schedule} {statistic}".strip()
                figure.add_scatter(
                    name=name, mode="lines+markers",
                    x=[getattr(point, across) for point in some], y=[getattr(point, field) for point in some],
                    customdata=[_about(point, throughput) for point in some],
                    line={"color": colour, "width": 2, "dash": "dot" if statistic == "p50" else "solid"},
                    marker={"size": 8, "symbol": ["x" if point.unstable else "circle" for point in some]},
                    hovertemplate=f"{name}, %{{customdata[0]}} requests/s offered%{{customdata[1]}}<br>"
                    "%{customdata[2]} " + unit + "<br>%{y:,.4g} " + title.split(", ")[-1] + "<extra></extra>",
                )  # fmt: skip
        if not any(len(line.x) for line in figure.data):
            continue
        reach = [value for line in figure.data for value in line.x]
        if bound is not None:
            add_bound(figure, [min(reach), max(reach)], [bound, bound], bound)
        figure.update_layout(**layout(height=PANEL_PX))
        figure.update_xaxes(title="requests/s offered" if offered else unit, zeroline=False, rangemode="tozero")
        scale = {"rangemode": "tozero"} if offered else {"type": "log", **ticks(line.y for line in figure.data)}
        figure.update_yaxes(title=title, **scale)
        plots[key] = figure
    return plots


def _about(point: LoadPoint, throughput: str) -> list[str]:
    state = ": unstable" if point.unstable else ""
    return [f"{point.offered_requests_per_s:,.4g}", state, f"{getattr(point, throughput):,.0f}"]

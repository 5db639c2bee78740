"""What became of the requests, in pictures: distributions of latencies, the queue over time, latency against load."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import ceil, floor, log10
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from batchsim.latency import Float64, Slo, after_warm_up, request_latencies
from batchsim.report.figures import ACROSS, layout
from batchsim.report.html import plot, section
from batchsim.report.shown import LATENCY_NAMES
from batchsim.result import LoadCurve, LoadPoint, Run
from batchsim.served import Int64, Served

# A curve of so many points looks the same as one of a million, and a page stays small.
MAX_POINTS = 400

_MARKED = (0.5, 0.99)
_DRAWN = ("ttft", "tpot", "itl", "e2e")
_LATENCY_NOTE = "The share of requests, for ITL of gaps between tokens, that took no longer. Dots mark p50 and p99."
_TIME_NOTE = (
    "The state after decisions: requests in the batch, requests that wait, and the share of the KV cache in use."
)
_LOAD_NOTE = (
    "Each point is a run at one rate of arrival. Crosses are unstable: latencies there grow with the length of the run."
)
_SLO_COLOUR = "#d9483b"
_PANEL_PX = 320


class _Line(NamedTuple):
    """One schedule of one run, and how it is drawn."""

    name: str
    schedule: str
    colour: str
    dash: str
    served: Served


def sections(predicted: Run, measured: Run | None) -> tuple[dict[str, go.Figure], list[str]]:
    """The pictures by their names, and the parts of the page that show them; nothing where there is nothing to show."""
    plots: dict[str, go.Figure] = {}
    parts = []
    lines = list(_lines(predicted, measured))
    if distributions := latencies(lines, predicted.slo):
        plots |= distributions
        parts.append(section("Latency of requests", _LATENCY_NOTE, _pair(distributions)))
    if any(len(line.served.series.time_ns) > 1 for line in lines):
        plots["over-time"] = over_time(lines)
        parts.append(section("Requests over time", _TIME_NOTE, plot("over-time")))
    if predicted.load_curve is not None:
        curves = load(predicted.load_curve, predicted.slo)
        plots |= curves
        parts.append(section("As load grows", _LOAD_NOTE, _pair(curves)))
    return plots, parts


def latencies(lines: Sequence[_Line], slo: Slo | None) -> dict[str, go.Figure]:
    """Cumulative distributions, one picture a latency, one line a schedule and run."""
    samples = [request_latencies(line.served, after_warm_up(line.served)) for line in lines]
    plots = {}
    for latency in _DRAWN:
        figure = go.Figure()
        for line, sample in zip(lines, samples, strict=True):
            if latency == "itl":
                times, shares = distribution(line.served.itl_ns, line.served.itl_count)
            else:
                times, shares = distribution(sample[latency])
            if not len(times):
                continue
            marked = times[np.searchsorted(shares, _MARKED)]
            figure.add_scatter(
                name=line.name, legendgroup=line.name, mode="lines",
                x=_rounded(np.append(times[:1], times)), y=[0.0, *_rounded(shares)],
                line={"color": line.colour, "dash": line.dash, "width": 2, "shape": "hv"},
                hovertemplate=f"{line.name}<br>%{{y:.2%}} within %{{x:,.4g}} ms<extra></extra>",
            )  # fmt: skip
            figure.add_scatter(
                mode="markers", x=_rounded(marked), y=_MARKED, hoverinfo="skip",
                legendgroup=line.name, showlegend=False, marker={"color": line.colour, "size": 7},
            )  # fmt: skip
        if not figure.data:
            continue
        bound = getattr(slo, f"{latency}_ms", None)
        if bound is not None:
            _add_bound(figure, [bound, bound], [0, 1], bound)
        figure.update_layout(**layout(height=_PANEL_PX))
        figure.update_xaxes(type="log", title=f"{LATENCY_NAMES[latency]}, ms", **_ticks(line.x for line in figure.data))
        figure.update_yaxes(tickformat=".0%", range=[-0.02, 1.03], zeroline=False, fixedrange=True)
        plots[f"latency-{latency}"] = figure
    return plots


def distribution(values_ns: Int64 | Float64, counts: Int64 | None = None) -> tuple[Float64, Float64]:
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


def over_time(lines: Sequence[_Line]) -> go.Figure:
    """Running requests, waiting requests, and where it is bounded the use of the KV cache, below one another."""
    panels = ["requests running", "requests waiting"]
    if any(line.served.kv_blocks for line in lines):
        panels.append("KV cache in use")
    figure = go.Figure()
    look: dict[str, Any] = layout(height=190 * len(panels) + 90)
    figure.update_layout(**look)
    for number, title in enumerate(panels):
        axis = "y" if number == 0 else f"y{number + 1}"
        for line in lines:
            series = line.served.series
            columns = (series.running, series.waiting, series.kv_blocks / max(line.served.kv_blocks, 1))
            form = ".1%" if number == 2 else ",d"
            figure.add_scatter(
                name=line.name, legendgroup=line.name, showlegend=number == 0, yaxis=axis, mode="lines",
                x=_rounded(series.time_ns / 1e9), y=_rounded(columns[number]),
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
    asked: dict[str, tuple[str, tuple[tuple[str, str], ...], float | None]] = {
        "load-throughput": ("tokens/s", (("", "throughput_tokens_per_s"),), None),
        "load-ttft": ("TTFT, ms", (("p50", "ttft_p50_ms"), ("p99", "ttft_p99_ms")), slo.ttft_ms),
        "load-tpot": ("TPOT p50, ms", (("", "tpot_p50_ms"),), slo.tpot_ms),
        "load-e2e": ("E2E, ms", (("p50", "e2e_p50_ms"), ("p99", "e2e_p99_ms")), slo.e2e_ms),
    }
    plots = {}
    for key, (title, statistics, bound) in asked.items():
        figure = go.Figure()
        offered = key == "load-throughput"
        across = "offered_requests_per_s" if offered else "throughput_tokens_per_s"
        for colour, (schedule, points) in zip(ACROSS * len(curve.points), curve.points.items(), strict=False):
            for statistic, field in statistics:
                some = [point for point in points if getattr(point, field) is not None]
                name = f"{schedule} {statistic}".strip()
                figure.add_scatter(
                    name=name, mode="lines+markers",
                    x=[getattr(point, across) for point in some], y=[getattr(point, field) for point in some],
                    customdata=[_about(point) for point in some],
                    line={"color": colour, "width": 2, "dash": "dot" if statistic == "p50" else "solid"},
                    marker={"size": 8, "symbol": ["x" if point.unstable else "circle" for point in some]},
                    hovertemplate=f"{name}, %{{customdata[0]}} requests/s offered%{{customdata[1]}}<br>"
                    "%{customdata[2]} tokens/s<br>%{y:,.4g} " + title.split(", ")[-1] + "<extra></extra>",
                )  # fmt: skip
        if not any(len(line.x) for line in figure.data):
            continue
        reach = [value for line in figure.data for value in line.x]
        if bound is not None:
            _add_bound(figure, [min(reach), max(reach)], [bound, bound], bound)
        figure.update_layout(**layout(height=_PANEL_PX))
        figure.update_xaxes(title="requests/s offered" if offered else "tokens/s", zeroline=False, rangemode="tozero")
        scale = {"rangemode": "tozero"} if offered else {"type": "log", **_ticks(line.y for line in figure.data)}
        figure.update_yaxes(title=title, **scale)
        plots[key] = figure
    return plots


def _ticks(columns: Iterable[Sequence[float]]) -> dict[str, Any]:
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


def _lines(predicted: Run, measured: Run | None) -> Iterator[_Line]:
    for colour, schedule in zip(ACROSS * len(predicted.results), predicted.results, strict=False):
        for run, dash in ((predicted, "solid"), (measured, "dash")):
            if run is not None and schedule in run.served:
                name = schedule if measured is None else f"{schedule}, {run.source}"
                yield _Line(name, schedule, colour, dash, run.served[schedule])


def _add_bound(figure: go.Figure, x: list[float], y: list[float], bound: float) -> None:
    figure.add_scatter(
        name=f"SLO, {bound:,g} ms", x=x, y=y, mode="lines", hoverinfo="skip",
        line={"color": _SLO_COLOUR, "width": 1.5, "dash": "dashdot"},
    )  # fmt: skip


def _about(point: LoadPoint) -> list[str]:
    state = ": unstable" if point.unstable else ""
    return [f"{point.offered_requests_per_s:,.4g}", state, f"{point.throughput_tokens_per_s:,.0f}"]


def _pair(plots: dict[str, go.Figure]) -> str:
    return f'<div class="pair">{"".join(plot(name) for name in plots)}</div>'


def _rounded(values: Int64 | Float64) -> list[float]:
    """Six digits of each, which is more than a picture shows."""
    return [float(f"{value:.6g}") for value in values.tolist()]

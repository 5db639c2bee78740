"""What `batchsim tune` found, as tables in the terminal and as a page: the choice, and what could be had elsewhere."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batchsim.files import write_text
from batchsim.report.figures import ACROSS, layout
from batchsim.report.html import as_yaml, document, escaped, header, plot, section
from batchsim.report.shown import ms_text
from batchsim.tune.dynamic import Setting, Trial, Tuning

_NOTE = (
    "Each dot is one simulated run of one setting at one load. The line joins the settings with the lowest latency at "
    "their load: nothing that was tried lies below it."
)


def sentences(found: Tuning) -> list[str]:
    """What to set, what that gives, and how far other seeds agree."""
    best, asked, verified = found.best, found.asked, found.verified
    latency = f"{found.percentile} {_ms(best.latency_ms)}"
    if found.bound_ms is None:
        told = [f"Set {in_words(best.setting)}: {latency} at {_rate(best)}."]
        reached = "does not serve this load"
        if asked.latency_ms < inf:
            reached = f"gives {_ms(asked.latency_ms)}; the change {best.latency_ms / asked.latency_ms - 1:+.1%}"
        told.append(f"The file's setting, {in_words(asked.setting)}, {reached}.")
    else:
        told = [f"Set {in_words(best.setting)}: it serves {_rate(best)} with {latency}, within {_ms(found.bound_ms)}."]
    width = f"{_ms(verified.latency_ms)} \N{PLUS-MINUS SIGN} {_ms(verified.half_width_ms)}"
    kept = ""
    if found.bound_ms is not None:
        within = verified.latency_ms + verified.half_width_ms <= found.bound_ms
        kept = ", within the bound" if within else ", which may exceed the bound"
    told.append(f"With {verified.replications} other seeds: {found.percentile} {width}{kept}.")
    if found.interval_90_ms is not None:
        low, high = (_ms(end) for end in found.interval_90_ms)
        told.append(f"With what is uncertain of the costs, too: from {low} to {high} with 90% confidence.")
    most = f"{found.breaking_requests_per_s:,.1f} requests/s"
    told.append(f"No setting serves more than {most}. Found with {found.simulations} simulations.")
    return told


def print_tuning(console: Console, name: str, found: Tuning) -> None:
    """The choice, and the frontier as a table."""
    console.print()
    console.print(Text(name, style="bold cyan"))
    first, *rest = sentences(found)
    console.print(Text(first, style="bold"))
    for line in rest:
        console.print(Text(line))
    console.print()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in _COLUMNS:
        table.add_column(column, justify="right", header_style="bold", overflow="fold")
    for trial in found.frontier:
        table.add_row(*_row(trial), style="bold" if trial is found.best else "")
    console.print(table)
    console.print()


def write_tuning(path: Path, name: str, scenario: dict[str, Any], found: Tuning) -> None:
    """The page, in one file."""
    rows = "".join(
        f"<tr{' class=chosen' * (trial is found.best)}><td>{'</td><td>'.join(map(escaped, _row(trial)))}</td></tr>"
        for trial in found.frontier
    )
    table = f'<div class="scroll"><table><tr><th>{"</th><th>".join(_COLUMNS)}</th></tr>{rows}</table></div>'
    first, *rest = sentences(found)
    parts = [
        header(name, first, rest),
        section("Latency against load", _NOTE, plot("frontier")),
        section("The best setting at each load", "", table),
        section("Scenario", "", as_yaml(scenario)),
    ]
    write_text(path, document(f"{name}: tuned", parts, {"frontier": frontier(found)}))


def frontier(found: Tuning) -> go.Figure:
    """Latency against load: all trials, the frontier, the choice, and the file's own setting."""
    figure = go.Figure()
    schedules = list(dict.fromkeys(trial.setting.schedule for trial in found.trials))
    for colour, schedule in zip(ACROSS * len(schedules), schedules, strict=False):
        some = [trial for trial in found.trials if trial.setting.schedule == schedule and trial.latency_ms < inf]
        _add(figure, f"{schedule}, tried", some, mode="markers", marker={"color": colour, "size": 5, "opacity": 0.35})
    _add(figure, "frontier", found.frontier, mode="lines+markers", line={"color": "#d55e00", "width": 2})
    _add(figure, "chosen", [found.best], mode="markers", marker={"color": "#d55e00", "size": 15, "symbol": "star"})
    if found.asked.latency_ms < inf:
        _add(
            figure,
            "as in the file",
            [found.asked],
            mode="markers",
            marker={"color": "#667085", "size": 11, "symbol": "x"},
        )
    if found.bound_ms is not None:
        figure.add_hline(found.bound_ms, line={"color": "#d9483b", "dash": "dash", "width": 1.5})
    figure.add_vline(found.breaking_requests_per_s, line={"color": "#667085", "dash": "dot", "width": 1.5})
    figure.update_layout(**layout(height=460))
    figure.update_xaxes(title="requests/s that arrive", rangemode="tozero")
    figure.update_yaxes(title=f"{found.percentile} of the latency, ms", type="log")
    return figure


def _add(figure: go.Figure, name: str, trials: Any, **look: Any) -> None:
    figure.add_scatter(
        name=name, x=[trial.requests_per_s for trial in trials], y=[trial.latency_ms for trial in trials],
        text=[in_words(trial.setting) for trial in trials],
        hovertemplate="%{text}<br>%{y:,.4g} ms at %{x:,.4g} requests/s<extra></extra>", **look,
    )  # fmt: skip


def in_words(setting: Setting) -> str:
    """`async, max_batch_size 32, max_queue_delay_us 500`."""
    delay = f"max_queue_delay_us {setting.max_queue_delay_us:g}"
    return f"{setting.schedule}, max_batch_size {setting.max_batch_size}, {delay}"


_COLUMNS = (
    "requests/s",
    "latency, ms",
    "p50, ms",
    "p99, ms",
    "schedule",
    "max batch",
    "delay, us",
    "mean batch",
    "busy",
)


def _row(trial: Trial) -> list[str]:
    setting = trial.setting
    return [
        f"{trial.requests_per_s:,.1f}", f"{trial.latency_ms:,.2f}", f"{trial.p50_ms:,.2f}", f"{trial.p99_ms:,.2f}",
        setting.schedule, f"{setting.max_batch_size}", f"{setting.max_queue_delay_us:,.0f}",
        f"{trial.batch_size:,.1f}", f"{trial.device_busy_fraction:.0%}",
    ]  # fmt: skip


def _ms(value: float) -> str:
    return "without end" if value == inf else ms_text(value)


def _rate(trial: Trial) -> str:
    return f"{trial.requests_per_s:,.1f} requests/s"

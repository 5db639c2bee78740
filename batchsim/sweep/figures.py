"""The figures of a sweep that a notebook shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from batchsim.errors import InputError, shown
from batchsim.refusal import choice
from batchsim.report.figures import ACROSS

if TYPE_CHECKING:
    from batchsim.sweep.result import SweepResult

Columns = Mapping[str, Sequence[Any]]

_SHOWN_ROWS = 8
_SHOWN_FIGURES = (
    "throughput_tokens_per_s", "throughput_requests_per_s", "goodput_requests_per_s", "latency_ms.ttft.p99",
    "latency_ms.tpot.p99", "latency_ms.e2e.p99",
)  # fmt: skip


def lines(columns: Columns, x: str, y: str, color: str | None) -> go.Figure:
    """`y` over `x`: of each schedule and `color` the points, joined in the order of x, with their intervals."""
    by = tuple(dict.fromkeys(key for key in (color, "schedule") if key is not None and key != x))
    found: dict[tuple[Any, ...], list[int]] = {}
    for i, value in enumerate(columns[y]):
        if value is not None and columns[x][i] is not None:
            found.setdefault(tuple(columns[key][i] for key in by), []).append(i)
    # Only what differs is named.
    told = [i for i, key in enumerate(by) if key == color or len({group[i] for group in found}) > 1]
    groups = {", ".join(str(group[i]) for i in told): rows for group, rows in found.items()}
    figure = go.Figure()
    for number, (name, rows) in enumerate(groups.items()):
        rows.sort(key=lambda i: (columns[x][i], i))
        values = [columns[y][i] for i in rows]
        figure.add_scatter(
            x=[columns[x][i] for i in rows],
            y=values,
            error_y=_error_bars(columns, y, rows, values),
            name=name,
            mode="lines+markers",
            line_color=ACROSS[number % len(ACROSS)],
        )
    figure.update_layout(
        template="plotly_white",
        xaxis_title=x,
        yaxis_title=y,
        legend_title_text=color or "",
        showlegend=bool(told),
        margin={"t": 30, "r": 20},
    )
    return figure


def _error_bars(columns: Columns, y: str, rows: Sequence[int], values: Sequence[float]) -> dict[str, Any] | None:
    if f"{y}.low" not in columns:
        return None
    bounds = [(columns[f"{y}.low"][i], columns[f"{y}.high"][i]) for i in rows]
    above = [0.0 if high is None else high - value for (_, high), value in zip(bounds, values, strict=True)]
    below = [0.0 if low is None else value - low for (low, _), value in zip(bounds, values, strict=True)]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1}


def heat(columns: Columns, x: str, y: str, value: str, schedule: str | None) -> go.Figure:
    """`value` over two fields."""
    names = list(dict.fromkeys(name for name in columns["schedule"] if name is not None))
    if schedule is not None and schedule not in names:
        raise InputError("the sweep", "schedule", shown(schedule), choice(schedule, names) if names else "none")
    wanted = schedule if schedule is not None else next(iter(names), None)
    cells: dict[tuple[Any, Any], list[float]] = {}
    for i, found in enumerate(columns[value]):
        at = columns[x][i], columns[y][i]
        if found is not None and None not in at and columns["schedule"][i] == wanted:
            cells.setdefault(at, []).append(found)
    across, down = (sorted({cell[axis] for cell in cells}) for axis in (0, 1))
    table = [[fmean(cells[at]) if (at := (left, top)) in cells else None for left in across] for top in down]
    figure = go.Figure(go.Heatmap(x=across, y=down, z=table, colorscale="Viridis", colorbar_title_text=value))
    figure.update_layout(template="plotly_white", xaxis_title=x, yaxis_title=y, title_text=wanted or "")
    if not all(isinstance(each, int | float) for each in across):
        figure.update_xaxes(type="category")
    if not all(isinstance(each, int | float) for each in down):
        figure.update_yaxes(type="category")
    return figure


def as_html(result: SweepResult) -> str:
    """The sweep in a notebook: what it is, and the first of its rows by a few figures."""
    rows = result.rows()
    have = {key for row in rows for key, value in row.items() if value is not None}
    keys = ["point", *result.fields, "schedule", *(key for key in _SHOWN_FIGURES if key in have)]
    keys += ["error"] if result.failed else []
    head = "".join(f"<th>{escape(key)}</th>" for key in keys)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_cell(row.get(key)))}</td>" for key in keys) + "</tr>"
        for row in rows[:_SHOWN_ROWS]
    )
    more = f"<p>{len(rows) - _SHOWN_ROWS:,} more rows: frame() has all</p>" if len(rows) > _SHOWN_ROWS else ""
    failed = f", {len(result.failed):,} of which failed" if result.failed else ""
    return (
        f"<h4>{escape(result.name)}</h4><p>{len(result.points):,} points{failed}</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)

"""A plan as a picture: what a million tokens cost against the latency that they come with."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from math import inf
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from batchsim.plan.candidate import Trial
from batchsim.plan.changes import dollars
from batchsim.report.figures import ACROSS, layout, on_white

if TYPE_CHECKING:
    from batchsim.plan.result import PlanResult


def frontier_figure(found: PlanResult) -> go.Figure:
    """Every simulated candidate that serves the load, the frontier, the choice and its runner-up."""
    figure, latency = go.Figure(), found.latency
    shown = [trial for trial in found.evaluated if trial.stable and trial.cost_per_million_tokens is not None]
    names = list(dict.fromkeys(trial.candidate.configuration.hardware for trial in shown))
    for i, name in enumerate(names):
        some = [trial for trial in shown if trial.candidate.configuration.hardware == name]
        look = {"color": ACROSS[i % len(ACROSS)], "size": 8, "opacity": 0.6}
        _add(figure, found, name, some, mode="markers", marker=look)
    _add(figure, found, "frontier", found.frontier, mode="lines", line={"color": "#667085", "width": 1.5})
    for role, trial, symbol in (("best", found.best, "star"), ("runner-up", found.runner_up, "diamond")):
        if trial is not None and trial.cost_per_million_tokens is not None:
            _add(
                figure, found, role, [trial], mode="markers", marker={"size": 14, "symbol": symbol, "color": "#d55e00"}
            )
    if latency is not None and latency.limit < inf:
        figure.add_hline(latency.limit, line={"color": "#d9483b", "dash": "dash", "width": 1.5})
    figure.update_layout(**layout(height=460))
    figure.update_xaxes(title="USD for a million output tokens", rangemode="tozero")
    figure.update_yaxes(title="" if latency is None else f"{latency.words}, ms", type="log")
    return on_white(figure)


def as_html(found: PlanResult) -> str:
    """The answer, its runner-up and the frontier, for a notebook."""
    told = "".join(f"<li>{escape(text)}</li>" for text in found.sentences)
    columns = ["candidate", "USD an hour", "USD a million tokens", *(each.key for each in found.objectives), "verdict"]
    rows = []
    notable = {id(trial): trial for trial in (found.best, found.runner_up, *found.frontier) if trial is not None}
    for trial in notable.values():
        each = trial.cost_per_million_tokens
        cells = [
            trial.candidate.words, dollars(trial.candidate.cost_per_hour), "" if each is None else dollars(each),
            *(_value(trial.values[objective.key]) for objective in found.objectives), verdict(found, trial),
        ]  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    table = f"<table><tr>{head}</tr>{''.join(rows)}</table><p>frame() has all that was simulated</p>"
    # Else Jupyter sets what stands between two dollar signs as mathematics.
    return f'<div class="tex2jax_ignore mathjax_ignore"><h3>{escape(found.name)}</h3><ul>{told}</ul>{table}</div>'


def verdict(found: PlanResult, trial: Trial) -> str:
    """What to say of one candidate beside its figures."""
    role = "best" if trial is found.best else "runner-up" if trial is found.runner_up else None
    if role is not None:
        return role
    if trial.meets:
        return "meets them"
    return trial.why_not or "meets them as predicted, without draws"


def _value(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}"


def _add(figure: go.Figure, found: PlanResult, name: str, trials: Iterable[Trial], **look: object) -> None:
    some, latency = list(trials), found.latency
    assert latency is not None
    figure.add_scatter(
        name=name, x=[trial.cost_per_million_tokens for trial in some],
        y=[trial.figures.get(latency.figure) for trial in some],
        text=[f"{trial.candidate.words}: {verdict(found, trial)}" for trial in some],
        hovertemplate="%{text}<br>$%{x:,.3f}, %{y:,.4g} ms<extra></extra>", **look,
    )  # fmt: skip

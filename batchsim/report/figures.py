"""The figures of the page: stream timeline, idle attribution, and the errors of a prediction."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import plotly.graph_objects as go

from batchsim.operations import HOST_PHASES
from batchsim.records import DEVICE_STAGES, Lane, Span
from batchsim.report.shown import compared, error_text, shown, stage_label
from batchsim.report.words import idle_shares
from batchsim.result import Run, ScheduleResult, errors, figures, in_points, occurrence

LANES: tuple[Lane, ...] = ("host", "copy_in", "compute", "copy_out")

# Okabe and Ito's palette, told apart by colour-blind readers, in the order of a step; greys for what is not work.
COLOURS = {
    "schedule": "#cc79a7",
    "build_inputs": "#d55e00",
    "copy_in": "#e69f00",
    "launch": "#56b4e9",
    "copy_out": "#d9c615",
    "record": "#7f7f7f",
    "stream_wait": "#a6a6a6",
    "wait": "rgba(148,160,176,0.22)",
    "update": "#882255",
    "prefill": "#009e73",
    "decode": "#0072b2",
    "prepare": "#d55e00",
    "launch_forward": "#56b4e9",
    "launch_backward": "#66c2a5",
    "launch_optimizer": "#e7a8cb",
    "read_loss": "#882255",
    "forward": "#0072b2",
    "backward": "#009e73",
    "optimizer": "#cc79a7",
    "wake_up": "#9aa5b1",
    "launch_latency": "#5b6673",
    "busy": "#0072b2",
    "no_requests": "rgba(148,160,176,0.35)",
}
_UNKNOWN = "#c3cad3"
_OTHERS = "other stages"
_SMALL_SHARE = 0.001
_GAPPY = " with gaps"
# Schedules beside one another.
ACROSS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
_DARK = "#1c2330"
# Stages whose colour is too light for white letters.
_LIGHT = (
    "copy_in", "copy_out", "launch", "stream_wait", "schedule", "launch_forward", "launch_backward", "launch_optimizer",
)  # fmt: skip
_INK = dict.fromkeys(_LIGHT, _DARK) | dict.fromkeys(("wait", "no_requests"), "#7b8794")
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
_ROW_PX = 24

_ValueOf = Callable[[str, ScheduleResult, ScheduleResult], float | None]


class _Row(NamedTuple):
    """One schedule's window as it is drawn; times count from `origin_ns`, where its first forward ends."""

    title: str
    spans: Sequence[Span]
    origin_ns: int
    end_ns: int
    turn_ns: int


def timelines(predicted: Run, measured: Run | None) -> dict[str, go.Figure]:
    """The lanes of each schedule's window under one another on one time scale, whole and close up."""
    rows = [
        _row(name, run)
        for name in predicted.windows
        for run in (predicted, measured)
        if run is not None and any(span.lane == "compute" for span in run.windows.get(name, ()))
    ]
    whole = max((row.end_ns - row.origin_ns for row in rows), default=0)
    turn = max((row.turn_ns for row in rows), default=0)
    return {"timeline": _timeline(rows, whole, ("compute",)), "close-up": _timeline(rows, turn, LANES)}


def _timeline(rows: Sequence[_Row], length_ns: int, labelled: Sequence[Lane]) -> go.Figure:
    """Lanes from a little before the origin to `length_ns` after it; one trace a stage."""
    left_ns, right_ns = -length_ns // 20, length_ns + length_ns // 100
    figure = go.Figure()
    bars: defaultdict[str, list[tuple[float, float, float, str, list[object]]]] = defaultdict(list)
    ticks: dict[float, str] = {}
    position = 0.0
    for row in rows:
        position += 0.9
        figure.add_annotation(
            text=row.title, x=0, xref="paper", xanchor="left", y=position, yanchor="middle", showarrow=False,
            font={"size": 13},
        )  # fmt: skip
        for lane in LANES:
            position += 1
            ticks[position] = lane.replace("_", " ")
            for span in row.spans:
                start = max(span.start_ns - row.origin_ns, left_ns)
                end = min(span.end_ns - row.origin_ns, row.end_ns - row.origin_ns, right_ns)
                if span.lane == lane and start < end:
                    text = "" if lane not in labelled else f"step {span.step}" if lane == "compute" else span.stage
                    starts_ms = (span.start_ns - row.origin_ns) / 1e6
                    gaps = f", {_duration(span.gap_ns)} of it waiting for launches" if span.gap_ns else ""
                    about = [span.step, starts_ms, _duration(span.duration_ns) + gaps, ticks[position]]
                    bars[_drawn_as(span)].append((start / 1e6, (end - start) / 1e6, position, text, about))
    for stage in sorted(bars, key=_order):
        starts, durations, positions, texts, about_all = zip(*bars[stage], strict=True)
        figure.add_bar(
            name=stage_label(stage), orientation="h", base=starts, x=durations, y=positions, text=texts,
            customdata=about_all, width=0.82, textposition="inside", insidetextanchor="middle", textangle=0,
            insidetextfont={"color": _ink(stage), "size": 11}, marker=_marker(stage),
            hovertemplate=f"<b>{stage}</b> on %{{customdata[3]}}, step %{{customdata[0]}}<br>starts at "
            "%{customdata[1]:.4f} ms, lasts %{customdata[2]}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        **layout(height=round(position * _ROW_PX) + 110), barmode="overlay", uniformtext={"minsize": 9, "mode": "hide"}
    )
    figure.update_xaxes(title="ms since a forward ended", zeroline=False, range=[left_ns / 1e6, right_ns / 1e6])
    figure.update_yaxes(
        tickvals=list(ticks), ticktext=[f"{lane}  " for lane in ticks.values()],
        range=[position + 0.7, 0.2], showgrid=False, zeroline=False, fixedrange=True,
    )  # fmt: skip
    return figure


def idle(predicted: Run, measured: Run | None) -> go.Figure:
    """Where the device's time goes: one stacked bar a schedule, busy and idle stages adding up to all of it."""
    rows: dict[str, dict[str, float]] = {}
    for name in predicted.results:
        for run in (predicted, measured):
            if run is not None and name in run.results:
                rows[name if measured is None else f"{name}, {run.source}"] = _shares(run.results[name])
    figure = go.Figure()
    for stage in sorted({stage for shares in rows.values() for stage in shares}, key=_order):
        values = [shares.get(stage, 0.0) for shares in rows.values()]
        label = stage if stage in ("busy", "launch gaps") else f"idle: {stage_label(stage)}"
        figure.add_bar(
            name=label, orientation="h", x=values, y=list(rows), marker=_marker(stage),
            text=[f"{value:.1%}" if value >= 0.025 else "" for value in values], textposition="inside",
            insidetextanchor="middle", insidetextfont={"size": 11}, textangle=0, constraintext="none",
            hovertemplate=f"%{{y}}<br><b>{label}</b> %{{x:.2%}} of the time<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        **layout(height=len(rows) * 38 + 110 + 20 * (len(figure.data) // 5)), barmode="stack", bargap=0.3
    )
    for row, shares in rows.items():
        unused = sum(share for stage, share in shares.items() if stage not in ("busy", "launch gaps"))
        figure.add_annotation(text=f"{unused:.2%} idle", x=1, y=row, xanchor="left", xshift=6, showarrow=False)
    figure.update_xaxes(tickformat=".0%", range=[0, 1.09], tickvals=[0, 0.2, 0.4, 0.6, 0.8, 1], title="share of total")
    figure.update_yaxes(autorange="reversed", fixedrange=True, ticksuffix="  ", showgrid=False)
    return figure


def metric_errors(predicted: Run, measured: Run) -> go.Figure:
    """Signed errors of the metrics: percent, and percentage points for shares and gains."""
    labels = {
        metric.key: metric.label + (" (points)" if in_points(metric.key) else "") for metric in compared(predicted)
    }
    return _errors(predicted, measured, labels, "predicted against measured, % or points", _scaled_error)


def stage_errors(predicted: Run, measured: Run) -> go.Figure:
    """Signed errors of the stages, as the time they add to the mean step: a rare stage counts little."""
    stages: dict[str, float] = {}
    for run in (predicted, measured):
        for result in run.results.values():
            for stage, value in result.stage_ms.items():
                stages[stage] = max(value * occurrence(result, stage), stages.get(stage, 0.0))
    ordered = sorted(stages, key=lambda stage: (-stages[stage], stage))
    labels = {f"stage_ms.{stage}": stage_label(stage) for stage in ordered}
    return _errors(predicted, measured, labels, "predicted minus measured, \N{MICRO SIGN}s a step", _difference_us)


def _scaled_error(key: str, predicted: ScheduleResult, measured: ScheduleResult) -> float | None:
    error = errors(predicted, measured).get(key)
    return None if error is None else error if in_points(key) else error * 100


def _difference_us(key: str, predicted: ScheduleResult, measured: ScheduleResult) -> float | None:
    left, right = figures(predicted).get(key), figures(measured).get(key)
    if left is None or right is None:
        return None
    stage = key.removeprefix("stage_ms.")
    return (left * occurrence(predicted, stage) - right * occurrence(measured, stage)) * 1e3


def _errors(predicted: Run, measured: Run, labels: dict[str, str], title: str, value_of: _ValueOf) -> go.Figure:
    figure = go.Figure()
    names = [name for name in predicted.results if name in measured.results]
    for colour, name in zip(ACROSS * len(names), names, strict=False):
        left, right = predicted.results[name], measured.results[name]
        error, sides = errors(left, right), (figures(left), figures(right))
        keys = [key for key in labels if key in shown(left) and value_of(key, left, right) is not None]
        figure.add_bar(
            name=name, orientation="h", y=[labels[key] for key in keys], marker={"color": colour},
            x=[value_of(key, left, right) for key in keys],
            text=[error_text(key, error[key]) if key in error else "" for key in keys], textposition="outside",
            cliponaxis=False, textfont={"size": 11},
            customdata=[[f"{side[key]:,.4g}" for side in sides] for key in keys],
            hovertemplate="<b>%{y}</b>, " + name + "<br>predicted %{customdata[0]}, measured %{customdata[1]}"
            "<br>error %{text}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(**layout(height=len(labels) * (16 * len(names) + 8) + 120), barmode="group", bargap=0.25)
    reach = 1.4 * max((abs(value) for bar in figure.data for value in bar.x), default=0.0) or 1.0
    figure.update_xaxes(title=title, zeroline=True, zerolinewidth=1.5, range=[-reach, reach])
    order = {"categoryorder": "array", "categoryarray": list(labels.values()), "autorange": "reversed"}
    figure.update_yaxes(**order, fixedrange=True, ticksuffix="  ")
    return figure


def _row(name: str, run: Run) -> _Row:
    spans = run.windows[name]
    forwards = [span for span in spans if span.lane == "compute"]
    origin = min(span.end_ns for span in forwards)
    end = min(max(span.end_ns for span in forwards), max(span.end_ns for span in spans if span.lane == "host"))
    # A turn's work on the host is over when the host waits again, and on the device when the next forward begins.
    waits = [span.start_ns for span in spans if span.stage == "wait" and span.start_ns > origin]
    nexts = [span.start_ns for span in forwards if span.start_ns >= origin]
    turn = max(min(waits, default=origin), min(nexts, default=origin)) - origin
    title = f"<b>{name}</b> \N{MIDDLE DOT} {run.source}"
    if name in run.results:
        title += f" \N{MIDDLE DOT} device busy {run.results[name].device_busy_fraction:.2%} of the run"
    return _Row(title, spans, origin, end, round(turn * 1.15))


def _shares(result: ScheduleResult) -> dict[str, float]:
    gaps = result.launch_gap_fraction or 0.0
    shares = {"busy": result.device_busy_fraction - gaps} | ({"launch gaps": gaps} if gaps else {})
    for stage, share in idle_shares(result).items():
        name = stage if share >= _SMALL_SHARE else _OTHERS
        shares[name] = shares.get(name, 0.0) + share
    return shares


def _order(stage: str) -> tuple[int, str]:
    if stage in ("busy", "launch gaps"):
        return -1, stage
    name = stage.removeprefix("device_").removesuffix(_GAPPY)
    return list(COLOURS).index(name) if name in COLOURS else len(COLOURS), stage


def _drawn_as(span: Span) -> str:
    """The stage, marked where the device waits for launches during a good part of it."""
    return span.stage + (_GAPPY if span.gap_ns and span.gap_ns > 0.1 * span.duration_ns else "")


def _ink(stage: str) -> str:
    return _DARK if stage.endswith(_GAPPY) else _INK.get(stage, "white")


def _marker(stage: str) -> dict[str, object]:
    colour = COLOURS.get(stage.removeprefix("device_"), _UNKNOWN)
    if stage.endswith(_GAPPY) or stage == "launch gaps":
        stage = stage.removesuffix(_GAPPY)
        return {"color": "#a8cbe4", "pattern": _pattern("/", COLOURS.get(stage, "#0072b2"))}
    if stage == "wait":
        return {"color": colour, "pattern": _pattern("/", "rgba(148,160,176,0.55)")}
    if stage.startswith("device_"):
        return {"color": colour, "pattern": _pattern("x", "white")}
    if stage in DEVICE_STAGES and stage not in HOST_PHASES:
        return {"color": colour, "line": {"color": "rgba(0,0,0,0.45)", "width": 1}}
    # An outline in its own colour keeps a span of microseconds visible.
    return {"color": colour, "line": {"color": colour, "width": 0.6}}


def _pattern(shape: str, colour: str) -> dict[str, object]:
    return {"shape": shape, "fillmode": "overlay", "fgcolor": colour, "size": 5, "solidity": 0.25}


def looks(stages: Iterable[str]) -> dict[str, dict[str, object]]:
    """How bars of these stages are drawn, in the order of a step: label, marker, and the colour of letters on them."""
    return {
        stage: {"label": stage_label(stage), "marker": _marker(stage), "ink": _ink(stage)}
        for stage in sorted(set(stages), key=_order)
    }


def _duration(ns: int) -> str:
    return f"{ns / 1e6:,.3f} ms" if ns >= 1_000_000 else f"{ns / 1e3:,.3f} \N{MICRO SIGN}s"


def on_white(figure: go.Figure) -> go.Figure:
    """The figure on a ground of its own: its letters are dark, and a notebook may be, too."""
    figure.update_layout(paper_bgcolor="white", plot_bgcolor="white")
    return figure


def layout(height: int) -> dict[str, object]:
    grid = {"gridcolor": "rgba(128,128,128,0.2)", "zerolinecolor": "rgba(128,128,128,0.6)", "automargin": True}
    return {
        "template": None,
        "height": height,
        "font": {"family": _FONT, "size": 12.5},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 10, "r": 24, "t": 12, "b": 10},
        "xaxis": grid | {"ticks": "outside", "tickcolor": "rgba(128,128,128,0.4)"},
        "yaxis": grid,
        "hoverlabel": {"align": "left"},
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "traceorder": "normal"},
        "showlegend": True,
    }

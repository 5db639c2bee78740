"""The pictures of `batchsim whatif`: steps with their intervals, timelines, and what the device idles through."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from batchsim.report.figures import layout
from batchsim.report.whatif_words import NO_PHASE, gains, in_order, ms, phase_label
from batchsim.whatif.answer import Answer
from batchsim.whatif.replay import ADDED, Moment
from batchsim.whatif.traced import replay_traced
from batchsim.whatif.variants import COPY_IN, COPY_OUT

STEPS = 3  # As many are drawn of each timeline.
WAIT = "wait"
OTHERS = "other phases"
_WAIT_COLOUR = "rgba(148,160,176,0.22)"
# Okabe and Ito's palette and its kin, those of the device apart from those of the host.
_DEVICE = {"graph": "#0072b2", "kernels": "#0072b2", "h2d": "#e69f00", "d2h": "#d9c615", "d2d": "#b07d3c"}
_DEVICE_NAMES = {
    "kernels": "kernels",
    "graph": "kernels",
    "h2d": "copy to device",
    "d2h": "copy to host",
    "d2d": "copy on device",
}
_HOST = ("#d55e00", "#56b4e9", "#cc79a7", "#009e73", "#882255", "#7f9c3b", "#e7a8cb", "#66c2a5", "#a8577e")
_SPECIAL = {NO_PHASE: "#8792a2", ADDED: "#7b5fb2", "feedback": "#a58bd6", OTHERS: "#c3cad3", WAIT: _WAIT_COLOUR}
_LIGHT = ("#e69f00", "#d9c615", "#56b4e9", "#cc79a7", "#e7a8cb", "#66c2a5", "#a58bd6", "#c3cad3")
_DARK_INK = "#1c2330"
_GAIN, _SAME, _LOSS, _AS_IS = "#009e73", "#98a2b3", "#d55e00", "#0072b2"
_ROW_PX = 26
# Waits shorter than this share of a timeline are no more than a dent in what they interrupt.
_DENT = 1 / 1500


@dataclass(frozen=True)
class _Row:
    title: str
    moments: Sequence[Moment]  # from time zero
    length_ns: float


def steps(answer: Answer) -> go.Figure:
    """A bar a schedule with the interval as its whisker; a line where the loop is now."""
    figure = go.Figure()
    found = in_order(answer)
    middles = [each.step_ms for each in found.values()]
    figure.add_bar(
        orientation="h", x=middles, y=list(found), marker={"color": [_bar_colour(answer, name) for name in found]},
        error_x={
            "type": "data", "symmetric": False, "thickness": 1.6, "width": 5, "color": "rgba(128,128,128,0.95)",
            "array": [max(each.step_ms_interval[1] - each.step_ms, 0) for each in found.values()],
            "arrayminus": [max(each.step_ms - each.step_ms_interval[0], 0) for each in found.values()],
        },
        customdata=[
            [f"{ms(each.step_ms_interval[0])} to {ms(each.step_ms_interval[1])}", f"{each.throughput_gain:+z.1%}"]
            for each in found.values()
        ],
        hovertemplate="<b>%{y}</b> %{x:,.4g} ms a step (%{customdata[0]})<br>%{customdata[1]} throughput"
        "<extra></extra>",
    )  # fmt: skip
    for name, each in found.items():
        gain = "as it is" if name == answer.as_is else f"{each.throughput_gain:+z.0%}"
        _beside(figure, name, f"{ms(each.step_ms)} <span style='opacity:0.7'>{gain}</span>")
    reach = max(each.step_ms_interval[1] for each in found.values())
    figure.add_vline(found[answer.as_is].step_ms, line={"color": _AS_IS, "dash": "dot", "width": 1.5}, layer="below")
    figure.update_layout(**_layout(len(found) * 34 + 80, right=112), bargap=0.35)
    figure.update_xaxes(title="ms a step", range=[0, reach * 1.03], fixedrange=True)
    figure.update_yaxes(autorange="reversed", fixedrange=True, ticksuffix="  ", showgrid=False)
    return figure


def exposed(answer: Answer) -> go.Figure:
    """What the host does in a step while no kernels are under way, by phase."""
    figure = go.Figure()
    colours = phase_colours(answer)
    values: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for name, found in in_order(answer).items():
        for phase, time_ms in found.exposed_ms.items():
            key = phase if phase in colours else OTHERS
            values[key][name] = values[key].get(name, 0.0) + time_ms
    names = list(in_order(answer))
    for phase in [*colours, OTHERS]:
        if phase in values:
            figure.add_bar(
                name=phase_label(phase), orientation="h", y=names, x=[values[phase].get(name, 0.0) for name in names],
                marker={"color": colours.get(phase, _SPECIAL[OTHERS])},
                hovertemplate=f"%{{y}}<br><b>{phase_label(phase)}</b> %{{x:,.3f}} ms a step<extra></extra>",
            )  # fmt: skip
    totals = {name: sum(each.get(name, 0.0) for each in values.values()) for name in names}
    for name, total in totals.items():
        _beside(figure, name, ms(total))
    figure.update_layout(**_layout(len(names) * 30 + 80, right=60), barmode="stack", bargap=0.35)
    figure.update_xaxes(title="ms a step", range=[0, (max(totals.values()) or 1.0) * 1.03], fixedrange=True)
    # A schedule in which nothing is exposed keeps its row.
    order = {"categoryorder": "array", "categoryarray": names, "range": [len(names) - 0.5, -0.5]}
    figure.update_yaxes(**order, fixedrange=True, ticksuffix="  ", showgrid=False)
    return figure


def timelines(answer: Answer) -> go.Figure:
    """Some steps as traced, and as predicted for sync and async, under one another on one time scale."""
    traced = replay_traced(answer.profile.steps, answer.profile.launch_ns)
    rows = [_row(f"<b>measured</b> \N{MIDDLE DOT} {answer.as_is}, with the profiler", traced.moments)]
    for name in dict.fromkeys((answer.as_is, "sync", "async")):
        if (found := answer.schedules.get(name)) is not None:
            title = f"<b>predicted</b> \N{MIDDLE DOT} {name}, {ms(found.step_ms)} ms a step"
            rows.append(_row(title, found.moments))
    colours = phase_colours(answer)
    length = max(row.length_ns for row in rows)
    figure = go.Figure()
    bars: defaultdict[str, list[tuple[float, float, float, str, str, str]]] = defaultdict(list)
    ticks: dict[float, str] = {}
    position = 0.0
    for row in rows:
        position += 1.0
        figure.add_annotation(
            text=row.title, x=0, xref="paper", xanchor="left", y=position, yanchor="middle", showarrow=False,
            font={"size": 13},
        )  # fmt: skip
        for lane in _lanes(row.moments):
            position += 1
            ticks[position] = _lane_label(lane)
            for moment in _merged(row, lane, length * _DENT):
                key = _key(moment, colours)
                start, end = max(moment.start_ns, 0.0), min(moment.end_ns, row.length_ns)
                if start < end:
                    name = _label(moment)
                    text = f"step {moment.step + 1}" if moment.what in ("graph", "kernels") else name.rpartition("/")[2]
                    about = f"{name}, step {moment.step + 1}", _lasts(moment)
                    bars[key].append((start / 1e6, (end - start) / 1e6, position, text, *about))
    order = [*colours, OTHERS, WAIT, *_DEVICE]
    for key in sorted(bars, key=order.index):
        starts, durations, positions, texts, names, lasts = zip(*bars[key], strict=True)
        colour = colours.get(key) or _SPECIAL.get(key) or _DEVICE[key]
        figure.add_bar(
            name=_DEVICE_NAMES.get(key) or phase_label(key), orientation="h", base=starts, x=durations, y=positions,
            text=texts, width=0.82, textposition="inside", insidetextanchor="middle", textangle=0,
            customdata=list(zip(names, lasts, strict=True)), marker=_marker(key, colour),
            insidetextfont={"size": 11, "color": _ink(key, colour)},
            hovertemplate="<b>%{customdata[0]}</b><br>from %{base:,.4f} ms, %{customdata[1]}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        **_layout(round(position * _ROW_PX) + 70), barmode="overlay", uniformtext={"minsize": 9, "mode": "hide"}
    )
    figure.update_xaxes(title="ms since a step began", zeroline=False, range=[-length / 4e8, length * 1.005 / 1e6])
    figure.update_yaxes(
        tickvals=list(ticks), ticktext=[f"{lane}  " for lane in ticks.values()], range=[position + 0.7, 0.3],
        showgrid=False, zeroline=False, fixedrange=True,
    )  # fmt: skip
    return figure


def legend(answer: Answer) -> tuple[dict[str, str], dict[str, str]]:
    """What the colours stand for, on the host and on the device: labels, and colours as CSS has them."""
    colours = phase_colours(answer)
    moments = [moment for found in answer.schedules.values() for moment in found.moments]
    keys = {_key(moment, colours) for moment in moments}
    host = colours | ({OTHERS: _SPECIAL[OTHERS]} if OTHERS in keys else {})
    device = {_DEVICE_NAMES[key]: colour for key, colour in _DEVICE.items() if key in keys}
    return {phase_label(key): colour for key, colour in host.items()}, device


def phase_colours(answer: Answer) -> dict[str, str]:
    """Colours of the host's phases, the largest first; those that are none of the largest have none."""
    spent: defaultdict[str, float] = defaultdict(float)
    for name, found in answer.schedules.items():
        weight = 1.0 if name == answer.as_is else 1e-3  # Others only have phases of their own.
        for moment in found.moments:
            if moment.lane == "host" and moment.what != WAIT:
                spent[moment.what] += weight * (moment.end_ns - moment.start_ns)
    largest = sorted((phase for phase in spent if phase not in _SPECIAL), key=lambda phase: -spent[phase])
    return dict(zip(largest, _HOST, strict=False)) | {
        phase: _SPECIAL[phase] for phase in (NO_PHASE, "feedback", ADDED) if phase in spent
    }


def _row(title: str, moments: Sequence[Moment]) -> _Row:
    """The moments of some steps from the second on, where there are so many, and of what is under way meanwhile."""
    host = [moment for moment in moments if moment.lane == "host"]
    steps = sorted({moment.step for moment in host})
    if not steps:
        return _Row(title, (), 0.0)
    first = steps[1] if len(steps) > STEPS else steps[0]
    last = min(first + STEPS - 1, steps[-1])
    begin = min(moment.start_ns for moment in host if moment.step == first)
    end = max(moment.end_ns for moment in host if moment.step == last)
    under_way = [moment for moment in moments if moment.end_ns > begin and moment.start_ns < end]
    first = min(moment.step for moment in under_way)
    shown = [
        moment._replace(step=moment.step - first, start_ns=moment.start_ns - begin, end_ns=moment.end_ns - begin)
        for moment in under_way
    ]
    return _Row(title, shown, end - begin)


def _lanes(moments: Iterable[Moment]) -> list[str]:
    """The host, and the streams, busiest first but those that a schedule adds around them."""
    busy: defaultdict[str, float] = defaultdict(float)
    for moment in moments:
        if moment.lane != "host":
            busy[moment.lane] += moment.end_ns - moment.start_ns
    return ["host", *sorted(busy, key=lambda lane: -busy[lane])]


def _lane_label(lane: str) -> str:
    return {f"stream {COPY_IN}": "copy in", f"stream {COPY_OUT}": "copy out"}.get(lane, lane)


def _merged(row: _Row, lane: str, dent_ns: float) -> list[Moment]:
    """A lane's moments in order of time, those of one thing after the other as one."""
    merged: list[Moment] = []
    for moment in sorted((each for each in row.moments if each.lane == lane), key=lambda each: each.start_ns):
        before = merged[-1] if merged else None
        if before is not None and moment.start_ns - before.end_ns < 2:
            dent = lane == "host" and moment.what == WAIT and moment.end_ns - moment.start_ns < dent_ns
            if (dent or moment.what == before.what) and before.step == moment.step:
                merged[-1] = before._replace(end_ns=moment.end_ns)
                continue
        merged.append(moment)
    return merged


def _key(moment: Moment, colours: Mapping[str, str]) -> str:
    """Which trace of the figure a moment belongs to."""
    if moment.lane != "host":
        return "kernels" if moment.what == "graph" else moment.what
    return moment.what if moment.what in colours or moment.what == WAIT else OTHERS


def _label(moment: Moment) -> str:
    return moment.what if moment.what == "graph" else _DEVICE_NAMES.get(moment.what) or phase_label(moment.what)


def _lasts(moment: Moment) -> str:
    ns = moment.end_ns - moment.start_ns
    return f"lasts {ns / 1e6:,.3f} ms" if ns >= 1e6 else f"lasts {ns / 1e3:,.1f} \N{MICRO SIGN}s"


def _marker(key: str, colour: str) -> dict[str, object]:
    if key == WAIT:
        pattern = {
            "shape": "/",
            "fillmode": "overlay",
            "fgcolor": "rgba(148,160,176,0.55)",
            "size": 5,
            "solidity": 0.25,
        }
        return {"color": colour, "pattern": pattern}
    if key in _DEVICE:
        return {"color": colour, "line": {"color": "rgba(140,160,185,0.9)", "width": 0.8 if key == "kernels" else 0}}
    return {"color": colour, "line": {"color": colour, "width": 0.6}}


def _ink(key: str, colour: str) -> str:
    return "#7b8794" if key == WAIT else _DARK_INK if colour in _LIGHT else "white"


def _bar_colour(answer: Answer, name: str) -> str:
    if name == answer.as_is:
        return _AS_IS
    return {1: _GAIN, 0: _SAME, -1: _LOSS}[gains(answer.schedules[name])]


def _beside(figure: go.Figure, row: str, text: str) -> None:
    """Write `text` to the right of the plot, in a column as wide as the margin, however narrow the page is."""
    figure.add_annotation(
        text=text, x=1, xref="paper", y=row, xanchor="left", xshift=6, showarrow=False, font={"size": 12}
    )


def _layout(height: int, right: int = 12) -> dict[str, object]:
    """Without a legend: the page has one, which wraps."""
    return layout(height) | {"showlegend": False, "margin": {"l": 10, "r": right, "t": 12, "b": 10}}

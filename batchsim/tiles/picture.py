"""Multiprocessors over time: which tile is on which slot, and where it waits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from batchsim.report.figures import layout
from batchsim.tiles.result import Recorded

# Okabe and Ito's palette, told apart by colour-blind readers.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#882255", "#d9c615")
WAITING = "#a3a9b3"

# A browser draws so many bars without a pause; where there are more, only some multiprocessors are drawn.
MAX_BARS = 6_000

_LEAST_PX, _MOST_PX, _SM_PX = 140, 360, 3
_TITLE_PX, _REST_PX = 36, 110
# A tile is drawn shorter by such a part of the picture's width, so that the next one is told from it.
_GAPS = 900
_SEAM_PX = 6


class _Bar(NamedTuple):
    start_us: float
    us: float
    place: float
    about: list[object]


def picture(runs: Sequence[Recorded], sms: int) -> go.Figure:
    """One panel a run, below one another on one time axis: a colour a kernel, waiting in grey, blank is idle."""
    every, longest_us = every_nth(runs), max(run.total_us for run in runs)
    panel = min(max(sms * _SM_PX, _LEAST_PX), _MOST_PX)
    height = len(runs) * (panel + _TITLE_PX)
    figure = go.Figure()
    look: dict[str, Any] = layout(height=height + _REST_PX)
    figure.update_layout(**look, barmode="overlay")
    for number, recorded in enumerate(runs):
        axis = "y" if number == 0 else f"y{number + 1}"
        top = 1 - (number * (panel + _TITLE_PX) + _TITLE_PX) / height
        _draw(figure, recorded, axis, every, longest_us / _GAPS, row_px=panel * every / sms)
        domain = [max(top - panel / height, 0.0), top]
        figure.layout[axis.replace("y", "yaxis")] = {
            **look["yaxis"], "domain": domain, "range": [sms - 0.5, -0.5], "fixedrange": True, "zeroline": False,
            "showgrid": False, "nticks": 6, "title": {"text": "SM", "standoff": 2}, "anchor": "x",
        }  # fmt: skip
        end_us = recorded.total_us
        figure.add_annotation(
            text=f"<b>{recorded.policy.name}</b> \N{MIDDLE DOT} {end_us:,.1f} \N{MICRO SIGN}s", showarrow=False,
            x=0, xref="paper", xanchor="left", y=top, yref="paper", yanchor="bottom", font={"size": 13},
        )  # fmt: skip
        figure.add_shape(
            type="line", x0=end_us, x1=end_us, y0=0, y1=1, yref=f"{axis} domain",
            line={"color": "rgba(128,128,128,0.9)", "width": 1, "dash": "dot"},
        )  # fmt: skip
    last = "y" if len(runs) == 1 else f"y{len(runs)}"
    figure.update_xaxes(
        title="\N{MICRO SIGN}s", anchor=last, range=[0, longest_us * 1.01], zeroline=False, minallowed=0,
        maxallowed=longest_us * 1.01,
    )  # fmt: skip
    return figure


def every_nth(runs: Sequence[Recorded]) -> int:
    """Of how many multiprocessors one is drawn."""
    return max(-(-sum(len(recorded.run.spans) for recorded in runs) // MAX_BARS), 1)


def _draw(figure: go.Figure, recorded: Recorded, axis: str, every: int, trim_us: float, row_px: float) -> None:
    """The run's tiles, one trace a kernel, and the waiting on top of them."""
    spans, kernels = recorded.run.spans, recorded.policy.chain.kernels
    slots = 1 + max((span.slot for span in spans), default=0)
    tiles: defaultdict[int, list[_Bar]] = defaultdict(list)
    waiting: list[_Bar] = []
    names = [kernel.name for kernel in kernels]
    for span in spans:
        if span.sm % every:
            continue
        place = span.sm + (every - 1) / 2 + every * ((span.slot + 0.5) / slots - 0.5)
        waited_ns = sum(end - start for start, end in span.waits)
        which = f"row {span.row}, column {span.col}" + (
            f", share {span.slice}" if kernels[span.kernel].slices > 1 else ""
        )
        about: list[object] = [which, span.sm, round(span.end_ns / 1e3, 2), round(waited_ns / 1e3, 2)]
        tiles[span.kernel].append(_bar(span.start_ns, span.end_ns, place, about))
        waiting += [_bar(start, end, place, [names[span.kernel], which, span.sm]) for start, end in span.waits]
    # Thin rows overlap a little, or the seams between them would show as a pattern.
    width = every / slots * (0.9 if row_px / slots > _SEAM_PX else 1.3)
    for kernel, bars in sorted(tiles.items()):
        bars = [bar._replace(us=round(max(bar.us - trim_us, bar.us / 2), 2)) for bar in bars]
        _trace(
            figure, names[kernel], bars, axis, width, COLOURS[kernel % len(COLOURS)],
            "<b>%{fullData.name}</b> %{customdata[0]}<br>SM %{customdata[1]}, %{base} to %{customdata[2]} "
            "\N{MICRO SIGN}s, waiting %{customdata[3]}<extra></extra>",
        )  # fmt: skip
    if waiting:
        _trace(
            figure, "waiting", waiting, axis, width, WAITING,
            "<b>%{customdata[0]}</b> %{customdata[1]} waits<br>SM %{customdata[2]}, from %{base} for %{x} "
            "\N{MICRO SIGN}s<extra></extra>",
        )  # fmt: skip


def _bar(start_ns: float, end_ns: float, place: float, about: list[object]) -> _Bar:
    return _Bar(round(start_ns / 1e3, 2), round((end_ns - start_ns) / 1e3, 2), round(place, 3), about)


def _trace(
    figure: go.Figure, name: str, bars: Sequence[_Bar], axis: str, width: float, colour: str, hover: str
) -> None:
    starts, lengths, places, about = zip(*bars, strict=True)
    known = any(trace.name == name for trace in figure.data)
    figure.add_bar(
        name=name, legendgroup=name, showlegend=not known, orientation="h", base=starts, x=lengths, y=places,
        customdata=about, width=width, yaxis=axis, hovertemplate=hover,
        marker={"color": colour, "line": {"width": 0}},
    )  # fmt: skip

"""The page of many runs: its sections, and the data that its script draws from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from math import isfinite
from typing import Any

from batchsim.report.explore.columns import Column, Row
from batchsim.report.explore.details import Detail
from batchsim.report.figures import ACROSS, layout, looks
from batchsim.report.html import document, embedded, escaped, section
from batchsim.report.shown import LATENCY_NAMES

# Rows of the table at first: a browser lays out so many at once, however narrow the machine.
_ROWS = 200
# Okabe and Ito's, told apart by colour-blind readers; the first five tell chosen rows apart.
_PALETTE = (*ACROSS, "#b87700", "#56b4e9", "#882255", "#7f9c3b")
# What is too dark on a dark page, and what stands for it there.
_DARK = {"#0072b2": "#4aa8e0", "#882255": "#c76b98", "#d55e00": "#ef7d2b"}
# From dark to bright in equal steps of lightness (viridis), less its darkest end, which is lost on a dark page.
_SCALE = [[0.0, "#3b528b"], [0.25, "#2c728e"], [0.5, "#21918c"], [0.75, "#5ec962"], [1.0, "#fde725"]]

_SCRIPTS = ("table.js", "pictures.js", "overview.js", "chosen.js")
_TABLE_NOTE = (
    "Click on a heading to sort, on a row to compare it below (up to five at once). The filter takes words, "
    "name=value and comparisons of figures, and the pictures show what it leaves."
)
_CHOSEN_NOTE = "Up to five at once: a further choice replaces the oldest."
_LATENCY_NOTE = "The share of requests, for ITL of gaps between tokens, that took no longer. Dots mark p50 and p99."
_TIMELINE_NOTE = (
    "A few steps of each, aligned where a forward ends. Blank is idle, hatched is waiting. "
    "Drag to zoom, double-click to go back."
)


@dataclass(frozen=True, slots=True)
class Explored:
    """Runs to look at.

    `rows` have a `schedule` and may have an `error`; `details` are of some of them, `chosen` those that are compared
    at first, `marks` short words beside a row's name, `bounds` service objectives by latency in ms. `allowed` says of
    each row whether it meets what was asked: only such rows stand for a cell of the map. `steady` says which rows may
    be on a frontier.
    The pictures show first: `against` (x and y of the frontier), and `value` over the fields `over`, where they vary.
    """

    columns: Sequence[Column]
    rows: Sequence[Row]
    details: Mapping[int, Detail]
    chosen: Sequence[int]
    sort: str
    against: tuple[str, str]
    value: str
    over: Sequence[str] = ()
    marks: Mapping[int, Sequence[str]] = field(default_factory=dict)
    bounds: Mapping[str, float] = field(default_factory=dict)
    allowed: Sequence[bool] | None = None
    steady: Sequence[bool] | None = None

    def to_json(self) -> dict[str, Any]:
        """What the script reads, by columns."""
        stages = looks(stage for detail in self.details.values() for stage, *_ in detail.bars)
        down = next((column.better == "high" for column in self.columns if column.key == self.sort), False)
        figures = [column.key for column in self.columns if column.kind == "figure"]
        sides = {
            side: {key: self._column(f"{key}.{side}") for key in figures if self._has(f"{key}.{side}")}
            for side in ("low", "high")
        }
        return {
            "columns": [column.to_json() for column in self.columns],
            "values": {column.key: self._column(column.key) for column in self.columns},
            **sides,
            "errors": {index: row["error"] for index, row in enumerate(self.rows) if row.get("error")},
            "details": {index: detail.to_json(list(stages)) for index, detail in self.details.items()},
            "stages": list(stages),
            "looks": stages,
            "chosen": list(self.chosen),
            "marks": {index: list(words) for index, words in self.marks.items() if words},
            "bounds": dict(self.bounds),
            "allowed": None if self.allowed is None else list(self.allowed),
            "steady": None if self.steady is None else list(self.steady),
            "sort": {"key": self.sort, "down": down},
            "limit": _ROWS,
            "palette": _PALETTE,
            "colours": _PALETTE[:5],
            "dark": _DARK,
            "scale": _SCALE,
            "layout": layout(400),
        }

    def axes(self) -> list[Column]:
        """The fields that pictures may go over: those of more than one value."""
        fields = [column for column in self.columns if column.kind == "field"]
        many = [column for column in fields if len({str(row.get(column.key)) for row in self.rows}) > 1]
        return many or fields[:1]

    def _column(self, key: str) -> list[object]:
        return [_short(row.get(key)) for row in self.rows]

    def _has(self, key: str) -> bool:
        return any(row.get(key) is not None for row in self.rows)


def page(title: str, top: Iterable[str], found: Explored, bottom: Iterable[str], *, frontier: str, rows: str) -> str:
    """The HTML text of a page: `top`, the runs, `bottom`; `frontier` and `rows` head the picture and the table."""
    if all(row.get("error") for row in found.rows):
        return document(title, [*top, *bottom], {})
    parts = [*top, embedded("explored", found.to_json())]
    parts += [_frontier(found, frontier), section(rows, _TABLE_NOTE, _table(found)), _map(found)]
    parts.append(_chosen(found))
    here = files("batchsim.report.explore")
    style = here.joinpath("style.css").read_text(encoding="utf-8")
    scripts = [here.joinpath(name).read_text(encoding="utf-8") for name in _SCRIPTS]
    return document(title, [*parts, *bottom], {}, style, "{\n" + "\n".join(scripts) + "}\n")


def _frontier(found: Explored, title: str) -> str:
    figures = [column for column in found.columns if column.kind == "figure" and column.better]
    axes = found.axes()
    colour = next((column.key for column in axes if column.bare), axes[0].key)
    x, y = found.against
    controls = _controls(
        _select("scatter-y", "up", figures, y), _select("scatter-x", "across", figures, x),
        _select("scatter-colour", "colour", axes, colour),
    )  # fmt: skip
    crosses = ""
    if found.allowed is not None:
        crosses = " Crosses miss an objective."
    elif not all(found.steady or ()):
        crosses = " Crosses are unstable: latencies there grow with the length of the run."
    note = f"Each point is a row of the table below; on the red line no other row is better in both.{crosses}"
    return section(title, note, controls + '<div class="plot" id="scatter"></div>')


def _table(found: Explored) -> str:
    headings = "".join(
        f'<th scope="col" data-key="{escaped(column.key)}"><button type="button">{escaped(column.label)}</button></th>'
        for column in found.columns
        if column.shown
    )
    controls = _controls(
        f'<input type="search" id="filter" placeholder="{escaped(_example(found))}" aria-label="filter rows">',
        '<span id="count" role="status"></span>',
        '<button type="button" id="more">show all</button>',
    )
    return (
        f'{controls}<div class="box" tabindex="0" role="region" aria-label="all rows"><table id="table"><thead><tr>'
        f'<td></td>{headings}</tr></thead><tbody id="rows"></tbody></table></div>'
    )


def _example(found: Explored) -> str:
    """What one may type into the filter of these rows."""
    row = next(row for row in found.rows if not row.get("error"))
    vary = [column for column in found.axes() if row.get(column.key) is not None]
    parts = [f"{column.label}={row[column.key]:g}" for column in vary if isinstance(row[column.key], int | float)][:1]
    parts += [str(row[column.key]) for column in vary if column.bare][:1]
    x = found.against[0]
    return " ".join([*parts, f"{x.removeprefix('latency_ms.')}<{float(f'{row[x]:.2g}'):.6g}"] if row.get(x) else parts)


def _map(found: Explored) -> str:
    axes = found.axes()
    figures = [column for column in found.columns if column.kind == "figure"]
    # The schedules are few and told apart by lines, unless nothing else varies.
    vary = sorted(axes, key=lambda column: (column.key not in found.over, column.bare))
    x, y = vary[0].key, vary[1].key if len(vary) > 1 and (not vary[1].bare or vary[1].key in found.over) else ""
    controls = _controls(
        _select("map-value", "figure", figures, found.value), _select("map-x", "across", axes, x),
        _select("map-y", "up", [Column("", "nothing: lines"), *axes], y),
        _select("several", "of several", [Column(name, f"the {name}") for name in ("best", "median", "worst")], "best"),
    )  # fmt: skip
    note = (
        "What a figure does over one field or two; brighter is better. Where several rows share a cell, one of them "
        "stands for it. Click on a cell to compare its row below."
    )
    note += "" if found.allowed is None else " \N{BALLOT X}: no row there meets the objectives."
    return section("Over the fields", note, controls + '<div class="plot" id="map"></div>')


def _chosen(found: Explored) -> str:
    """Their latencies, where any has some, and their timelines."""
    names = dict.fromkeys(name for detail in found.details.values() for name in detail.cdf)
    latencies = [Column(name, LATENCY_NAMES.get(name, name)) for name in names]
    few = len(found.details) < sum(not row.get("error") for row in found.rows)
    some = f" Of {len(found.rows):,} rows, this page has them of {len(found.details):,} only: the best by each figure."
    body = '<ul class="choice" id="chosen"></ul>'
    if latencies:
        controls = _controls(_select("latency", "of", latencies, latencies[0].key))
        body += f'<h3>Latencies</h3><p class="note">{_LATENCY_NOTE}</p>{controls}{_drawn("cumulative")}'
    body += f'<h3>Timelines</h3><p class="note">{_TIMELINE_NOTE}</p>{_drawn("timeline")}'
    return section("Chosen rows", _CHOSEN_NOTE + some * few, body)


def _drawn(name: str) -> str:
    return f'<div class="plot" id="{name}"></div><p class="note" id="{name}-missing"></p>'


def _controls(*controls: str) -> str:
    return f'<div class="controls">{"".join(controls)}</div>'


def _select(name: str, label: str, options: Sequence[Column], chosen: str) -> str:
    written = "".join(
        f'<option value="{escaped(option.key)}"{" selected" * (option.key == chosen)}>{escaped(option.label)}</option>'
        for option in options
    )
    return f'<label>{escaped(label)} <select id="{name}">{written}</select></label>'


def _short(value: object) -> object:
    """Seven digits of a number are more than a page shows; a value that is no number has no place in it."""
    if isinstance(value, float):
        return float(f"{value:.7g}") if isfinite(value) else None
    return value

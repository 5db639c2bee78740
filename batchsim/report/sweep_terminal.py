"""A sweep in the terminal: the best points first; made for 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batchsim.report.explore.columns import Column, Row, text_of
from batchsim.report.sweep_words import columns_of, failures, findings, headline, primary, shown, warnings
from batchsim.report.terminal import bullet

if TYPE_CHECKING:
    from batchsim.sweep.result import SweepResult

ROWS = 20
# What a narrow terminal leaves out last.
_FIGURES = (
    "throughput_tokens_per_s",
    "latency_ms.ttft.p99",
    "latency_ms.tpot.p99",
    "latency_ms.e2e.p99",
    "goodput_requests_per_s",
    "device_busy_fraction",
    "step_ms.mean",
    "gain_over_sync",
)


def print_sweep(console: Console, result: SweepResult) -> None:
    """Print what was swept, the best points by throughput with their 90% intervals, and what failed."""
    rows: list[dict[str, Any]] = result.rows()
    columns = columns_of(result.fields, rows)
    key = primary(rows)
    able = sorted((row for row in rows if row.get(key) is not None), key=lambda row: -float(row[key]))
    console.print()
    console.print(Text.assemble((result.name, "bold cyan"), ("  sweep", "dim")))
    console.print(Text(headline(len(result.points), columns, rows), style="bold"))
    console.print()
    if able:
        console.print(table(columns, able[:ROWS], key, console.width), "", sep="\n")
        told = f"The best {ROWS} of {len(able):,} rows by {columns_by(columns)[key].label}." if len(able) > ROWS else ""
        if any(each.endswith(".low") for row in able for each in row):
            told += f"{' ' * bool(told)}Ranges are 90% intervals."
        if told:
            console.print(Text(told, "dim"))
        for sentence in findings(columns, rows):
            console.print(bullet("\N{BULLET} ", sentence))
    for sentence in warnings(result.points):
        console.print(bullet("warning: ", sentence, "yellow"))
    for sentence in failures(len(result.points), [str(each["error"]) for each in result.points if each.get("error")]):
        console.print(bullet("\N{WARNING SIGN} ", sentence, "bold red"))


def table(columns: Sequence[Column], rows: Sequence[Row], key: str, width: int) -> Table:
    """The fields that differ, the figure `key` with its interval, and as many more figures as there is room for."""
    by_key = columns_by(columns)
    fields = [column for column in columns if column.kind == "field"]
    fields = [each for each in fields if any(row.get(each.key) != rows[0].get(each.key) for row in rows)] or fields
    figures = [by_key[each] for each in (key, *(each for each in _FIGURES if each != key)) if each in by_key]
    found = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    needed = sum(_width(column, rows, broken=False) for column in [*fields, *figures[:1]])
    left, broken = width, needed > width
    for column in [*fields, *figures]:
        wide = _width(column, rows, broken=broken and column in fields)
        if wide > left and len(found.columns) > len(fields):
            break
        left -= wide
        words = any(isinstance(text_of(row.get(column.key)), str) for row in rows)
        found.add_column(
            _heading(column, broken=broken and column in fields), justify="left" if words else "right",
            header_style="bold", no_wrap=column.kind == "figure", overflow="fold",
        )  # fmt: skip
    shown_ = [*fields, *figures][: len(found.columns)]
    for row in rows:
        found.add_row(*(_cell(column, row) for column in shown_))
    return found


def columns_by(columns: Sequence[Column]) -> Mapping[str, Column]:
    return {column.key: column for column in columns}


def _width(column: Column, rows: Sequence[Row], *, broken: bool) -> int:
    lines = [*_heading(column, broken=broken).split("\n"), *(_cell(column, row) for row in rows)]
    return max(map(len, lines)) + 2


def _heading(column: Column, *, broken: bool = False) -> str:
    """The unit below the name; a long name `broken` in two at an underscore, as near to its middle as there is one."""
    name, _, unit = column.label.partition(", ")
    breaks = [place + 1 for place, letter in enumerate(name) if letter in "_."]
    if broken and breaks and not unit:
        at = min(breaks, key=lambda place: abs(place - len(name) / 2))
        return f"{name[:at]}\n{name[at:]}"
    return f"{name}\n{unit}" if unit else f"\n{name}"


def _cell(column: Column, row: Row) -> str:
    text = shown(column, text_of(row.get(column.key)))
    low, high = row.get(f"{column.key}.low"), row.get(f"{column.key}.high")
    if column.interval and low is not None and high is not None:
        text += f" {shown(column, low)}-{shown(column, high)}"
    return text

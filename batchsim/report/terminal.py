"""Results as tables in the terminal; made for 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batchsim.report.words import (
    METRICS,
    NEGLIGIBLE_GAIN,
    agreement,
    causes,
    error_text,
    headline,
    idle_shares,
    shown,
    stage_label,
    unique_warnings,
)
from batchsim.result import DEFINITIONS, Run, ScheduleResult, errors, figures

_IDLE_TITLE = "device idle for"
_BAR_CELLS = 16
_SCHEDULES_ABREAST = 2


def print_run(console: Console, predicted: Run, measured: Run | None = None) -> None:
    """Print the figures of each schedule, the cause of the device's idle time, warnings and definitions.

    With `measured`, every figure stands beside its measurement and the signed error of the prediction.
    """
    console.print()
    console.print(_title(predicted, measured))
    console.print(Text(headline(predicted, measured), style="bold"))
    console.print()
    if measured is None:
        console.print(_figures(predicted), "", _idle(predicted), "", sep="\n")
    else:
        names = [name for name in predicted.results if name in measured.results]
        for first in range(0, len(names), _SCHEDULES_ABREAST):
            some = names[first : first + _SCHEDULES_ABREAST]
            for table in (_comparison, _stages, _idle_comparison):
                console.print(table(predicted, measured, some), "", sep="\n")
        console.print(Text(agreement(predicted, measured)))
        console.print()
    for sentence in causes(measured or predicted):
        console.print(_bullet("\N{BULLET} ", sentence))
    console.print()
    for warning in unique_warnings([predicted] if measured is None else [predicted, measured]):
        console.print(_bullet("warning: ", warning, style="yellow"))
    keys = {key for result in predicted.results.values() for key in figures(result)}
    for key, definition in DEFINITIONS.items():
        if key in keys or key in ("step_ms", "idle_ns"):
            console.print(_bullet(f"{key}: ", definition, style="dim"))


def _title(predicted: Run, measured: Run | None) -> Text:
    name = str(predicted.scenario.get("name", "scenario"))
    how = "simulated" if measured is None else "simulated and executed"
    title = Text.assemble((name, "bold cyan"), (f"  {how}", "dim"))
    profile = predicted.provenance.get("profile")
    if isinstance(profile, str):
        title.append(f" on profile {profile}", style="dim")
    return title


def _table(first: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True, header_style="bold")
    return table


def _figures(run: Run) -> Table:
    """One row a metric, one column a schedule."""
    table = _table("")
    found = {name: shown(result) for name, result in run.results.items()}
    for name in found:
        table.add_column(name, justify="right", header_style="bold", min_width=10)
    for metric in METRICS:
        if any(metric.key in values for values in found.values()):
            cells = [_number(values.get(metric.key), metric.format) for values in found.values()]
            if metric.key == "gain_over_sync":
                for cell, values in zip(cells, found.values(), strict=True):
                    cell.stylize(_gain_style(values.get(metric.key)))
            table.add_row(metric.label, *cells, end_section=metric.key in ("gain_over_sync", "step_ms.p99"))
    return table


def _idle(run: Run) -> Table:
    """The idle share of each schedule by stage, with bars on one scale."""
    shares = {name: idle_shares(result) for name, result in run.results.items()}
    table = _table(_IDLE_TITLE)
    for name in shares:
        table.add_column(name, justify="right", header_style="bold")
        table.add_column("", min_width=_BAR_CELLS, style="red")
    largest = max((share for stages in shares.values() for share in stages.values()), default=0.0) or 1.0
    for stage in _stages_by_share(shares):
        cells: list[Text] = []
        for stages in shares.values():
            share = stages.get(stage, 0.0)
            cells += [_number(share or None, ".2%"), Text("\N{FULL BLOCK}" * round(share / largest * _BAR_CELLS))]
        table.add_row(stage_label(stage), *cells)
    if table.rows:
        table.rows[-1].end_section = True
    totals: list[Text] = []
    for result in run.results.values():
        totals += [_number(1 - result.device_busy_fraction, ".2%"), Text()]
    table.add_row("all", *totals)
    return table


def _comparison(predicted: Run, measured: Run, names: list[str]) -> Table:
    table = _compared("", names)
    for metric in METRICS:
        pairs = [
            (shown(predicted.results[name]).get(metric.key), shown(measured.results[name]).get(metric.key))
            for name in names
        ]
        if any(value is not None for pair in pairs for value in pair):
            cells: list[Text] = []
            for name, (left, right) in zip(names, pairs, strict=True):
                error = errors(predicted.results[name], measured.results[name]).get(metric.key)
                error = None if left is None else error
                cells += [_number(left, metric.format), _number(right, metric.format), _error(metric.key, error)]
            table.add_row(metric.label, *cells)
    return table


def _stages(predicted: Run, measured: Run, names: list[str]) -> Table:
    table = _compared("ms a step in", names)
    for stage in _stages_of([run.results[name] for run in (predicted, measured) for name in names]):
        key = f"stage_ms.{stage}"
        cells: list[Text] = []
        for name in names:
            left, right = predicted.results[name], measured.results[name]
            cells += [_number(left.stage_ms.get(stage), ",.4f"), _number(right.stage_ms.get(stage), ",.4f")]
            cells.append(_error(key, errors(left, right).get(key)))
        table.add_row(stage_label(stage), *cells)
    return table


def _idle_comparison(predicted: Run, measured: Run, names: list[str]) -> Table:
    table = _compared(_IDLE_TITLE, names)
    shares = {(run.source, name): idle_shares(run.results[name]) for run in (predicted, measured) for name in names}
    for stage in _stages_by_share(shares):
        cells: list[Text] = []
        for name in names:
            left, right = (shares[run.source, name].get(stage, 0.0) for run in (predicted, measured))
            cells += [_number(left or None, ".2%"), _number(right or None, ".2%")]
            cells.append(_error("idle_fraction", (left - right) * 100 if left or right else None))
        table.add_row(stage_label(stage), *cells)
    return table


def _compared(first: str, names: list[str]) -> Table:
    table = _table(f"\n{first}")
    for name in names:
        table.add_column(f"{name}\npredicted", justify="right", header_style="bold")
        table.add_column("\nmeasured", justify="right", header_style="bold")
        table.add_column("\nerror", justify="right", header_style="bold")
    return table


def _stages_of(results: list[ScheduleResult]) -> list[str]:
    """All stages, the largest first."""
    largest: dict[str, float] = {}
    for result in results:
        for stage, value in result.stage_ms.items():
            largest[stage] = max(value, largest.get(stage, 0.0))
    return sorted(largest, key=lambda stage: (-largest[stage], stage))


def _stages_by_share(shares: Mapping[Any, dict[str, float]]) -> list[str]:
    largest: dict[str, float] = {}
    for stages in shares.values():
        for stage, share in stages.items():
            largest[stage] = max(share, largest.get(stage, 0.0))
    return sorted(largest, key=lambda stage: (-largest[stage], stage))


def _number(value: float | None, form: str) -> Text:
    return Text("-", style="dim") if value is None else Text(format(value, form))


def _error(key: str, error: float | None) -> Text:
    if error is None:
        return Text("-", style="dim")
    return Text(error_text(key, error), style="cyan")


def _gain_style(gain: float | None) -> str:
    if gain is None or abs(gain) < NEGLIGIBLE_GAIN:
        return ""
    return "bold green" if gain > 0 else "bold red"


def _bullet(mark: str, text: str, style: str = "") -> Table:
    """`text` wrapped beside `mark`, its lines aligned."""
    grid = Table.grid(padding=0)
    grid.add_column(no_wrap=True)
    grid.add_column()
    grid.add_row(Text(mark, style=style), Text(text, style=style))
    return grid

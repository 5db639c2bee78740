"""Results as tables in the terminal; made for 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batchsim.report.shown import (
    LATENCY_NAMES,
    METRICS,
    REQUEST_METRICS,
    STATISTICS,
    compared,
    definitions_of,
    error_text,
    held_text,
    interval_text,
    shown,
    stage_label,
    varied,
)
from batchsim.report.words import (
    NEGLIGIBLE_GAIN,
    agreement,
    alerts,
    causes,
    effort,
    headline,
    idle_shares,
    transfer_notes,
    unique_warnings,
)
from batchsim.result import Run, ScheduleResult, errors

_IDLE_TITLE = "device idle for"
_BAR_CELLS = 16
OUTCOMES = ("refused", "dropped", "served_late")
_SCHEDULES_ABREAST = 2
_WIDE = 1e6
_ENDS = ("gain_over_sync", "step_ms.p99", "total_s", "slo_attainment")
# Told in the page; none of the tables shows them, or they say what they are.
_NOT_PRINTED = (
    "stage_ms",
    "batch_histogram",
    "counts",
    "unstable",
    "partial",
    "engine_s",
    "iterations",
    "decisions",
    "events",
)


def print_run(console: Console, predicted: Run, measured: Run | None = None) -> None:
    """Print the figures of each schedule, the cause of the device's idle time, warnings and definitions.

    Where requests arrive over time or differ in length, their latencies too. With `measured`, every figure stands
    beside its measurement and the signed error of the prediction.
    """
    runs = [predicted] if measured is None else [predicted, measured]
    console.print()
    console.print(_title(predicted, measured))
    console.print(Text(headline(predicted, measured), style="bold"))
    for alert in alerts(runs):
        console.print(bullet("\N{WARNING SIGN} ", alert, style="bold red"))
    console.print()
    if measured is None:
        names = list(predicted.results)
        abreast = _SCHEDULES_ABREAST if any(result.interval_90 for result in predicted.results.values()) else len(names)
        for first in range(0, len(names), abreast):
            console.print(_figures(predicted, names[first : first + abreast]), "", sep="\n")
        if varied(predicted):
            for result in predicted.results.values():
                console.print(_latencies(result), "", sep="\n")
        console.print(_idle(predicted), "", sep="\n")
    else:
        names = [name for name in predicted.results if name in measured.results]
        for first in range(0, len(names), _SCHEDULES_ABREAST):
            some = names[first : first + _SCHEDULES_ABREAST]
            for table in (_comparison, _stages, _idle_comparison):
                console.print(table(predicted, measured, some), "", sep="\n")
        console.print(Text(agreement(predicted, measured)))
        if held := held_text(predicted, measured):
            console.print(Text(held))
        console.print()
    for sentence in causes(measured or predicted):
        console.print(bullet("\N{BULLET} ", sentence))
    console.print()
    for warning in unique_warnings(runs):
        console.print(bullet("warning: ", warning, style="yellow"))
    for key, definition in definitions_of(predicted).items():
        if key not in _NOT_PRINTED:
            console.print(bullet(f"{key}: ", definition, style="dim"))
    if varied(predicted):
        for line in effort(predicted):
            console.print(Text(line, style="dim"))


def _title(predicted: Run, measured: Run | None) -> Text:
    name = str(predicted.scenario.get("name", "scenario"))
    how = "simulated" if measured is None else "simulated and executed"
    title = Text.assemble((name, "bold cyan"), (f"  {how}", "dim"))
    profile = predicted.provenance.get("profile")
    if isinstance(profile, str):
        title.append(f" on profile {profile}", style="dim")
    for note in transfer_notes([predicted.provenance]):
        title.append(f", {note}", style="dim")
    return title


def _table(first: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True, header_style="bold")
    return table


def _figures(run: Run, names: list[str]) -> Table:
    """One row a metric, one column a schedule."""
    table = _table("")
    found = {name: shown(run.results[name]) for name in names}
    for name in found:
        table.add_column(name, justify="right", header_style="bold", min_width=10)
    for metric in (*METRICS, *REQUEST_METRICS) if varied(run) else METRICS:
        if any(metric.key in values for values in found.values()):
            cells = [_number(values.get(metric.key), metric.format) for values in found.values()]
            for cell, (name, values) in zip(cells, found.items(), strict=True):
                if metric.key == "gain_over_sync":
                    cell.stylize(_gain_style(values.get(metric.key)))
                if metric.key in values and (width := interval_text(run.results[name], metric)):
                    cell.append(f" {width}", style="dim")
            table.add_row(metric.label, *cells, end_section=metric.key in _ENDS)
    if varied(run) and any("preemptions" in result.counts for result in run.results.values()):
        table.add_row("preemptions", *(_number(run.results[name].counts.get("preemptions"), ",d") for name in found))
    for outcome in OUTCOMES:
        if any(result.outcomes.get(outcome) for result in run.results.values()):
            counted = (run.results[name].outcomes.get(outcome) for name in found)
            table.add_row(outcome.replace("_", " "), *(_number(count, ",d") for count in counted))
    return table


def _latencies(result: ScheduleResult) -> Table:
    """One row a latency, one column a statistic."""
    table = _table(f"{result.schedule}, ms")
    for statistic in STATISTICS:
        table.add_column(statistic, justify="right", header_style="bold", min_width=9)
    for name, statistics in result.latency_ms.items():
        table.add_row(LATENCY_NAMES[name], *(_number(statistics.get(statistic), ",.2f") for statistic in STATISTICS))
        ends = {statistic: result.interval_90.get(f"latency_ms.{name}.{statistic}") for statistic in statistics}
        if any(ends.values()):
            cells = (_half(ends.get(statistic), statistics.get(statistic, 0.0)) for statistic in STATISTICS)
            table.add_row("  90%", *cells, style="dim")
    return table


def _half(ends: tuple[float, float] | None, value: float) -> str:
    """Half an interval, in percent of the value in it."""
    return f"\N{PLUS-MINUS SIGN}{(ends[1] - ends[0]) / 2 / value:.0%}" if ends and value else ""


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
    for metric in compared(predicted):
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
    if value is None:
        return Text("-", style="dim")
    # Latencies of an overload know no bound, but the terminal does.
    if form.endswith(("2f", "1f", "0f")) and value >= _WIDE:
        form = ",.0f" if value < 10 * _WIDE else ",.3g"
    return Text(format(value, form))


def _error(key: str, error: float | None) -> Text:
    if error is None:
        return Text("-", style="dim")
    return Text(error_text(key, error), style="cyan")


def _gain_style(gain: float | None) -> str:
    if gain is None or abs(gain) < NEGLIGIBLE_GAIN:
        return ""
    return "bold green" if gain > 0 else "bold red"


def bullet(mark: str, text: str, style: str = "") -> Table:
    """`text` wrapped beside `mark`, its lines aligned."""
    grid = Table.grid(padding=0)
    grid.add_column(no_wrap=True)
    grid.add_column()
    grid.add_row(Text(mark, style=style), Text(text, style=style))
    return grid

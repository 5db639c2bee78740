"""What the tile level says, as tables in the terminal; made for 80 columns."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batchsim.tiles.compare import MARGIN
from batchsim.tiles.result import DEFINITIONS, CaseResult, PolicyResult, TilesRun


def print_tiles(console: Console, run: TilesRun) -> None:
    """Print the policies of each case, the reason for the choice, and the definitions of the figures."""
    console.print()
    name = str(run.scenario["name"])
    console.print(Text.assemble((name, "bold cyan"), (f"  simulated on profile {run.profile}", "dim")))
    for case in run.cases:
        console.print()
        console.print(Text(f"{case.name}: {headline(case)}", style="bold"))
        console.print(Text(case.why))
        console.print()
        console.print(_policies(case))
    if len(run.cases) > 1:
        console.print()
        console.print(_summary(run))
    console.print()
    for key, definition in DEFINITIONS.items():
        console.print(Text(f"{key}: {definition}", style="dim"))


def headline(case: CaseResult) -> str:
    """What is chosen, and what it changes, in one sentence; on the device as well, where that was measured."""
    baseline, chosen = case.baseline, case.chosen
    if chosen is baseline:
        on_device = f" (measured {case.measured[0].total_us:,.1f})" if case.measured else ""
        return f"{baseline.policy} is recommended, {baseline.time_us:,.1f} \N{MICRO SIGN}s{on_device}."
    times = f"{baseline.time_us:,.1f} \N{RIGHTWARDS ARROW} {chosen.time_us:,.1f} \N{MICRO SIGN}s"
    if case.measured_gain is not None:
        first, last = case.measured[0].total_us, case.measured[-1].total_us
        times += f" (measured {first:,.1f} \N{RIGHTWARDS ARROW} {last:,.1f}, {-case.measured_gain:+.1%})"
    less = f"{abs(chosen.gain):.1%} {'less' if chosen.gain > 0 else 'more'}"
    return f"{chosen.policy} should take {less} time than {baseline.policy}: {times}."


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    first, *rest = columns
    table.add_column(first, no_wrap=True, header_style="bold")
    for column in rest:
        table.add_column(column, justify="right", header_style="bold")
    return table


def _policies(case: CaseResult) -> Table:
    measured = any(result.measured_us is not None for result in case.policies)
    table = _table(
        "policy", "time, \N{MICRO SIGN}s", *["measured"][: int(measured)], "gain", "waves", "utilisation", "tiling"
    )
    table.columns[-1].justify = "left"
    for result in case.policies:
        _row(table, case, result, measured)
    if case.comparisons:
        table.add_section()
    for result in case.comparisons:
        _row(table, case, result, measured)
    return table


def _row(table: Table, case: CaseResult, result: PolicyResult, measured: bool) -> None:
    cells = [Text(f"{result.time_us:,.1f}")]
    if measured:
        cells.append(Text("-" if result.measured_us is None else f"{result.measured_us:,.1f}", style="cyan"))
    cells += [
        Text(f"{result.gain:+.1%}" if result is not case.baseline else "baseline", style=_style(result.gain)),
        Text(f"{result.waves:.2f}"),
        Text(f"{result.utilisation:.1%}"),
        Text(result.tiling, style="dim"),
    ]
    chosen = result is case.chosen
    mark = "\N{BLACK RIGHT-POINTING SMALL TRIANGLE} " if chosen else "  "
    table.add_row(Text(mark + result.policy, style="bold" if chosen else ""), *cells)


def _summary(run: TilesRun) -> Table:
    table = _table("case", "StreamSync, \N{MICRO SIGN}s", "chosen", "time, \N{MICRO SIGN}s", "gain")
    for case in run.cases:
        chosen = case.chosen
        table.add_row(
            Text(case.name),
            Text(f"{case.baseline.time_us:,.1f}"),
            Text(chosen.policy),
            Text(f"{chosen.time_us:,.1f}"),
            Text("-" if chosen is case.baseline else f"{chosen.gain:+.1%}", style=_style(chosen.gain)),
        )
    return table


def _style(gain: float) -> str:
    if abs(gain) < MARGIN:
        return ""
    return "bold green" if gain > 0 else "red"

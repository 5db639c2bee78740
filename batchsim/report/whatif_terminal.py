"""The answer to `batchsim whatif` in the terminal: a table, a picture of step times, sentences; made for 80 columns."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batchsim.report.terminal import bullet
from batchsim.report.whatif_words import BY_TURNS, DEFINITIONS, found_in, gains, headline, in_order, ms
from batchsim.whatif.answer import Answer, Prediction

_BAR_CELLS = 48
AS_IS = "\N{BLACK RIGHT-POINTING TRIANGLE} "


def print_whatif(console: Console, answer: Answer) -> None:
    """Print the predictions, the loop as it is first, their step times as bars, and what they come to."""
    console.print()
    console.print(Text.assemble((answer.profile.source, "bold cyan"), ("  what if", "dim")))
    console.print(Text(found_in(answer.profile), style="dim"))
    console.print(Text(headline(answer), style="bold"))
    console.print()
    console.print(_table(answer), "", sep="\n")
    console.print(_bars(answer), "", sep="\n")
    for sentence in answer.sentences:
        console.print(bullet("\N{BULLET} ", sentence))
    for schedule, reason in answer.refused.items():
        console.print(bullet("\N{BULLET} ", f"{schedule} is not predicted: {reason}."))
    for note in answer.profile.notes:
        console.print(bullet("note: ", note, "yellow"))
    console.print()
    console.print(bullet(AS_IS, "the loop as it is", "dim"))
    for name, meaning in DEFINITIONS.items():
        console.print(bullet(f"{name}: ", meaning, "dim"))


def _table(answer: Answer) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("schedule", no_wrap=True, header_style="bold")
    for column in ("step, ms", "90% interval", "gain", "device\nbusy", "host,\nms"):
        table.add_column(column, justify="right", header_style="bold", no_wrap=True)
    table.add_column("bound by", header_style="bold", no_wrap=True)
    for name, found in in_order(answer).items():
        as_is = name == answer.as_is
        low, high = found.step_ms_interval
        gain = Text("-" if as_is else f"{found.throughput_gain:+z.1%}", style="" if as_is else gain_style(found))
        table.add_row(
            Text(f"{AS_IS if as_is else '  '}{name}"), ms(found.step_ms), f"{ms(low)} to {ms(high)}", gain,
            f"{found.device_busy_fraction:.0%}", ms(found.host_ms),
            "by turns" if found.bound_by == BY_TURNS else found.bound_by, style="bold" if as_is else "",
        )  # fmt: skip
    return table


def _bars(answer: Answer) -> Table:
    """A bar a schedule on one scale: full up to the interval, lighter within it, up to the median and beyond."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    scale = max(max(found.step_ms_interval[1], found.step_ms) for found in answer.schedules.values())
    for name, found in in_order(answer).items():
        low, middle, high = (
            round(value / scale * _BAR_CELLS)
            for value in (found.step_ms_interval[0], found.step_ms, found.step_ms_interval[1])
        )
        style = "cyan" if name == answer.as_is else gain_style(found).removeprefix("bold ") or "white"
        bar = Text("\N{FULL BLOCK}" * low, style=style)
        bar.append("\N{DARK SHADE}" * max(middle - low, 0), style=style)
        bar.append("\N{LIGHT SHADE}" * max(high - max(middle, low), 0), style=style)
        mark = AS_IS if name == answer.as_is else "  "
        grid.add_row(Text(f"{mark}{name}"), Text.assemble(bar, f" {ms(found.step_ms)}"))
    grid.add_row(
        "", Text("\N{FULL BLOCK} to \N{DARK SHADE} to \N{LIGHT SHADE}: ms a step, and its 90% interval", style="dim")
    )
    return grid


def gain_style(found: Prediction) -> str:
    """How a gain is told apart from a loss."""
    return {1: "bold green", 0: "", -1: "bold red"}[gains(found)]

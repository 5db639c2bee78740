"""Where the device's memory goes: a table and a stacked bar in the terminal, and a page for the browser."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batchsim.memory.breakdown import CACHED, DEFINITIONS, FRAMEWORK, ROUNDING, Breakdown, gigabytes

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Okabe and Ito's palette, and its lighter and darker kin; greys for what no one asked for.
COLOURS = {
    "parameters": "#0072b2", "gradients": "#56b4e9", "optimiser state": "#0b4f79", "KV cache": "#e69f00",
    "residual stream": "#009e73", "norms": "#5bc8a8", "attention": "#d55e00", "MLP": "#cc79a7",
    "cached casts": "#882255", "activations": "#009e73", "logits": "#d9c615", "temporaries": "#a8577e",
    "inputs": "#7f9c3b", "workspace": "#b07d3c", ROUNDING: "#c3cad3", CACHED: "#9aa5b1", FRAMEWORK: "#5b6673",
}  # fmt: skip
_BAR_CELLS = 72


def headline(found: Breakdown) -> str:
    """Whether it fits, in a sentence."""
    device = gigabytes(found.device_bytes)
    if found.fits:
        return f"{gigabytes(found.total_bytes)} of {device}: {found.key} = {found.batch:,} fits."
    return (
        f"{gigabytes(found.total_bytes)}, more than the device's {device}: {found.key} = {found.batch:,} does not fit."
    )


def findings(found: Breakdown) -> list[str]:
    """Where the peak is, the largest batch, what is in the way of a larger one, and what would make way."""
    allocated, reserved = gigabytes(found.allocated_bytes), gigabytes(found.reserved_bytes)
    told = [f"Allocated at the peak, in the phase `{found.phase}`: {allocated}; reserved: {reserved}."]
    if found.largest is None:
        told.append(f"Every {found.key} that makes sense fits.")
    elif found.fits and found.largest < found.batch:
        told.append(f"At their longest {found.largest:,} fit at once, and more take turns; the wall is {found.wall}.")
    elif found.largest:
        told.append(f"The largest {found.key} that fits is {found.largest:,}; the wall is {found.wall}.")
    else:
        told.append(f"No {found.key} fits, not even 1; the wall is {found.wall}.")
    if found.grows:
        most = sorted(found.grows.items(), key=lambda term: -term[1])
        each = ", ".join(f"{name} {gigabytes(size)}" for name, size in most[:3])
        told.append(f"One more takes {gigabytes(sum(found.grows.values()))}: {each}{', ...' if len(most) > 3 else ''}.")
    told += [f"With {change}, {batch:,} would fit." for change, batch in found.relief.items()]
    return told


def print_memory(console: Console, found: Breakdown) -> None:
    """Print the terms, a stacked bar on the scale of the device, and what stands in the way."""
    console.print()
    console.print(Text.assemble((found.title, "bold cyan"), ("  device memory", "dim")))
    console.print(Text(headline(found), style="bold" if found.fits else "bold red"))
    console.print()
    console.print(_bar(found))
    console.print()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for column in ("GB", "share", "one more, MB"):
        table.add_column(column, justify="right", header_style="bold")
    for name, size in found.terms.items():
        more = found.grows.get(name)
        table.add_row(
            Text.assemble(("\N{FULL BLOCK} ", COLOURS[name]), name), f"{size / 1e9:,.3f}",
            f"{size / found.device_bytes:.1%}", "-" if more is None else f"{more / 1e6:,.1f}",
        )  # fmt: skip
    table.rows[-1].end_section = True
    table.add_row("in all", f"{found.total_bytes / 1e9:,.3f}", f"{found.total_bytes / found.device_bytes:.1%}", "")
    console.print(table)
    console.print()
    for sentence in findings(found):
        console.print(Text(f"\N{BULLET} {sentence}"))
    console.print()
    for name in found.terms:
        console.print(Text(f"{name}: {DEFINITIONS[name]}", style="dim"))


def _bar(found: Breakdown) -> Text:
    """The terms side by side, and what is left of the device; `|` is its end where they exceed it."""
    scale = max(found.total_bytes, found.device_bytes)
    bar, cells, filled = Text(), 0, 0
    for name, size in found.terms.items():
        filled += size
        stop = round(filled / scale * _BAR_CELLS)
        bar.append("\N{FULL BLOCK}" * (stop - cells), style=COLOURS[name])
        cells = stop
    bar.append("\N{LIGHT SHADE}" * (_BAR_CELLS - cells), style="dim")
    end = round(found.device_bytes / scale * _BAR_CELLS)
    if not found.fits:
        bar = Text.assemble(bar[:end], ("|", "bold red"), bar[end:])
    bar.append(f" {gigabytes(scale)}", style="dim")
    return bar


def write_memory_report(path: Path, found: Breakdown, scenario: Mapping[str, Any]) -> None:
    """Write one self-contained HTML page to `path`, whole or not at all; it needs no network."""
    from batchsim.files import write_text

    write_text(path, page(found, scenario))


def page(found: Breakdown, scenario: Mapping[str, Any]) -> str:
    """The HTML text of the report."""
    from batchsim.report.html import as_yaml, definitions, document, header, plot, section

    note = "What the allocator holds at its peak, what it reserves beyond, and what is beside it; 1 GB is 10^9 bytes."
    sections = [
        header(found.title, headline(found), findings(found)),
        section("Where the memory goes", note, plot("memory") + _table(found)),
        section("Definitions", "", definitions({name: DEFINITIONS[name] for name in found.terms})),
        section("Scenario", "", as_yaml(dict(scenario))),
    ]
    return document(found.title, sections, {"memory": _figure(found)})


def _figure(found: Breakdown) -> go.Figure:
    """One bar, stacked, and a line where the device ends."""
    import plotly.graph_objects as go

    from batchsim.report.figures import layout

    figure = go.Figure()
    for name, size in found.terms.items():
        figure.add_bar(
            name=name, orientation="h", x=[size / 1e9], y=[f"{found.key} = {found.batch:,}"],
            marker={"color": COLOURS[name]},
            hovertemplate=f"<b>{name}</b> {size / 1e9:,.3f} GB, {size / found.device_bytes:.1%} of the device"
            "<extra></extra>",
        )  # fmt: skip
    end = found.device_bytes / 1e9
    title = {"annotation_text": f"device, {end:,.1f} GB", "annotation_position": "top left"}
    figure.add_vline(x=end, line={"dash": "dash", "color": "#b42318"}, **title)
    figure.update_layout(**layout(height=260), barmode="stack")
    figure.update_xaxes(title="GB", range=[0, max(end, found.total_bytes / 1e9) * 1.04])
    return figure


def _table(found: Breakdown) -> str:
    from batchsim.report.html import escaped

    rows = ["<tr><th></th><th>GB</th><th>share of the device</th><th>one more, MB</th></tr>"]
    for name, size in [*found.terms.items(), ("in all", found.total_bytes)]:
        more = found.grows.get(name)
        one_more = "&ndash;" if more is None else f"{more / 1e6:,.1f}"
        cells = [f"{size / 1e9:,.3f}", f"{size / found.device_bytes:.1%}", one_more]
        told = "".join(f"<td>{cell}</td>" for cell in cells)
        chosen = " class=chosen" if name == found.wall else ""
        rows.append(f"<tr{chosen}><th>{escaped(name)}</th>{told}</tr>")
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'

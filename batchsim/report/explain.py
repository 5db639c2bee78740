"""Virtual speed-ups as people see them: a table for each schedule in the terminal, and a page for the browser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batchsim.report.shown import stage_label
from batchsim.report.terminal import bullet
from batchsim.report.words import transfer_notes

if TYPE_CHECKING:
    from batchsim.explain.result import Explained, Explanation, Gain

_ROOM_FOR_P99 = 116
_LEAST = 0.0005  # what is shown as a tenth of a percent
_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E"}
_DEFINITIONS = {
    "throughput": "so much more of it when this stage alone is faster, all requests and all draws being the same; "
    "where requests come at times of their own, that of a run in which they always wait",
    "latencies": "so much less of them",
    "of the step": "the stage's share of a mean step; stages overlap, and so shares may add up to more than the step",
    "everything": "all stages faster at once",
    "( )": "chance may explain it: with other requests it differs by as much",
}


def print_explain(console: Console, found: Explanation) -> None:
    """Print what to work on first, and for each schedule what each stage is worth, the most rewarding first."""
    console.print()
    console.print(Text.assemble((found.name, "bold cyan"), (f"  each stage {found.by:.0%} faster", "dim")))
    for sentence in found.sentences:
        console.print(bullet("\N{BULLET} ", sentence, "bold"))
    for sentence in transfer_notes([found.provenance]):
        console.print(bullet("warning: ", sentence, "yellow"))
    console.print()
    for each in found.schedules.values():
        console.print(_table(each, console.width))
        if rest := _rest(each):
            console.print(Text(rest, style="dim"))
        console.print()
    for key, meaning in _DEFINITIONS.items():
        console.print(bullet(f"{key}: ", meaning, "dim"))


def write_explain_report(path: Path, found: Explanation) -> None:
    """Write one self-contained HTML page to `path`, whole or not at all; it needs no network.

    The same explanation gives the same bytes.
    """
    from batchsim.files import write_text

    write_text(path, page(found))


def page(found: Explanation) -> str:
    """The HTML text of the report."""
    from batchsim.explain.figure import gains_figure
    from batchsim.report.html import as_yaml, definitions, document, header, plot, section

    parts = [
        header(found.name, f"What each stage is worth: {found.by:.0%} faster, one at a time", found.sentences),
        section("Gains", "The stage that helps most is on top.", plot("gains")),
        *(section(name, _rest(each), _html(each)) for name, each in found.schedules.items()),
        section("Definitions", "", definitions(_DEFINITIONS)),
        section("Scenario", "", as_yaml(found.scenario)),
        section("Provenance", "", as_yaml(dict(found.provenance))),
    ]
    return document(f"{found.name}: what to work on", parts, {"gains": gains_figure(found)})


def _table(each: Explained, width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(f"\n{each.schedule}", header_style="bold", overflow="fold")
    latencies = [key for key in _latencies(each) if width >= _ROOM_FOR_P99 or key.endswith("p50")]
    for heading in ("by the", "of the\nstep", "more\nthroughput", *(f"less\n{_words(key)}" for key in latencies)):
        justify = "left" if heading == "by the" else "right"
        table.add_column(heading, justify=justify, header_style="bold", overflow="fold")  # type: ignore[arg-type]
    some = _worth(each)
    for gain in (*some, each.everything):
        cells = [_share(gain), _percent(gain.throughput), *(_likely(gain, key) for key in latencies)]
        table.add_row(_name(gain), "" if gain is each.everything else gain.side, *cells)
        if some and gain is some[-1]:
            table.rows[-1].end_section = True
    return table


def _html(each: Explained) -> str:
    from batchsim.report.html import escaped

    latencies = _latencies(each)
    columns = ["", "by the", "of the step", "more throughput", *(f"less {_words(key)}" for key in latencies), ""]
    rows = ["<tr>" + "".join(f"<th>{escaped(column)}</th>" for column in columns) + "</tr>"]
    for gain in (*_worth(each), each.everything):
        side = "" if gain is each.everything else gain.side
        cells = [side, _share(gain), _percent(gain.throughput), *(_with_width(gain, key) for key in latencies)]
        told = "".join(f"<td>{escaped(cell)}</td>" for cell in cells)
        rows.append(f"<tr><th>{escaped(_name(gain))}</th>{told}<td><small>{escaped(gain.text)}</small></td></tr>")
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def _worth(each: Explained) -> list[Gain]:
    """The stages that change any figure by as much as is shown."""
    return [
        gain for gain in each.gains if any(abs(value) >= _LEAST for value in (gain.throughput, *gain.latency.values()))
    ]


def _rest(each: Explained) -> str:
    """The other stages, in a sentence."""
    shown = _worth(each)
    rest = [_name(gain) for gain in each.gains if gain not in shown]
    return f"Next to nothing is gained by {', '.join(rest)}." if rest else ""


def _latencies(each: Explained) -> list[str]:
    return list(dict.fromkeys(key for gain in each.gains for key in gain.latency))


def _words(key: str) -> str:
    """`ttft.p99` -> `TTFT p99`."""
    name, _, statistic = key.partition(".")
    return f"{_NAMES.get(name, name)} {statistic}"


def _name(gain: Gain) -> str:
    return stage_label(gain.stage)


def _share(gain: Gain) -> str:
    return "" if gain.share is None else f"{gain.share:.1%}"


def _likely(gain: Gain, key: str) -> str:
    """In brackets where chance may explain it."""
    text = _percent(gain.latency.get(key))
    return f"({text})" if text not in ("-", "0") and not gain.sure(key) else text


def _with_width(gain: Gain, key: str) -> str:
    """With half of its interval, where it has one."""
    width = gain.half_width.get(key)
    return _percent(gain.latency.get(key)) + ("" if width is None else f" \N{PLUS-MINUS SIGN}{width:.1%}")


def _percent(value: float | None) -> str:
    return "-" if value is None else "0" if abs(value) < _LEAST else f"{value:+.1%}"

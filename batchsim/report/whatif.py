"""The page for the browser of `batchsim whatif`: one file, and nothing fetched from anywhere."""

from __future__ import annotations

from pathlib import Path

from batchsim.report.whatif_words import (
    BY_TURNS,
    DEFINITIONS,
    found_in,
    gains,
    headline,
    how,
    in_order,
    ms,
)
from batchsim.whatif.answer import Answer, Prediction

_STEPS_NOTE = "Bars are medians, whiskers 90% intervals; the dotted line is the loop as it is."
_TIMELINE_NOTE = (
    "Three steps of each, on one time scale: the host by phase, and each stream. Blank is idle, hatched is waiting. "
    "Drag to zoom, double-click to go back."
)
_EXPOSED_NOTE = "Host work of a step during which no kernels are under way: what another schedule could hide."


def write_whatif(path: Path, answer: Answer) -> None:
    """Write one self-contained HTML page to `path`, whole or not at all; it needs no network.

    The same answer gives the same bytes.
    """
    from batchsim.files import write_text

    write_text(path, page(answer))


def page(answer: Answer) -> str:
    """The HTML text of the report."""
    from batchsim.report import whatif_figures as draw
    from batchsim.report.html import definitions, document, escaped, header, items, plot, section

    name = Path(answer.profile.source).name
    told = [*answer.sentences, *(f"{what} is not predicted: {why}." for what, why in answer.refused.items())]
    notes = f'<ul class="warnings">{items(answer.profile.notes)}</ul>' if answer.profile.notes else ""
    host, device = draw.legend(answer)
    parts = [
        header(name, headline(answer), told),
        notes,
        section("Predictions", found_in(answer.profile) + ".", _table(answer)),
        section("Step times", _STEPS_NOTE, plot("steps")),
        section("Timelines", _TIMELINE_NOTE, _legend(host | device) + plot("timelines")),
        section("What the host does while the device idles", _EXPOSED_NOTE, _legend(host) + plot("exposed")),
        section("How the numbers came about", "", definitions(dict(how(answer)))),
        section("Definitions", "", definitions(DEFINITIONS)),
    ]
    plots = {"steps": draw.steps(answer), "timelines": draw.timelines(answer), "exposed": draw.exposed(answer)}
    return document(f"{escaped(name)}: what if", parts, plots)


def _legend(colours: dict[str, str]) -> str:
    """A legend that wraps, which those of plotly do not."""
    from batchsim.report.html import escaped

    patch = "display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px"
    each = "".join(
        f'<span style="display:inline-block;margin-right:16px"><i style="{patch};background:{colour}"></i>'
        f"{escaped(label)}</span>"
        for label, colour in colours.items()
    )
    return f'<p style="font-size:13px;margin:4px 0 0">{each}</p>'


def _table(answer: Answer) -> str:
    columns = ("step, ms", "gain", "90% interval", "90% of the gain", "device busy", "host, ms", "bound by")
    rows = ["<tr><th></th>" + "".join(f"<th>{column}</th>" for column in columns) + "</tr>"]
    for name, found in in_order(answer).items():
        as_is = name == answer.as_is
        cells = "".join(f"<td>{cell}</td>" for cell in _cells(found, as_is=as_is))
        mark = " <small>as it is</small>" if as_is else ""
        rows.append(f"<tr{' class=chosen' if as_is else ''}><th>{name}{mark}</th>{cells}</tr>")
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def _cells(found: Prediction, *, as_is: bool) -> list[str]:
    low, high = found.step_ms_interval
    least, most = found.throughput_gain_interval
    gain = f'<span class="chip {_CHIPS[gains(found)]}">{found.throughput_gain:+z.1%}</span>'
    return [
        ms(found.step_ms), "&ndash;" if as_is else gain, f"{ms(low)} to {ms(high)}",
        "&ndash;" if as_is else f"{least:+z.0%} to {most:+z.0%}", f"{found.device_busy_fraction:.0%}",
        ms(found.host_ms), "by turns" if found.bound_by == BY_TURNS else found.bound_by,
    ]  # fmt: skip


_CHIPS = {1: "gain", 0: "same", -1: "loss"}

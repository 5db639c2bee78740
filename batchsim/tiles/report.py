"""What people look at: a table in the terminal, and a page with multiprocessors over time for the browser."""

from __future__ import annotations

from pathlib import Path

from batchsim.tiles.result import DEFINITIONS, CaseResult, TilesRun
from batchsim.tiles.terminal import headline, print_tiles

__all__ = ["print_tiles", "write_tiles_report"]

_NOTE = "{}. Blank is idle. Drag to zoom, double-click to go back."


def write_tiles_report(path: Path, run: TilesRun) -> None:
    """Write one self-contained HTML page to `path`, whole or not at all; it needs no network.

    The same run gives the same bytes.
    """
    # plotly takes a while to import, and most commands print no page.
    from batchsim.files import write_text

    write_text(path, page(run))


def page(run: TilesRun) -> str:
    """The HTML text of the report."""
    import plotly.graph_objects as go

    from batchsim.report.html import as_yaml, definitions, document, header, section

    name = str(run.scenario["name"])
    plots: dict[str, go.Figure] = {}
    sections = []
    for number, case in enumerate(run.cases):
        sections.append(section(case.name, case.why, _table(case) + _pictures(case, number, plots)))
    if len(run.cases) == 1:
        top, causes = headline(run.cases[0]), []
    else:
        gaining = [case for case in run.cases if case.chosen is not case.baseline]
        top = f"Synchronising tiles should pay in {len(gaining)} of {len(run.cases)} cases."
        causes = [f"{case.name}: {headline(case)}" for case in run.cases]
    sections += [
        section("Definitions", "", definitions(DEFINITIONS)),
        section("Scenario", "", as_yaml(run.scenario)),
        section("Provenance", "", as_yaml({"profile": run.profile, **run.provenance})),
    ]
    return document(name, [header(name, top, causes), *sections], plots)


def _pictures(case: CaseResult, number: int, plots: dict[str, object]) -> str:
    """The picture of the baseline and the chosen policy, below it the one from the device; folded but for the first."""
    from batchsim.report.html import escaped, plot
    from batchsim.tiles.picture import every_nth, picture

    parts = []
    for title, runs in (("Simulated", case.runs), ("Measured", case.measured)):
        if not runs:
            continue
        name = f"{title.lower()}-{number}"
        plots[name] = picture(runs, case.device.sms)
        every = every_nth(runs)
        which = "Each line is a slot of a multiprocessor" + (f", one of {every} drawn" if every > 1 else "")
        note = f'<p class="note">{escaped(_NOTE.format(which))}</p>'
        opened = " open" if number == 0 else ""
        parts.append(
            f"<details{opened}><summary>{title}: multiprocessors over time</summary>{note}{plot(name)}</details>"
        )
    return "".join(parts)


def _table(case: CaseResult) -> str:
    from batchsim.report.html import escaped

    measured = any(result.measured_us is not None for result in case.policies)
    head = ["policy", "time, \N{MICRO SIGN}s", *["measured, \N{MICRO SIGN}s"][: int(measured)], "gain", "waves"]
    rows = ["".join(f"<th>{escaped(each)}</th>" for each in (*head, "utilisation", "tiling"))]
    rows[0] = f"<tr>{rows[0]}</tr>"
    for result in (*case.policies, *case.comparisons):
        if result in case.comparisons[:1]:
            rows.append(f'<tr class="group"><th colspan="{6 + measured}">for comparison, not to choose</th></tr>')
        chosen = result is case.chosen
        cells = [f"{result.time_us:,.1f}"]
        if measured:
            cells.append("&ndash;" if result.measured_us is None else f"{result.measured_us:,.1f}")
        cells += [
            f"{result.gain:+.1%}" if result is not case.baseline else "baseline",
            f"{result.waves:.2f}",
            f"{result.utilisation:.1%}",
            escaped(result.tiling),
        ]
        name = escaped(result.policy) + (' <span class="chip gain">chosen</span>' if chosen else "")
        told = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f"<tr{' class=chosen' if chosen else ''}><th>{name}</th>{told}</tr>")
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'

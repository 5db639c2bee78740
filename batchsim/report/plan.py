"""The page for the browser of a plan: one file, and nothing fetched from anywhere."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchsim.report.plan_terminal import print_plan
from batchsim.report.plan_words import COST, DEFINITIONS, columns_of, in_order, passes, rows_of

if TYPE_CHECKING:
    from batchsim.plan.candidate import Trial
    from batchsim.plan.result import PlanResult
    from batchsim.report.explore.details import Detail
    from batchsim.report.explore.parts import Explored

__all__ = ["print_plan", "write_plan_report"]

_LATENCY = "latency_ms.ttft.p99"


def write_plan_report(path: Path, found: PlanResult) -> None:
    """Write one self-contained HTML page to `path`, whole or not at all; it needs no network.

    The same plan gives the same bytes.
    """
    from batchsim.files import write_text

    write_text(path, page(found))


def page(found: PlanResult) -> str:
    """The HTML text of the report."""
    from batchsim.report.explore import parts
    from batchsim.report.explore.columns import definitions_of
    from batchsim.report.html import as_yaml, definitions, header, items
    from batchsim.report.html import section as part

    partial = f'<ul class="alerts">{items([found.partial])}</ul>' if found.partial else ""
    first, *rest = [text for text in found.sentences if found.partial is None or found.partial not in text]
    top = [header(found.name, first, rest), partial, _objectives(found)]
    shown = _explored(found)
    told = DEFINITIONS | definitions_of(shown.columns, shown.rows)
    bottom = [part("Definitions", "", definitions(told)), part("Plan", "", as_yaml(found.plan))]
    return parts.page(found.name, top, shown, bottom, frontier="Cost against latency", rows="Candidates simulated")


def _explored(found: PlanResult) -> Explored:
    from batchsim.report.explore.details import interesting
    from batchsim.report.explore.parts import Explored

    trials = in_order(found)
    rows = rows_of(found, trials)
    columns = columns_of(found, rows)
    marks = {index: words for index, trial in enumerate(trials) if (words := _marks(found, trial))}
    chosen = [index for index, trial in enumerate(trials) if _role(found, trial) and trial.run is not None]
    latency = found.latency.figure if found.latency is not None else _LATENCY
    keys = {column.key for column in columns}
    wanted = interesting(rows, columns, chosen)
    return Explored(
        columns, rows, {index: _detail(trials[index]) for index in wanted}, chosen, sort="",
        against=(latency if latency in keys else "margin", COST), value=COST, over=("replicas", "hardware"),
        marks=marks, bounds=_bounds(found), allowed=[passes(trial) for trial in trials],
        steady=[trial.stable for trial in trials],
    )  # fmt: skip


def _role(found: PlanResult, trial: Trial) -> str:
    return "best" if trial is found.best else "runner-up" if trial is found.runner_up else ""


def _marks(found: PlanResult, trial: Trial) -> list[str]:
    transferred = trial.run is not None and "transfer" in trial.run.provenance
    return [word for word in (_role(found, trial), "transferred" if transferred else "") if word]


def _detail(trial: Trial) -> Detail:
    from batchsim.report.explore.details import Detail, detail_of
    from batchsim.sweep.point import cumulative

    run, schedule = trial.run, trial.candidate.configuration.schedule
    if run is None:
        return Detail()
    return detail_of(cumulative(run).get(schedule), run.windows.get(schedule))


def _bounds(found: PlanResult) -> dict[str, float]:
    """Bounds of latencies, as lines where latencies are drawn."""
    return {each.figure.split(".")[1]: each.limit for each in found.objectives if each.latency and isfinite(each.limit)}


def _objectives(found: PlanResult) -> str:
    """What the best and the runner-up make of each objective."""
    from batchsim.report.html import escaped, section

    named: dict[str, Any] = {"best": found.best, "runner-up": found.runner_up}
    shown = {name: trial for name, trial in named.items() if trial is not None}
    if not shown:
        return ""
    kinds = ("predicted", f"with {found.confidence:.0%} confidence", "margin")
    head = "".join(f'<th colspan="3">{name}: {escaped(trial.candidate.words)}</th>' for name, trial in shown.items())
    rows = [f'<tr><th rowspan="2"></th><th rowspan="2">wanted</th>{head}</tr>']
    rows.append("<tr>" + "".join(f"<th>{kind}</th>" for _ in shown for kind in kinds) + "</tr>")
    for each in found.objectives:
        cells = [f"{'at most' if each.at_most else 'at least'} {each.shown(each.limit)}"]
        for trial in shown.values():
            value, bound = trial.values[each.key], trial.bounds.get(each.key)
            cells += ["\N{EN DASH}" if it is None else each.shown(it) for it in (value, bound)]
            cells.append(f"{trial.confident_margins[each.key]:+.1%}")
        binds = " class=chosen" if found.binds is not None and each.key == found.binds.key else ""
        told = "".join(f"<td>{escaped(cell)}</td>" for cell in cells)
        rows.append(f"<tr{binds}><th>{escaped(each.words)}</th>{told}</tr>")
    note = "The objective that binds the best candidate is in bold." if found.binds is not None else ""
    return section("Objectives", note, f'<div class="scroll"><table>{"".join(rows)}</table></div>')

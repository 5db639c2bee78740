"""A plan in the terminal: the answer, the candidates that were simulated, and the frontier; made for 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batchsim.report.plan_words import in_order, passes, verdict
from batchsim.report.sweep_words import number
from batchsim.report.terminal import bullet
from batchsim.report.words import transfer_notes

if TYPE_CHECKING:
    from batchsim.plan.candidate import Trial
    from batchsim.plan.objectives import Objective
    from batchsim.plan.result import PlanResult

ROWS = 20
FRONTIER_ROWS = 8
_WIDE = 120
_BEST = "\N{BLACK RIGHT-POINTING TRIANGLE} "
_RUNNER_UP = "\N{WHITE RIGHT-POINTING TRIANGLE} "
_MEETS = "\N{CHECK MARK} "
_SCREENED = "\N{WHITE CIRCLE} "


def print_plan(console: Console, found: PlanResult) -> None:
    """Print the answer, what was simulated with its values and their bounds, and what lower latencies cost."""
    console.print()
    console.print(Text.assemble((found.name, "bold cyan"), ("  plan", "dim")))
    first, *rest = found.sentences
    console.print(Text(first, style="bold" if found.best is not None else "bold red"))
    for sentence in rest:
        console.print(bullet("\N{BULLET} ", sentence))
    console.print()
    trials = [trial for trial in in_order(found) if trial.result is not None]
    if trials:
        console.print(_candidates(found, trials[:ROWS], console.width), "", sep="\n")
        if len(trials) > ROWS:
            console.print(Text(f"{ROWS} of {len(trials):,} candidates simulated, the best first.", "dim"))
    if found.latency is not None and len(found.frontier) > 1:
        console.print(_frontier(found, found.latency), "", sep="\n")
    marks = f"{_BEST}best, {_RUNNER_UP}runner-up, {_MEETS}meets the objectives"
    if any(passes(trial) and not trial.meets for trial in trials[:ROWS]):
        marks += f", {_SCREENED}does as predicted, of which no draws were made"
    console.print(Text(f"{marks}; ( ): the value that holds with {found.confidence:.0%} confidence", style="dim"))
    runs = [trial.run.provenance for trial in trials if trial.run is not None]
    for sentence in transfer_notes(runs):
        console.print(bullet("warning: ", sentence, "yellow"))
    refused = [trial for trial in found.evaluated if trial.refused is not None]
    for reason in dict.fromkeys(trial.refused for trial in refused):
        some = sum(trial.refused == reason for trial in refused)
        told = f"{some:,} candidate{'s' * (some != 1)} cannot run: {reason}"
        console.print(bullet("\N{BULLET} ", told, "yellow"))


def _candidates(found: PlanResult, trials: list[Trial], width: int) -> Table:
    table = _table("\ncandidate")
    fields = {key: None for trial in trials for key in trial.candidate.configuration.fields}
    batches = any(trial.candidate.configuration.max_num_seqs is not None for trial in trials)
    for heading in ("\nschedule", *(["max_num_\nseqs"] if batches else []), *(f"\n{key}" for key in fields)):
        justify = "left" if "schedule" in heading else "right"
        table.add_column(heading, justify=justify, header_style="bold", overflow="fold")  # type: ignore[arg-type]
    for heading in ("USD\nan hour", "USD/1M\ntokens"):
        table.add_column(heading, justify="right", header_style="bold", no_wrap=True)
    for each in found.objectives:
        limit = number(each.limit) if each.limit > 1 else each.shown(each.limit)
        words = "\n".join(each.words.rsplit(" ", 1))
        heading = f"{words}\n{'<=' if each.at_most else '>='} {limit}"
        table.add_column(heading, justify="right", header_style="bold", overflow="fold")
    if width >= _WIDE:
        table.add_column("\nverdict", header_style="bold", overflow="fold")
    for trial in trials:
        of = trial.candidate.configuration
        batch = [number(of.max_num_seqs)] if batches else []
        costs = [_money(trial.candidate.cost_per_hour), _money(trial.cost_per_million_tokens)]
        values = [_value(trial, each) for each in found.objectives]
        told = [verdict(found, trial)] if width >= _WIDE else []
        others = [number(of.fields.get(key)) for key in fields]
        style = "bold green" if trial is found.best else "" if passes(trial) else "dim"
        devices = trial.candidate.words.partition(",")[0]
        table.add_row(_mark(found, trial) + devices, of.schedule, *batch, *others, *costs, *values, *told, style=style)
    return table


def _frontier(found: PlanResult, latency: Objective) -> Table:
    table = _table("what lower latency costs")
    table.add_column("USD a million tokens", justify="right", header_style="bold")
    table.add_column(f"{latency.words}, ms", justify="right", header_style="bold")
    for trial in found.frontier[:FRONTIER_ROWS]:
        style = "bold green" if trial is found.best else ""
        table.add_row(
            trial.candidate.words, _money(trial.cost_per_million_tokens), number(trial.figures[latency.figure]),
            style=style,
        )  # fmt: skip
    return table


def _table(first: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, header_style="bold", overflow="fold")
    return table


def _mark(found: PlanResult, trial: Trial) -> str:
    if trial is found.best:
        return _BEST
    if trial is found.runner_up:
        return _RUNNER_UP
    return _MEETS if trial.meets else _SCREENED if passes(trial) else "  "


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _money(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}" if value >= 0.1 else f"{value:,.4f}"


def _value(trial: Trial, each: Objective) -> str:
    value, bound = trial.values[each.key], trial.bounds.get(each.key)
    if value is None:
        return "-"
    share = each.limit <= 1
    text, sure = ("" if it is None else each.shown(it) if share else _short(it) for it in (value, bound))
    return f"{text} ({sure})" if sure else text

"""What `batchsim tune` found for a training run, as a table in the terminal and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batchsim.files import write_text
from batchsim.report.figures import ACROSS, layout
from batchsim.report.html import as_yaml, document, escaped, header, plot, section
from batchsim.report.shown import ms_text
from batchsim.tune.training import Setting, Trial, Tuning

_NOTE = "Every micro-batch that divides the global batch. Hover for figures; what does not fit the device has no time."
MOST_ROWS = 24  # in the terminal
_COLUMNS = ("micro-batch", "accumulation", "checkpointing", "schedule", "peak, GB", "step, ms", "tokens/s", "busy")


def sentences(found: Tuning) -> list[str]:
    """What to set, what that gives over the file's setting, and what bounds it."""
    best, asked = found.best, found.asked
    speed = f"{ms_text(best.step_ms or 0.0)} an optimiser step, {best.tokens_per_s or 0.0:,.0f} tokens/s"
    told = [f"Set {in_words(best.setting)}: {speed}, {_gb(best.peak_bytes)} of {_gb(found.room_bytes)}."]
    if found.interval_90_ms is not None:
        low, high = (ms_text(end) for end in found.interval_90_ms)
        told.append(f"With what is uncertain of the costs, its step takes {low} to {high} with 90% confidence.")
    if asked is not None and asked.setting != best.setting:
        if asked.step_ms is None or best.step_ms is None:
            told.append(
                f"The file's setting, {in_words(asked.setting)}, needs {_gb(asked.peak_bytes)} and does not fit."
            )
        else:
            change = asked.step_ms / best.step_ms - 1
            told.append(
                f"The file's setting, {in_words(asked.setting)}, takes {ms_text(asked.step_ms)}: {change:+.1%}."
            )
    too_large = [trial for trial in found.trials if not trial.fits]
    if too_large:
        least = min(too_large, key=lambda trial: (trial.setting.checkpointing != "none", trial.setting.micro_batch))
        told.append(f"{in_words(least.setting)} and more would need {_gb(least.peak_bytes)}.")
    return told


def print_tuning(console: Console, name: str, found: Tuning) -> None:
    """The choice, and all settings, the fastest first."""
    console.print()
    console.print(Text(name, style="bold cyan"))
    first, *rest = sentences(found)
    console.print(Text(first, style="bold"))
    for line in rest:
        console.print(Text(line))
    console.print()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in _COLUMNS:
        table.add_column(column, justify="right", header_style="bold")
    for trial in _ordered(found)[:MOST_ROWS]:
        if trial.fits:
            table.add_row(*_row(trial), style="bold" if trial is found.best else "")
    console.print(table)
    console.print()


def write_tuning(path: Path, name: str, scenario: dict[str, Any], found: Tuning) -> None:
    """The page, in one file."""
    rows = "".join(
        f"<tr{' class=chosen' * (trial is found.best)}><td>{'</td><td>'.join(map(escaped, _row(trial)))}</td></tr>"
        for trial in _ordered(found)
    )
    table = f'<div class="scroll"><table><tr><th>{"</th><th>".join(_COLUMNS)}</th></tr>{rows}</table></div>'
    first, *rest = sentences(found)
    parts = [
        header(name, first, rest),
        section("Time and memory by micro-batch", _NOTE, f'<div class="pair">{plot("time")}{plot("memory")}</div>'),
        section("All settings", "", table),
        section("Scenario", "", as_yaml(scenario)),
    ]
    write_text(path, document(f"{name}: tuned", parts, {"time": time(found), "memory": memory(found)}))


def time(found: Tuning) -> go.Figure:
    """Time of an optimiser step by micro-batch, a line for each schedule and checkpointing."""
    figure = go.Figure()
    lines = dict.fromkeys((trial.setting.schedule, trial.setting.checkpointing) for trial in found.trials)
    for colour, (schedule, kept) in zip(ACROSS * len(lines), lines, strict=False):
        some = [t for t in found.trials if t.fits and (t.setting.schedule, t.setting.checkpointing) == (schedule, kept)]
        figure.add_scatter(
            name=f"{schedule}, checkpointing {kept}", mode="lines+markers", line={"color": colour, "width": 2},
            x=[trial.setting.micro_batch for trial in some], y=[trial.step_ms for trial in some],
            hovertemplate="micro-batch %{x}<br>%{y:,.4g} ms<extra></extra>",
        )  # fmt: skip
    best = found.best
    figure.add_scatter(
        name="chosen", mode="markers", marker={"color": "#d55e00", "size": 15, "symbol": "star"},
        x=[best.setting.micro_batch], y=[best.step_ms], hovertemplate=in_words(best.setting) + "<extra></extra>",
    )  # fmt: skip
    return _by_micro_batch(figure, "an optimiser step, ms", found, type="log")


def memory(found: Tuning) -> go.Figure:
    """Peak memory by micro-batch, with and without checkpointing, and the device's."""
    figure = go.Figure()
    first = found.trials[0].setting.schedule
    for colour, kept in zip(ACROSS, dict.fromkeys(t.setting.checkpointing for t in found.trials), strict=False):
        some = [t for t in found.trials if (t.setting.schedule, t.setting.checkpointing) == (first, kept)]
        figure.add_scatter(
            name=f"checkpointing {kept}", mode="lines+markers", line={"color": colour, "width": 2},
            x=[trial.setting.micro_batch for trial in some], y=[trial.peak_bytes / 1e9 for trial in some],
            hovertemplate="micro-batch %{x}<br>%{y:,.4g} GB<extra></extra>",
        )  # fmt: skip
    figure.add_hline(found.room_bytes / 1e9, line={"color": "#d9483b", "dash": "dash", "width": 1.5})
    return _by_micro_batch(figure, "peak, GB", found, type="log")


def _by_micro_batch(figure: go.Figure, title: str, found: Tuning, **look: Any) -> go.Figure:
    sizes = sorted({trial.setting.micro_batch for trial in found.trials})
    figure.update_layout(**layout(height=400))
    figure.update_xaxes(type="log", title="micro-batch, sequences", tickvals=sizes, ticktext=[str(n) for n in sizes])
    figure.update_yaxes(title=title, **look)
    return figure


def in_words(setting: Setting) -> str:
    """`micro_batch 8 (x 4), checkpointing none, async`."""
    sizes = f"micro_batch {setting.micro_batch} (x {setting.accumulation_steps})"
    return f"{sizes}, checkpointing {setting.checkpointing}, {setting.schedule}"


def _ordered(found: Tuning) -> list[Trial]:
    return sorted(found.trials, key=lambda trial: (not trial.fits, trial.step_ms or 0.0, trial.peak_bytes))


def _row(trial: Trial) -> list[str]:
    setting = trial.setting
    times = ["does not fit", "", ""]
    if trial.step_ms is not None:
        times = [f"{trial.step_ms:,.1f}", f"{trial.tokens_per_s:,.0f}", f"{trial.device_busy_fraction:.1%}"]
    sizes = [f"{setting.micro_batch}", f"{setting.accumulation_steps}", setting.checkpointing, setting.schedule]
    return [*sizes, f"{trial.peak_bytes / 1e9:,.1f}", *times]


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:,.1f} GB"

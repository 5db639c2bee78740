"""A plan's candidates as rows of a table, and what is said of each."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

from batchsim.report.explore.columns import Column, figure_columns, swept_column, text_of

if TYPE_CHECKING:
    from batchsim.plan.candidate import Trial
    from batchsim.plan.result import PlanResult

COST = "cost_per_million_tokens"
COST_PER_HOUR = "cost_per_hour"

_FIELDS = ("hardware", "tensor_parallel", "replicas", "schedule", "max_num_seqs")
DEFINITIONS = {
    "USD an hour": "the price of all devices: replicas, times the devices of each, times the price of one",
    "USD/1M tokens": "for a million output tokens, at the rate at which the run generates them",
    "least margin": "how far the objective that is nearest to its bound is inside of it, as a share of it, at the "
    "plan's confidence; as predicted, where no costs were drawn",
}


def in_order(found: PlanResult) -> list[Trial]:
    """All trials: the best, the runner-up, what meets the objectives by cost, and then what comes closest to them."""

    def place(trial: Trial) -> tuple[bool | float, ...]:
        miss = 0.0 if passes(trial) else -min(trial.confident_margins.values())
        return trial is not found.best, trial is not found.runner_up, not passes(trial), miss, *trial.merit

    return sorted(found.evaluated, key=place)


def passes(trial: Trial) -> bool:
    """Whether it meets the objectives, as far as is known: of those screened only, as predicted."""
    return trial.meets if trial.draws else trial.passes


def verdict(found: PlanResult, trial: Trial) -> str:
    """What to say of a candidate beside its figures."""
    if trial is found.best:
        return "best"
    if trial is found.runner_up:
        return "runner-up"
    return trial.why_not or ("meets them" if trial.meets else "meets them as predicted")


def rows_of(found: PlanResult, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """A row a candidate, by the keys of `columns_of`."""
    return [_row(found, trial) for trial in trials]


def columns_of(found: PlanResult, rows: Sequence[dict[str, Any]]) -> list[Column]:
    """The fields of candidates, of the first few those that differ; costs, margin, figures, and the verdict."""
    others = dict.fromkeys(key for trial in found.evaluated for key in trial.candidate.configuration.fields)
    fields = [*_FIELDS, *(key for key in others if key not in _FIELDS)]
    have = [key for key in fields if any(row.get(key) is not None for row in rows)]
    swept = [
        Column(key, key, kind="field", bare=True) if key in ("hardware", "schedule") else swept_column(key, have)
        for key in have
        if key != "tensor_parallel" or any(row[key] != 1 for row in rows)
    ]
    asked = [each.figure for each in found.objectives]
    return [
        *swept,
        Column(COST_PER_HOUR, "USD an hour", format="money", better="low"),
        Column(COST, "USD/1M tokens", format="money", better="low"),
        Column("margin", "least margin", format="gain", better="high"),
        *figure_columns(rows, asked),
        Column("verdict", "verdict", kind="text"),
    ]


def _row(found: PlanResult, trial: Trial) -> dict[str, Any]:
    told = trial.candidate.to_json()
    margin = min(trial.confident_margins.values())
    intervals = {} if trial.result is None else trial.result.interval_90
    return {
        **{key: told[key] for key in (*_FIELDS, COST_PER_HOUR)},
        **{key: text_of(value) for key, value in trial.candidate.configuration.fields.items()},
        COST: trial.cost_per_million_tokens,
        "margin": margin if isfinite(margin) else None,
        **trial.figures,
        **{f"{key}.low": low for key, (low, _) in intervals.items()},
        **{f"{key}.high": high for key, (_, high) in intervals.items()},
        "verdict": verdict(found, trial),
        "error": trial.refused,
    }

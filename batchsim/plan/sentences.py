"""The answer to a plan in words."""

from __future__ import annotations

from batchsim.plan.candidate import Trial
from batchsim.plan.changes import dollars
from batchsim.plan.objectives import Objective
from batchsim.plan.result import PlanResult


def sentences(found: PlanResult) -> list[str]:
    """What to take and what it costs; what it reaches and what binds; the runner-up; what would change the answer."""
    effort = f"{found.simulations:,} simulations of {found.candidates:,} candidate{'s' * (found.candidates != 1)}"
    told = [] if found.partial is None else [f"This is not the whole answer: {found.partial}."]
    if found.best is None:
        none = "No candidate is known to meet" if found.partial else "No candidate meets"
        told.append(f"{none} all objectives at a confidence of {found.confidence:.0%}.")
    else:
        told += [f"Take {found.best.candidate.words}: {_cost(found.best)}.", _reached(found, found.best)]
        if found.runner_up is not None:
            told.append(_second(found.best, found.runner_up))
    told += [change.text for change in found.would_change]
    return [*told, f"Found with {effort}."]


def _second(best: Trial, other: Trial) -> str:
    text = f"Runner-up: {other.candidate.words}: {_cost(other)}"
    dearer = other.candidate.cost_per_hour / best.candidate.cost_per_hour - 1
    return f"{text}, {dearer:.0%} more." if dearer >= 0.005 else f"{text}."


def _reached(found: PlanResult, best: Trial) -> str:
    parts = [_part(best, each) for each in found.objectives]
    text = f"At a confidence of {found.confidence:.0%}, {', '.join(parts)}"
    if found.binds is None:
        return f"{text}."
    spare = f"{best.confident_margins[found.binds.key]:.0%} to spare"
    return f"{text}; {found.binds.words} binds, with {spare}." if len(parts) > 1 else f"{text}: {spare}."


def _part(best: Trial, objective: Objective) -> str:
    value = best.bounds.get(objective.key, best.values[objective.key])
    assert value is not None
    kept, sign = ("stays under", "<=") if objective.at_most else ("reaches", ">=")
    return f"{objective.words} {kept} {objective.shown(value)} (wanted {sign} {objective.shown(objective.limit)})"


def _cost(trial: Trial) -> str:
    text = f"{dollars(trial.candidate.cost_per_hour)} an hour"
    each = trial.cost_per_million_tokens
    return text if each is None else f"{text}, {dollars(each)} for a million output tokens"

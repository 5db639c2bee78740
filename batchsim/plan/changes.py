"""What would change a plan's answer: less or more traffic, other prices, another bound; by few simulations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from batchsim.plan.bench import ScenarioBench
from batchsim.plan.candidate import Candidate, Trial
from batchsim.plan.result import Change
from batchsim.plan.search import Search
from batchsim.plan.traffic import scaled

_LEAST_TRAFFIC, _MOST_TRAFFIC = 0.5, 2.0
_STEPS = 4  # of a bisection
_TRIES = 12


def changes(
    bench: ScenarioBench, search: Search, best: Trial | None, runner_up: Trial | None, cheapest: float
) -> tuple[Change, ...]:
    """What would change that `best` is the answer, or that there is none.

    `search` holds all trials that were made; `cheapest` is the least that any candidate costs an hour which might carry
    the load.
    """
    found: list[Change] = []
    missed = _nearest_miss(search, best)
    if missed is not None:
        found.append(_near_miss(bench, best, missed))
    elif best is not None and best.candidate.cost_per_hour <= cheapest:
        found.append(Change("floor", _floor(bench, best)))
    elif best is None:
        found.append(
            Change("floor", "By the profile's costs alone, the load or the throughput asked for is beyond them.")
        )
    if best is not None and runner_up is not None:
        found += _price(best, runner_up)
    if best is not None and (more := _headroom(bench, best)) is not None:
        found.append(more)
    return tuple(found)


def _floor(bench: ScenarioBench, best: Trial) -> str:
    """Why nothing cheaper was tried."""
    problem = bench.problem
    least = min(Candidate(each, problem.replicas[0]).cost_per_hour for each in problem.configurations)
    if best.candidate.cost_per_hour <= least:
        return "No candidate is cheaper."
    if any(each.rate for each in bench.objectives):
        return "No cheaper candidate can carry the load at the rate that is asked for, by the profile's costs alone."
    return "No cheaper candidate can carry the load, whatever the objectives."


def _nearest_miss(search: Search, best: Trial | None) -> Trial | None:
    """The nearest miss, with all of its draws: with them another one may turn out to be closer."""
    for _ in range(_TRIES):
        missed = nearest_miss(best, search.trials.values())
        if missed is None or search.complete(missed) is missed:
            return missed
    return nearest_miss(best, (trial for trial in search.trials.values() if trial.draws and trial.complete))


def nearest_miss(best: Trial | None, trials: Iterable[Trial]) -> Trial | None:
    """Of what is cheaper than `best` and does not do, what comes closest; without a best, of all."""
    cost = float("inf") if best is None else best.candidate.cost_per_hour
    some = [t for t in trials if t.candidate.cost_per_hour < cost and t.result is not None and not t.meets]
    some = [t for t in some if not (t.passes and not t.draws)]  # not known to miss
    if not some:
        return None
    return max(some, key=lambda t: (t.stable, min(_margins(t, best).values()), -t.candidate.cost_per_hour))


def _near_miss(bench: ScenarioBench, best: Trial | None, missed: Trial) -> Change:
    closest = "The closest" if best is None else "The closest of what is cheaper"
    text = (
        f"{closest}, {missed.candidate.words} at {dollars(missed.candidate.cost_per_hour)} an hour: {missed.why_not}."
    )
    figures: dict[str, Any] = missed.candidate.to_json()
    off, margins = _ratios(missed, best), _margins(missed, best)
    short = [each for each in missed.objectives if margins[each.key] < 0]
    remedies = []
    if missed.stable and len(short) == 1 and (value := missed.values[short[0].key]) is not None:
        needed = value * off[short[0].key]
        figures |= {"objective": short[0].key, "margin": margins[short[0].key], "limit_needed": needed}
        remedies.append(f"with a bound of {short[0].shown(needed)}")
    share = _traffic(bench, missed, off, _LEAST_TRAFFIC, 1.0)
    if share is not None and share < 1:
        figures["traffic"] = share
        remedies.append(f"at {1 - share:.0%} less traffic")
    if remedies:
        text += f" It would do {' or '.join(remedies)}."
    return Change("near_miss", text, figures)


def _price(best: Trial, other: Trial) -> list[Change]:
    """At what price of its devices another candidate would be as cheap as the best."""
    of = other.candidate.configuration
    if of.hardware == best.candidate.configuration.hardware:
        return []
    price = best.candidate.cost_per_hour / other.candidate.devices
    if price >= of.price_per_hour:
        return []
    text = (
        f"{other.candidate.words} would be cheaper if an hour of {of.hardware} cost under {dollars(price)}: it costs "
        f"{dollars(of.price_per_hour)}."
    )
    return [Change("price", text, {**other.candidate.to_json(), "price_needed": price})]


def _headroom(bench: ScenarioBench, best: Trial) -> Change | None:
    """How much more traffic the best carries within the objectives."""
    share = _traffic(bench, best, _ratios(best), 1.0, _MOST_TRAFFIC)
    if share is None:
        return None
    figures = {**best.candidate.to_json(), "traffic": share}
    if share >= _MOST_TRAFFIC:
        return Change("traffic", f"The answer holds even at {share:g} times the traffic.", figures)
    if share <= 1:
        return Change("traffic", "The answer holds at hardly more traffic than this.", figures)
    return Change("traffic", f"The answer holds up to about {share - 1:.0%} more traffic.", figures)


def _traffic(bench: ScenarioBench, trial: Trial, off: Mapping[str, float], low: float, high: float) -> float | None:
    """The most traffic, as a share of the plan's, at which a candidate meets the objectives; None: less than `low`.

    By runs without draws, each objective's figure taken `off` times.
    """
    document = bench.document(trial.candidate.configuration, replicas=trial.candidate.replicas)
    if scaled(document, 1.0) is None:
        return None

    def holds(share: float) -> bool:
        changed = scaled(document, share)
        assert changed is not None
        result = bench.evaluate(changed).results[trial.candidate.configuration.schedule]
        found = Trial(trial.candidate, trial.objectives, trial.confidence, 0, result)
        return found.stable and all(
            each.margin(_times(found.values[each.key], off[each.key])) >= 0 for each in trial.objectives
        )

    if low < 1 and not holds(low):
        return None
    if high > 1 and holds(high):
        return high
    return _bisected(holds, low, high)


def _ratios(trial: Trial, other: Trial | None = None) -> dict[str, float]:
    """What holds with confidence over what is predicted, by objective; of `other` where `trial` had no draws."""
    told = trial if trial.draws or other is None else other
    return {key: _ratio(told.bounds.get(key), value) for key, value in told.values.items()}


def _margins(trial: Trial, other: Trial | None) -> dict[str, float]:
    """The margins of a trial with the plan's confidence, as far as they are known or may be expected."""
    off = _ratios(trial, other)
    return {each.key: each.margin(_times(trial.values[each.key], off[each.key])) for each in trial.objectives}


def _ratio(bound: float | None, value: float | None) -> float:
    return bound / value if bound is not None and value else 1.0


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _bisected(holds: Callable[[float], bool], low: float, high: float) -> float:
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def dollars(value: float) -> str:
    """USD, in cents."""
    return f"${value:,.2f}"

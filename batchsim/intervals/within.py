"""90% prediction intervals of every figure of a run: perturbed profiles and other replications, drawn and simulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import hypot, sqrt
from typing import TYPE_CHECKING, Any

from batchsim.intervals import belief
from batchsim.intervals.design import signs
from batchsim.intervals.groups import group_of, is_exact, scale_of
from batchsim.intervals.learned import Learned, Width, learned, loop_of
from batchsim.intervals.perturb import perturbed
from batchsim.profile import Profile
from batchsim.result import Run, ScheduleResult, figures
from batchsim.schedules import loop_name

if TYPE_CHECKING:
    from batchsim.kinds import AnyProfile

CONFIDENCE = 0.9
# Optimiser steps that tell how far off one more is.
ENOUGH_STEPS = 4

Draw = Mapping[str, ScheduleResult]
Simulate = Callable[[Any, Any], Run]


def with_intervals(
    run: Run,
    scenario: Any,
    costs: AnyProfile,
    simulate: Simulate,
    *,
    draws: int,
    progress: Callable[[float], None] | None = None,
    same_requests: bool = False,
    probed: bool = False,
) -> Run:
    """`run` with the `interval_90` of every schedule's figures, from `draws` more simulations of `scenario`.

    Each draw has the costs of a profile that is off as this one may be, and requests and step times of another
    replication; all of its schedules have the same. The user's own table of times has no other costs. `simulate` runs a
    scenario at some costs. `same_requests`: the requests are known, as those that were executed are. `probed`: so is
    the host's speed, as measured beside a run. The same for the same seed, wherever it is called; an interrupted run
    has no intervals.
    """
    if draws < 1 or run.interrupted:
        return run
    known = learned()
    short = _shortened(scenario)
    middle = run.results if short is scenario else simulate(short, costs).results
    drawn: list[Draw] = []
    for each in draw(short, costs, simulate, draws, known, same_requests=same_requests, probed=probed):
        drawn.append(each)
        if progress is not None:
            progress(len(drawn) / draws)
    # Of a table no execution has told: all that is uncertain is the run, of which so many draws are a small sample.
    usual = Width(spread=_student(draws)) if costs is None else Width()
    transferred = getattr(costs, "transfer", None) is not None
    widths = {} if costs is None else known.widths_of(loop_of(scenario), transferred)
    results = {}
    for name, result in run.results.items():
        off = offsets(middle[name], [each[name] for each in drawn])
        results[name] = replace(result, interval_90=_intervals(result, off, widths, usual))
    return replace(run, results=results)


def _shortened(scenario: Any) -> Any:
    """A scenario whose figures are as far off as those of `scenario`: every optimiser step is like the last."""
    if scenario.kind == "training" and scenario.steps > ENOUGH_STEPS:
        return scenario.model_copy(update={"steps": ENOUGH_STEPS, "replications": 1})
    return scenario


def draw(
    scenario: Any, costs: AnyProfile, simulate: Simulate, draws: int, known: Learned, *, same_requests: bool,
    probed: bool,
) -> Iterator[Draw]:  # fmt: skip
    """The results of each draw, by schedule."""
    loops: list[str] = []
    columns: tuple[tuple[str, ...], ...] = ()
    spreads: Mapping[str, float] = {}
    if costs is not None:
        if isinstance(costs, Profile):
            loops = sorted({loop_name(name, graphs=scenario.cuda_graphs) for name in scenario.schedules})
        loop = loop_of(scenario)
        drift, share = known.drift.get(loop, {}), known.share.get(loop, 1.0)
        columns, spreads = belief.columns(costs), belief.spreads(costs, loops, drift, share, probed=probed)
    first = scenario.replication + scenario.replications  # the first after the run's own
    for number, row in enumerate(signs(draws, len(columns), seed=scenario.seed, replication=scenario.replication)):
        factors = {
            name: float(sign) * spreads.get(name, 0.0)
            for names, sign in zip(columns, row, strict=True)
            for name in names
        }
        replication = scenario.replication if same_requests else first + number
        changed = scenario.model_copy(update={"replication": replication, "replications": 1})
        yield simulate(changed, None if costs is None else perturbed(costs, factors, loops)).results


def offsets(result: ScheduleResult, drawn: Sequence[ScheduleResult]) -> dict[str, float]:
    """The root mean square of how far draws are off each figure, on its scale; of those that all of them have."""
    tables = [figures(each) for each in drawn]
    found = {}
    for key, point in figures(result).items():
        if all(key in table for table in tables):
            scale = scale_of(key)
            at = scale.of(point)
            found[key] = sqrt(sum((scale.of(table[key]) - at) ** 2 for table in tables) / len(tables))
    return found


def half_width(width: Width, offset: float) -> float:
    """Half an interval, on the figure's scale."""
    return hypot(width.spread * offset, width.floor)


def _intervals(
    result: ScheduleResult, off: Mapping[str, float], widths: Mapping[str, Width], usual: Width
) -> dict[str, tuple[float, float]]:
    found = {}
    for key, point in figures(result).items():
        scale, offset = scale_of(key), off.get(key)
        if offset is None:
            continue
        if is_exact(key, result.schedule):
            found[key] = (point, point)
        else:
            at, half = scale.of(point), half_width(widths.get(group_of(key), usual), offset)
            found[key] = (min(scale.back(at - half), point), max(scale.back(at + half), point))
    return _consistent(found)


def _consistent(found: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Bounds that fit each other: of quantiles they rise, and no more requests are good than are served.

    Each figure stays within its own, because the figures themselves rise.
    """
    ladders: dict[str, list[str]] = {}
    for key in found:
        stem, _, statistic = key.rpartition(".p")
        if stem and statistic.replace(".", "").isdigit():
            ladders.setdefault(stem, []).append(key)
    for keys in ladders.values():
        keys.sort(key=lambda key: float(key.rpartition(".p")[2]))
        lows, highs = (sorted(found[key][side] for key in keys) for side in (0, 1))
        found |= dict(zip(keys, zip(lows, highs, strict=True), strict=True))
    good, served = found.get("goodput_requests_per_s"), found.get("throughput_requests_per_s")
    if good is not None and served is not None:
        found["goodput_requests_per_s"] = good[0], min(good[1], served[1])
    return found


def _student(draws: int) -> float:
    """Half an interval in root mean squares of so many draws."""
    from scipy.special import stdtrit

    return float(stdtrit(draws, (1 + CONFIDENCE) / 2))

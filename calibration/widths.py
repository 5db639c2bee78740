"""Learns from executed points how far predictions are off: the numbers of `batchsim.intervals.learned`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import log, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import t

from batchsim.intervals.belief import UNPROBED
from batchsim.intervals.groups import group_of
from batchsim.intervals.learned import NORMAL, Learned, Width, loop_of
from batchsim.operations import HOST_PHASES
from batchsim.result import ScheduleResult
from calibration.executed import Figure, Point, figures_of_all
from calibration.training.points import HOST_BOUND

Floats = npt.NDArray[np.float64]

# The share of the figures told of that intervals hold.
HELD = 0.9
# The tails of errors: Student's t of so many degrees of freedom.
_TAILS = 4.0
# Figures that the distribution counts as: a few points of a group.
_PRIOR = 50
_SPREADS = np.geomspace(0.3, 3.0, 30)
_NO_FLOOR = np.zeros(1)
_FLOORS = np.concatenate([_NO_FLOOR, np.geomspace(0.002, 1.5, 60)])
# The group that says what share of the spread of single costs a whole run shows.
_WHOLE = "throughput"
# Outliers apart: of a normal distribution as many values are within so many standard deviations.
_MOST, _MOST_IN = 0.8, 1.2816
_DEVICE = {"decode": "decode", "forward": "decode", "prefill": "prefill"}
_TRAINED = {"forward": "device", "backward": "device", "optimizer": "optimizer"}
_COPIES = ("device_copy_in", "device_copy_out")


def learn(chosen: Sequence[Point], draws: int, provenance: dict[str, Any], *, workers: int = 1) -> Learned:
    """From executed points, each of which is asked whether it tells."""
    telling = [point for point in chosen if point.told]
    own = [point for point in telling if not point.transferred]
    names: dict[str, list[str]] = defaultdict(list)
    for point in telling:
        names[point.scenario.kind].append(point.name)
    known = Learned(
        schema_version=1, provenance=provenance, fitted_to=dict(names), drift=drifts(own), share={}, widths={}
    )
    # With such a share of the spread of single costs, what draws tell of a whole run holds as many as it should.
    groups = _grouped(figures_of_all(own, known, draws, workers=workers))
    share = {loop: round(width(found[_WHOLE], _NO_FLOOR).spread / NORMAL, 3) for loop, found in sorted(groups.items())}
    known = known.model_copy(update={"share": share})
    groups = _grouped(figures_of_all(telling, known, draws, workers=workers))
    widths = {
        kind: {name: width(figures) for name, figures in sorted(found.items())}
        for kind, found in sorted(groups.items())
    }
    return known.model_copy(update={"widths": widths})


def drifts(telling: Sequence[Point]) -> dict[str, dict[str, float]]:
    """How far the costs of single stages were off: root mean squares of logarithms, by loop and factor."""
    off: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for point in telling:
        of, run = off[loop_of(point.scenario)], point.simulate(point.scenario, point.costs)
        hosts = []
        for schedule, measured in point.measured.items():
            if schedule in run.results:
                predicted = run.results[schedule]
                for factor, ratios in _stages(point.scenario.kind, predicted, measured).items():
                    of[factor] += ratios
                if point.scenario.kind == "training":
                    for factor, ratio in _launches(predicted, measured).items():
                        of[factor].append(ratio)
                else:
                    hosts.append(_host(predicted, measured))
        if hosts:
            middle = sum(hosts) / len(hosts)
            of["host"].append(middle)
            if len(hosts) == 2:  # of two, each is as far from their mean as the other
                for name in ("sync", "async"):
                    of[name].append((hosts[0] - hosts[1]) / sqrt(2))
        of[UNPROBED] += _speeds(point.facts.get("host_speed", 1.0))
    return {
        loop: {factor: round(_spread(values), 4) for factor, values in sorted(found.items()) if values}
        for loop, found in sorted(off.items())
    }


def _stages(kind: str, predicted: ScheduleResult, measured: ScheduleResult) -> dict[str, list[float]]:
    factors = _TRAINED if kind == "training" else _DEVICE
    found: dict[str, list[float]] = defaultdict(list)
    for stage, truth in measured.stage_ms.items():
        told = predicted.stage_ms.get(stage, 0.0)
        factor = "copies" if stage in _COPIES else factors.get(stage)
        if factor is not None and told > 0 and truth > 0:
            found[factor].append(log(truth / told))
    return found


def _host(predicted: ScheduleResult, measured: ScheduleResult) -> float:
    """Of all the host's phases together but for the wait."""
    phases = [name for name in HOST_PHASES if name != "wait" and name in measured.stage_ms]
    return log(sum(measured.stage_ms[name] for name in phases) / sum(predicted.stage_ms[name] for name in phases))


def _launches(predicted: ScheduleResult, measured: ScheduleResult) -> dict[str, float]:
    """Of the two passes' launches, where the host bounds them: elsewhere a launch call waits for the device."""
    passes = ("forward", "backward")
    host = {name: predicted.stage_ms[f"launch_{name}"] for name in passes}
    accumulated = predicted.counts["micro_batches"] / predicted.counts["steps"]
    if sum(host.values()) < HOST_BOUND * accumulated * sum(predicted.stage_ms[name] for name in passes):
        return {}
    off = [log(measured.stage_ms[f"launch_{name}"] / host[name]) for name in passes]
    return {"host": sum(off) / 2, "backward": (off[1] - off[0]) / sqrt(2)}


def _speeds(speed: float | Mapping[str, Sequence[float]]) -> list[float]:
    """The logarithms of the speeds that were measured beside a point."""
    each = [sum(pair) / len(pair) for pair in speed.values()] if isinstance(speed, Mapping) else [speed]
    return [log(value) for value in each]


def _grouped(found: Sequence[Figure]) -> dict[str, dict[str, list[Figure]]]:
    groups: dict[str, dict[str, list[Figure]]] = defaultdict(lambda: defaultdict(list))
    for figure in found:
        groups[figure.kind][group_of(figure.key)].append(figure)
    return groups


def width(found: Sequence[Figure], floors: Floats = _FLOORS) -> Width:
    """How wide a group's intervals are.

    The ratio of `spread` to `floor` is the likeliest if errors are Student's t, with a scale that is the root of the
    sum of the squares of the two; how large both are is then such that `HELD` of the figures are inside. Of few figures
    that share says little, and it is drawn towards that of the distribution. With a floor, draws count no less than
    they tell: what is added to their spread, as by a transfer, must show.
    """
    errors = np.abs([figure.error for figure in found])
    offsets = np.array([figure.offset for figure in found])
    usual = max(float(np.quantile(errors, 0.9)), 1e-9)
    _, spread, floor = min(
        (_unlikely(errors, np.hypot(spread * offsets, floor * usual)), float(spread), float(floor) * usual)
        for spread in _SPREADS
        for floor in floors
    )
    count = len(errors)
    ratios = errors / np.maximum(np.hypot(spread * offsets, floor), 1e-12)
    level = min(HELD * (count + 1) / count, 1.0)
    held = float(np.quantile(ratios, level))
    by = (count * held + _PRIOR * float(t.ppf((1 + HELD) / 2, _TAILS))) / (count + _PRIOR)
    spread, floor = spread * by, floor * by
    if spread < NORMAL and len(floors) > 1:
        left = np.maximum(errors**2 - (NORMAL * offsets) ** 2, 0.0)
        spread, floor = NORMAL, sqrt(float(np.quantile(left, level))) * by / max(held, 1e-12)
    return Width(spread=round(spread, 4), floor=float(f"{floor:.3g}"))


def _unlikely(errors: Floats, scales: Floats) -> float:
    """Minus the mean logarithm of the likelihood, but for a constant."""
    scales = np.maximum(scales, 1e-12)
    return float(np.mean(np.log(scales) + (_TAILS + 1) / 2 * np.log1p((errors / scales) ** 2 / _TAILS)))


def _spread(values: Sequence[float]) -> float:
    """The standard deviation, about 0, of a normal distribution with as many values as far off as most of these."""
    return float(np.quantile(np.abs(values), _MOST)) / _MOST_IN

"""How far off a profile's costs may be: a standard deviation of the logarithm for each factor of `perturb`.

From the calibration: the residuals of the profile's fits, and how far its curves are off where a point is left out and
interpolated from its neighbours. From executions: how far the same costs were off on other days (`learned`). From the
transfer to another device: its own spread. The three are independent, and add up as variances.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import hypot, log, sqrt
from statistics import fmean

from batchsim.profile import DecodeCurve, LoopFit, Profile, line
from batchsim.training_profile import Curve, PrecisionFit, TrainingProfile

# Factors that are moved together, by one column of the design: hardly a figure depends on both.
SERVING_COLUMNS = (("host",), ("sync",), ("async",), ("decode",), ("shape",), ("prefill",), ("copies", "beside"))
TRAINING_COLUMNS = (("host",), ("calls",), ("backward",), ("device",), ("shape",), ("optimizer",), ("copies",))

# What is added to the host's spread where its speed was not measured beside the run.
UNPROBED = "unprobed"
# The parts of a transfer's spread, and the factors that they widen.
_TRANSFERRED = {"decode": ("decode",), "prefill": ("prefill",), "host": ("host",), "copies": ("copies",)}
# A batch whose phases weigh as they do in most.
_TYPICAL_SEQS = 32
# An error of linear interpolation grows with the square of the distance between points, which leaving one out doubles.
_LEFT_OUT = 4.0


def columns(profile: Profile | TrainingProfile) -> tuple[tuple[str, ...], ...]:
    """The factors of a profile; those that are moved together side by side."""
    return SERVING_COLUMNS if isinstance(profile, Profile) else TRAINING_COLUMNS


def spreads(
    profile: Profile | TrainingProfile, loops: Iterable[str], drift: Mapping[str, float], share: float, *, probed: bool
) -> dict[str, float]:
    """The standard deviation of each factor's logarithm, for a run in `loops`; `drift` and `share` as in `Learned`.

    `probed`: the host's speed was measured beside the run, so that only what such a probe leaves is uncertain of it.
    """
    of_costs = _of_serving(profile, loops) if isinstance(profile, Profile) else _of_training(profile)
    names = {*of_costs, *drift} - {UNPROBED}
    found = {name: share * hypot(of_costs.get(name, 0.0), drift.get(name, 0.0)) for name in sorted(names)}
    if not probed:
        found["host"] = hypot(found.get("host", 0.0), drift.get(UNPROBED, 0.0))
    transfer = getattr(profile, "transfer", None)
    for part, spread in transfer.spread.items() if transfer is not None else ():
        for name in _TRANSFERRED.get(part, ()):
            found[name] = hypot(found.get(name, 0.0), spread)
    return found


def _of_serving(profile: Profile, loops: Iterable[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in loops:
        if name in profile.loops:
            schedule = name.split("/")[0]
            found[schedule] = max(found.get(schedule, 0.0), _loop_spread(profile.loops[name]))
    found["decode"] = _repeated(profile.cells)
    found["shape"] = _root_mean_square([each for curve in profile.device.decode for each in _left_out(curve)])
    found["prefill"] = _root_mean_square([log(1 + each) for each in profile.device.prefill.residuals.values()])
    return found


def _loop_spread(loop: LoopFit) -> float:
    """By how much the time of all of a loop's phases together is off, cell by cell."""
    fits = {name: fit for name, fit in loop.phases.items() if fit.residuals and name != "wait"}
    weights = {name: fit.mean_ns(_TYPICAL_SEQS) for name, fit in fits.items()}
    cells = {cell for fit in fits.values() for cell in fit.residuals}
    off = []
    for cell in sorted(cells):
        known = [name for name in fits if cell in fits[name].residuals]
        whole = sum(weights[name] for name in known)
        if whole:
            off.append(sum(weights[name] * fits[name].residuals[cell] for name in known) / whole)
    return _root_mean_square(off)


def _repeated(cells: Sequence[Mapping[str, object]]) -> float:
    """By how much the same decodes differ from one measurement to another, in the two schedules."""
    seen: dict[tuple[tuple[str, str], ...], list[float]] = {}
    for each in cells:
        cell, stages = each.get("cell"), each.get("stages")
        if not isinstance(cell, dict) or not isinstance(stages, dict) or not cell.get("graphs") or cell.get("chunk"):
            continue
        stage = stages.get("decode") or stages.get("forward")
        if isinstance(stage, dict) and stage.get("mean_ns"):
            key = tuple(sorted((name, repr(value)) for name, value in cell.items() if name != "schedule"))
            seen.setdefault(key, []).append(log(float(stage["mean_ns"])))
    off = [each - fmean(values) for values in seen.values() if len(values) > 1 for each in values]
    return _root_mean_square(off) * sqrt(2)  # of two from their mean


def _left_out(curve: DecodeCurve) -> list[float]:
    xs, ys = curve.kv_tokens, curve.ns
    return _interpolated(xs, ys)


def _interpolated(xs: Sequence[int], ys: Sequence[float]) -> list[float]:
    """Relative errors of a piecewise linear curve between its points, by those of points left out."""
    found = []
    for i in range(1, len(xs) - 1):
        told = line(xs[i], (xs[i - 1], xs[i + 1]), (ys[i - 1], ys[i + 1]))
        if told > 0 and ys[i] > 0:
            found.append(log(told / ys[i]) / _LEFT_OUT)
    return found


def _of_training(profile: TrainingProfile) -> dict[str, float]:
    fits: list[PrecisionFit] = list(profile.precisions.values())
    curves: list[Curve] = [curve for fit in fits for curve in fit.device.values()]
    return {
        "device": _root_mean_square([log(1 + each) for fit in fits for each in fit.residuals.values()]),
        "shape": _root_mean_square([each for curve in curves for each in _interpolated(curve.tokens, curve.ns)]),
    }


def _root_mean_square(values: Sequence[float]) -> float:
    return sqrt(fmean(each * each for each in values)) if values else 0.0

"""Predictions of the tile level beside what was timed on a device: errors, and what following them costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from batchsim.tiles.compare import MARGIN, margin_of, tiles_of
from batchsim.tiles.policy import STREAM_SYNC
from batchsim.tiles.profile import TileProfile
from batchsim.tiles.shapes import Tiling
from calibration.tile_fit import chain_ns, own, policy_of
from calibration.tile_runs import LIBRARY, Shape, Timing


@dataclass(frozen=True, slots=True)
class Point:
    """A timed chain and its predicted time, nanoseconds."""

    timing: Timing
    predicted_ns: float

    @property
    def error(self) -> float:
        """Relative, of the time."""
        return self.predicted_ns / self.timing.ns - 1


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the predictions say about one shape, and what that is worth.

    baseline: StreamSync in the tilings that are predicted to be fastest under it. chosen: the fastest prediction of
    those believed, the baseline unless it is faster by the margin. same: StreamSync in the chosen tilings. best: the
    fastest as timed. library: the framework's own kernels, ns.
    """

    shape: Shape
    baseline: Point
    chosen: Point
    same: Point
    best: Point
    library_ns: float

    @property
    def regret(self) -> float:
        """By how much the chosen one is slower than the best."""
        return self.chosen.timing.ns / self.best.timing.ns - 1

    @property
    def gain(self) -> float:
        """Of the chosen over the better of the two under StreamSync, as timed."""
        return 1 - self.chosen.timing.ns / min(self.baseline.timing.ns, self.same.timing.ns)


def predict(timings: Iterable[Timing], profile: TileProfile, workers: int = 2) -> list[Point]:
    """The predicted times of our own kernels' timings."""
    kept = own(timings)
    with ProcessPoolExecutor(workers) as pool:
        found = pool.map(_predicted_ns, kept, [profile] * len(kept), chunksize=8)
        return [Point(timing, ns) for timing, ns in zip(kept, found, strict=True)]


def _predicted_ns(timing: Timing, profile: TileProfile) -> float:
    return chain_ns(policy_of(timing), profile.costs, profile.device)


def gain_errors(points: Sequence[Point]) -> list[tuple[Timing, float, float]]:
    """(timing, predicted, measured) gain of every policy over StreamSync in the same tilings."""
    baselines = {(p.timing.shape, p.timing.tilings): p for p in points if p.timing.policy == STREAM_SYNC}
    found = []
    for point in points:
        if point.timing.policy != STREAM_SYNC:
            base = baselines[point.timing.shape, point.timing.tilings]
            predicted, measured = 1 - point.predicted_ns / base.predicted_ns, 1 - point.timing.ns / base.timing.ns
            found.append((point.timing, predicted, measured))
    return found


def margins_of(points: Sequence[Point]) -> dict[str, float]:
    """By the tiles of chains, what nine in ten of the predicted gains stay within of the measured ones, if above."""
    over: dict[str, list[float]] = defaultdict(list)
    for timing, predicted, measured in gain_errors(points):
        over[tiles_of(policy_of(timing).chain)].append(predicted - measured)
    return {tiles: round(max(float(np.quantile(errors, 0.9)), 0.0), 4) for tiles, errors in sorted(over.items())}


def verdicts(timings: Iterable[Timing], points: Sequence[Point], margins: Mapping[str, float]) -> list[Verdict]:
    """One for each shape."""
    library = {timing.shape: timing.ns for timing in timings if timing.policy == LIBRARY}
    by_shape: dict[Shape, list[Point]] = defaultdict(list)
    for point in points:
        by_shape[point.timing.shape].append(point)
    return [_verdict(shape, some, library[shape], margins) for shape, some in by_shape.items()]


def policy_regrets(points: Sequence[Point], margins: Mapping[str, float]) -> list[float]:
    """For every shape in every tiling, by how much the chosen policy is slower than the best one."""
    groups: dict[tuple[Shape, tuple[Tiling, ...]], list[Point]] = defaultdict(list)
    for point in points:
        groups[point.timing.shape, point.timing.tilings].append(point)
    return [_verdict(shape, some, 0.0, margins).regret for (shape, _), some in groups.items()]


def _verdict(shape: Shape, points: Sequence[Point], library_ns: float, margins: Mapping[str, float]) -> Verdict:
    streams = {point.timing.tilings: point for point in points if point.timing.policy == STREAM_SYNC}

    def believed(point: Point) -> bool:
        limit = streams[point.timing.tilings].predicted_ns * (1 - margin_of(policy_of(point.timing).chain, margins))
        return point.predicted_ns < limit

    def predicted(point: Point) -> float:
        return point.predicted_ns

    baseline = min(streams.values(), key=predicted)
    fastest = min(filter(believed, points), key=predicted, default=baseline)
    chosen = fastest if fastest.predicted_ns < baseline.predicted_ns * (1 - MARGIN) else baseline
    best = min(points, key=lambda point: point.timing.ns)
    return Verdict(shape, baseline, chosen, streams[chosen.timing.tilings], best, library_ns)


def summary(timings: Sequence[Timing], points: Sequence[Point], margins: Mapping[str, float]) -> list[str]:
    """The accuracy over all shapes, a line a figure."""
    told = verdicts(timings, points, margins)
    errors = np.array([point.error for point in points])
    gains = np.array([(predicted - measured) * 100 for _, predicted, measured in gain_errors(points)])
    chosen = np.array([verdict.chosen.error for verdict in told])
    regrets = np.array([verdict.regret for verdict in told])
    policies = np.array(policy_regrets(points, margins))
    losses = [verdict for verdict in told if verdict.gain < -0.01]
    best = max(((measured, timing) for timing, _, measured in gain_errors(points)), key=lambda found: found[0])
    ahead = [verdict for verdict in told if verdict.best.timing.ns < verdict.library_ns]
    return [
        f"{len(told)} shapes, {len(points)} chains timed.",
        (
            f"Time: median error {np.median(np.abs(errors)):.1%} (signed {np.median(errors):+.1%}), nine in ten within "
            f"{np.quantile(np.abs(errors), 0.9):.1%}; of the chosen ones {np.median(np.abs(chosen)):.1%}."
        ),
        (
            f"Gain over StreamSync: median error {np.median(np.abs(gains)):.2f} points, nine in ten within "
            f"{np.quantile(np.abs(gains), 0.9):.1f}."
        ),
        (
            f"Chosen policy within 2% of the best of its tiles: {np.mean(policies <= 0.02):.0%} of {len(policies)}; "
            f"chosen tiles and policy within 2% of the best of all: {np.mean(regrets <= 0.02):.0%} of {len(regrets)}."
        ),
        f"Chosen slower than StreamSync by over 1%: {len(losses)} of {len(told)}"
        + "".join(f"; {verdict.shape.name} {verdict.gain:+.1%}" for verdict in losses)
        + ".",
        f"Largest gain of the same kernels: {best[0]:.1%}, {best[1].shape.name}, {best[1].policy}.",
        f"Faster than the framework's own: {len(ahead)} of {len(told)}.",
    ]

"""What is known of a traced loop's true times, as draws.

A trace is off in three ways: the host is slower by every event that the profiler records, the host's speed was another
when the loop ran without a profiler, and the device's time may be another too (longer contexts, clocks, gaps that
tracing makes between a graph's nodes). Each has a prior, fitted on traces with a known step time
(`calibration/validation/learn`). Where the untraced step time is known, the host's scale is solved for so that the
replayed step equals it, draw by draw, and a draw counts as much as that scale is plausible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, qmc, t

from batchsim.learned import Kernels, Operation
from batchsim.whatif.replay import Array, Scales
from batchsim.whatif.replay import replay as replayed

DRAWS = 256
# Priors: the median, and the standard deviation of the logarithm.
HOST = (1.0, 0.25)
EVENT_NS = (1_300.0, 0.45)
NODE_NS = (20.0, 0.5)
DEVICE = (1.0, 0.02)
GAP_NS = (80.0, 0.5)
ADDED = (1.0, 0.5)
TIMER = (1.0, 0.1)  # Of timers around phases, whose means or medians are of other steps than the step's.
# The host's scale has a heavy tail, degrees of freedom: a shared host may be three times as slow as a moment before.
TAIL = 3.0
# The untraced steps may come later than the traced ones, with longer contexts: in half of the draws the device takes
# longer, by half a normal of this standard deviation, the share of attention in its time in proportion.
LATER, LATER_ATTENTION = 0.02, 1.2
# Dense matrix products take longer on a device that is always busy than on one that rests: the power limit lowers the
# clocks. Mean and standard deviation; from `RESTING` of the time on they are as fast as they get.
THROTTLE = (0.05, 0.04)
RESTING = 0.75
# How far a step time is from what any scales give, standard deviation of the logarithm.
OFF = 0.01
# The profiler's share explains a host's scale this far from its prior's median, as a logarithm.
USUAL = 0.35
HOST_BOUNDS = (0.02, 20.0)
CLOSE = 1e-4
BOUNDED = 0.95  # A device that is busy this share of the time bounds the loop.
_ROUNDS = 30


@dataclass(frozen=True)
class Loop:
    """A loop's steps and what the replay needs of them; `dense`: the device's share in dense matrix products."""

    steps: Sequence[Sequence[Operation]]
    launch_ns: int
    dense: float
    traced_ns: float
    overlapped: bool = False

    @property
    def kernels_ns(self) -> float:
        """Device time of a step as traced."""
        total = sum(sum(o.device_ns) for step in self.steps for o in step if isinstance(o, Kernels))
        return total / len(self.steps)


def prior(attention: float = 0.0, known: frozenset[str] = frozenset()) -> Scales:
    """Draws before the untraced step time is known."""
    seed = np.random.SeedSequence(0, spawn_key=(crc32(b"whatif"),))
    normal = norm.ppf(np.clip(qmc.Sobol(9, seed=np.random.default_rng(seed)).random(DRAWS), 1e-6, 1 - 1e-6)).T

    later = LATER + LATER_ATTENTION * attention

    def lognormal(draws: Array, median: float, sd: float) -> Array:
        return median * np.exp(sd * draws)

    return Scales(
        host=lognormal(normal[0], *HOST),
        event_ns=lognormal(normal[1], *EVENT_NS),
        node_ns=lognormal(normal[2], *NODE_NS),
        device=lognormal(normal[3], *DEVICE) * np.exp(later * np.maximum(normal[6], 0)),
        gap_ns=lognormal(normal[4], *GAP_NS),
        added=lognormal(normal[5], *ADDED),
        throttle=np.maximum(THROTTLE[0] + THROTTLE[1] * normal[7], 0),
        timer=lognormal(normal[8], *TIMER),
        known=known,
    )


def informed(scales: Scales, loop: Loop, step_ns: float) -> tuple[Scales, float]:
    """The draws after the untraced step time, and by how much a replay of them is off it, relatively."""
    scales = warmed(scales, loop, loop.kernels_ns / step_ns, loop.kernels_ns / loop.traced_ns)
    host, off = _solved(scales, loop, step_ns)
    # A scale is as plausible as its prior says; a step that no scale gives, by how far it is off.
    log_weight = t.logpdf(np.log(host / HOST[0]) / HOST[1], TAIL) - 0.5 * (off / OFF) ** 2
    scales_then = replace(scales, host=host)
    if loop.overlapped:
        bounded, stretch = _stretched(scales, loop, step_ns)
        scales_then = replace(
            scales_then,
            host=np.where(bounded, scales.host, host),
            device=np.where(bounded, scales.device * stretch, scales.device),
        )
        likely = t.logpdf(np.log(scales.host / HOST[0]) / HOST[1], TAIL) - 0.5 * (np.log(stretch) / LATER) ** 2
        log_weight = np.where(bounded, likely, log_weight)
        off = np.where(bounded, 0.0, off)
    weight = np.exp(log_weight - log_weight.max())
    chosen = _resampled(weight / weight.sum())
    return _taken(scales_then, chosen), float(off[chosen].mean())


def _stretched(scales: Scales, loop: Loop, step_ns: float) -> tuple[NDArray[np.bool_], Array]:
    """Of which draws the device bounds a loop, and how much longer its time must be for the step to be `step_ns`.

    Where host and device overlap, the step tells of the longer of the two, and of the host only where that is it.
    """
    now = replayed(loop.steps, scales, loop.launch_ns)
    return now.busy > BOUNDED, step_ns / now.step_ns


def _solved(scales: Scales, loop: Loop, step_ns: float) -> tuple[Array, Array]:
    """The host's scale at which the replayed step is `step_ns`, and how far it is off where none is; for each draw.

    A step grows with the host's scale, piecewise linearly, so that the secant of the two ends finds it in a few
    rounds; the end that stays is weighed down (the Illinois rule).
    """

    def off_at(host: Array) -> Array:
        return replayed(loop.steps, replace(scales, host=host), loop.launch_ns).step_ns / step_ns - 1

    low, high = (np.full_like(scales.host, bound) for bound in HOST_BOUNDS)
    at_low, at_high = off_at(low), off_at(high)
    stayed = np.zeros_like(low)
    for _ in range(_ROUNDS):
        host = np.clip(low + (high - low) * -at_low / np.maximum(at_high - at_low, 1e-12), low, high)
        off = off_at(host)
        if np.abs(off[(at_low < 0) & (at_high > 0)]).max(initial=0) < CLOSE:
            break
        longer = off > 0
        at_low = np.where(longer, np.where(stayed > 0, at_low / 2, at_low), off)
        at_high = np.where(longer, off, np.where(stayed < 0, at_high / 2, at_high))
        low, high = np.where(longer, low, host), np.where(longer, host, high)
        stayed = np.where(longer, 1.0, -1.0)
    return host, off


def warmed(scales: Scales, loop: Loop, busy: float | Array, before: float | Array) -> Scales:
    """The scales of a device that is `busy` this share of the time, where it was `before` so far."""

    def longer(share: float | Array) -> Array:
        return 1 + scales.throttle * loop.dense * np.clip((np.asarray(share) - RESTING) / (1 - RESTING), 0, 1)

    return replace(scales, device=scales.device * longer(busy) / longer(before))


def drifted(scales: Scales) -> Scales:
    """The scales of a run at another moment.

    Where the host was much faster or slower without the profiler than with it, more than the profiler's share
    explains, its speed drifts, and which of the two is usual is not known: half of the draws have it anywhere between
    them.
    """
    away = np.log(scales.host / HOST[0])
    unexplained = np.sign(away) * np.maximum(np.abs(away) - USUAL, 0)
    order = np.random.default_rng(np.random.SeedSequence(0, spawn_key=(2,))).permutation(len(away))
    share = np.maximum(2 * order / len(away) - 1, 0)
    return replace(scales, host=scales.host * np.exp(-unexplained * share))


def _taken(scales: Scales, chosen: np.ndarray) -> Scales:
    arrays = {name: value[chosen] for name, value in vars(scales).items() if isinstance(value, np.ndarray)}
    return replace(scales, **arrays)


def _resampled(weight: Array) -> np.ndarray:
    """Indices drawn by systematic resampling: as often as their weight says, with no randomness left."""
    places = (np.arange(len(weight)) + 0.5) / len(weight)
    return np.searchsorted(np.cumsum(weight), places).clip(max=len(weight) - 1)

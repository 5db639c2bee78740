"""What a loop would do under other schedules, on another host, with or without graphs: the answer to `batchsim
whatif`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from batchsim.learned import LearnedProfile, Operation
from batchsim.whatif.belief import Loop, drifted, informed, prior, warmed
from batchsim.whatif.graphs import captured, has_graphs, one_by_one
from batchsim.whatif.phases import fixed
from batchsim.whatif.replay import Array, Moment, Scales, replay
from batchsim.whatif.tile_sync import apply, saved_ns
from batchsim.whatif.variants import asynchronous, is_overlapped, plain, synchronous

SCHEMA_VERSION = 1
# What no prior covers, standard deviation of the logarithm: fitted on the residuals of
# `calibration/validation/learn/fit`.
RESIDUAL = 0.025
# The loop as it is has been timed; its step varies by about this much from one run to the next.
AS_IS = 0.01
# A gain smaller than this, either way, is none.
NOTHING = 0.01
HOST_SPEEDS = (0.5, 2.0)

Steps = Sequence[Sequence[Operation]]


@dataclass(frozen=True)
class Prediction:
    """A schedule's step, milliseconds: the median, and an interval that holds it in 9 of 10 cases.

    `throughput_gain` is over the loop as it is, 0.1 for a tenth more steps a second. `device_busy_fraction` is the
    share of the step in which kernels or graphs are under way, from a forward's first kernel to its last. `host_ms`
    the host's own work in a step, waits left out; `exposed_ms` of it, by phase, what the device idles through.
    """

    step_ms: float
    step_ms_interval: tuple[float, float]
    throughput_gain: float
    throughput_gain_interval: tuple[float, float]
    device_busy_fraction: float
    host_ms: float
    bound_by: str
    exposed_ms: dict[str, float] = field(default_factory=dict)
    moments: tuple[Moment, ...] = ()


@dataclass(frozen=True)
class Answer:
    """All predictions by schedule; `as_is` names the one that was traced."""

    profile: LearnedProfile
    steady_step_ms: float | None
    as_is: str
    schedules: dict[str, Prediction]
    refused: dict[str, str]
    sentences: tuple[str, ...]
    conflict: float
    host_scale: float

    def to_json(self) -> dict[str, Any]:
        """The answer as plain data."""
        names = [name for name in Prediction.__dataclass_fields__ if name != "moments"]
        return {
            "schema_version": SCHEMA_VERSION,
            "source": self.profile.source,
            "device": self.profile.device,
            "steps": self.profile.steps_in_trace,
            "steps_found_by": self.profile.found_by,
            "steady_step_ms": self.steady_step_ms,
            "as_is": self.as_is,
            "schedules": {
                schedule: {name: getattr(prediction, name) for name in names}
                for schedule, prediction in self.schedules.items()
            },
            "not_predicted": self.refused,
            "sentences": list(self.sentences),
            "notes": self.profile.notes,
        }


def whatif(
    profile: LearnedProfile,
    steady_step_ms: float | None = None,
    progress: Callable[[float], None] | None = None,
) -> Answer:
    """Predict the loop of `profile` under other schedules.

    `steady_step_ms` is its untraced step; without it that of the profile, and without that one the step is predicted
    from the trace alone, with wider intervals.
    """
    from batchsim.whatif.sentences import sentences

    steady = steady_step_ms or profile.steady_step_ms
    steps, known = fixed(plain(profile.steps), profile.phases_ms)
    traced_ns = sum(step.traced_ns for step in profile.steps) / len(profile.steps)
    loop = Loop(steps, profile.launch_ns, profile.dense, traced_ns, is_overlapped(steps))
    scales, conflict = prior(profile.attention, known), 0.0
    if steady is not None:
        scales, conflict = informed(scales, loop, steady * 1e6)
    as_is = "async" if is_overlapped(steps) else "sync"
    variants, refused = _variants(steps, profile)
    tile = saved_ns(profile)
    if isinstance(tile, str):
        refused["tile"] = tile
    else:
        faster = apply(steps, tile[0])
        variants |= {"sync_tile": (synchronous(faster), 1.0), "async_tile": (asynchronous(faster), 1.0)}
    asked = _Asked(loop, scales, steady)
    now_ns = asked.step_ns(steps)
    schedules: dict[str, Prediction] = {}
    for done, (name, (changed, speed)) in enumerate(variants.items()):
        schedules[name] = asked.predict(changed, speed, now_ns, as_it_is=name == as_is and steady is not None)
        if progress is not None:
            progress((done + 1) / len(variants))
    answer = Answer(profile, steady, as_is, schedules, refused, (), conflict, float(np.median(scales.host)))
    told = [] if isinstance(tile, str) else [tile[1]]
    return replace(answer, sentences=(*sentences(answer), *told))


def _variants(steps: Steps, profile: LearnedProfile) -> tuple[dict[str, tuple[Steps, float]], dict[str, str]]:
    """Steps and the host's speed of each schedule, and why others are not predicted."""
    both = {"sync": synchronous(steps), "async": asynchronous(steps)}
    made: dict[str, tuple[Steps, float]] = {name: (changed, 1.0) for name, changed in both.items()}
    refused: dict[str, str] = {}
    if has_graphs(steps):
        launched = one_by_one(steps)
        made["sync_no_graphs"] = synchronous(launched), 1.0
        made["async_no_graphs"] = asynchronous(launched), 1.0
    elif (graphs := captured(steps, profile.queued_gap_ns)) is not None:
        made["sync_graphs"] = synchronous(graphs), 1.0
        made["async_graphs"] = asynchronous(graphs), 1.0
    else:
        refused["graphs"] = "no run of kernels that is long enough to capture"
    for speed in HOST_SPEEDS:
        for name, changed in both.items():
            made[f"{name}_host_x{speed:g}"] = changed, speed
    return made, refused


@dataclass
class _Asked:
    loop: Loop
    scales: Scales
    steady_ms: float | None

    def step_ns(self, steps: Steps) -> Array:
        return replay(steps, self.scales, self.loop.launch_ns).step_ns

    def predict(self, steps: Steps, speed: float, now_ns: Array, *, as_it_is: bool) -> Prediction:
        loop, scales = self.loop, replace(self.scales, host_speed=speed)
        if not as_it_is:
            scales = drifted(scales)
        first = replay(steps, scales, loop.launch_ns)
        busy = first.busy if not as_it_is else loop.kernels_ns / now_ns
        before = np.minimum(loop.kernels_ns / now_ns, 1.0)
        scales = warmed(scales, loop, busy, before)
        ended = replay(steps, scales, loop.launch_ns)
        step_ns = ended.step_ns * np.exp((AS_IS if as_it_is else RESIDUAL) * _residuals(len(now_ns)))
        low, middle, high = np.percentile(step_ns, (5, 50, 95))
        if as_it_is and self.steady_ms is not None:
            middle = self.steady_ms * 1e6
        gain = np.percentile(now_ns / step_ns - 1, (5, 95))
        usual_ns, host_ns, share = (float(np.median(each)) for each in (ended.step_ns, ended.host_ns, ended.busy))
        # Where the step is known all draws have it, and differ in what is in it.
        away = (np.abs(ended.step_ns - usual_ns) + np.abs(ended.host_ns - host_ns)) / usual_ns
        typical = int(np.argmin(away + np.abs(ended.busy - share)))
        moments = replay(steps, scales, loop.launch_ns, moments_of=typical).moments
        exposed = exposed_ns(moments)
        per_step = {phase: ns / len(steps) / 1e6 for phase, ns in exposed.items()}
        return Prediction(
            step_ms=float(middle) / 1e6,
            step_ms_interval=(float(low) / 1e6, float(high) / 1e6),
            throughput_gain=float(np.median(now_ns)) / float(middle) - 1,
            throughput_gain_interval=(float(gain[0]), float(gain[1])),
            device_busy_fraction=share,
            host_ms=host_ns / 1e6,
            bound_by=_bound(share, host_ns / usual_ns),
            exposed_ms={phase: ms for phase, ms in sorted(per_step.items(), key=lambda i: -i[1]) if ms >= 1e-3},
            moments=moments,
        )


def _bound(busy: float, host: float) -> str:
    """Which of the two is (nearly) never idle."""
    if busy >= 0.97 and busy >= host:
        return "device"
    return "host" if host >= 0.97 else "host and device by turns"


def _residuals(draws: int) -> Array:
    """Normal quantiles, one a draw, in an order that has nothing to do with the draws."""
    from scipy.stats import norm

    order = np.random.default_rng(np.random.SeedSequence(0, spawn_key=(1,))).permutation(draws)
    return np.asarray(norm.ppf((order + 0.5) / draws))


def exposed_ns(moments: Sequence[Moment]) -> dict[str, float]:
    """Host work by phase during which no kernels were under way, nanoseconds.

    The steps follow themselves: kernels that outlast the last of them are under way as the first begins.
    """
    host = [moment for moment in moments if moment.lane == "host"]
    period = max((m.end_ns for m in host), default=0.0) - min((m.start_ns for m in host), default=0.0)
    kernels = [(m.start_ns, m.end_ns) for m in moments if m.what in ("kernels", "graph") and m.lane != "host"]
    device = sorted((start - turn, end - turn) for start, end in kernels for turn in (period, 0.0))
    starts = np.array([start for start, _ in device])
    ends = np.maximum.accumulate(np.array([end for _, end in device])) if device else starts
    idle = np.stack((np.append(-np.inf, ends), np.append(starts, np.inf)), axis=1)
    idle = idle[idle[:, 1] > idle[:, 0]]
    exposed: defaultdict[str, float] = defaultdict(float)
    for moment in host:
        if moment.what != "wait":
            overlap = np.minimum(idle[:, 1], moment.end_ns) - np.maximum(idle[:, 0], moment.start_ns)
            exposed[moment.what] += float(overlap.clip(min=0).sum())
    return dict(exposed)

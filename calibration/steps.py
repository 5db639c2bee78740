"""Where the steps of a traced loop are: by annotations that repeat, or by launches that do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from batchsim.errors import InputError
from calibration.kineto import KINDS, Trace

MIN_STEPS = 4  # The first and the last of a trace are seldom whole.
HOW = "`with calibration.record(FILE)` around the loop, or torch.profiler with ProfilerActivity.CPU and CUDA over 10 steps"
RUNTIME, ANNOTATION = KINDS.index("runtime"), KINDS.index("annotation")
ACTIVITIES = tuple(KINDS.index(kind) for kind in ("kernel", "memcpy", "memset"))

# An iteration's number at the end of an annotation's name: ProfilerStep#12, step 12, iter_12.
_NUMBER = re.compile(r"[#_ :\-]*\d+$")
# Annotations cover nearly the same launches if they differ by this share; then the longer ones are the steps.
_ALIKE = 0.02
# Of the periods between two occurrences of a launch, how many must be alike for it to mark a step.
_REGULAR = 0.6


@dataclass(frozen=True)
class Steps:
    """`starts_ns`: where each step begins, and where the last one ends; `thread`: the one that runs the loop."""

    starts_ns: NDArray[np.int64]
    thread: int
    found_by: str


def refuse(trace: Trace, found: str, wanted: str) -> NoReturn:
    raise InputError(trace.source, "", found, wanted)


def launches_of(trace: Trace) -> NDArray[np.int64]:
    """Indices of the runtime calls that put something on the device, in order of time.

    Raises:
        InputError: there are none, or they went to several devices.
    """
    on_device = np.flatnonzero(np.isin(trace.kind, ACTIVITIES))
    if not on_device.size:
        refuse(trace, "no kernels and no copies of a device", f"a trace with the device's events: {HOW}")
    devices = sorted({trace.streams[lane][0] for lane in np.unique(trace.lane[on_device])})
    if len(devices) > 1:
        wanted = "one device: record one process of the loop, with one GPU visible to it (CUDA_VISIBLE_DEVICES)"
        refuse(trace, f"activity on devices {', '.join(map(str, devices))}", wanted)
    calls = np.flatnonzero(trace.kind == RUNTIME)
    launches = calls[np.isin(trace.correlation[calls], trace.correlation[on_device])]
    launches = launches[trace.correlation[launches] >= 0]
    if not launches.size:
        refuse(trace, "device events, but no launch call of the host", f"a trace with the host's events too: {HOW}")
    return launches


def find_steps(trace: Trace) -> Steps:
    """The steps of the loop that launches most of the trace's work.

    Raises:
        InputError: there are none, too few, or they overlap.
    """
    launches = launches_of(trace)
    return _annotated(trace, launches) or _periodic(trace, launches)


def _annotated(trace: Trace, launches: NDArray[np.int64]) -> Steps | None:
    groups: dict[str, list[int]] = {}
    for i in np.flatnonzero(trace.kind == ANNOTATION):
        name = trace.names[trace.name[i]]
        groups.setdefault(_NUMBER.sub("", name) or name, []).append(int(i))
    times = trace.start_ns[launches]
    best: tuple[float, int, str] | None = None
    for name, members in groups.items():
        starts, ends = trace.start_ns[members], trace.end_ns[members]
        inside = np.searchsorted(times, ends) - np.searchsorted(times, starts)
        with_launches = int((inside > 0).sum())
        if with_launches < max(MIN_STEPS, len(members) - 1):
            continue
        share = float(inside.sum()) / len(launches)
        candidate = (share, int((ends - starts).sum()), name)
        if (
            best is None
            or candidate[0] > best[0] + _ALIKE
            or (candidate[0] > best[0] - _ALIKE and candidate[1] > best[1])
        ):
            best = candidate
    if best is None:
        return None
    name = best[2]
    members = sorted(groups[name], key=lambda i: int(trace.start_ns[i]))
    starts, ends = trace.start_ns[members], trace.end_ns[members]
    if len(members) > 1 and (starts[1:] < ends[:-1]).any():
        wanted = "steps one after the other: trace one loop of one thread, with one annotation around each of its steps"
        refuse(trace, f"steps that overlap (annotation {name!r})", wanted)
    bounds = np.append(starts, ends[-1])
    threads, counts = np.unique(trace.lane[members], return_counts=True)
    return Steps(bounds, int(threads[counts.argmax()]), f"annotation {name!r}")


def _periodic(trace: Trace, launches: NDArray[np.int64]) -> Steps:
    """Steps by the launch that occurs least often and at regular distance in the order of launches."""
    tokens = _tokens(trace, launches)
    values, inverse, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    for token in np.argsort(counts, kind="stable"):
        if counts[token] < MIN_STEPS:
            continue
        places = np.flatnonzero(inverse == token)
        distances = np.diff(places)
        usual = int(np.median(distances))
        alike = [
            np.array_equal(tokens[a : a + usual], tokens[b : b + usual])
            for a, b in pairwise(places)
            if b + usual <= len(tokens)
        ]
        if alike and np.mean(alike) >= _REGULAR and np.mean(distances == usual) >= _REGULAR:
            threads, per_thread = np.unique(trace.lane[launches], return_counts=True)
            anchor = trace.names[values[token] % len(trace.names)]
            starts = trace.start_ns[launches[places]]
            return Steps(starts.astype(np.int64), int(threads[per_thread.argmax()]), f"the period of {anchor[:60]!r}")
    wanted = f"at least {MIN_STEPS} steps, each inside an annotation: {HOW}"
    refuse(trace, "no steps: neither an annotation nor a sequence of launches that repeats", wanted)


def _tokens(trace: Trace, launches: NDArray[np.int64]) -> NDArray[np.int64]:
    """What each launch put on the device, as a number: the name of its first activity, and the call's."""
    activity = np.flatnonzero(np.isin(trace.kind, ACTIVITIES))
    order = activity[np.argsort(trace.correlation[activity], kind="stable")]
    first = order[np.searchsorted(trace.correlation[order], trace.correlation[launches])]
    return trace.name[launches].astype(np.int64) * len(trace.names) + trace.name[first]

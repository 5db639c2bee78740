"""Where the steps of a traced loop are: by annotations that repeat, or by launches that do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from batchsim.errors import InputError
from calibration.kineto import KINDS, Trace

MIN_STEPS = 4  # The first and the last of a trace are seldom whole.
HOW = (
    "`with calibration.record(FILE)` around the loop, "
    "or torch.profiler with ProfilerActivity.CPU and CUDA over 10 steps"
)
RUNTIME, ANNOTATION = KINDS.index("runtime"), KINDS.index("annotation")
ACTIVITIES = tuple(KINDS.index(kind) for kind in ("kernel", "memcpy", "memset"))

# An iteration's number at the end of an annotation's name: ProfilerStep#12, step 12, iter_12.
_DIGITS, _BEFORE_THEM = "0123456789", "#_ :-"
# Annotations cover nearly the same launches if they differ by this share; then the longer ones are the steps.
_ALIKE = 0.02
# Of the periods between two occurrences of a launch, how many must be alike for it to mark a step.
_REGULAR = 0.6
# So many launches at regular distance are tried; what repeats is found within a few.
_TRIED = 100
# Annotations with more of a period between them than this share are parts of steps, whose last one is not seen to end.
_APART = 0.05


@dataclass(frozen=True)
class Steps:
    """`starts_ns`: where each step begins, and where the last one ends; `thread`: the one that runs the loop.

    `marks`: the annotations, by their place in the trace, that steps were found by.
    """

    starts_ns: NDArray[np.int64]
    thread: int
    found_by: str
    marks: frozenset[int] = frozenset()


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
    found = np.flatnonzero(trace.kind == ANNOTATION)
    times = trace.start_ns[launches]
    inside = np.searchsorted(times, trace.end_ns[found]) - np.searchsorted(times, trace.start_ns[found])
    lasted = trace.end_ns[found] - trace.start_ns[found]
    best: tuple[float, int] | None = None
    name, places = "", np.empty(0, np.int64)
    for candidate, alike in _named_alike(trace, found):
        own = _of_one_thread(trace, found, alike, launches)
        if np.count_nonzero(inside[own]) < max(MIN_STEPS, len(own) - 1):
            continue
        share, total = float(inside[own].sum()) / len(launches), int(lasted[own].sum())
        if best is None or share > best[0] + _ALIKE or (share > best[0] - _ALIKE and total > best[1]):
            best, name, places = (share, total), candidate, own
    if best is None:
        return None
    marks = found[places]
    starts, ends = trace.start_ns[marks], trace.end_ns[marks]
    if (starts[1:] < ends[:-1]).any():
        wanted = "steps one after the other: trace one loop of one thread, with one annotation around each of its steps"
        refuse(trace, f"steps that overlap (annotation {name!r})", wanted)
    apart = np.median(starts[1:] - ends[:-1]) > _APART * np.median(np.diff(starts))
    bounds = starts if apart else np.append(starts, ends[-1])
    threads, counts = np.unique(trace.lane[marks], return_counts=True)
    return Steps(bounds, int(threads[counts.argmax()]), f"annotation {name!r}", frozenset(marks.tolist()))


def _named_alike(trace: Trace, annotations: NDArray[np.int64]) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Names without an iteration's number, and the places in `annotations` of those that have it."""
    names = {number: _without_number(trace.names[number]) for number in np.unique(trace.name[annotations]).tolist()}
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for place, number in enumerate(trace.name[annotations].tolist()):
        groups[names[number]].append(place)
    for name, places in groups.items():
        if len(places) >= MIN_STEPS:
            yield name, np.array(places)


def _without_number(name: str) -> str:
    bare = name.rstrip(_DIGITS)
    return (bare.rstrip(_BEFORE_THEM) if bare != name else name) or "#"


def _of_one_thread(
    trace: Trace, annotations: NDArray[np.int64], places: NDArray[np.int64], launches: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The places of the annotations on the only one of their threads that launches, if there is one such; else all."""
    lanes = trace.lane[annotations[places]]
    if (lanes == lanes[0]).all():
        return places
    launching = np.intersect1d(lanes, trace.lane[launches])
    mine = places[np.isin(lanes, launching)]
    return mine if len(launching) == 1 and len(mine) >= MIN_STEPS else places


def _periodic(trace: Trace, launches: NDArray[np.int64]) -> Steps:
    """Steps by the launch that occurs least often and at regular distance in the order of launches."""
    tokens = _tokens(trace, launches)
    values, inverse, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    by_token = np.split(np.argsort(inverse, kind="stable"), np.cumsum(counts)[:-1])
    tried = 0
    order = np.argsort(counts, kind="stable")
    for token in order[counts[order] >= MIN_STEPS]:
        places = by_token[token]
        distances = np.diff(places)
        usual = int(np.median(distances))
        same = distances == usual
        # So many of the periods, and so much of all that is launched in them.
        if same.mean() < _REGULAR or same.sum() * usual < _REGULAR * distances.sum():
            continue
        tried += 1
        if tried > _TRIED:
            break
        alike = [
            np.array_equal(tokens[a : a + usual], tokens[b : b + usual])
            for a, b in pairwise(places)
            if b + usual <= len(tokens)
        ]
        if alike and np.mean(alike) >= _REGULAR:
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

"""Whether a trace agrees with itself.

What a damaged, merged or partial trace lacks is not seen in the steps that are learned from it: a wait whose call is
missing looks like host work, and a kernel without its launch like an idle device. Each doubt is a share of what it
concerns; small ones are told with the answer, and a trace with larger ones is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchsim.learned import Copy, Kernels, Wait, Work
from calibration.kineto import Trace
from calibration.linked import KERNEL, Linked
from calibration.reading import SKEW_NS, WAKE_NS, Placed
from calibration.steps import ACTIVITIES, HOW, RUNTIME, launches_of, refuse

# Times are off by their share of a step: clocks that differ by less than this one change no prediction by more.
SLACK = 0.01
LONG_NS = 200_000  # Host work this long may have a wait in it.
IDLE_NS = 100_000  # A device that rests this long has been waited for.
# A step this many times as long or as short as the usual one is another kind of step; many this unlike are uneven.
UNLIKE, UNEVEN = 4.0, 1.5
LAUNCHES = ("LaunchKernel", "LaunchCooperativeKernel", "GraphLaunch")
COPIES = ("Memcpy", "Memset")

_WHOLE = f"every launch and what it put on the device: {HOW}, and fewer steps if the profiler dropped events"
_ONCE = "each event once: the trace of one recording of one process, not merged with others"
_CLOCKS = "one clock: record again, with nothing else that profiles the device"
_SEEN = f"a trace in which the host waits by synchronising calls, CUDA's runtime events among them: {HOW}"


class Doubt(NamedTuple):
    """`share` of what was looked at is not as it should be; from `told` on it is told, from `refused` on refused."""

    share: float
    told: float
    refused: float
    found: str
    wanted: str


def of_ids(trace: Trace) -> list[str]:
    """What is doubtful about which launch each kernel comes from; all else that is learned relies on it.

    Raises:
        InputError: ids do not tell, as in traces merged of several.
    """
    return _told(trace, _ids(trace, launches_of(trace)))


def of_steps(linked: Linked, placed: Sequence[Placed]) -> list[str]:
    """What is doubtful about a trace whose calls were read as `placed`.

    Raises:
        InputError: so much that its steps say nothing about the loop.
    """
    return _told(
        linked.trace, chain(_launches(linked, placed), _clocks(linked), _waits(linked, placed), _lengths(linked))
    )


def _told(trace: Trace, checked: Iterator[Doubt]) -> list[str]:
    notes: list[str] = []
    for doubt in checked:
        if doubt.share >= doubt.refused:
            refuse(trace, doubt.found, doubt.wanted)
        if doubt.share >= doubt.told:
            notes.append(f"the trace has {doubt.found}")
    return notes


def _ids(trace: Trace, launches: NDArray[np.int64]) -> Iterator[Doubt]:
    """Correlation ids stand for one launch each, of one process, and a launch that is no graph's for one kernel."""
    owners = np.array([trace.threads[lane][0] for lane in trace.lane[launches].tolist()])
    processes, counts = np.unique(owners, return_counts=True)
    found = f"launches by {len(processes)} processes ({', '.join(processes[:4])})"
    yield Doubt(1 - counts.max() / len(launches), 1e-9, 0.05, found, _ONCE)

    order = launches[np.lexsort((trace.start_ns[launches], trace.correlation[launches]))]
    same = trace.correlation[order][1:] == trace.correlation[order][:-1]
    apart = trace.start_ns[order][1:] >= trace.end_ns[order][:-1]
    again = int((same & apart).sum())
    found = f"{again:,} launches that bear the correlation id of another"
    yield Doubt(again / len(launches), 1e-9, 0.01, found, _ONCE)

    graph = np.array(["Graph" in name for name in trace.names], bool)
    single = launches[~graph[trace.name[launches]]]
    kernels = np.sort(trace.correlation[trace.kind == KERNEL])
    own = trace.correlation[single]
    several = int((np.searchsorted(kernels, own, "right") - np.searchsorted(kernels, own) > 1).sum())
    found = f"{several:,} launches of one kernel that launched several"
    yield Doubt(several / len(launches), 1e-9, 0.01, found, _ONCE)


def _launches(linked: Linked, placed: Sequence[Placed]) -> Iterator[Doubt]:
    trace, launches = linked.trace, linked.launches
    begin, end = linked.window
    on_device = np.flatnonzero(np.isin(trace.kind, ACTIVITIES))
    lasted = trace.end_ns - trace.start_ns
    launched = np.isin(trace.correlation[on_device], trace.correlation[launches])
    without = on_device[~launched]
    # Streams are in order: what was launched before the recording comes before what was launched in it.
    first = np.full(len(trace.streams), np.iinfo(np.int64).max)
    np.minimum.at(first, trace.lane[on_device[launched]], trace.start_ns[on_device[launched]])
    without = without[trace.start_ns[without] >= first[trace.lane[without]]]
    share = _share(lasted[without].sum(), lasted[on_device].sum())
    found = f"{len(without):,} kernels and copies ({share:.1%} of the device's time) without the calls that launch them"
    yield Doubt(max(share, 1e-9 * len(without)), 1e-9, 0.05, found, _WHOLE)

    for what, names, refused in (("launches", LAUNCHES, 0.05), ("copies", COPIES, 0.3)):
        named = np.array([any(part in name for part in names) for name in trace.names], bool)
        calls = np.flatnonzero((trace.kind == RUNTIME) & named[trace.name])
        bare = calls[~np.isin(trace.correlation[calls], trace.correlation[on_device])]
        # The driver's call within the runtime's, or the other way round, is the same launch.
        bare = bare[~_touches(linked, bare) & (trace.start_ns[bare] >= begin) & (trace.start_ns[bare] < end)]
        found = f"{len(bare):,} calls of {what} without what they put on the device"
        yield Doubt(_share(len(bare), len(calls)), 1e-9, refused, found, _WHOLE)

    inside = (trace.start_ns[launches] >= begin) & (trace.start_ns[launches] < end)
    ids = len(np.unique(trace.correlation[launches[inside]]))
    kept = sum(_launched(item) for item in placed)
    found = f"{ids - kept:,} launches while the host was in another call: several threads launch at once"
    yield Doubt(_share(ids - kept, ids), 1e-9, 0.05, found, "one loop: trace a process in which one thread launches")


def _touches(linked: Linked, calls: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which calls have a launch in them, or are in one."""
    trace, launches = linked.trace, linked.launches
    starts = trace.start_ns[launches]
    reached = np.maximum.accumulate(trace.end_ns[launches])
    before = np.searchsorted(starts, trace.end_ns[calls], side="right") - 1
    return np.asarray((before >= 0) & (reached[before.clip(min=0)] >= trace.start_ns[calls]))


def _launched(item: Placed) -> int:
    operation = item.operation
    return len(operation.device_ns) if isinstance(operation, Kernels) else int(isinstance(operation, Copy))


def _clocks(linked: Linked) -> Iterator[Doubt]:
    """Nothing begins before its launch, a stream does one thing at a time, and a blocking copy has ended."""
    trace, launches = linked.trace, linked.launches
    slack = _slack_ns(linked)
    on_device = np.flatnonzero(np.isin(trace.kind, ACTIVITIES))
    ids, starts = np.unique(trace.correlation[launches], return_index=True)
    called = trace.start_ns[launches[starts]]
    place = np.searchsorted(ids, trace.correlation[on_device]).clip(max=len(ids) - 1)
    known = ids[place] == trace.correlation[on_device]
    ahead = (called[place] - trace.start_ns[on_device])[known]
    early = int((ahead > slack).sum())
    most = ahead.max(initial=0) / 1e3
    found = f"{early:,} kernels and copies that begin before the calls that launch them, by up to {most:,.0f} us"
    yield Doubt(_share(early, len(ahead)), 1e-9, 0.01, found, _CLOCKS)

    overlap = total = 0
    counts = np.bincount(place[known], minlength=len(ids))
    single = on_device[known][counts[place[known]] == 1]
    for lane in np.unique(trace.lane[single]):
        mine = single[trace.lane[single] == lane]
        begin, end = trace.start_ns[mine], trace.end_ns[mine]
        reached = np.maximum.accumulate(end)
        overlap += int((np.minimum(reached[:-1], end[1:]) - begin[1:]).clip(min=0).sum())
        total += int((end - begin).sum())
    share = _share(overlap, total)
    found = f"kernels that overlap on one stream, by {share:.0%} of their time"
    yield Doubt(share, 0.05, 0.4, found, _ONCE)


def _waits(linked: Linked, placed: Sequence[Placed]) -> Iterator[Doubt]:
    """Waits end when something on the device does, and host work does not."""
    trace, starts = linked.trace, linked.steps.starts_ns
    # What the first steps wait for may have been launched before the recording.
    late = [item for item in placed if item.start >= starts[2]]
    span = max(int(starts[-1] - starts[2]), 1)
    waits = [item.operation for item in late if isinstance(item.operation, Wait)]
    nothing = sum(max(wait.host_ns - WAKE_NS, 0) for wait in waits)
    per_step = nothing / (len(starts) - 3) / 1e6
    found = f"waits of {per_step:.3g} ms a step that end with nothing on the device"
    yield Doubt(nothing / span, 0.02, 0.2, found, f"what they wait for: {HOW}, of all that the process does")

    waiting = [item.start for item in late if _waits_in(item)]
    never = np.histogram(waiting, starts[2:])[0] == 0
    hidden = _hidden(linked, late, never)
    share, per_step = hidden / span, hidden / len(never) / 1e6
    found = f"host work of {per_step:.3g} ms a step that ends as the device falls idle, as a wait would"
    yield Doubt(share, 0.02, 0.1, found, _SEEN)

    found = f"no call that waits for the device in {never.sum()} of {len(never)} steps, as if the host always worked"
    yield Doubt(float(never.any()), 1, 2, found, _SEEN)

    named = np.array(["Synchronize" in name for name in trace.names], bool)
    calls = np.flatnonzero((trace.kind == RUNTIME) & named[trace.name])
    counts = np.histogram(trace.start_ns[calls], starts[2:])[0]
    found = f"{counts.min()} to {counts.max()} synchronising calls a step, as if some were missing"
    yield Doubt(float(counts.min() < counts.max()), 1, 2, found, _SEEN)


def _waits_in(item: Placed) -> bool:
    return isinstance(item.operation, Wait) or (isinstance(item.operation, Copy) and item.operation.waits)


def _hidden(linked: Linked, placed: Sequence[Placed], never: NDArray[np.bool_]) -> int:
    """Long host work that ends as the device falls idle, in the steps that `never` wait, nanoseconds."""
    trace, starts = linked.trace, linked.steps.starts_ns[2:]
    on_device = np.flatnonzero(np.isin(trace.kind, ACTIVITIES))
    reached = np.maximum.accumulate(trace.end_ns[on_device])
    rests = np.append(trace.start_ns[on_device][1:] - reached[:-1], 0) >= IDLE_NS
    idle = reached[rests]
    hidden = 0
    for item in placed:
        if not isinstance(item.operation, Work) or item.end - item.start < LONG_NS:
            continue
        step = min(int(np.searchsorted(starts, item.start, side="right")) - 1, len(never) - 1)
        place = int(np.searchsorted(idle, item.end - 2 * WAKE_NS))
        if never[step] and place < len(idle) and item.start < idle[place] <= item.end:
            hidden += int(idle[place]) - item.start
    return hidden


def _lengths(linked: Linked) -> Iterator[Doubt]:
    """Steps are alike, and what is launched between annotated ones is launched between all of them."""
    trace, lengths = linked.trace, np.diff(linked.steps.starts_ns)[1:]
    ratio = np.maximum(lengths, 1) / max(float(np.median(lengths)), 1.0)
    apart = np.maximum(ratio, 1 / ratio)
    shortest, longest = lengths.min() / 1e6, lengths.max() / 1e6
    unlike = int((apart > UNLIKE).sum())
    found = f"steps of {shortest:.3g} to {longest:.3g} ms"
    wanted = "steady steps: trace the loop when its batches are alike, without what it does only now and then"
    yield Doubt(max(unlike / len(lengths), float((apart > UNEVEN).mean() >= 0.25) * 1e-9), 1e-9, 1 / 3, found, wanted)

    marks = np.sort(np.array(list(linked.steps.marks), np.int64))
    times = trace.start_ns[linked.launches]
    between = np.searchsorted(times, trace.start_ns[marks][1:]) - np.searchsorted(times, trace.end_ns[marks][:-1])
    some = int((between > 0).sum())
    found = f"launches between the steps in {some} of {len(between)} places ({linked.steps.found_by})"
    seldom = 0 < some < len(between) / 2
    yield Doubt(float(seldom), 1, 2, found, "an annotation around each whole step")


def _slack_ns(linked: Linked) -> float:
    return max(SKEW_NS, SLACK * float(np.median(np.diff(linked.steps.starts_ns))))


def _share(part: float, whole: float) -> float:
    return float(part) / max(float(whole), 1.0)

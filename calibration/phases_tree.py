"""Which annotations of a trace stand in which: a user's timer around one has the time of those inside in it, too."""

from __future__ import annotations

from collections import Counter

import numpy as np

from calibration.kineto import KINDS, Trace

ANNOTATION = KINDS.index("annotation")


def parents_of(trace: Trace) -> dict[str, str]:
    """Of each annotation that stands in others, the name of the one next around it in most cases.

    Annotations that occur once, such as `ProfilerStep#12`, are steps and no phases: they are passed over.
    """
    annotations = np.flatnonzero(trace.kind == ANNOTATION)
    often = np.bincount(trace.name[annotations], minlength=len(trace.names)) > 1
    annotations = annotations[often[trace.name[annotations]]]
    found: Counter[tuple[str, str]] = Counter()
    for lane in np.unique(trace.lane[annotations]):
        around: list[tuple[int, str]] = []
        mine = annotations[trace.lane[annotations] == lane]
        columns = (trace.start_ns[mine], trace.end_ns[mine], trace.name[mine])
        for start, end, number in zip(*(column.tolist() for column in columns), strict=True):
            while around and around[-1][0] <= start:
                around.pop()
            name = trace.names[number]
            outer = next((other for until, other in reversed(around) if until >= end and other != name), None)
            if outer is not None:
                found[name, outer] += 1
            around.append((end, name))
    parents: dict[str, str] = {}
    for (name, outer), _ in found.most_common():
        parents.setdefault(name, outer)
    return parents

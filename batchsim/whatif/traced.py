"""A learned loop as it was traced: its steps replayed at their traced times, with all that the profiler added."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from batchsim.learned import Kernels, LearnedProfile, Step
from batchsim.whatif.replay import Replayed, Scales, replay

# A replay this close to the traced steps is one of them; how much longer kernels may be taken for it.
CLOSE = 0.05
LONGEST = 1.5


def replay_traced(steps: Sequence[Step], launch_ns: int) -> Replayed:
    """The traced steps replayed, with one draw and all of its moments."""
    one, none = np.ones(1), np.zeros(1)
    scales = Scales(
        host=one, event_ns=none, node_ns=none, device=one, gap_ns=none, added=one, throttle=none, timer=one,
        known=frozenset(operation.phase for step in steps for operation in step.operations),
    )  # fmt: skip
    return replay([step.operations for step in steps], scales, launch_ns, moments_of=0)


def matched(steps: Sequence[Step], launch_ns: int) -> tuple[list[Step], float]:
    """The steps with their kernels' times such that a replay takes as long as they did, and by what factor.

    Kernels of several streams slow one another while they run at once, of which a replay of streams knows nothing.
    Left as they are where little is missing, where there is one stream, or where no factor would do.
    """
    streams = {o.stream for step in steps for o in step.operations if isinstance(o, Kernels)}
    wanted = sum(step.traced_ns for step in steps) / len(steps)
    if len(streams) == 1 or float(replay_traced(steps, launch_ns).step_ns[0]) / wanted - 1 >= -CLOSE:
        return list(steps), 1.0
    low, high = 1.0, LONGEST
    for _ in range(12):
        factor = (low + high) / 2
        long = float(replay_traced(slowed(steps, factor), launch_ns).step_ns[0]) > wanted
        low, high = (low, factor) if long else (factor, high)
    made = slowed(steps, factor)
    if abs(float(replay_traced(made, launch_ns).step_ns[0]) / wanted - 1) > CLOSE:
        return list(steps), 1.0
    return made, factor


def slowed(steps: Sequence[Step], factor: float) -> list[Step]:
    """The steps with kernels that take `factor` times as long."""
    made = []
    for step in steps:
        operations = [
            operation.model_copy(update={"device_ns": [round(ns * factor) for ns in operation.device_ns]})
            if isinstance(operation, Kernels)
            else operation
            for operation in step.operations
        ]
        made.append(step.model_copy(update={"operations": operations}))
    return made


def traced_ms(profile: LearnedProfile) -> float:
    """The mean traced step."""
    return sum(step.traced_ns for step in profile.steps) / len(profile.steps) / 1e6

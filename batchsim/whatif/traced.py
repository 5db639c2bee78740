"""A learned loop as it was traced: its steps replayed at their traced times, with all that the profiler added."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from batchsim.learned import LearnedProfile, Step
from batchsim.whatif.replay import Replayed, Scales, replay


def replay_traced(steps: Sequence[Step], launch_ns: int) -> Replayed:
    """The traced steps replayed, with one draw and all of its moments."""
    one, none = np.ones(1), np.zeros(1)
    scales = Scales(
        host=one, event_ns=none, node_ns=none, device=one, gap_ns=none, added=one, throttle=none, timer=one,
        known=frozenset(operation.phase for step in steps for operation in step.operations),
    )  # fmt: skip
    return replay([step.operations for step in steps], scales, launch_ns, moments_of=0)


def traced_ms(profile: LearnedProfile) -> float:
    """The mean traced step."""
    return sum(step.traced_ns for step in profile.steps) / len(profile.steps) / 1e6

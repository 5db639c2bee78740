"""What a machine, simulated or real, reports: spans of activity on its lanes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

Lane = Literal["host", "copy_in", "compute", "copy_out"]

# Stages of the device lanes. The stages of the host lane are the phases of `batchsim.operations`.
DEVICE_STAGES = ("copy_in", "prefill", "decode", "forward", "copy_out")


class Span(NamedTuple):
    """One activity: nanoseconds since the run began, `[start_ns, end_ns)`.

    `stage` is a host phase on the host lane; `copy_in` or `copy_out` on the lanes of copies; on the compute lane
    `decode` or `prefill` (a forward with any prompt token in it), of dynamic batching `forward`, and of training also
    `backward` and `optimizer`. `step` is the index of the batch (-1: none was formed). `gap_ns` is the part of a
    forward in which the device waited for the host's next launch (0 with CUDA graphs; None where it was not measured).
    """

    step: int
    lane: Lane
    stage: str
    start_ns: int
    end_ns: int
    gap_ns: int | None = 0

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


Observer = Callable[[Span], None]

"""Metrics of a run, gathered from its spans as they come; the same code serves simulation and execution.

What each figure means is said once, in `batchsim.result.DEFINITIONS`.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from itertools import pairwise

import numpy as np

from batchsim.batching.continuous import ContinuousBatcher
from batchsim.records import Lane, Span
from batchsim.result import ScheduleResult


_DEVICE_COPY = {"copy_in": "device_copy_in", "copy_out": "device_copy_out"}


class Metrics:
    """An observer of spans.

    Spans may come in any order in which, when a forward is told of, every host span and copy that began before
    that forward's start has been told of too. Memory does not grow with tokens: eight bytes a step are kept.
    """

    def __init__(self) -> None:
        self._stage_ns: Counter[str] = Counter()
        self._stage_steps: Counter[str] = Counter()
        self._idle_ns: Counter[str] = Counter()
        self._recent: deque[Span] = deque()
        self._launched_ns: dict[int, int] = {}
        self._busy_ns = 0
        self._gap_ns: int | None = 0
        self._waiting_ns = 0
        self._device_end_ns = 0
        self._last_update_ns = 0
        self._steps_ns = array("q")

    def __call__(self, span: Span) -> None:
        step, lane, stage, start_ns, end_ns, gap_ns = span
        duration = end_ns - start_ns
        if lane == "host":
            self._stage_ns[stage] += duration
            self._recent.append(span)
            if stage == "wait":
                self._waiting_ns += duration
            elif stage == "launch":
                self._launched_ns.setdefault(step, end_ns)
            elif stage == "update":
                self._steps_ns.append(end_ns - self._last_update_ns)
                self._last_update_ns = end_ns
        elif lane == "compute":
            self._stage_ns[stage] += duration
            self._stage_steps[stage] += 1
            self._busy_ns += duration
            self._gap_ns = None if gap_ns is None or self._gap_ns is None else self._gap_ns + gap_ns
            self._attribute(self._device_end_ns, start_ns, self._launched_ns.pop(step, start_ns))
            self._device_end_ns = end_ns
            while self._recent and self._recent[0].end_ns <= end_ns:
                self._recent.popleft()
        else:
            stage = _DEVICE_COPY[stage]
            self._stage_ns[stage] += duration
            self._stage_steps[stage] += 1
            self._recent.append(span)

    def _attribute(self, start_ns: int, end_ns: int, launched_ns: int) -> None:
        """Give every nanosecond of the idle gap `[start_ns, end_ns)` to the stage that the device waited for.

        The gap ends with a forward whose launch had returned at `launched_ns`. Until then the device waits for
        the host's phase, else for a copy out, else for the host to wake up (`wake_up`); from then on for the
        launch to reach it (`launch_latency`). A copy in goes before all of these.
        """
        if end_ns <= start_ns:
            return
        spans = [s for s in self._recent if s.end_ns > start_ns and s.start_ns < end_ns]
        times = {launched_ns, *(s.start_ns for s in spans), *(s.end_ns for s in spans)}
        cuts = [start_ns, *sorted(t for t in times if start_ns < t < end_ns), end_ns]
        for left, right in pairwise(cuts):
            active = {s.lane: s.stage for s in spans if s.start_ns <= left and s.end_ns >= right}
            self._idle_ns[_awaited(active, launched=left >= launched_ns)] += right - left

    def result(self, schedule: str, total_ns: int, batcher: ContinuousBatcher) -> ScheduleResult:
        """The metrics of the whole run, which took `total_ns`."""
        self._attribute(self._device_end_ns, total_ns, total_ns)
        steps = np.asarray(self._steps_ns, dtype=np.int64) / 1e6
        count = len(steps)
        p50, p95, p99 = np.percentile(steps, (50, 95, 99))
        stages = {
            stage: total / 1e6 / (self._stage_steps.get(stage) or count)
            for stage, total in sorted(self._stage_ns.items())
        }
        return ScheduleResult(
            schedule=schedule,
            throughput_tokens_per_s=batcher.output_tokens / (total_ns / 1e9),
            total_s=total_ns / 1e9,
            step_ms={"mean": float(steps.mean()), "p50": float(p50), "p95": float(p95), "p99": float(p99)},
            device_busy_fraction=self._busy_ns / total_ns,
            launch_gap_fraction=None if self._gap_ns is None else self._gap_ns / total_ns,
            host_busy_fraction=1 - self._waiting_ns / total_ns,
            idle_ns={stage: ns for stage, ns in self._idle_ns.most_common() if ns},
            stage_ms=stages,
            counts={
                "requests": batcher.finished,
                "steps": count,
                "output_tokens": batcher.output_tokens,
                "wasted_tokens": batcher.wasted_tokens,
                "prefill_steps": self._stage_steps["prefill"],
            },
        )


def _awaited(active: dict[Lane, str], *, launched: bool) -> str:
    if "copy_in" in active:
        return "device_copy_in"
    if launched:
        return "launch_latency"
    host = active.get("host", "wait")
    if host != "wait":
        return host
    return "device_copy_out" if "copy_out" in active else "wake_up"

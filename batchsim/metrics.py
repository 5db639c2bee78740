"""Metrics of a run, gathered from its spans as they come; the same code serves simulation and execution.

What each figure means is said once, in `batchsim.result.DEFINITIONS`.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict, deque

import numpy as np

from batchsim.batching.continuous import ContinuousBatcher
from batchsim.errors import RunError
from batchsim.records import Span
from batchsim.result import ScheduleResult

_Claim = tuple[str, int, int]  # a stage, and since when and until when idle time is its
_DEVICE_COPY = {"copy_in": "device_copy_in", "copy_out": "device_copy_out"}


class Metrics:
    """An observer of spans.

    Spans may come in any order in which host spans come by their start, and in which, when a forward is told of,
    every host span and copy that began before that forward's start has been told of too. Memory does not grow with
    tokens: eight bytes a step are kept.
    """

    def __init__(self) -> None:
        self._stage_ns: defaultdict[str, int] = defaultdict(int)
        self._stage_steps: defaultdict[str, int] = defaultdict(int)
        self._idle_ns: Counter[str] = Counter()
        self._recent: deque[Span] = deque()
        self._launched_ns: dict[int, int] = {}
        self._busy_ns = 0
        self._gap_ns: int | None = 0
        self._device_end_ns = 0
        self._last_update_ns = 0
        self._steps_ns = array("q")

    def __call__(self, span: Span) -> None:
        step, lane, stage, start_ns, end_ns, gap_ns = span
        if lane == "host":
            self._stage_ns[stage] += end_ns - start_ns
            self._recent.append(span)
            if stage == "launch":
                self._launched_ns.setdefault(step, end_ns)
            elif stage == "update":
                self._steps_ns.append(end_ns - self._last_update_ns)
                self._last_update_ns = end_ns
        elif lane == "compute":
            self._stage_ns[stage] += end_ns - start_ns
            self._stage_steps[stage] += 1
            self._busy_ns += end_ns - start_ns
            self._gap_ns = None if gap_ns is None or self._gap_ns is None else self._gap_ns + gap_ns
            self._attribute(self._device_end_ns, start_ns, step, self._launched_ns.pop(step, start_ns))
            self._device_end_ns = end_ns
            recent = self._recent
            while recent and recent[0].end_ns <= end_ns:
                recent.popleft()
        else:
            stage = _DEVICE_COPY[stage]
            self._stage_ns[stage] += end_ns - start_ns
            self._stage_steps[stage] += 1
            self._recent.append(span)

    def _attribute(self, start_ns: int, end_ns: int, step: int, launched_ns: int) -> None:
        """Give every nanosecond of the idle gap `[start_ns, end_ns)` to the stage that the device waited for.

        The gap ends with the forward of `step`, whose (first) launch had returned at `launched_ns`. A nanosecond
        goes to the first of these that holds for it: inputs are being copied (`device_copy_in`); the host is
        launching this forward (`launch`); it has launched it (`launch_latency`); the host is in some other phase
        than waiting; results are not copied yet (`device_copy_out`); the host has not woken up yet (`wake_up`).
        """
        if end_ns <= start_ns:
            return
        copies: list[_Claim] = []
        launch: list[_Claim] = []
        phases: list[_Claim] = []
        copied_ns = start_ns
        for number, lane, stage, first, last, _ in self._recent:
            if last <= start_ns or first >= end_ns or stage == "wait":
                continue
            if lane == "copy_in":
                copies.append(("device_copy_in", first, last))
            elif lane == "copy_out":
                copied_ns = max(copied_ns, last)
            elif stage == "launch" and number == step:
                launch.append((stage, first, last))
            else:
                phases.append((stage, first, last))
        launched = ("launch_latency", launched_ns, end_ns)
        waiting = ("device_copy_out", start_ns, copied_ns), ("wake_up", start_ns, end_ns)
        unclaimed = [(start_ns, end_ns)]
        for stage, first, last in (*copies, *launch, launched, *phases, *waiting):
            rest: list[tuple[int, int]] = []
            for left, right in unclaimed:
                if last <= left or right <= first:
                    rest.append((left, right))
                    continue
                self._idle_ns[stage] += min(last, right) - max(first, left)
                if left < first:
                    rest.append((left, first))
                if last < right:
                    rest.append((last, right))
            if not rest:
                return
            unclaimed = rest

    def result(self, schedule: str, total_ns: int, batcher: ContinuousBatcher) -> ScheduleResult:
        """The metrics of the whole run, which took `total_ns`.

        Raises:
            RunError: nothing ran, it took no time, or requests were left unserved.
        """
        if unserved := len(batcher.waiting) + len(batcher.running):
            raise RunError(f"{schedule}: the run ended with {unserved} requests not served to their end")
        if not self._steps_ns:
            raise RunError(f"{schedule}: nothing ran: not a single step was made")
        if total_ns <= 0:
            raise RunError(f"{schedule}: the whole run took no time: all costs are zero")
        self._attribute(self._device_end_ns, total_ns, -1, total_ns)
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
            host_busy_fraction=1 - self._stage_ns["wait"] / total_ns,
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

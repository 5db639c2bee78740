"""Metrics of a run, gathered from its spans as they come; the same code serves simulation and execution.

What each figure means is said once, in `batchsim.result.DEFINITIONS`.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchsim.batching.batch import Batcher
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
        self._no_requests_ns = 0
        self._steps_ns = array("q")

    def __call__(self, span: Span) -> None:
        step, lane, stage, start_ns, end_ns, gap_ns = span
        if lane == "host":
            self._recent.append(span)
            if stage == "no_requests":
                self._no_requests_ns += end_ns - start_ns
                self._last_update_ns += end_ns - start_ns
                return
            self._stage_ns[stage] += end_ns - start_ns
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

    def totals(self, total_ns: int) -> Totals:
        """What the whole run, which took `total_ns`, adds up to."""
        self._attribute(self._device_end_ns, total_ns, -1, total_ns)
        return Totals(
            total_ns=total_ns,
            stage_ns=dict(self._stage_ns),
            stage_steps=dict(self._stage_steps),
            idle_ns=dict(self._idle_ns),
            busy_ns=self._busy_ns,
            gap_ns=self._gap_ns,
            no_requests_ns=self._no_requests_ns,
            steps_ns=np.asarray(self._steps_ns, dtype=np.int64),
        )

    def result(self, schedule: str, total_ns: int, batcher: Batcher) -> ScheduleResult:
        """The metrics of the whole run, which took `total_ns`.

        Raises:
            RunError: nothing ran, it took no time, or requests were left unserved.
        """
        if unserved := batcher.unserved:
            raise RunError(f"{schedule}: the run ended with {unserved} requests not served to their end")
        return self.totals(total_ns).result(schedule, batcher.counts)


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over a run, nanoseconds and steps, by the stages of `batchsim.records`; `steps_ns` as `step_ms` is defined.

    Of several replicas, the sums over all of them; `total_ns` then is the time of one, and `replicas` their number.
    """

    total_ns: int
    stage_ns: Mapping[str, int]
    stage_steps: Mapping[str, int]
    idle_ns: Mapping[str, int]
    busy_ns: int
    gap_ns: int | None
    no_requests_ns: int
    steps_ns: npt.NDArray[np.int64]
    replicas: int = 1

    def result(self, schedule: str, counts: Mapping[str, int]) -> ScheduleResult:
        """The metrics of the run; `counts` are requests and, where any are generated, tokens.

        Raises:
            RunError: nothing ran, or it took no time.
        """
        count = len(self.steps_ns)
        if not count:
            raise RunError(f"{schedule}: nothing ran: not a single step was made")
        if self.total_ns <= 0:
            raise RunError(f"{schedule}: the whole run took no time: all costs are zero")
        tokens = counts.get("output_tokens")
        steps_ms = self.steps_ns / 1e6
        p50, p95, p99 = np.percentile(steps_ms, (50, 95, 99))
        machine_ns = self.total_ns * self.replicas
        stages = {
            stage: total / 1e6 / (self.stage_steps.get(stage) or count)
            for stage, total in sorted(self.stage_ns.items())
        }
        waited_ns = self.stage_ns.get("wait", 0) + self.no_requests_ns
        idle = sorted(self.idle_ns.items(), key=lambda entry: (-entry[1], entry[0]))
        return ScheduleResult(
            schedule=schedule,
            throughput_tokens_per_s=None if tokens is None else tokens / (self.total_ns / 1e9),
            total_s=self.total_ns / 1e9,
            step_ms={
                "mean": float(steps_ms.mean()), "p50": float(p50), "p95": float(p95), "p99": float(p99)
            },
            device_busy_fraction=self.busy_ns / machine_ns,
            launch_gap_fraction=None if self.gap_ns is None else self.gap_ns / machine_ns,
            host_busy_fraction=1 - waited_ns / machine_ns,
            idle_ns={stage: round(ns / self.replicas) for stage, ns in idle if ns},
            stage_ms=stages,
            counts={**counts, "steps": count, "prefill_steps": self.stage_steps.get("prefill", 0)},
        )  # fmt: skip

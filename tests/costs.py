"""Costs for the simulated machine that a test writes down, and a run that keeps every span."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from batchsim.batching.batch import AnyBatch
from batchsim.batching.continuous import ContinuousBatcher
from batchsim.machine import Burst, Latencies, SimulatedMachine
from batchsim.metrics import Metrics
from batchsim.operations import KernelSync
from batchsim.records import Span
from batchsim.result import ScheduleResult
from batchsim.schedules import SCHEDULES


@dataclass
class FixedCosts:
    """Host phases and copies by name (0 where absent), forwards by the index of their batch."""

    host: Mapping[str, int] = field(default_factory=dict)
    forward: Sequence[Sequence[Burst]] = ()
    copy: int = 0
    latencies: Latencies = Latencies()

    def host_ns(self, phase: str, batch: AnyBatch | None) -> int:
        return self.host.get(phase, 0)

    def copy_ns(self, phase: str, batch: AnyBatch) -> int:
        return self.copy

    def launch(self, batch: AnyBatch, kernels: KernelSync) -> Sequence[Burst]:
        return self.forward[batch.index % len(self.forward)]


def graph(device_ns: int, host_ns: int = 0) -> tuple[Burst, ...]:
    return (Burst((host_ns,), (device_ns,)),)


def run(
    schedule: str, batcher: ContinuousBatcher, costs: FixedCosts, *, launch_queue_depth: int = 1024
) -> tuple[int, list[Span], ScheduleResult]:
    """(total, spans, metrics) of one schedule."""
    spans: list[Span] = []
    metrics = Metrics()

    def observe(span: Span) -> None:
        spans.append(span)
        metrics(span)

    machine = SimulatedMachine(batcher, costs, observe, launch_queue_depth=launch_queue_depth)
    total = machine.run(SCHEDULES[schedule]())
    return total, spans, metrics.result(schedule, total, batcher)

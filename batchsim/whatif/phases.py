"""Phases whose untraced host times are known: their traced times are replaced by those."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from batchsim.learned import Kernels, Operation, Work


def fixed(
    steps: Sequence[Sequence[Operation]], phases_ms: Mapping[str, float]
) -> tuple[list[list[Operation]], frozenset[str]]:
    """The steps with the times of the phases in `phases_ms` (milliseconds a step, without waits) in place of the traced
    ones, and the names of those phases."""
    traced: defaultdict[str, float] = defaultdict(float)
    for step in steps:
        for operation in step:
            traced[operation.phase] += host_ns(operation) / len(steps)
    ratios = {phase: ms * 1e6 / traced[phase] for phase, ms in phases_ms.items() if traced.get(phase)}
    return [[_scaled(o, ratios.get(o.phase)) for o in step] for step in steps], frozenset(ratios)


def host_ns(operation: Operation) -> int:
    """What the host works for an operation, as traced."""
    if isinstance(operation, Work):
        return operation.ns
    return sum(operation.host_ns) if isinstance(operation, Kernels) else operation.host_ns


def _scaled(operation: Operation, ratio: float | None) -> Operation:
    if ratio is None:
        return operation
    if isinstance(operation, Work):
        return operation.model_copy(update={"ns": round(operation.ns * ratio)})
    if isinstance(operation, Kernels):
        return operation.model_copy(update={"host_ns": [round(ns * ratio) for ns in operation.host_ns]})
    return operation.model_copy(update={"host_ns": round(operation.host_ns * ratio)})

"""How far off predictions for other hardware are: what the README shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Point = Mapping[str, Any]

HEADER = """\
| point | SMs | cores | neighbours | host speed | sync tokens/s | error | async tokens/s | error |
|---|--:|--:|--:|--:|--:|--:|--:|--:|"""


def kind_of(point: Point) -> str:
    """What was changed of the machine."""
    facts, scenario = point["provenance"]["measured"], point["scenario"]
    if scenario.get("tensor_parallel", 1) > 1:
        return "tensor-parallel"
    if scenario["replicas"] > 1:
        return "replicas"
    if facts.get("limited_to_multiprocessors"):
        return "part of the device"
    return "slowed host" if facts.get("neighbours") or facts.get("cores_used") == 1 else "whole device"


def summary(points: Sequence[Point]) -> Iterator[str]:
    """A line for each kind of point and one for all: the errors of tokens/s and of the device's busy share."""
    kinds = dict.fromkeys(kind_of(point) for point in points)
    for kind in kinds:
        yield f"{kind}: {_accuracy([point for point in points if kind_of(point) == kind])}"
    if len(kinds) > 1:
        yield f"all: {_accuracy(points)}"


def rows(points: Sequence[Point]) -> Iterator[str]:
    """The lines of a table, a point each."""
    yield from HEADER.splitlines()
    for point in points:
        facts, measured, error = point["provenance"]["measured"], point["measured"], point["error"]
        cells = [
            point["scenario"]["name"],
            str(facts.get("limited_to_multiprocessors") or facts.get("multiprocessors", "")),
            str(facts.get("cores_used") or facts["host_cores"]),
            str(facts.get("neighbours", 0)),
            f"{facts['host_speed']:.2f}",
        ]
        for schedule in ("sync", "async"):
            cells += [
                f"{measured[schedule]['throughput_tokens_per_s']:,.0f}",
                f"{error[schedule]['throughput_tokens_per_s']:+.1%}",
            ]
        yield f"| {' | '.join(cells)} |"


def _accuracy(points: Sequence[Point]) -> str:
    errors = [error for point in points for error in point["error"].values()]
    speed = np.array([error["throughput_tokens_per_s"] for error in errors]) * 100
    busy = np.abs([error["device_busy_fraction"] for error in errors])
    return (
        f"{len(points)} points, {len(errors)} runs; tokens/s: median error {np.median(np.abs(speed)):.2f}% (signed "
        f"{np.median(speed):+.2f}%), worst {speed[np.argmax(np.abs(speed))]:+.1f}%; device busy: median error "
        f"{np.median(busy):.2f} points, worst {busy.max():.2f}"
    )

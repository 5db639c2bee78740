"""Predictions beside measurements: the peak of every point, the largest batch of every edge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from batchsim.memory.allocator import Usage, fits, play
from batchsim.memory.breakdown import largest
from batchsim.memory.overheads import Library
from calibration.memory.points import Point, Program, tape_of, with_batch

MOST = 65_536
FEW = 16  # batches up to which an edge has to be right exactly; above, within one
HEADER = "| point | measured, GB | predicted | error | reserved | error |\n|---|--:|--:|--:|--:|--:|"
EDGE_HEADER = "| edge | measured | predicted |\n|---|--:|--:|"


def predicted_peak(program: Program, library: Library) -> Usage:
    """What a program takes on a device with memory enough."""
    return play(tape_of(program, library))


def predicted_edge(point: Point, library: Library, guess: int = 1) -> int:
    """The largest batch of a point's program on a device that has its capacity to give; 0 if none fits.

    Segments leave gaps, so that a batch may fit where a smaller one does not; then there are several edges, and the
    one is found that a search from `guess` meets first.
    """
    capacity = point.capacity or 0
    return largest(lambda batch: fits(tape_of(with_batch(point.program, batch), library), capacity), MOST, guess)


def compare(points: Sequence[Point], found: Mapping[str, Any], library: Library) -> list[str]:
    """Markdown: a summary, the points with their errors, and the edges."""
    rows, errors, reserved, edges = [], [], [], []
    for point in points:
        if point.name not in found:
            continue
        measured = found[point.name]["measured"]
        if point.capacity is not None:
            batch = measured["largest"]
            edges.append((point.name, batch, predicted_edge(point, library, batch)))
            continue
        usage = predicted_peak(point.program, library)
        errors.append(usage.allocated / measured["allocated"] - 1)
        reserved.append(usage.reserved / measured["reserved"] - 1)
        rows.append(
            f"| {point.name} | {measured['allocated'] / 1e9:.3f} | {usage.allocated / 1e9:.3f} | {errors[-1]:+.2%} "
            f"| {measured['reserved'] / 1e9:.3f} | {reserved[-1]:+.2%} |"
        )
    lines = []
    if errors:
        lines += [
            f"{len(errors)} points. Peak allocated: {_spread(errors)}. Peak reserved: {_spread(reserved)}.",
        ]
    if edges:
        right = sum(abs(batch - guess) <= (batch > FEW) for _, batch, guess in edges)
        exactly = sum(batch == guess for _, batch, guess in edges)
        lines.append(
            f"Largest batch that fits: right on {right} of {len(edges)} edges (within one above {FEW}), "
            f"exactly on {exactly}."
        )
    if rows:
        lines += ["", HEADER, *rows]
    if edges:
        lines += ["", EDGE_HEADER, *(f"| {name} | {batch:,} | {guess:,} |" for name, batch, guess in edges)]
    return lines


def _spread(errors: Sequence[float]) -> str:
    return f"median error {median(map(abs, errors)):.2%}, worst {max(errors, key=abs):+.2%}"

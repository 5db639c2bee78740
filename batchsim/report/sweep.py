"""The page for the browser of a sweep: one file, and nothing fetched from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchsim.report.sweep_words import (
    best_row,
    columns_of,
    failures,
    findings,
    headline,
    primary,
    throughput,
    warnings,
)

if TYPE_CHECKING:
    from batchsim.report.explore.columns import Column, Row
    from batchsim.report.explore.parts import Explored
    from batchsim.sweep.result import SweepResult

# What is drawn against throughput, and over the fields, where there is such a figure.
_LATENCIES = ("latency_ms.ttft.p99", "latency_ms.e2e.p99", "latency_ms.tpot.p99", "step_ms.mean")


def write_sweep_report(path: Path, result: SweepResult) -> None:
    """Write one self-contained HTML page to `path`, whole or not at all; it needs no network.

    The same points give the same bytes.
    """
    from batchsim.files import write_text

    write_text(path, page(result))


def page(result: SweepResult) -> str:
    """The HTML text of the report."""
    from batchsim.report.explore import parts
    from batchsim.report.explore.columns import definitions_of
    from batchsim.report.html import definitions, header, items
    from batchsim.report.html import section as part

    rows = [_row(row, result.fields) for row in result.rows()]
    columns = columns_of(result.fields, rows)
    failed = failures(len(result.points), [str(point["error"]) for point in result.points if point.get("error")])
    told = f'<ul class="alerts">{items(failed)}</ul>' if failed else ""
    if warned := warnings(result.points):
        told += f'<ul class="warnings">{items(warned)}</ul>'
    top = [header(result.name, headline(len(result.points), columns, rows), findings(columns, rows)), told]
    bottom = [part("Definitions", "", definitions(definitions_of(columns, rows))), *_origin(result.points)]
    found = _explored(columns, rows, result.points)
    return parts.page(
        result.name, top, found, bottom, frontier="Throughput against latency", rows="All points and schedules"
    )


def _row(row: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    from batchsim.report.explore.columns import text_of

    return {**row, **{key: text_of(row.get(key)) for key in fields}}


def _explored(columns: Sequence[Column], rows: Sequence[Row], points: Sequence[Mapping[str, Any]]) -> Explored:
    from batchsim.report.explore.details import detail_of, interesting
    from batchsim.report.explore.parts import Explored

    keys = {column.key for column in columns if column.kind == "figure"}
    speed = throughput(rows)
    latency = next((key for key in _LATENCIES if key in keys), speed)
    best = best_row(rows, primary(rows))
    chosen = [] if best is None else [index for index, row in enumerate(rows) if row is best]
    # The same point under the other schedules: what they are for is to be compared.
    chosen += [
        index
        for index, row in enumerate(rows)
        if best is not None and row is not best and row["point"] == best["point"] and not row.get("error")
    ][:2]
    details = {}
    for index in interesting(rows, columns, chosen):
        point, schedule = points[rows[index]["point"]], rows[index]["schedule"]
        detail = detail_of((point.get("cdf") or {}).get(schedule), (point.get("window") or {}).get(schedule))
        details[index] = detail
    return Explored(
        columns, rows, details, chosen, sort=primary(rows), against=(latency, speed), value=primary(rows),
        marks={index: words for index, row in enumerate(rows) if (words := _marks(row, points))},
        bounds=_bounds(points), steady=[not _unstable(row, points) for row in rows],
    )  # fmt: skip


def _marks(row: Row, points: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to know of a row before its figures are believed."""
    run = points[row["point"]]["run"] or {}
    words = ["transferred"] if "transfer" in run.get("provenance", {}) else []
    return [*words, *(["unstable"] if _unstable(row, points) else [])]


def _unstable(row: Row, points: Sequence[Mapping[str, Any]]) -> bool:
    run = points[row["point"]]["run"]
    return run is not None and run["schedules"][row["schedule"]].get("unstable") is not None


def _bounds(points: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The service objectives of latencies, where all points have the same."""
    slos = [point["run"]["scenario"].get("slo") or {} for point in points if point.get("run")]
    same = slos[0] if slos and all(slo == slos[0] for slo in slos) else {}
    return {key.removesuffix("_ms"): float(value) for key, value in same.items() if value is not None}


def _origin(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """The scenario of the first point and where its costs come from; the others differ in the fields alone."""
    from batchsim.report.html import as_yaml, section

    run = next((point["run"] for point in points if point.get("run")), None)
    if run is None:
        return []
    note = "Of the first point; the others differ in the fields that the table has."
    return [
        section("Scenario", note, as_yaml(run["scenario"])),
        section("Provenance", note, as_yaml(run.get("provenance", {}))),
    ]

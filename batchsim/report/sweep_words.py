"""A sweep in sentences: what was swept, what is best, and what failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from batchsim.report.explore.columns import Column, Row, figure_columns, swept_column, text_of

_VALUES = 8  # As many values of a field are named.
_THROUGHPUT = ("throughput_tokens_per_s", "throughput_requests_per_s")
_WARNINGS = 6
_FAILURES = 3  # As many reasons are told.
# What a run is best by: the figure that its objectives make first, then throughput, then latencies.
_BEST = (
    "goodput_requests_per_s",
    "throughput_tokens_per_s",
    "latency_ms.ttft.p99",
    "latency_ms.tpot.p99",
    "latency_ms.e2e.p99",
)


def columns_of(fields: Sequence[str], rows: Sequence[Row]) -> list[Column]:
    """The swept fields, the schedule and the figures of `rows`."""
    # A row has one schedule, and so the list of a point's schedules says nothing more.
    swept = [swept_column(key, fields) for key in fields if key != "schedules"]
    schedule = Column("schedule", "schedule", kind="field", bare=True)
    return [*swept, schedule, *figure_columns(rows, [primary(rows)])]


def headline(points: int, columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """How much was swept over what, and the run of most throughput."""
    swept = [column.label for column in columns if column.kind == "field" and column.key != "schedule"]
    schedules = listed(list(dict.fromkeys(str(row["schedule"]) for row in rows if row.get("schedule"))))
    over = f" over {listed(swept)}" if swept else ""
    told = f"{points:,} point{'s' * (points != 1)}{over}{f', {schedules}' if schedules else ''}"
    best = best_row(rows, primary(rows))
    if best is None:
        return f"{told}: none could be simulated."
    return f"{told}. {_best(next(column for column in columns if column.key == primary(rows)), columns, best)}"


def findings(columns: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    """What each field went over, and which run is best by each of the figures that matter."""
    told = [
        f"{column.label}: {span([row.get(column.key) for row in rows])}."
        for column in columns
        if column.kind == "field" and column.key != "schedule"
    ]
    figures = {column.key: column for column in columns if column.kind == "figure"}
    wanted = _BEST if any(key.startswith("latency_ms.") for key in figures) else (*_BEST, "step_ms.mean")
    some = [figures[key] for key in wanted if key in figures and key != primary(rows)]
    bests = [(column, best_row(rows, column.key, column.better)) for column in some]
    return told + [_best(column, columns, best) for column, best in bests if best is not None]


def failures(points: int, errors: Sequence[str]) -> list[str]:
    """How many points failed, and the commonest reasons."""
    if not errors:
        return []
    common = Counter(errors).most_common(_FAILURES)
    reasons = [f"{reason} ({count:,} times)" if count > 1 else reason for reason, count in common]
    more = len(set(errors)) - len(common)
    rest = [f"{more:,} more reasons in the table"] if more else []
    return [f"{len(errors):,} of {points:,} points failed: {'; '.join([*reasons, *rest])}."]


def warnings(points: Iterable[Mapping[str, Any]]) -> list[str]:
    """What runs warn of, the commonest first, and how many do."""
    runs = [result for point in points if point["run"] for result in point["run"]["schedules"].values()]
    common = Counter(text for result in runs for text in result["warnings"])
    told = [f"{text} (in {count:,} of {len(runs):,} rows)" for text, count in common.most_common(_WARNINGS)]
    more = len(common) - len(told)
    return told + ([f"{more:,} more warnings, in the results of single points"] if more else [])


def primary(rows: Sequence[Row]) -> str:
    """The figure that runs are compared by: what meets the objectives, where there are some, else throughput."""
    return _first(rows, ("goodput_requests_per_s", *_THROUGHPUT))


def throughput(rows: Sequence[Row]) -> str:
    """Tokens a second, or where none are generated requests."""
    return _first(rows, _THROUGHPUT)


def _first(rows: Sequence[Row], keys: Sequence[str]) -> str:
    return next((key for key in keys if any(row.get(key) is not None for row in rows)), keys[-1])


def _best(column: Column, columns: Sequence[Column], row: Row) -> str:
    """`Most goodput: 12.3 requests/s (11.8 to 12.6), with max_num_seqs 64, async.`"""
    most = "Most" if column.better == "high" else "Least"
    return f"{most} {column.label.partition(', ')[0]}: {figure(column, row)}, with {named(columns, row)}."


def best_row(rows: Iterable[Row], key: str, better: str = "high") -> Row | None:
    """The best by a figure, of equal ones the first; None where none has it."""
    have = [row for row in rows if row.get(key) is not None]
    choose = max if better == "high" else min
    return choose(have, key=lambda row: float(row[key])) if have else None


def named(columns: Sequence[Column], row: Row) -> str:
    """`max_num_seqs 64, hardware h200, async`: what tells a run from the others."""
    parts = []
    for column in columns:
        value = text_of(row.get(column.key)) if column.kind == "field" else None
        if value is not None:
            parts.append(f"{value}" if column.bare else f"{column.label} {value_text(value)}")
    return ", ".join(parts)


def figure(column: Column, row: Row) -> str:
    """`12.3 requests/s (11.8 to 12.6)`."""
    value, low, high = (row.get(f"{column.key}{side}") for side in ("", ".low", ".high"))
    text = f"{shown(column, value)} {column.label.partition(', ')[2]}".rstrip()
    return text if low is None or high is None else f"{text} ({shown(column, low)} to {shown(column, high)})"


def shown(column: Column, value: object) -> str:
    """A cell as text, as the page's script has it."""
    if value is None:
        return "\N{EN DASH}"
    if column.kind == "field":
        return value_text(value)
    if column.format in ("percent", "gain") and isinstance(value, int | float):
        return f"{value:{'+' if column.format == 'gain' else ''}.1%}"
    return f"{'$' * (column.format == 'money')}{number(value)}"


def number(value: object) -> str:
    """Four digits or so: `12,345`, `123.4`, `1.23`, `0.0123`; whole numbers as they are."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e6):
        return f"{value:,.0f}"
    size = abs(value)
    return f"{value:,.{0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 3 if size >= 0.1 else 4}f}"


def value_text(value: object) -> str:
    """A field's value, with as many digits as it was given."""
    return f"{value:,.6g}" if isinstance(value, float) else number(value)


def span(values: Iterable[object]) -> str:
    """The values of a field: all of a few, else how many and their range."""
    distinct = list(dict.fromkeys(text_of(value) for value in values if value is not None))
    numbers = [value for value in distinct if isinstance(value, int | float)]
    if numbers and len(numbers) == len(distinct):
        if len(numbers) > _VALUES:
            return f"{len(numbers):,} values from {value_text(min(numbers))} to {value_text(max(numbers))}"
        distinct = [*sorted(numbers)]
    shown_ = [value_text(value) for value in distinct[:_VALUES]]
    return ", ".join(shown_) + (f" and {len(distinct) - _VALUES:,} more" if len(distinct) > _VALUES else "")


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)

"""Which columns a table of runs has, and what is written in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from batchsim.report.shown import LATENCY_METRICS, METRICS, REQUEST_METRICS
from batchsim.result import DEFINITIONS

Row = Mapping[str, Any]  # Values by the columns' keys; `<key>.low` and `<key>.high` bound the 90% interval of a figure.

# Statistics of latencies that have a column: the others are in the results' files.
_STATISTICS = (".mean", ".p50", ".p90", ".p99")
_IN_TABLE = (
    "throughput_tokens_per_s",
    "throughput_requests_per_s",
    "goodput_requests_per_s",
    "slo_attainment",
    "gain_over_sync",
    "latency_ms.ttft.p50",
    "latency_ms.ttft.p99",
    "latency_ms.tpot.p50",
    "latency_ms.tpot.p99",
    "latency_ms.e2e.p50",
    "latency_ms.e2e.p99",
    "device_busy_fraction",
)
# Without requests that arrive over time, steps tell more.
_IN_TABLE_OF_STEPS = ("step_ms.mean", "step_ms.p99", "to_target.hours")
_HIGH = (
    "throughput_tokens_per_s",
    "throughput_requests_per_s",
    "goodput_requests_per_s",
    "slo_attainment",
    "gain_over_sync",
    "breaking_requests_per_s",
    "device_busy_fraction",
)
_LOW = ("latency_ms.", "step_ms.", "to_target.", "waiting.", "total_s")

Format = Literal["number", "percent", "gain", "money"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column: `better` says which values are good, `bare` that its values need no name, `interval` that the 90%
    interval stands beside the figure (else it is told on hovering), `shown` that the table has it, not only pictures.
    """

    key: str
    label: str
    kind: Literal["field", "figure", "text"] = "figure"
    format: Format = "number"
    better: Literal["high", "low", ""] = ""
    shown: bool = True
    interval: bool = False
    bare: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def figure_columns(rows: Iterable[Row], asked: Sequence[str] = ()) -> list[Column]:
    """The figures that any of `rows` has; those of latencies by a few statistics.

    Those that are `asked` for come first, with their intervals.
    """
    have = {key for row in rows for key, value in row.items() if value is not None}
    metrics = [metric for metric in (*METRICS, *REQUEST_METRICS, *LATENCY_METRICS) if metric.key in have]
    metrics = [
        metric
        for metric in metrics
        if not metric.key.startswith("latency_ms.") or metric.key.endswith(_STATISTICS) or metric.key in asked
    ]
    of_requests = any(metric.key.startswith("latency_ms.") for metric in metrics)
    wanted: tuple[str, ...] = _IN_TABLE if of_requests else (*_IN_TABLE, *_IN_TABLE_OF_STEPS)
    order = {key: index for index, key in enumerate(dict.fromkeys((*asked, *wanted)))}
    metrics.sort(key=lambda metric: order.get(metric.key, len(order)))
    return [
        Column(
            metric.key, metric.label, format=_format(metric.format), better=_better(metric.key),
            shown=metric.key in order, interval=metric.key in (*asked, *wanted[:2]),
        )
        for metric in metrics
    ]  # fmt: skip


def definitions_of(columns: Iterable[Column], rows: Iterable[Row]) -> dict[str, str]:
    """What the figures among `columns` are, and their intervals, where `rows` have some."""
    keys = {column.key for column in columns if column.kind == "figure"}
    have = {".".join(key.split(".")[:parts]) for key in keys for parts in (1, 2)}
    if any(f"{key}.low" in row for row in rows for key in keys):
        have.add("interval_90")
    return {key: text for key, text in DEFINITIONS.items() if key in have}


def swept_column(key: str, keys: Sequence[str]) -> Column:
    """The column of a scenario's field: called by the last part of its path where no other of `keys` ends so."""
    last = key.rpartition(".")[2]
    alone = sum(other.rpartition(".")[2] == last for other in keys) == 1
    return Column(key, last if alone else key, kind="field")


def text_of(value: object) -> str | float | int | None:
    """A field's value as a cell: numbers and None as they are, all else as short text."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        base = [str(value["base"])] if "base" in value else []
        return " ".join([*base, *(f"{key}={text_of(each)}" for key, each in value.items() if key != "base")])
    if isinstance(value, list | tuple):
        return "+".join(str(text_of(each)) for each in value)
    return str(value)


def _format(spec: str) -> Format:
    if spec.endswith("%"):
        return "gain" if spec.startswith("+") else "percent"
    return "number"


def _better(key: str) -> Literal["high", "low", ""]:
    return "high" if key in _HIGH else "low" if key.startswith(_LOW) else ""

"""What came out of a sweep: its points, as rows, as a table or a frame, and as figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchsim.errors import InputError, need_pandas
from batchsim.sweep.store import POINTS, SUMMARY

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    import pyarrow as pa

SCHEMA_VERSION = 1
# Beside the swept fields and the figures in each row.
POINT, SCHEDULE, HASH, ERROR = "point", "schedule", "hash", "error"


@dataclass(frozen=True, repr=False)
class SweepResult:
    """A sweep's points in its order, as their files hold them. `folder` is where those lie, if they do.

    `draws`: how often costs were drawn for the intervals of the figures; 0: they have none.
    """

    name: str
    fields: list[str]
    points: list[dict[str, Any]]
    draws: int = 0
    code: str = ""
    folder: Path | None = field(default=None, compare=False)

    @classmethod
    def load(cls, folder: Path | str) -> SweepResult:
        """The sweep that was written into a folder.

        Raises:
            InputError: there is none.
        """
        folder = Path(folder)
        summary = read_json(folder / SUMMARY)
        points = []
        for each in summary["points"]:
            path = folder / POINTS / f"{each['hash']}.json"
            points.append(read_json(path) if path.is_file() else _unknown(each))
        return cls(summary["name"], summary["fields"], points, summary["draws"], summary["code"], folder)

    def __repr__(self) -> str:
        return f"<SweepResult {self.name!r}: {len(self.points):,} points over {', '.join(self.fields)}>"

    @property
    def failed(self) -> list[dict[str, Any]]:
        """The points that could not be run; `error` says why."""
        return [point for point in self.points if point["error"] is not None]

    def summary(self) -> dict[str, Any]:
        """What `sweep.json` holds: the points in order, with the hashes that name their files."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "sweep",
            "name": self.name,
            "fields": self.fields,
            "draws": self.draws,
            "code": self.code,
            "points": [{key: point[key] for key in (HASH, "fields", ERROR)} for point in self.points],
        }

    def to_json(self) -> dict[str, Any]:
        """What `batchsim sweep --json` prints: the summary, and the rows of the table."""
        return {**self.summary(), "results": self.rows()}

    def rows(self) -> list[dict[str, Any]]:
        """A row for each point and schedule; for a point that failed one, without figures.

        Keys: `point` (from 0), the swept fields, `schedule`, the figures as `batchsim.result.figures` names them, with
        90% intervals `<figure>.low` and `<figure>.high`, `hash` and `error`.
        """
        return [row for number, point in enumerate(self.points) for row in _rows(number, point, self.fields)]

    def frame(self) -> pd.DataFrame:
        """The rows as a pandas frame; a swept field whose values are no plain ones is told as text."""
        need_pandas()
        import pandas as pd

        columns = self._columns
        return pd.DataFrame({name: pd.Series(values) for name, values in columns.items()})

    def table(self) -> pa.Table:
        """The rows as an Arrow table, which is what `results.parquet` holds."""
        import pyarrow as pa

        return pa.table({name: _array(name, values) for name, values in self._columns.items()})

    @cached_property
    def _columns(self) -> dict[str, list[Any]]:
        """The table by columns: the point, its fields, the schedule, the figures, the hash and the error."""
        rows = self.rows()
        ends = [POINT, *self.fields, SCHEDULE], [HASH, ERROR]
        known = {*ends[0], *ends[1]}
        figures = list(dict.fromkeys(key for row in rows for key in row if key not in known))
        columns = {key: [row.get(key) for row in rows] for key in (*ends[0], *figures, *ends[1])}
        return columns | {name: plain(columns[name]) for name in self.fields}

    def figure(self, x: str, y: str | None = None, color: str | None = SCHEDULE) -> go.Figure:
        """A figure (without a name the throughput) over a field or another figure, a line for each value of `color`,
        with its 90% intervals.

        Raises:
            InputError: there is no such column.
        """
        from batchsim.sweep.figures import lines

        hue = None if color is None else self._known(color)
        return lines(self._columns, self._known(x), self._known(y or self._throughput), hue)

    def heatmap(self, x: str, y: str, value: str | None = None, schedule: str | None = None) -> go.Figure:
        """A figure (without a name the throughput) over two fields, of one schedule (without a name the first); the
        mean where several points fall together.

        Raises:
            InputError: there is no such column or schedule.
        """
        from batchsim.sweep.figures import heat

        chosen = self._known(value or self._throughput)
        return heat(self._columns, self._known(x), self._known(y), chosen, schedule)

    @property
    def _throughput(self) -> str:
        """Of tokens, or of requests where none are generated."""
        tokens = "throughput_tokens_per_s"
        return tokens if tokens in self._columns else "throughput_requests_per_s"

    def _known(self, key: str) -> str:
        from batchsim.errors import nearest, shown

        if key not in self._columns:
            guess = nearest(key, self._columns) or next((name for name in self._columns if name.endswith(key)), None)
            wanted = "one of those of frame()" + (f" (the nearest: {guess})" if guess else "")
            raise InputError("the sweep", "columns", shown(key), wanted)
        return key

    def _repr_html_(self) -> str:
        from batchsim.sweep.figures import as_html

        return as_html(self)


def _rows(number: int, point: Mapping[str, Any], fields: list[str]) -> list[dict[str, Any]]:
    from batchsim.result import ScheduleResult, figures

    head = {POINT: number, **{key: point["fields"].get(key) for key in fields}}
    tail = {HASH: point[HASH], ERROR: point[ERROR]}
    if point["run"] is None:
        return [{**head, SCHEDULE: None, **tail}]
    found = []
    for name, values in point["run"]["schedules"].items():
        result = ScheduleResult(**values)
        told: dict[str, float] = {}
        for key, value in figures(result).items():
            told[key] = value
            if key in result.interval_90:
                told[f"{key}.low"], told[f"{key}.high"] = result.interval_90[key]
        found.append({**head, SCHEDULE: name, **told, **tail})
    return found


def plain(values: list[Any]) -> list[Any]:
    """Values of one kind, for a column: numbers, truths or texts; others, and mixed ones, are told as text."""
    from batchsim.report.explore.columns import text_of

    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return [None if value is None else float(value) for value in values]
    if len(kinds) <= 1 and kinds <= {int, float, bool, str}:
        return values
    return [None if value is None else str(text_of(value)) for value in values]


def read_json(path: Path) -> Any:
    """What a file of a sweep's folder holds.

    Raises:
        InputError: it is not there, or damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(str(path), "", f"no readable file ({error.strerror})", "what a sweep wrote") from None
    except ValueError:
        raise InputError(str(path), "", "no JSON", "what a sweep wrote; remove it and start the sweep again") from None


def _unknown(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A point without a file: the process that ran it died."""
    return {"schema_version": SCHEMA_VERSION, **summary, "run": None, "cdf": {}, "window": {}}


def _array(name: str, values: list[Any]) -> pa.Array:
    import pyarrow as pa

    if name in (SCHEDULE, HASH, ERROR):
        return pa.array(values, pa.string())
    return pa.array(values)

"""Requests as a Parquet file: one row a request, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from batchsim.errors import RunError
from batchsim.files import beside, put
from batchsim.served import Int64, Served

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 1
ROW_GROUP = 65_536

# Columns of `Served`. Times that have not come are null.
TIMES = ("arrival_ns", "started_ns", "first_token_ns", "finished_ns")
NUMBERS = (
    "replica", "priority", "prompt_tokens", "output_tokens", "generated", "cached_tokens", "preemptions",
)  # fmt: skip
NAMES = {"generated": "generated_tokens"}  # in the file, where that differs
UNITS = {
    "request": "index in the order of arrival",
    **dict.fromkeys(TIMES, "ns since the run began; null: has not happened"),
    **dict.fromkeys((NAMES.get(name, name) for name in NUMBERS if name in NAMES or name.endswith("_tokens")), "tokens"),
}


class RequestsWriter:
    """A Parquet file that grows in row groups of `ROW_GROUP` requests, and has its name once `commit` is called.

    A context manager: leaving it without an exception commits; with one, the file is discarded unless `commit` has
    been called. A file of that name stays as it is until then.

    Raises:
        RunError: pyarrow is not installed.
    """

    def __init__(self, path: Path) -> None:
        if find_spec("pyarrow") is None:
            raise RunError("writing Parquet needs pyarrow: pip install pyarrow")
        import pyarrow.parquet as pq

        self.path = path
        self._schema = _schema()
        self._pending: list[pa.Table] = []
        self._rows = 0
        self._file, temporary = beside(path)
        self._temporary: Path | None = temporary
        # Of numbers that grow by little it makes half of what the default encoding makes, in a third of the time.
        encodings = dict.fromkeys(self._schema.names[1:], "DELTA_BINARY_PACKED")
        self._writer = pq.ParquetWriter(
            self._file, self._schema, use_dictionary=["schedule"], column_encoding=encodings
        )

    def append(self, schedule: str, first_index: int, columns: Mapping[str, Int64]) -> None:
        """Add requests of `schedule`, the first of which has the index `first_index`.

        `columns` are those of `Served` by their names there, arrays of one length; all of `TIMES` and `NUMBERS`.
        """
        import pyarrow as pa

        count = len(columns["arrival_ns"])
        arrays = [
            pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), [schedule]),
            np.arange(first_index, first_index + count, dtype=np.int64),
            *(pa.array(columns[name], pa.int64(), mask=columns[name] < 0) for name in TIMES),
            *(pa.array(columns[name], pa.int64()) for name in NUMBERS),
        ]
        self._pending.append(pa.Table.from_arrays(arrays, schema=self._schema))
        self._rows += count
        if self._rows >= ROW_GROUP:
            self._write(self._rows - self._rows % ROW_GROUP)

    def commit(self) -> None:
        """Give the file its name, with all that was appended; nothing can be appended any more."""
        if self._temporary is None:
            return
        try:
            if self._rows:
                self._write(self._rows)
            self._writer.close()
            put(self._file, self._temporary, self.path)
        except BaseException:
            self.discard()
            raise
        self._temporary = None

    def discard(self) -> None:
        """Remove what was written, if it was not committed."""
        if self._temporary is None:
            return
        # Without its footer, the file is of no use to anyone.
        with contextlib.suppress(Exception):
            self._writer.close()
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._temporary)
        self._temporary = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()

    def _write(self, rows: int) -> None:
        """Write the first `rows` of what is pending."""
        import pyarrow as pa

        table = pa.concat_tables(self._pending).unify_dictionaries()
        self._writer.write_table(table.slice(0, rows), row_group_size=ROW_GROUP)
        self._rows -= rows
        self._pending = [table.slice(rows)] if self._rows else []


def write_requests(path: Path, runs: Mapping[str, Served]) -> None:
    """Write the requests of each schedule, finished or not, to `path`; the file's metadata say the units.

    Raises:
        RunError: pyarrow is not installed.
    """
    with RequestsWriter(path) as file:
        for schedule, served in runs.items():
            for first in range(0, len(served.arrival_ns), ROW_GROUP):
                some = slice(first, first + ROW_GROUP)
                file.append(schedule, first, {name: getattr(served, name)[some] for name in (*TIMES, *NUMBERS)})


def _schema() -> Any:
    import pyarrow as pa

    about = {"schema_version": str(SCHEMA_VERSION), "units": json.dumps(UNITS)}
    schedule = pa.field("schedule", pa.dictionary(pa.int32(), pa.string()), nullable=False)
    names = ("request", *TIMES, *(NAMES.get(name, name) for name in NUMBERS))
    numbers = [pa.field(name, pa.int64(), nullable=name in TIMES) for name in names]
    return pa.schema([schedule, *numbers], metadata=about)

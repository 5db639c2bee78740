"""Requests as Parquet: what was written is read, and a file is there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import signal
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from batchsim import requests_file
from batchsim.errors import RunError
from batchsim.requests_file import NAMES, NUMBERS, ROW_GROUP, TIMES, RequestsWriter, write_requests
from batchsim.served import Int64, Served
from tests.sample_runs import requests_at, serve

pq = pytest.importorskip("pyarrow.parquet")

KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from batchsim.requests_file import NUMBERS, TIMES, RequestsWriter
with RequestsWriter(Path(sys.argv[1])) as file:
    file.append("sync", 0, dict.fromkeys((*TIMES, *NUMBERS), np.arange(100_000)))
    print("written", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def runs() -> dict[str, Served]:
    requests = requests_at(15.0, 200)
    return {
        "sync": serve(*requests, host_ns=900_000, device_ns=4_900_000),
        "async": serve(*requests, host_ns=0, device_ns=4_900_000, until_ns=6_000_000_000),
    }


def columns(count: int, start: int = 0) -> Mapping[str, Int64]:
    return dict.fromkeys((*TIMES, *NUMBERS), np.arange(start, start + count))


def test_what_is_written_is_read(runs: dict[str, Served], tmp_path: Path) -> None:
    path = tmp_path / "new" / "requests.parquet"
    write_requests(path, runs)
    table = pq.read_table(path)
    first = 0
    for schedule, served in runs.items():
        count = len(served.arrival_ns)
        rows = table.slice(first, count).to_pydict()
        assert set(rows["schedule"]) == {schedule}
        assert rows["request"] == list(range(count))
        for name in TIMES:
            assert rows[name] == [None if value < 0 else value for value in getattr(served, name).tolist()]
        for name in NUMBERS:
            assert rows[NAMES.get(name, name)] == getattr(served, name).tolist()
        first += count
    assert first == table.num_rows
    assert None in table["finished_ns"].to_pylist()
    assert str(table.schema.field("schedule").type).startswith("dictionary<values=string")
    about = table.schema.metadata
    assert about[b"schema_version"] == b"1"
    assert set(json.loads(about[b"units"])) <= set(table.column_names)


def test_large_runs_are_written_in_groups_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "requests.parquet"
    with RequestsWriter(path) as file:
        for start in range(0, 200_000, 30_000):
            file.append("sync" if start < 90_000 else "async", start, columns(min(30_000, 200_000 - start), start))
            assert file._rows < ROW_GROUP
    about = pq.ParquetFile(path).metadata
    assert [about.row_group(group).num_rows for group in range(about.num_row_groups)] == [*[ROW_GROUP] * 3, 3_392]
    table = pq.read_table(path)
    assert (table["request"].to_numpy() == np.arange(200_000)).all()
    assert table["schedule"].to_pylist() == ["sync"] * 90_000 + ["async"] * 110_000


def test_no_requests_are_a_file_without_rows(tmp_path: Path) -> None:
    write_requests(tmp_path / "requests.parquet", {})
    assert pq.read_table(tmp_path / "requests.parquet").num_rows == 0


def test_what_fails_leaves_the_file_as_it_was(runs: dict[str, Served], tmp_path: Path) -> None:
    path = tmp_path / "requests.parquet"
    path.write_bytes(b"before")
    with contextlib.suppress(ZeroDivisionError), RequestsWriter(path) as file:
        file.append("sync", 0, columns(ROW_GROUP))
        raise ZeroDivisionError
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    write_requests(path, runs)
    assert stat.S_IMODE(path.stat().st_mode) & stat.S_IRUSR
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_run_keeps_what_it_commits(tmp_path: Path) -> None:
    path = tmp_path / "requests.parquet"
    with contextlib.suppress(KeyboardInterrupt), RequestsWriter(path) as file:
        file.append("sync", 0, columns(10))
        file.commit()
        raise KeyboardInterrupt
    assert pq.read_table(path).num_rows == 10
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_run_leaves_no_file_of_that_name(tmp_path: Path) -> None:
    path = tmp_path / "requests.parquet"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("written\n", -signal.SIGKILL)
    assert not path.exists()


def test_without_pyarrow_a_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests_file, "find_spec", lambda name: None)
    with pytest.raises(RunError, match="pip install"):
        write_requests(tmp_path / "requests.parquet", {})
    assert list(tmp_path.iterdir()) == []


def test_pyarrow_is_imported_only_to_write() -> None:
    code = "import sys, batchsim.requests_file; sys.exit('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

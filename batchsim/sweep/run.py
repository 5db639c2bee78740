"""A sweep from its file to its result: which points there are, which are done, and the engine that runs the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from batchsim import fields
from batchsim.errors import InputError, shown
from batchsim.refusal import Override
from batchsim.sweep.point import Task
from batchsim.sweep.points import Point, code_version, points_of, source_of
from batchsim.sweep.result import SweepResult
from batchsim.sweep.spec import SweepSpec, load, refusals
from batchsim.sweep.store import REPORT, RESULTS, SUMMARY, Store, only_writer
from batchsim.yaml_loader import Document, KeyPath

if TYPE_CHECKING:
    from batchsim.sweep.pool import Done

Engine = Literal["processes", "ray"]
ENGINES = ("processes", "ray")
# Takes how many points are done, of how many, how many of them have failed, and how many were done before.
Progress = Callable[[int, int, int, int], None]


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep that has been read and found possible: its points, and the user's own files that they name."""

    name: str
    fields: tuple[str, ...]
    points: list[Point]
    files: dict[Path, bytes]
    base: Path
    draws: int

    def tasks(self) -> dict[str, Task]:
        """Each point to run, by its hash, in order; equal points are one."""
        return {
            point.hash: Task(point.hash, point.fields, point.document, self.base, self.draws, point.refused)
            for point in self.points
        }


def read(path: Path | str, sets: Iterable[str | Override] = (), *, draws: int | None = None) -> Sweep:
    """The sweep in a YAML file; `sets` are put over its values, and `draws` over the usual number of them.

    Raises:
        InputError: with everything that is wrong with the file, or with the scenarios of its points.
    """
    path = Path(path)
    spec, lines = load(path, sets)
    return _sweep(spec, path, lines, draws)


def of(document: Mapping[str, Any], *, base: Path = Path(), draws: int | None = None) -> Sweep:
    """As `read`, of the content of such a file; paths in it are relative to `base`.

    Raises:
        InputError: as `read`.
    """
    path = base / "sweep"  # what errors name
    spec = fields.read(SweepSpec, refusals(), Document(dict(document)), str(path), ())
    return _sweep(spec, path, {}, draws)


def _sweep(spec: SweepSpec, path: Path, lines: Mapping[KeyPath, int], draws: int | None) -> Sweep:
    draws = usual_draws() if draws is None else _count("draws", draws)
    source = source_of(spec, path, lines)
    points, files = points_of(spec, source, file=str(path), lines=lines, draws=draws)
    return Sweep(spec.name, spec.fields, points, files, source.base, draws)


def _count(name: str, value: int) -> int:
    """A count that was given in a call, whatever kind of integer it is."""
    if not hasattr(value, "__index__") or value < 0:
        raise InputError(None, name, shown(value), "an integer, 0 or more")
    return index(value)


def usual_draws() -> int:
    """How often costs are drawn for the intervals of each point."""
    from batchsim.intervals import SWEEP_DRAWS

    return SWEEP_DRAWS


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    sweep: Sweep,
    out: Path | None = None,
    *,
    engine: str = "processes",
    workers: int | None = None,
    address: str | None = None,
    progress: Progress | None = None,
) -> SweepResult:
    """Run the points that are not done, and write what is made of all of them into `out` (None: nothing is written).

    `engine`: `processes` of this machine, `workers` of them, by default one for each core (0: none, this very process
    runs the points); or `ray`, on the cluster at `address`. Interrupted or killed, what is done stays, and the same
    call goes on from there. `progress` as `Progress`.

    Raises:
        InputError: another sweep writes into `out`.
        RunError: the engine does not work.
    """
    if engine not in ENGINES:
        raise InputError(None, "engine", shown(engine), " or ".join(ENGINES))
    workers = cores() if workers is None else _count("workers", workers)
    with only_writer(out):
        store, tasks, lost = Store(out), sweep.tasks(), {}
        todo = [task for name, task in tasks.items() if name not in store]
        before, failed = len(tasks) - len(todo), 0
        if progress is not None:
            progress(before, len(tasks), failed, before)
        with closing(_engine(todo, engine, workers, address, sweep.files)) as told:
            for count, (name, content, keep) in enumerate(told):
                failed += _has_failed(content)
                if keep:
                    store.put(name, content)
                else:
                    lost[name] = content
                if progress is not None:
                    progress(before + count + 1, len(tasks), failed, before)
        contents = (_content(store, lost, point.hash) for point in sweep.points)
        result = SweepResult(sweep.name, list(sweep.fields), list(contents), sweep.draws, code_version(), out)
        if out is not None:
            _write(out, result)
    return result


def _engine(
    todo: list[Task], engine: str, workers: int, address: str | None, files: Mapping[Path, bytes]
) -> Generator[Done]:
    from batchsim.sweep.pool import in_this_process, on_processes

    if engine == "ray" and todo:
        from batchsim.sweep.on_ray import on_ray

        return on_ray(todo, address or "auto", files)
    return on_processes(todo, workers) if todo and workers else in_this_process(todo)


def _has_failed(content: bytes) -> bool:
    return b'"run":null' in content[:10_000]


def _content(store: Store, lost: Mapping[str, bytes], name: str) -> dict[str, Any]:
    content = lost[name] if name in lost else store[name]
    try:
        found: dict[str, Any] = json.loads(content)
    except ValueError:
        raise InputError(store.where(name), "", "no JSON", "what a sweep wrote; remove it and start again") from None
    return found


def _write(out: Path, result: SweepResult) -> None:
    import pyarrow.parquet as pq

    from batchsim.files import write_bytes, write_json
    from batchsim.report.sweep import write_sweep_report

    buffer = BytesIO()
    pq.write_table(result.table(), buffer, compression="zstd")
    write_bytes(out / RESULTS, buffer.getvalue())
    write_sweep_report(out / REPORT, result)
    write_json(out / SUMMARY, result.summary())

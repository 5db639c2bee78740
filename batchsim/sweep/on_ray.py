"""Points on an existing Ray cluster, a task each. Needs the extra `ray`.

The cluster's machines need this package's dependencies; the package itself, and the profiles and traces that a scenario
names, are sent along. A Ray worker that dies takes nothing with it but the point that it was at.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from batchsim.errors import RunError
from batchsim.sweep.point import PASSING, Task, told
from batchsim.sweep.points import code_version
from batchsim.sweep.pool import THREADS, Done, Fallen

# Tasks in flight for each core, so that none is idle while the next one travels.
_AHEAD = 2
_PACKAGES = ("batchsim", "calibration")
_EXCLUDED = ["**/__pycache__/**", "**/calibration/validation/**"]


def on_ray(tasks: Sequence[Task], address: str, files: Mapping[Path, bytes]) -> Generator[Done]:
    """Run the tasks on the Ray cluster at `address` (`auto`: the one of this machine), and tell each as it is done.

    `files` are those that the scenarios name. A point whose worker dies is run again, once.

    Raises:
        RunError: Ray is not installed, there is no cluster there, or its code is another version.
    """
    ray = _ray()
    already = ray.is_initialized()
    if not already:
        _connect(ray, address)
    try:
        yield from _run(ray, tasks, files)
    finally:
        if not already:
            ray.shutdown()


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ModuleNotFoundError:
        raise RunError("--engine ray needs Ray: pip install 'batchsim[ray]'") from None
    return ray


def _connect(ray: Any, address: str) -> None:
    root = Path(__file__).parents[2]
    shipped = {
        "py_modules": [str(root / name) for name in _PACKAGES],
        "excludes": _EXCLUDED,
        "env_vars": THREADS,
    }
    try:
        ray.init(address, runtime_env=shipped, logging_level="error", log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(f"no Ray cluster at {address}: {reason}") from None


def _run(ray: Any, tasks: Sequence[Task], files: Mapping[Path, bytes]) -> Generator[Done]:
    todo, fallen = deque(tasks), Fallen()
    errors = ray.exceptions
    lost_with = errors.WorkerCrashedError, errors.OutOfMemoryError, errors.NodeDiedError, errors.ObjectLostError
    died = (*lost_with, *PASSING)
    packed = _packed(tasks[0].base, files)
    sent = None if packed is None else [ray.put(packed)]  # in a list, so that it is fetched by those alone who need it
    remote = ray.remote(num_cpus=1, max_retries=0)(_told)
    flying: dict[Any, Task] = {}
    while todo or flying:
        while todo and len(flying) < max(_AHEAD * int(ray.cluster_resources().get("CPU", 0)), 1):
            task = todo.popleft()
            flying[remote.remote(task, sent, code_version())] = task
        ready, _ = ray.wait(list(flying), num_returns=1)
        for each in ready:
            task = flying.pop(each)
            try:
                yield task.hash, ray.get(each), True
            except died:
                lost = fallen.again(task)
                if lost is None:
                    todo.appendleft(task)
                else:
                    yield lost
            except errors.RayError as error:
                reason = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
                raise RunError(f"Ray could not run points: {reason}") from None


@dataclass(frozen=True, slots=True)
class _Packed:
    """Files, by their paths within a folder, and where in it the scenario's own folder is."""

    base: str
    files: dict[str, bytes]


def _packed(base: Path, files: Mapping[Path, bytes]) -> _Packed | None:
    """The files in a form that another machine can make a folder of; None: there are none."""
    if not files:
        return None
    # As they are written: a link is not followed to where it leads.
    places = {os.path.abspath(path): content for path, content in files.items()}  # noqa: PTH100
    folder = os.path.abspath(base)  # noqa: PTH100
    root = os.path.commonpath([folder, *map(os.path.dirname, places)])
    within = {os.path.relpath(place, root): content for place, content in places.items()}
    return _Packed(os.path.relpath(folder, root), within)


def _told(task: Task, sent: list[Any] | None, version: str) -> bytes:
    """On a machine of the cluster: what becomes of a point, as it would on this one."""
    if code_version() != version:
        raise RunError("the cluster runs another version of batchsim, or of the libraries that it needs")
    return told(task if sent is None else replace(task, base=_unpacked(sent[0])))


_folders: dict[Any, tuple[tempfile.TemporaryDirectory[str], Path]] = {}


def _unpacked(reference: Any) -> Path:
    """The scenario's folder, made once in each process."""
    if reference not in _folders:
        packed: _Packed = _ray().get(reference)
        folder = tempfile.TemporaryDirectory(prefix="batchsim-")
        for name, content in packed.files.items():
            path = Path(folder.name) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        base = Path(folder.name) / packed.base
        base.mkdir(parents=True, exist_ok=True)
        _folders[reference] = folder, base
    return _folders[reference][1]

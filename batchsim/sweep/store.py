"""The folder of a sweep: one file a finished point, and what is made of all of them.

Every file is written whole or not at all and holds nothing of when or where it was made, so that a sweep that was
killed and started again ends with the same bytes as one that was not. What killed runs left half-written is removed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from batchsim.errors import InputError
from batchsim.files import write_bytes

POINTS, RESULTS, SUMMARY, REPORT = "points", "results.parquet", "sweep.json", "report.html"
# The names that `batchsim.files` gives to files that are not yet whole.
_HALF_WRITTEN = re.compile(r"\.([0-9a-f]{64}\.json|results\.parquet|sweep\.json|report\.html)\.[a-z0-9_]{8}")


class Store:
    """The points of a sweep that are done, by their hashes: in a folder, or with None in memory."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._kept: dict[str, bytes] = {}
        self._done: set[str] = set()
        if folder is not None and (folder / POINTS).is_dir():
            self._done = {path.stem for path in (folder / POINTS).iterdir() if path.suffix == ".json"}

    def __contains__(self, name: str) -> bool:
        return name in self._kept or name in self._done

    def __getitem__(self, name: str) -> bytes:
        """The content of a point's file."""
        return self._kept[name] if self.folder is None else self._path(self.folder, name).read_bytes()

    def put(self, name: str, content: bytes) -> None:
        """Keep a point: from now on it is done."""
        if self.folder is None:
            self._kept[name] = content
            return
        write_bytes(self._path(self.folder, name), content)
        self._done.add(name)

    def where(self, name: str) -> str:
        """The file of a point, for errors."""
        return name if self.folder is None else str(self._path(self.folder, name))

    @staticmethod
    def _path(folder: Path, name: str) -> Path:
        return folder / POINTS / f"{name}.json"


@contextmanager
def only_writer(folder: Path | None) -> Iterator[None]:
    """Keeps other sweeps out of a folder, which is made where it is missing, and removes what killed ones left there.

    Raises:
        InputError: another sweep writes into it now.
    """
    if folder is None:
        yield
        return
    (folder / POINTS).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder)
        for place in (folder, folder / POINTS):
            for path in place.iterdir():
                if _HALF_WRITTEN.fullmatch(path.name):
                    path.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    """The lock is the open folder's own: it leaves no file, and goes when the process does."""
    try:
        import fcntl
    except ImportError:  # not on this system
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError("--out", "", f"the folder {folder}, which another sweep writes into", "another one") from None
    except OSError:  # a file system without locks
        return

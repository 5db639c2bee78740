"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, BinaryIO


def beside(path: Path) -> tuple[BinaryIO, Path]:
    """An open temporary file in the folder of `path`, which is made where it is missing, and its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    return os.fdopen(descriptor, "wb"), Path(temporary)


def put(file: BinaryIO, temporary: Path, path: Path) -> None:
    """Give a file from `beside` its name, with all that was written to it: flush, fsync, rename."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    # mkstemp makes files private; results are for others to read.
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)
    os.replace(temporary, path)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    file, temporary = beside(path)
    try:
        with file:
            file.write(data)
            put(file, temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None:  # a full disk does not say what it had no room for
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a closing newline; NaN and infinities are refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")

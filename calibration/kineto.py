"""Chrome traces of torch.profiler (Kineto), read into columns in bounded memory.

A trace is an object whose `traceEvents` are a list of events, or that list alone; plain or gzipped. Kept are the
complete events (`ph` X) of the categories that BatchSim learns from, and pairs of `ph` B and E of a thread, which stand
for the same. Flows, counters, instants, metadata and other categories are left out: correlation ids say what flows do,
and gpu_user_annotation repeats the host's.
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
import zlib
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batchsim.errors import InputError, shown
from calibration.json_stream import LARGE, JsonStream
from calibration.kineto_events import CATEGORIES as CATEGORIES
from calibration.kineto_events import DEVICE_KINDS as DEVICE_KINDS
from calibration.kineto_events import KINDS as KINDS
from calibration.kineto_events import Events, clean

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]

CHUNK = 1 << 19
MAX_EXTRA = 1 << 18
MAX_EXTRAS = 256

_WANTED = "a Chrome trace that torch.profiler's export_chrome_trace wrote, plain or gzipped"
_WHOLE = "a whole trace: copy it again, or record anew and let export_chrome_trace return before the process ends"
_EVENTS = "those of a profiler: record with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])"
_ARCHIVES = {
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
}


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """The complete events of a trace, columns of one length n, by start and of those that start together longest first.

    Attributes:
        kind: uint8[n], indices into KINDS.
        name: int32[n], indices into `names`.
        start_ns, end_ns: int64[n], nanoseconds since the earliest event began.
        lane: int32[n], indices into `streams` for the kinds in DEVICE_KINDS, into `threads` for the others.
        correlation: int64[n], which launch a device's activity comes from; -1 where the event has none.
        external: int64[n], the "External id" that an operator shares with what it launches; -1 where there is none.
        bytes: int64[n], of copies and fills; 0 elsewhere.
        graph_node: int64[n], the node of a CUDA graph that a kernel or copy is, where the trace tells; else -1.
        threads: (process, thread) as the trace names them; process -1 is the profiler's own.
        streams: (device, stream).
        dims: external id of a matrix product (MATRIX_PRODUCTS) -> JSON text of its inputs' shapes, where recorded.
        device_names: by device number; empty where the trace does not tell.
        extra: the top-level keys other than traceEvents, those of up to MAX_EXTRA characters.
        source: the file.
    """

    kind: npt.NDArray[np.uint8]
    name: Int32
    start_ns: Int64
    end_ns: Int64
    lane: Int32
    correlation: Int64
    external: Int64
    bytes: Int64
    graph_node: Int64
    names: tuple[str, ...]
    threads: tuple[tuple[str, str], ...]
    streams: tuple[tuple[int, int], ...]
    dims: dict[int, str]
    device_names: tuple[str, ...]
    extra: dict[str, Any]
    source: str

    def __len__(self) -> int:
        return len(self.kind)


def read_trace(path: Path, progress: Callable[[int, int], None] | None = None, *, chunk: int = CHUNK) -> Trace:
    """Read a trace; `progress` is told the bytes of the file that were read, and how many it has.

    Args:
        chunk: bytes read at a time; the result does not depend on it.

    Raises:
        InputError: what the file is instead of a trace, or which of its events cannot be understood and why.
    """
    file = str(path)
    with closing(_pieces(path, progress, chunk)) as pieces:
        stream = JsonStream(file, pieces, wanted=_WANTED, whole=_WHOLE)
        events, extra = _parts(file, stream)
        stream.end()
    if events is None:
        keys = f"the keys {', '.join(map(ascii, list(extra)[:5]))}, " if extra else ""
        raise InputError(file, "", f"a JSON object with {keys}no traceEvents", _WANTED)
    return Trace(*events.columns(), _device_names(extra.get("deviceProperties")), extra, file)


def _parts(file: str, stream: JsonStream) -> tuple[Events | None, dict[str, Any]]:
    """The events, and what else the trace has at its top level."""
    events: Events | None = None
    extra: dict[str, Any] = {}
    match stream.peek():
        case "":
            raise InputError(file, "", "an empty file", _WANTED)
        case "[":
            events = Events(file, "", _EVENTS)
            events.take(stream)
        case "{":
            for key in stream.members():
                if key != "traceEvents":
                    value = stream.skip(MAX_EXTRA)
                    if len(extra) < MAX_EXTRAS and (kept := _plain(value)) is not LARGE:
                        extra[clean(key)] = kept
                    continue
                if events is not None:
                    raise InputError(file, key, "the key twice", "one list of events")
                if stream.peek() not in ("[", ""):
                    raise InputError(file, key, shown(stream.skip(MAX_EXTRA)), "a list of events")
                events = Events(file, key, _EVENTS)
                events.take(stream)
        case _:
            raise InputError(file, "", shown(stream.value()), _WANTED)
    return events, extra


def _pieces(path: Path, progress: Callable[[int, int], None] | None, chunk: int) -> Generator[str, None, None]:
    """The text of a file."""
    with _opened(path) as raw:
        try:
            start = raw.peek(8)[:8]
        except OSError as error:
            raise _unreadable(path, error) from None
        for magic, archive in _ARCHIVES.items():
            if start.startswith(magic):
                raise InputError(str(path), "", archive, _WANTED)
        size = os.fstat(raw.fileno()).st_size
        stream = gzip.GzipFile(fileobj=raw) if start.startswith(b"\x1f\x8b") else raw
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        count = 0
        while data := _read(path, stream, chunk):
            count += len(data)
            yield _decoded(str(path), decoder, data, count)
            if progress is not None:
                progress(raw.tell() if raw.seekable() else count, size)
        yield _decoded(str(path), decoder, b"", count)


def _opened(path: Path) -> BufferedReader:
    try:
        if path.is_dir():
            raise InputError(str(path), "", "a directory", "one of the traces in it")
        return path.open("rb")
    except OSError as error:
        raise _unreadable(path, error) from None
    except ValueError:
        raise InputError(ascii(str(path)), "", "an impossible path", _WANTED) from None


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(str(path), "", f"no readable file ({error.strerror or type(error).__name__})", _WANTED)


def _read(path: Path, stream: BufferedReader | gzip.GzipFile, chunk: int) -> bytes:
    try:
        return stream.read(chunk)
    except EOFError:
        raise InputError(str(path), "", "a gzip file that ends in the middle", _WHOLE) from None
    except (gzip.BadGzipFile, zlib.error):
        raise InputError(str(path), "", "a damaged gzip file", _WHOLE) from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _decoded(file: str, decoder: codecs.IncrementalDecoder, data: bytes, count: int) -> str:
    """The text of a piece of a file, which ends at byte `count`; no bytes are its end."""
    try:
        return decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:
        if not data:
            raise InputError(file, "", "a file that ends in the middle of a character", _WHOLE) from None
        at = count - len(error.object) + error.start + 1
        found = f"byte 0x{error.object[error.start]:02x} at byte {at:,}, which is not UTF-8"
        raise InputError(file, "", found, _WANTED) from None


def _plain(value: Any) -> Any:
    """A value that any writer of JSON in UTF-8 takes: no halves of surrogate pairs, and null for what is no number."""
    if value is LARGE:
        return LARGE
    try:
        return json.loads(clean(json.dumps(value, ensure_ascii=False)), parse_constant=lambda _: None)
    except RecursionError:
        return LARGE


def _device_names(properties: Any) -> tuple[str, ...]:
    names: dict[int, str] = {}
    if isinstance(properties, list):
        for index, device in enumerate(properties):
            if isinstance(device, dict) and isinstance(name := device.get("name"), str):
                number = device.get("id", index)
                names[number if type(number) is int and 0 <= number < 1024 else index] = name
    return tuple(names.get(number, "") for number in range(max(names, default=-1) + 1))

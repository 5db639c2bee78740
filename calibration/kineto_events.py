"""Events of torch.profiler's Chrome traces, gathered into columns: which are kept, and what is refused of those."""

from __future__ import annotations

import re
from array import array
from collections import defaultdict
from decimal import Decimal
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from batchsim.errors import InputError, shown
from calibration.json_stream import JsonStream

KINDS = ("annotation", "op", "runtime", "kernel", "memcpy", "memset", "python", "sync", "overhead")
ANNOTATION, OP, RUNTIME, KERNEL, MEMCPY, MEMSET, PYTHON, SYNC, OVERHEAD = range(len(KINDS))
DEVICE_KINDS = frozenset({KERNEL, MEMCPY, MEMSET, SYNC})

# Categories by the names that torch has given them, early ones with capitals.
CATEGORIES = {
    "user_annotation": ANNOTATION,
    "cpu_op": OP, "Operator": OP,
    "cuda_runtime": RUNTIME, "cuda_driver": RUNTIME, "hip_runtime": RUNTIME, "hip_driver": RUNTIME,
    "xpu_runtime": RUNTIME, "xpu_driver": RUNTIME, "privateuse1_runtime": RUNTIME, "privateuse1_driver": RUNTIME,
    "Runtime": RUNTIME,
    "kernel": KERNEL, "Kernel": KERNEL,
    "gpu_memcpy": MEMCPY, "Memcpy": MEMCPY,
    "gpu_memset": MEMSET, "Memset": MEMSET,
    "python_function": PYTHON,
    "cuda_sync": SYNC,
    "overhead": OVERHEAD,
}  # fmt: skip
MATRIX_PRODUCTS = frozenset(f"aten::{op}" for op in ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "_scaled_mm"))

MAX_US = 4.6e15  # 146 years: clocks that count from 1970 fit, and twice as many nanoseconds fit into 63 bits.
MAX_SPAN_NS = 86400 * 10**9
MAX_OPEN = 100_000
# Beyond this many microseconds a float64 no longer tells one nanosecond from the next.
_EXACT_US = float(1 << 43)

_NUMBER = re.compile(r"[+-]?\d{1,20}(?:\.\d{0,20})?", re.ASCII)
_NUMBERS = frozenset({int, float, Decimal})

# A row: kind, name, start_ns, end_ns, lane, correlation, external, bytes, graph_node, number of the event.
_WIDTH = 10


class Columns(NamedTuple):
    """The columns of a `calibration.kineto.Trace`, and what their indices stand for."""

    kind: npt.NDArray[np.uint8]
    name: npt.NDArray[np.int32]
    start_ns: npt.NDArray[np.int64]
    end_ns: npt.NDArray[np.int64]
    lane: npt.NDArray[np.int32]
    correlation: npt.NDArray[np.int64]
    external: npt.NDArray[np.int64]
    bytes: npt.NDArray[np.int64]
    graph_node: npt.NDArray[np.int64]
    names: tuple[str, ...]
    threads: tuple[tuple[str, str], ...]
    streams: tuple[tuple[int, int], ...]
    dims: dict[int, str]


class Events:
    """The events of one list, gathered as they come.

    Args:
        file: what refusals call the file.
        key: the list's key in the file.
        wanted: what they say should have been there where no event is kept.
    """

    def __init__(self, file: str, key: str, wanted: str) -> None:
        self._file = file
        self._key = key
        self._wanted = wanted
        self._seen = 0
        self._rows = array("q")
        self._names: dict[str, int] = {}
        self._threads: dict[tuple[Any, Any], int] = {}
        self._streams: dict[tuple[Any, Any], int] = {}
        self._thread_names: dict[tuple[str, str], int] = {}
        self._stream_numbers: dict[tuple[int, int], int] = {}
        self._dims: dict[int, str] = {}
        self._dims_texts: dict[str, str] = {}
        self._begun: defaultdict[int, list[tuple[int, dict[str, Any], int | None, int]]] = defaultdict(list)
        self._open = 0

    def take(self, stream: JsonStream) -> None:
        """Gather the events of the list that comes next."""
        exact = False
        for batch in stream.elements():
            if not exact and any(map(_inexact, batch)):
                exact = True
                stream.exact()
                continue
            self._add(batch)

    def columns(self) -> Columns:
        """What was kept, sorted.

        Raises:
            InputError: where that is nothing, or spans more than MAX_SPAN_NS.
        """
        rows = np.frombuffer(self._rows, dtype=np.int64).reshape(-1, _WIDTH)
        if not len(rows):
            found = f"{self._seen:,} events, none of them an operator, launch or kernel" if self._seen else "no events"
            raise InputError(self._file, self._key, found, self._wanted)
        start, end = rows[:, 2], rows[:, 3]
        origin = start.min()
        if end.max() - origin > MAX_SPAN_NS:
            self._refuse_span(rows)
        order = np.lexsort((-end, start))

        def column(index: int, least: int = -1) -> npt.NDArray[np.int64]:
            values: npt.NDArray[np.int64] = rows[order, index]
            return np.maximum(values, least, out=values)

        return Columns(
            column(0).astype(np.uint8), column(1).astype(np.int32), start[order] - origin, end[order] - origin,
            column(4).astype(np.int32), column(5), column(6), column(7, 0), column(8),
            tuple(map(clean, self._names)), tuple(self._thread_names), tuple(self._stream_numbers), self._dims,
        )  # fmt: skip

    def _add(self, batch: list[Any]) -> None:
        for number, event in enumerate(batch, self._seen):
            if type(event) is not dict:
                self._refuse(number, "", shown(event), "an event, which is an object")
            phase = event.get("ph")
            if phase == "X":
                if (kind := self._kind(number, event)) is not None:
                    start_ns = self._ns(number, event, "ts", -MAX_US)
                    self._keep(number, event, kind, start_ns, start_ns + self._ns(number, event, "dur", 0.0))
            elif phase == "B":
                self._begin(number, event)
            elif phase == "E":
                self._end(number, event)
        self._seen += len(batch)

    def _begin(self, number: int, event: dict[str, Any]) -> None:
        kind = self._kind(number, event)
        start_ns = self._ns(number, event, "ts", -MAX_US)
        self._begun[self._thread(number, event)].append((number, event, kind, start_ns))
        self._open += 1
        if self._open > MAX_OPEN:
            self._refuse(number, "ph", f"{self._open:,} events begun and not ended", "an E for every B of a thread")

    def _end(self, number: int, event: dict[str, Any]) -> None:
        begun = self._begun[self._thread(number, event)]
        if not begun:
            return  # What began before the recording.
        self._open -= 1
        first, beginning, kind, start_ns = begun.pop()
        if kind is not None:
            end_ns = self._ns(number, event, "ts", -MAX_US)
            if end_ns < start_ns:
                self._refuse(
                    number, "ts", f"an end {start_ns - end_ns:,} ns before its beginning, [{first}]", "one after"
                )
            self._keep(first, beginning, kind, start_ns, end_ns)

    def _keep(self, number: int, event: dict[str, Any], kind: int, start_ns: int, end_ns: int) -> None:
        args = event.get("args")
        if type(args) is not dict:
            if args is not None:
                self._refuse(number, "args", shown(args), "an object")
            args = {}
        name = event.get("name")
        if type(name) is not str:
            self._refuse(number, "name", _found(name), "a string")
        external = args.get("External id")
        if external is None:
            external = args.get("external id", -1)
        correlation = args.get("correlation", -1)
        size, node = 0, -1
        if kind in DEVICE_KINDS:
            lane = self._stream(number, event, args)
            size, node = args.get("bytes", 0), args.get("graph node id", -1)
        else:
            lane = self._thread(number, event)
            if kind == OP and name in MATRIX_PRODUCTS:
                self._keep_dims(external, args.get("Input Dims"))
        row = (
            kind, self._names.setdefault(name, len(self._names)), start_ns, end_ns, lane,
            correlation, external, size, node, number,
        )  # fmt: skip
        length = len(self._rows)
        try:
            self._rows.extend(row)
        except (TypeError, OverflowError):
            del self._rows[length:]
            numbers = (
                ("correlation", correlation, -1),
                ("External id", external, -1),
                ("bytes", size, 0),
                ("graph node id", node, -1),
            )
            self._rows.extend(row[:5])
            self._rows.extend(self._integer(number, f"args.{key}", value, absent) for key, value, absent in numbers)
            self._rows.append(number)

    def _keep_dims(self, external: Any, dims: Any) -> None:
        """Shapes as torch writes them for tensors and numbers; lists of tensors are no operands of products."""
        if type(external) is int and external >= 0 and type(dims) is list and all(_is_shape(shape) for shape in dims):
            text = repr(dims)  # Of lists of integers this is their JSON.
            self._dims[external] = self._dims_texts.setdefault(text, text)

    def _kind(self, number: int, event: dict[str, Any]) -> int | None:
        category = event.get("cat")
        if type(category) is not str:
            self._refuse(number, "cat", _found(category), "a category, which torch.profiler gives each of its events")
        return CATEGORIES.get(category)

    def _ns(self, number: int, event: dict[str, Any], key: str, least_us: float) -> int:
        """Microseconds, as a number or in quotation marks, in nanoseconds."""
        value: Any = event.get(key)
        if type(value) is str and _NUMBER.fullmatch(value):
            value = Decimal(value)
        # NaN is not between the two.
        if type(value) not in _NUMBERS or not least_us <= value <= MAX_US:
            self._refuse(number, key, _found(value), f"microseconds from {least_us:.3g} to {MAX_US:.3g}")
        time_ns: int = round(value * 1000)
        return time_ns

    def _thread(self, number: int, event: dict[str, Any]) -> int:
        raw = event.get("pid"), event.get("tid")
        try:
            return self._threads[raw]
        except (KeyError, TypeError):
            names = self._label(number, "pid", raw[0]), self._label(number, "tid", raw[1])
            lane = self._threads[raw] = self._thread_names.setdefault(names, len(self._thread_names))
            return lane

    def _stream(self, number: int, event: dict[str, Any], args: dict[str, Any]) -> int:
        # What has no such arguments says it as torch does for viewers: a process for a device, a thread for a stream.
        raw = args.get("device", event.get("pid")), args.get("stream", event.get("tid"))
        try:
            return self._streams[raw]
        except (KeyError, TypeError):
            device, stream = (
                self._integer(number, f"args.{key}", value)
                for key, value in zip(("device", "stream"), raw, strict=True)
            )
            lane = self._streams[raw] = self._stream_numbers.setdefault((device, stream), len(self._stream_numbers))
            return lane

    def _label(self, number: int, key: str, value: Any) -> str:
        if value is None:
            return ""
        if type(value) is not int and type(value) is not str:
            self._refuse(number, key, shown(value), "a number or a string")
        return clean(str(value))

    def _integer(self, number: int, key: str, value: Any, absent: int | None = None) -> int:
        """An integer of 64 bits, which may stand in quotation marks or have a point, or `absent` for null."""
        if value is None and absent is not None:
            return absent
        if type(value) is str and _NUMBER.fullmatch(value):
            value = Decimal(value)
        if type(value) not in _NUMBERS or not -(1 << 63) <= value < 1 << 63 or value != int(value):
            self._refuse(number, key, _found(value), "an integer of 64 bits")
        return int(value)

    def _refuse_span(self, rows: npt.NDArray[np.int64]) -> NoReturn:
        middle = int(np.median(rows[:, 2]))
        far = np.abs(rows[:, 2:4] - middle)
        row, column = divmod(int(far.argmax()), 2)
        found = f"{'an end' if column else 'a beginning'} {far[row, column] / MAX_SPAN_NS:.1f} days from most others"
        self._refuse(int(rows[row, -1]), "dur" if column else "ts", found, "a recording of at most a day")

    def _refuse(self, number: int, key: str, found: str, wanted: str) -> NoReturn:
        place = f"{self._key}[{number}]"
        raise InputError(self._file, f"{place}.{key}" if key else place, found, wanted)


def clean(text: str) -> str:
    """The text with halves of surrogate pairs, which JSON can spell and no file can hold, as question marks."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def _inexact(event: Any) -> bool:
    return type(event) is dict and type(time := event.get("ts")) is float and abs(time) > _EXACT_US


def _is_shape(value: Any) -> bool:
    return type(value) is list and all(type(size) is int for size in value)


def _found(value: Any) -> str:
    return "nothing" if value is None else str(value) if type(value) is Decimal else shown(value)

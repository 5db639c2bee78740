"""A trace cut down to what is learned from it: some steady steps, and of their events what the reader reads.

python -m calibration.trim run.trace.json.gz small.trace.json.gz --steps 8

Kept are the first steps that are not unusually long, with one more at either end, of which a trace may show only a
part; what they put on the device; and of the top level `deviceProperties` and the versions. What else torch and
`calibration.record` note is left out: names of files, and the untraced step time, which is to be given beside the
trace. Times count from the earliest event kept, to the nanosecond; threads, streams and the ids that tie launches to
kernels stay as they are. The same trace gives the same bytes.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from batchsim.command import outcome, progress_bar
from batchsim.errors import InputError
from batchsim.files import beside, put
from calibration.kineto import CATEGORIES, DEVICE_KINDS, KINDS, Trace, read_trace
from calibration.kineto_events import MATRIX_PRODUCTS
from calibration.learn import MAX_STEPS, OUTLIER
from calibration.steps import ANNOTATION, MIN_STEPS, RUNTIME, find_steps

PYTHON, OP = KINDS.index("python"), KINDS.index("op")
# The earliest category of each kind in the reader's list is the one that torch writes today.
CATEGORY = {kind: category for category, kind in reversed(CATEGORIES.items())}
ENDS = 2  # Steps at the ends of a trace that are not whole, and so not learned from.
LEAST = MIN_STEPS - ENDS
_TOP = ("schemaVersion", "deviceProperties")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def kept(trace: Trace, steps: int = MAX_STEPS) -> NDArray[np.int64]:
    """The indices of a trace's events from which `steps` steps are learned, in order; all events if it has no more.

    Functions of Python are left out, which nothing is learned from.

    Raises:
        InputError: no steps can be found.
    """
    begin, end = _window(trace, steps)
    device, calls = np.isin(trace.kind, list(DEVICE_KINDS)), (trace.kind == RUNTIME) & (trace.correlation >= 0)
    within = (trace.end_ns > begin) & (trace.start_ns < end)
    # What still runs when the steps begin is kept with its launch.
    running = np.isin(trace.correlation, trace.correlation[device & within])
    host = ~device & (trace.kind != PYTHON) & (within | calls & running & (trace.start_ns < end))
    launched = np.isin(trace.correlation, trace.correlation[host & calls])
    alone = ~np.isin(trace.correlation, trace.correlation[calls])
    return np.flatnonzero(host | device & (launched | alone & within))


def _window(trace: Trace, steps: int) -> tuple[int, int]:
    """When the events of the steps to keep begin and end, nanoseconds."""
    starts = find_steps(trace).starts_ns
    length = np.diff(starts)
    usual = np.flatnonzero(length[1:] <= OUTLIER * np.median(length)) + 1
    # The last step ends with its annotation, or where one more begins, which is then needed to tell.
    ended = bool((trace.end_ns[trace.kind == ANNOTATION] == starts[-1]).any())
    last = len(starts) if len(usual) < steps else int(usual[steps - 1]) + ENDS + (not ended)
    return (int(starts[0]), int(starts[last])) if last < len(starts) else (-1, int(trace.end_ns.max()) + 1)


def write(trace: Trace, chosen: NDArray[np.int64], path: Path) -> None:
    """Write the events `chosen` of a trace as Kineto would, gzipped if the path ends in `.gz`; whole or not at all."""
    file, temporary = beside(path)
    try:
        with file:
            if path.suffix == ".gz":
                # Neither a name nor a time, so that the bytes are a matter of the events alone.
                with gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
                    packed.writelines(_lines(trace, chosen))
            else:
                file.writelines(_lines(trace, chosen))
            put(file, temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _lines(trace: Trace, chosen: NDArray[np.int64]) -> Iterator[bytes]:
    top = {key: value for key, value in trace.extra.items() if key in _TOP or key.endswith("_version")}
    yield f'{_json(top).removesuffix("}")}{"," if top else ""}"traceEvents":[\n'.encode()
    origin = int(trace.start_ns[chosen].min(initial=0))
    # Events of a kind are alike, and pack tighter one after the other.
    ordered = chosen[np.argsort(trace.kind[chosen], kind="stable")].tolist()
    for place, i in enumerate(ordered):
        yield f"{_json(_event(trace, i, origin))}{',' if place < len(ordered) - 1 else ''}\n".encode()
    yield b"]}\n"


def _event(trace: Trace, i: int, origin: int) -> dict[str, Any]:
    kind, name, external = int(trace.kind[i]), trace.names[trace.name[i]], int(trace.external[i])
    args: dict[str, Any] = {}
    # Operators are looked for by these ids only where their inputs' shapes are known.
    if external >= 0 and trace.dims:
        args["External id"] = external
    if trace.correlation[i] >= 0:
        args["correlation"] = int(trace.correlation[i])
    if kind in DEVICE_KINDS:
        lane: tuple[Any, ...] = trace.streams[trace.lane[i]]
        args |= {"device": lane[0], "stream": lane[1]}
    else:
        lane = tuple(map(_number, trace.threads[trace.lane[i]]))
    if trace.bytes[i]:
        args["bytes"] = int(trace.bytes[i])
    if trace.graph_node[i] >= 0:
        args["graph node id"] = int(trace.graph_node[i])
    if kind == OP and name in MATRIX_PRODUCTS and external in trace.dims:
        args["Input Dims"] = json.loads(trace.dims[external])
    start, end = int(trace.start_ns[i]) - origin, int(trace.end_ns[i]) - origin
    event = {"ph": "X", "cat": CATEGORY[kind], "name": name, "pid": lane[0], "tid": lane[1]}
    return event | ({"args": args} if args else {}) | {"ts": start / 1000, "dur": (end - start) / 1000}


def _number(label: str) -> int | str:
    """A process's or thread's label as torch writes it: without quotation marks where it is a number."""
    return int(label) if label.isascii() and label.isdigit() and str(int(label)) == label else label


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


@app.command()
def trim(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A trace, plain or gzipped.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write, *.json or *.json.gz.")],
    steps: Annotated[int, typer.Option(min=LEAST, help="Steady steps to keep.")] = MAX_STEPS,
) -> None:
    """Cut a profiler trace down to a few steady steps."""
    with outcome():
        if out.is_dir() or (out.exists() and trace.exists() and out.samefile(trace)):
            raise InputError(
                "OUT", "", f"{'the folder' if out.is_dir() else 'the trace itself,'} {out}", "another file"
            )
        with progress_bar(f"reading {trace.name}") as tell:
            read = read_trace(trace, None if tell is None else lambda done, size: tell(done / max(size, 1)))
        chosen = kept(read, steps)
        write(read, chosen, out)
        typer.echo(f"wrote {out}: {len(chosen):,} of {len(read):,} events, {out.stat().st_size / 1e6:.2f} MB", err=True)


if __name__ == "__main__":
    sys.exit(app())

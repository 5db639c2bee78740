"""How fast profiler traces are read, on one core: `make bench` prints the table. Nothing fails for being slow.

The traces are like those of a decoding loop without CUDA graphs: half their events operators, a sixth each launches,
kernels and the flows between them.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

MB = 10**6
SIZE = 300 * MB
LAUNCHES = 1000  # To a step.
NAME = (
    "void at::native::vectorized_elementwise_kernel<4, at::native::{lambda(int)#1}, std::array<char*, 2ul> >(int, "
    "at::native::CUDAFunctorOnSelf_add<int>, std::array<char*, 2ul>)"
)


def events(step: int) -> Iterator[dict[str, Any]]:
    """The events of one step, 40 us of the host to a launch."""
    start = 4355801512712.805 + step * LAUNCHES * 40
    host: dict[str, Any] = {"pid": 1611, "tid": 1665}
    device: dict[str, Any] = {"pid": 0, "tid": 7}

    def op(category: str, name: str, at: float, us: float, number: int) -> dict[str, Any]:
        args = {"External id": number, "Record function id": 0, "Ev Idx": number - 1}
        return {"ph": "X", "cat": category, "name": name, **host, "ts": round(at, 3), "dur": us, "args": args}

    yield op("user_annotation", f"ProfilerStep#{step}", start, LAUNCHES * 40, step * LAUNCHES * 4)
    for launch in range(LAUNCHES):
        at = start + 40 * launch
        number = step * LAUNCHES + launch + 1
        for nested, name in enumerate(("aten::add_", "aten::slice", "aten::as_strided")):
            yield op("cpu_op", name, at + 8 * nested, 7.125, 4 * number + nested)
        ids = {"External id": 4 * number, "correlation": number}
        yield {
            "ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", **host, "ts": round(at + 30, 3), "dur": 5.394,
            "args": {**ids, "cbid": 211},
        }  # fmt: skip
        yield {
            "ph": "X", "cat": "kernel", "name": NAME, **device, "ts": round(at + 36, 3), "dur": 0.928,
            "args": {
                **ids, "queued": 0, "device": 0, "context": 1, "stream": 7, "registers per thread": 32,
                "shared memory": 0, "blocks per SM": 0.007576, "warps per SM": 0.030303, "grid": [1, 1, 1],
                "block": [128, 1, 1], "est. achieved occupancy %": 0,
            },
        }  # fmt: skip
        yield {"ph": "s", "id": number, **host, "ts": round(at + 30, 3), "cat": "ac2g", "name": "ac2g"}
        yield {"ph": "f", "id": number, **device, "ts": round(at + 36, 3), "cat": "ac2g", "name": "ac2g", "bp": "e"}


def write(path: Path, indent: int | None) -> None:
    """A trace of about SIZE characters, in one line or as torch indents its own."""
    separators = (",", ":") if indent is None else (",", ": ")
    with path.open("w", encoding="utf-8") as file:
        size = file.write(
            '{"schemaVersion": 1, "deviceProperties": [{"id": 0, "name": "NVIDIA H200"}], "traceEvents": ['
        )
        step = 0
        while size < SIZE:
            text = json.dumps(list(events(step)), indent=indent, separators=separators)
            size += file.write("," * (step > 0) + text[1:-1])
            step += 1
        file.write(f'], "traceName": "{path.name}"}}\n')


def measured(path: Path) -> tuple[int, float, float]:
    """(events, processor seconds, most MB held) of a process of its own that reads a trace, its imports included."""
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from calibration.kineto import read_trace\n"
        "print(len(read_trace(Path(sys.argv[1]))), time.process_time())\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=True, text=True)
    count, seconds, kb = done.stdout.split()
    return int(count), float(seconds), int(kb) / 1e3


def test_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("trace", "MB of text", "MB of file", "events kept", "seconds [12, at most 30]", "peak MB [400, 1000]")
    for name, indent in (("in one line", None), ("indented", 2)):
        plain = tmp_path / "trace.json"
        write(plain, indent)
        zipped = tmp_path / "trace.json.gz"
        with plain.open("rb") as source, gzip.open(zipped, "wb", compresslevel=1) as target:
            while data := source.read(1 << 20):
                target.write(data)
        for path in (plain, zipped):
            count, seconds, peak = measured(path)
            table.add_row(
                name + ", gzipped" * (path is zipped), f"{plain.stat().st_size / MB:.0f}",
                f"{path.stat().st_size / MB:.0f}", f"{count:,}", f"{seconds:.1f}", f"{peak:.0f}",
            )  # fmt: skip
    with capsys.disabled():
        Console(width=130).print("\nprofiler traces", table)

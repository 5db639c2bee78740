"""Recording a user's loop: some untraced steps, then a few traced ones; one file.

A profiler slows the host down, so a trace tells the structure of a step and the times of its kernels, and the untraced
steps tell how long it takes. They come first: what a profiler attaches may stay attached when it has gone (on an H200,
a graph launch then took 0.1 to 0.4 ms instead of 0.04). The file is the trace as torch.profiler writes it, with one
more key in front, `batchsim`, which holds the rest.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar, cast

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from batchsim.errors import InputError, RunError
from batchsim.files import beside, put
from calibration.provenance import host_yardstick_ns, provenance
from calibration.steady import Floats, turn_of
from calibration.steps import MIN_STEPS

T = TypeVar("T")

SCHEMA_VERSION = 1
PROFILER_WARMUP = 2  # steps with the profiler on that it throws away: the first ones pay for its buffers
QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
DEVICE_EVENTS = (b'"cat": "kernel"', b'"cat": "gpu_memcpy"')
CHUNK_BYTES = 1 << 20

_NOTHING: AbstractContextManager[Any] = nullcontext()


class Recording:
    """A context manager around a loop, which calls `step` at the start of each of its steps.

    Steps go by in this order: `warmup` that count for nothing; `timed`; 2 of the profiler's own warm-up; `traced`. What
    comes after that costs next to nothing. Nothing waits for the device on account of being timed or traced; the
    profiler itself does, when it starts and when it stops. The process should not have been profiled before.

    The file, gzipped if its name ends in `.gz`, is written when the block ends, whole or not at all, and not if the
    block ends by an exception. Its key `batchsim` holds what `batchsim learn` and `whatif` take from it:

    - `steady_step_ms`: the median of the timed steps, from one start to the next. Where long and short steps take
      turns, of which a median tells nothing, the mean over a turn of each place's median; places that take more than
      twice the usual are left out, as from the trace. `turn` is its length, 1 for most loops.
    - `phases_ms`: each phase's wall time in a step, the same way. A phase may come several times in a step. What
      phases inside it take is in it too, and what it waits for the device; whoever reads it takes both out.

    and, to judge them by, `schema_version`, `steady_step_ms_mean` and `steady_step_ms_quantiles` (fraction:
    milliseconds) of all timed steps, `steps` and `traced_steps`, `host_yardstick_ns` and a provenance.

    Raises (at the end of the block):
        RunError: there were too few steps, or the trace has no device events; in the second case the file is there.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, warmup: int = 10, timed: int = 40, traced: int = 8, shapes: bool = False
    ) -> None:
        """`shapes` has the profiler note the shapes of operators' inputs, at some more cost to the traced host.

        `batchsim learn` uses all traced steps but two, 8 at most: where steps differ by turns, trace whole turns and
        two more.

        Raises:
            InputError: the path is a folder, or a number of steps is out of range.
        """
        self.path = Path(path)
        if self.path.is_dir():
            raise InputError(str(path), "", "a folder", "the name of the file to write, such as run.trace.json.gz")
        for name, value, least in (("warmup", warmup, 0), ("timed", timed, 2), ("traced", traced, MIN_STEPS)):
            if value < least:
                raise InputError("calibration.record", name, str(value), f"{least} or more")
        self._timed = range(warmup, warmup + timed)
        self._profiled = range(self._timed.stop, self._timed.stop + PROFILER_WARMUP + traced)
        self._traced, self._shapes = traced, shapes
        self._profiler: profile | None = None
        self._step = -1  # the one that is under way
        self._starts_ns: list[int] = []  # of the steps, and the end of the last
        self._timers: dict[str, _Timer] = {}
        self._timing = self._tracing = False

    @property
    def wanted(self) -> int:
        """How many steps a recording takes."""
        return self._profiled.stop

    def __enter__(self) -> Self:
        self._about = _about()
        self._yardstick_ns = host_yardstick_ns()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if 0 <= self._step < self.wanted:
            self._end_step()
        if self._tracing:
            self._stop()
        if kind is None:
            self._save()

    def steps(self, loop: Iterable[T]) -> Iterator[T]:
        """The items of `loop`, each of which begins a step."""
        for item in loop:
            self.step()
            yield item

    def step(self) -> None:
        """Say that a step begins, and that the one before it has ended."""
        if self._step >= self.wanted:
            return
        step = self._end_step()
        self._timing = step in self._timed
        if step == self._profiled.start:
            self._start()
        elif self._tracing:
            assert self._profiler is not None
            self._profiler.step()
            if step == self._profiled.stop:
                self._stop()

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """A phase of the host's part of a step, for a `with`: timed in timed steps, an annotation in traced ones."""
        if self._timing:
            timer = self._timers.get(name)
            if timer is None:
                timer = self._timers[name] = _Timer()
            return timer
        return record_function(name) if self._tracing else _NOTHING

    def _end_step(self) -> int:
        """The step under way has ended, if there is one; the index of the next."""
        self._starts_ns.append(time.perf_counter_ns())
        if self._timing:
            for timer in self._timers.values():
                timer.close_step()
        self._step += 1
        return self._step

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=PROFILER_WARMUP, active=self._traced, repeat=1),
            record_shapes=self._shapes,
        )
        self._profiler.start()
        self._tracing = True

    def _stop(self) -> None:
        assert self._profiler is not None
        self._profiler.stop()
        self._tracing = False

    def _save(self) -> None:
        seen = max(self._step, 0)
        if seen < self.wanted:
            raise RunError(
                f"{self.path}: not written, for the loop called recording.step() {seen} times and {self.wanted} are "
                f"wanted ({self._timed.start} to warm up, {len(self._timed)} timed, {len(self._profiled)} under the "
                "profiler): let it run for longer, or ask for fewer steps, as in "
                "calibration.record(path, warmup=3, timed=20, traced=6)"
            )
        assert self._profiler is not None
        descriptor, plain = beside(self.path)
        descriptor.close()
        try:
            self._profiler.export_chrome_trace(str(plain))
            has_device_events = write_with_key(plain, self.path, "batchsim", self._summary())
        finally:
            plain.unlink(missing_ok=True)
        if not has_device_events:
            raise RunError(f"{self.path}: written, but it has no device events, so nothing can be learned from it: "
                           + ("no step under the profiler launched anything on the GPU; record the loop that does, in "
                              "the process that does" if torch.cuda.is_available() else
                              "this PyTorch sees no CUDA device; record on the machine with the GPU"))  # fmt: skip

    def _summary(self) -> dict[str, Any]:
        starts_ms = np.array(self._starts_ns, dtype=np.int64) / 1e6
        timed_ms: Floats = np.diff(starts_ms)[self._timed.start : self._timed.stop]
        turn = turn_of(timed_ms)
        return {
            "schema_version": SCHEMA_VERSION,
            "steady_step_ms": turn.typical(timed_ms),
            "turn": turn.length,
            "steady_step_ms_mean": float(timed_ms.mean()),
            "steady_step_ms_quantiles": {str(q): float(np.quantile(timed_ms, q)) for q in QUANTILES},
            "steps": len(timed_ms),
            "traced_steps": self._traced,
            "phases_ms": {name: turn.typical(timer.step_ms(len(timed_ms))) for name, timer in self._timers.items()},
            "host_yardstick_ns": {"before": self._yardstick_ns, "after": host_yardstick_ns()},
            **self._about,
        }


def _about() -> dict[str, Any]:
    """Where a recording is made; the trace itself tells the driver."""
    facts = provenance("cpu", "calibration.record")
    if torch.cuda.is_available():
        facts |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return facts


class _Timer:
    """The wall time of one phase in each step; a phase may come several times in a step, and contain itself."""

    __slots__ = ("_depth", "_start_ns", "_step_ns", "_steps_ns")

    def __init__(self) -> None:
        self._depth = self._start_ns = self._step_ns = 0
        self._steps_ns: list[int] = []

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._start_ns = time.perf_counter_ns()

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._step_ns += time.perf_counter_ns() - self._start_ns

    def close_step(self) -> None:
        self._steps_ns.append(self._step_ns)
        self._step_ns = 0

    def step_ms(self, steps: int) -> Floats:
        """The time in each of `steps` steps; those before the phase was first seen had none of it."""
        return np.array([0] * (steps - len(self._steps_ns)) + self._steps_ns) / 1e6


def write_with_key(source: Path, target: Path, key: str, value: dict[str, Any]) -> bool:
    """Copy a Chrome trace, an object in JSON, with `key: value` put first; whether it holds any device events.

    Reads and writes in pieces, so that a trace of any size passes; gzipped if the target's name ends in `.gz`.
    """
    file, temporary = beside(target)
    packed = gzip.GzipFile("", "wb", 5, file) if target.suffix == ".gz" else None
    out = cast(BinaryIO, packed or file)
    found, tail = False, b""
    try:
        with source.open("rb") as trace:
            head = trace.read(64).lstrip()
            assert head.startswith(b"{"), "the profiler wrote no object"
            out.write(b"{" + f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)},".encode())
            piece = head[1:]
            while piece:
                out.write(piece)
                found = found or any(event in tail + piece for event in DEVICE_EVENTS)
                tail = piece[-len(max(DEVICE_EVENTS, key=len)) :]
                piece = trace.read(CHUNK_BYTES)
        if packed:
            packed.close()
        put(file, temporary, target)
    except BaseException:
        file.close()
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    return found

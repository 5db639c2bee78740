"""What a training loop needs of the device: two streams, named events, and marks between parts that can be timed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from batchsim.operations import Stream

CYCLES_PER_NS = 1.98  # of an H200 that is not throttled; a sleep only has to be long enough


class TrainingStreams(Protocol):
    """Enqueues on `compute` (torch's current stream) and `copy_in`; times are nanoseconds."""

    def begin(self) -> int: ...
    def copy(self, stream: Stream, destination: Tensor, source: Tensor, *, timed: bool) -> None: ...
    def record(self, event: str, stream: Stream) -> None: ...
    def wait(self, stream: Stream, event: str) -> None: ...
    def synchronize(self, event: str) -> None: ...
    def sleep(self, ns: int) -> None: ...
    def mark(self, part: str) -> None: ...
    def marks(self) -> Iterator[tuple[str, int]]: ...
    def copies(self) -> list[tuple[int, int]]: ...
    def finish(self) -> None: ...


class CpuTrainingStreams:
    """Everything is done when it is enqueued, so events have nothing to wait for."""

    def begin(self) -> int:
        self._marks: list[tuple[str, int]] = []
        self._copies: list[tuple[int, int]] = []
        self._began = time.perf_counter_ns()
        return self._began

    def copy(self, stream: Stream, destination: Tensor, source: Tensor, *, timed: bool) -> None:  # noqa: ARG002
        start = time.perf_counter_ns()
        destination.copy_(source)
        if timed:
            self._copies.append((start - self._began, time.perf_counter_ns() - self._began))

    def record(self, event: str, stream: Stream) -> None: ...

    def wait(self, stream: Stream, event: str) -> None: ...

    def synchronize(self, event: str) -> None: ...

    def sleep(self, ns: int) -> None: ...

    def mark(self, part: str) -> None:
        self._marks.append((part, time.perf_counter_ns() - self._began))

    def marks(self) -> Iterator[tuple[str, int]]:
        yield from self._marks

    def copies(self) -> list[tuple[int, int]]:
        return self._copies

    def finish(self) -> None: ...


class CudaTrainingStreams:
    """Torch's current stream and another one for copies. The device's times count from an event as the run begins."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copy_in = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._events: dict[str, torch.cuda.Event] = {}

    def begin(self) -> int:
        """Wait until the device is idle; the host's clock as the run begins."""
        torch.cuda.synchronize(self._device)
        self._compute = torch.cuda.current_stream(self._device)
        self._base = _event(timing=True)
        self._base.record(self._compute)  # torch makes an event when it is first recorded, which takes a while
        torch.cuda.synchronize(self._device)
        self._marks: list[tuple[str, torch.cuda.Event]] = []
        self._copies: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        began = time.perf_counter_ns()
        self._base.record(self._compute)
        return began

    def copy(self, stream: Stream, destination: Tensor, source: Tensor, *, timed: bool) -> None:
        """Enqueue a copy on `stream`; the host memory has to be pinned."""
        with torch.cuda.stream(self._stream(stream)):
            if timed:
                start, stop = _event(timing=True), _event(timing=True)
                start.record()
                destination.copy_(source, non_blocking=True)
                stop.record()
                self._copies.append((start, stop))
            else:
                destination.copy_(source, non_blocking=True)

    def record(self, event: str, stream: Stream) -> None:
        self._events.setdefault(event, _event(timing=False)).record(self._stream(stream))

    def wait(self, stream: Stream, event: str) -> None:
        self._stream(stream).wait_event(self._events[event])

    def synchronize(self, event: str) -> None:
        self._events[event].synchronize()

    def sleep(self, ns: int) -> None:
        """Keep the compute stream busy with nothing for about so long."""
        torch.cuda._sleep(round(ns * CYCLES_PER_NS))  # type: ignore[no-untyped-call]

    def mark(self, part: str) -> None:
        """An event here; also for autograd's thread, whose current stream is one of its own choice."""
        event = _event(timing=True)
        event.record(self._compute)
        self._marks.append((part, event))

    def marks(self) -> Iterator[tuple[str, int]]:
        """The marks of the run and their times. Call after `finish`."""
        # elapsed_time is a float32 of milliseconds, too coarse over a long run: add up short intervals.
        before, at = self._base, 0.0
        for part, event in self._marks:
            at += before.elapsed_time(event) * 1e6
            before = event
            yield part, round(at)

    def copies(self) -> list[tuple[int, int]]:
        """(start, end) of the timed copies. Call after `finish`."""
        found, before, at = [], self._base, 0.0
        for start, stop in self._copies:
            begun = at + before.elapsed_time(start) * 1e6
            before, at = stop, begun + start.elapsed_time(stop) * 1e6
            found.append((round(begun), round(at)))
        return found

    def finish(self) -> None:
        torch.cuda.synchronize(self._device)

    def _stream(self, stream: Stream) -> torch.cuda.Stream:
        return self._copy_in if stream == "copy_in" else self._compute


def _event(*, timing: bool) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=timing)  # type: ignore[no-untyped-call]

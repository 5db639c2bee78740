"""Streams, events and timed copies: torch's on a GPU, and stand-ins that finish at once on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from batchsim.operations import Stream
from calibration.executor.partition import stream_like_current

Interval = tuple[int, int]  # nanoseconds of the host's clock, perf_counter


class Streams(Protocol):
    """What a schedule's device operations need."""

    def copy(self, stream: Stream, destination: Tensor, source: Tensor, timed: bool) -> None: ...
    def launch(self, forward: Callable[[], None]) -> None: ...
    def record(self, event: str, stream: Stream) -> None: ...
    def wait(self, stream: Stream, event: str) -> None: ...
    def synchronize(self, event: str) -> None: ...
    def begin(self) -> None: ...
    def finish(self) -> None: ...
    def host_time(self, stamp: int) -> int: ...
    def copies(self) -> list[Interval]: ...


class CpuStreams:
    """Everything is done when it is enqueued, so events have nothing to wait for."""

    def __init__(self) -> None:
        self._copies: list[Interval] = []

    def copy(self, stream: Stream, destination: Tensor, source: Tensor, timed: bool) -> None:  # noqa: ARG002
        start = time.perf_counter_ns()
        destination.copy_(source)
        if timed:
            self._copies.append((start, time.perf_counter_ns()))

    def launch(self, forward: Callable[[], None]) -> None:
        forward()

    def record(self, event: str, stream: Stream) -> None: ...

    def wait(self, stream: Stream, event: str) -> None: ...

    def synchronize(self, event: str) -> None: ...

    def begin(self) -> None:
        self._copies = []

    def finish(self) -> None: ...

    def host_time(self, stamp: int) -> int:
        return stamp

    def copies(self) -> list[Interval]:
        return self._copies


class CudaStreams:
    """Three torch streams, reusable named events, and a map from the device's clock to the host's.

    A host that waits for an event spins, or with `sleeps` leaves its core to others until the device interrupts it.
    `stamp` launches a kernel that writes the device's clock to a word. At most `timed_copies` copies of a run are
    timed, by events around them: on an idle stream the first event completes at once, so such an interval includes
    the host's few microseconds between recording it and issuing the copy.
    """

    def __init__(
        self, device: torch.device, stamp: Callable[[Tensor], None], timed_copies: int, *, sleeps: bool = False
    ) -> None:
        self._device, self._stamp, self._sleeps = device, stamp, sleeps
        self._word = torch.zeros(1, dtype=torch.int64, device=device)
        names: tuple[Stream, ...] = ("compute", "copy_in", "copy_out")
        self._streams = {name: _stream(device) for name in names}
        self._events: dict[str, torch.cuda.Event] = {}
        self._pool = [_event(timing=True) for _ in range(2 * timed_copies)]
        for event in self._pool:
            event.record()  # torch creates an event when it is first recorded: here, not in a run
        self._timed: list[tuple[Stream, torch.cuda.Event, torch.cuda.Event]] = []
        self._current: Stream = "compute"

    def copy(self, stream: Stream, destination: Tensor, source: Tensor, timed: bool) -> None:
        """Enqueue a copy on `stream`; the host memory has to be pinned."""
        self._use(stream)
        used = 2 * len(self._timed)
        if timed and used < len(self._pool):
            on, start, stop = self._streams[stream], self._pool[used], self._pool[used + 1]
            start.record(on)
            destination.copy_(source, non_blocking=True)
            stop.record(on)
            self._timed.append((stream, start, stop))
        else:
            destination.copy_(source, non_blocking=True)

    def launch(self, forward: Callable[[], None]) -> None:
        """Run `forward` with the compute stream as the current one."""
        self._use("compute")
        forward()

    def record(self, event: str, stream: Stream) -> None:
        recorded = self._events.get(event)
        if recorded is None:
            recorded = self._events[event] = _event(timing=False, blocking=self._sleeps)
        recorded.record(self._streams[stream])

    def wait(self, stream: Stream, event: str) -> None:
        self._streams[stream].wait_event(self._events[event])

    def synchronize(self, event: str) -> None:
        self._events[event].synchronize()

    def begin(self) -> None:
        """Make the compute stream current and tie the clocks together. Call before a run."""
        torch.cuda.synchronize(self._device)
        self._before = torch.cuda.current_stream(self._device)
        torch.cuda.set_stream(self._streams["compute"])
        self._current = "compute"
        self._timed = []
        self._base_event, self._base_stamp = self._tie_events()
        self._first = self._last = self._tie_host()

    def finish(self) -> None:
        """Wait for the device and tie the clocks together again; call after a run, also after a failed one."""
        try:
            torch.cuda.synchronize(self._device)
            torch.cuda.set_stream(self._streams["compute"])
            self._last = self._tie_host()
        finally:
            torch.cuda.set_stream(self._before)

    def host_time(self, stamp: int) -> int:
        """The host's clock when the device's read `stamp`: on the line through the two ties."""
        (device_0, host_0), (device_1, host_1) = self._first, self._last
        drift = (host_1 - host_0) - (device_1 - device_0)
        return host_0 + (stamp - device_0) + round(drift * (stamp - device_0) / max(1, device_1 - device_0))

    def copies(self) -> list[Interval]:
        """The timed copies of the run, in the order in which they were enqueued."""
        # elapsed_time is a float32 of milliseconds, too coarse over a long run: add up short intervals, per stream.
        reached: dict[Stream, tuple[torch.cuda.Event, float]] = {}
        intervals = []
        for stream, start, stop in self._timed:
            event, at = reached.get(stream, (self._base_event, 0.0))
            begun = at + event.elapsed_time(start) * 1e6
            ended = begun + start.elapsed_time(stop) * 1e6
            reached[stream] = stop, ended
            base = self._base_stamp
            intervals.append((self.host_time(base + round(begun)), self.host_time(base + round(ended))))
        return intervals

    def _use(self, stream: Stream) -> None:
        if stream != self._current:
            torch.cuda.set_stream(self._streams[stream])
            self._current = stream

    def _tie_host(self, pings: int = 50) -> tuple[int, int]:
        """(device, host) nanoseconds of one moment: each ping bounds the offset of the clocks, all together best."""
        least, most = [], []
        for _ in range(pings):
            before = time.perf_counter_ns()
            self._stamp(self._word)
            torch.cuda.synchronize(self._device)
            after = time.perf_counter_ns()
            stamp = int(self._word.item())
            least.append(before - stamp)
            most.append(after - stamp)
        return stamp, stamp + (max(least) + min(most)) // 2

    def _tie_events(self, tries: int = 10) -> tuple[torch.cuda.Event, int]:
        """An event and the device's clock at its time: it and a stamp run back to back behind a short delay."""
        best: tuple[float, torch.cuda.Event, int] | None = None
        stream = self._streams["compute"]
        for _ in range(tries):
            before, after = _event(timing=True), _event(timing=True)
            torch.cuda._sleep(400_000)  # type: ignore[no-untyped-call]  # cycles: time to enqueue what follows
            before.record(stream)
            self._stamp(self._word)
            after.record(stream)
            torch.cuda.synchronize(self._device)
            window = before.elapsed_time(after) * 1e6
            if best is None or window < best[0]:
                best = window, before, int(self._word.item()) - round(window / 2)
        assert best is not None
        return best[1], best[2]


def _stream(device: torch.device) -> torch.cuda.Stream:
    return stream_like_current(device) or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _event(*, timing: bool, blocking: bool = False) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=timing, blocking=blocking)  # type: ignore[no-untyped-call]

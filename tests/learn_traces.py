"""Traces of made-up loops whose steps are known: a host and its device's streams, simulated, which write down what
torch.profiler would.

Times are nanoseconds. A loop is its `Step`, run by one of `SCHEDULES`, each of which calls a `Tracer` as an engine
would call torch; a trace is the same whenever it is made.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from calibration.kineto import Trace, read_trace
from tests.kineto_traces import START_NS, Event, saved

PROCESS, MAIN = 4711, 4711
COMPUTE, COPY_IN, COPY_OUT = 7, 20, 24
LAUNCH_NS = 6_000  # from the start of a launch call to its kernel on an idle device
CALL_NS = 4_000  # of a launch or a copy; other calls take less
SHORT_CALL_NS = 1_000
WAKE_NS = 3_000
GAP_NS = 800  # between kernels of a busy stream, and of a graph
COPY_NS = 2_000
SHAPES = ("gemm", "norm", "attention", "rope", "silu")


class Mark(NamedTuple):
    """A recorded event: when what was on the stream by then has ended."""

    time: int


@dataclass
class Tracer:
    """A host thread and in-order streams of one device.

    `event_ns`: what writing down an event of the host costs it. `jitter`: how much host work varies, as a share of it,
    by `seed`. `phases`: whether parts of a step are annotated.
    """

    event_ns: int = 0
    jitter: float = 0.0
    seed: int = 0
    phases: bool = True
    device: int = 0
    now: int = 0
    thread: int = MAIN
    events: list[Event] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._free: dict[int, int] = {}
        self._correlation = 1000

    def work(self, ns: int) -> None:
        """The host computes."""
        self.now += round(ns * (1 + self.jitter * self._random.uniform(-1, 1)))

    @contextmanager
    def around(self, name: str, category: str = "user_annotation") -> Iterator[None]:
        start = self._begin()
        yield
        self._host(category, name, start)

    def op(self, name: str) -> AbstractContextManager[None]:
        return self.around(name, "cpu_op")

    def phase(self, name: str) -> AbstractContextManager[None]:
        return self.around(name) if self.phases else nullcontext()

    def launch(self, ns: int, *, stream: int = COMPUTE, name: str = "gemm", thread: int | None = None) -> None:
        """One kernel."""
        start, number = self._call("cudaLaunchKernel", CALL_NS, thread=thread)
        self._put("kernel", name, start + LAUNCH_NS, ns, stream, number)

    def graph(self, nodes: Sequence[int], *, stream: int = COMPUTE) -> None:
        """Kernels of one launch."""
        _, number = self._call("cudaGraphLaunch", 2 * CALL_NS)
        for place, ns in enumerate(nodes):
            self._put("kernel", SHAPES[place % len(SHAPES)], self.now, ns, stream, number)

    def copy_in(self, size: int, *, ns: int = COPY_NS) -> None:
        """A blocking copy to the device, of what is not pinned, within its operator."""
        with self.op("aten::copy_"):
            start, number = self._call("cudaMemcpyAsync", CALL_NS)
            self._put("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", start + CALL_NS, ns, COMPUTE, number, size)
            self.synchronize()

    def copy_out(self, size: int, *, ns: int = COPY_NS) -> None:
        """A blocking copy from the device, whose call returns when it is done."""
        with self.op("aten::to"), self.op("aten::_to_copy"):
            start, number = self._call("cudaMemcpyAsync", 0)
            end = self._put(
                "gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", start + CALL_NS, ns, COMPUTE, number, size
            )
            self._until(end + WAKE_NS)
            self.synchronize()

    def pinned(self, direction: str, size: int, stream: int, *, ns: int = COPY_NS) -> Mark:
        """A copy from or into pinned memory, which the host does not wait for."""
        name = "Memcpy HtoD (Pinned -> Device)" if direction == "h2d" else "Memcpy DtoH (Device -> Pinned)"
        start, number = self._call("cudaMemcpyAsync", CALL_NS)
        return Mark(self._put("gpu_memcpy", name, start + LAUNCH_NS, ns, stream, number, size))

    def copy(self, direction: str, size: int, *, ns: int = COPY_NS) -> None:
        """cudaMemcpy, which returns when it is done."""
        name = "Memcpy HtoD (Pageable -> Device)" if direction == "h2d" else "Memcpy DtoH (Device -> Pageable)"
        start, number = self._call("cudaMemcpy", 0)
        self._until(self._put("gpu_memcpy", name, start + CALL_NS, ns, COMPUTE, number, size) + WAKE_NS)

    def synchronize(self, call: str = "cudaStreamSynchronize", longer: int = 0) -> None:
        """Wait for all that is on the device, and `longer`."""
        self._call(call, 0)
        self._until(max([self.now, *self._free.values()]) + WAKE_NS + longer)

    def record(self, stream: int = COMPUTE) -> Mark:
        self._call("cudaEventRecord", SHORT_CALL_NS)
        return Mark(self._free.get(stream, 0))

    def stream_wait(self, stream: int, mark: Mark) -> None:
        self._call("cudaStreamWaitEvent", SHORT_CALL_NS)
        self._free[stream] = max(self._free.get(stream, 0), mark.time)

    def wait(self, mark: Mark) -> None:
        self._call("cudaEventSynchronize", 0)
        self._until(max(self.now, mark.time) + WAKE_NS)

    def poll(self, mark: Mark, every_ns: int = 5_000) -> None:
        """Ask for an event again and again until it is there, three times at least."""
        asked, there = 0, False
        while asked < 3 or not there:
            there = self.now >= mark.time
            self._call("cudaEventQuery", SHORT_CALL_NS)
            asked += 1
            self.now += 0 if there else every_ns

    def forget(self, until: int) -> None:
        """Leave out what a recording that begins at `until` does not see: the host before, and what ended before."""
        self.events = [
            event for event in self.events
            if event["args"].get("start_ns", event["args"].get("end_ns")) >= until
        ]  # fmt: skip

    def traced(self, folder: Path) -> Trace:
        return read_trace(saved(folder, self.document()))

    def document(self) -> dict[str, Any]:
        names = {"deviceProperties": [{"id": self.device, "name": "NVIDIA H200"}]}
        return {"schemaVersion": 1, **names, **self.extra, "traceEvents": self.events}

    def _begin(self) -> int:
        start = self.now
        self.now += self.event_ns
        return start

    def _call(self, name: str, ns: int, *, thread: int | None = None) -> tuple[int, int]:
        """A runtime call; when it began and its number."""
        self._correlation += 1
        start = self._begin()
        self.now += ns
        self._host("cuda_runtime", name, start, thread=thread, correlation=self._correlation)
        return start, self._correlation

    def _until(self, time: int) -> None:
        """The last call returns at `time`."""
        self.now = max(self.now, time)
        call = self.events[-1] if self.events[-1]["cat"] == "cuda_runtime" else self.events[-2]
        call["dur"] = round((self.now - call["args"]["start_ns"]) / 1000, 3)

    def _host(self, category: str, name: str, start: int, *, thread: int | None = None, **args: int) -> None:
        args["start_ns"] = start
        self._event(category, name, start, self.now, PROCESS, self.thread if thread is None else thread, args)

    def _put(
        self, category: str, name: str, launched: int, ns: int, stream: int, number: int, size: int | None = None
    ) -> int:
        """An activity on a stream, which starts when it is launched and the stream is free; when it ends."""
        free = self._free.get(stream)
        start = launched if free is None or free + GAP_NS < launched else free + GAP_NS
        self._free[stream] = start + ns
        args = {"device": self.device, "stream": stream, "correlation": number}
        if size is not None:
            args["bytes"] = size
        self._event(category, name, start, start + ns, self.device, stream, args | {"end_ns": start + ns})
        return start + ns

    def _event(self, category: str, name: str, start: int, end: int, pid: int, tid: int, args: dict[str, int]) -> None:
        times = {"ts": (START_NS + start) / 1000, "dur": (end - start) / 1000}
        self.events.append({"ph": "X", "cat": category, "name": name, "pid": pid, "tid": tid, **times, "args": args})


@dataclass(frozen=True)
class Step:
    """What a step of a made-up loop does; times are nanoseconds, sizes bytes.

    The host prepares, copies `inputs`, launches `kernels`, one by one with `between` of host work before each or as a
    graph, copies `results` out and reads them.
    """

    prepare: int = 400_000
    inputs: tuple[int, ...] = (1024, 4096)
    kernels: tuple[int, ...] = (60_000,) * 24
    between: int = 6_000
    graph: bool = False
    results: int = 512
    read: int = 150_000

    @property
    def device(self) -> int:
        """Device time of the kernels, with the gaps of a busy stream."""
        return sum(self.kernels) + GAP_NS * len(self.kernels)


def forward(tracer: Tracer, step: Step) -> None:
    """Launch a step's kernels."""
    with tracer.phase("model"):
        if step.graph:
            tracer.graph(step.kernels)
            return
        for place, ns in enumerate(step.kernels):
            with tracer.op("aten::mm"):
                tracer.work(step.between)
                tracer.launch(ns, name=SHAPES[place % len(SHAPES)])


def read(tracer: Tracer, step: Step) -> None:
    with tracer.phase("read"):
        tracer.work(step.read)


def prepare(tracer: Tracer, step: Step) -> None:
    with tracer.phase("prepare"):
        tracer.work(step.prepare)


# A schedule yields at the start of each step.
Schedule = Callable[[Tracer, Step, int], Iterator[None]]


def sync(tracer: Tracer, step: Step, steps: int) -> Iterator[None]:
    """Each step's results are read before the next is prepared; all copies block the host."""
    for _ in range(steps):
        yield
        prepare(tracer, step)
        for size in step.inputs:
            tracer.copy_in(size)
        forward(tracer, step)
        tracer.copy_out(step.results)
        read(tracer, step)


def overlapped(tracer: Tracer, step: Step, steps: int, lag: int = 1) -> Iterator[None]:
    """A step is launched before the results of that `lag` steps before are read; copies are on streams of their own."""
    flying: list[Mark] = []
    for _ in range(steps):
        yield
        prepare(tracer, step)
        for size in step.inputs:
            tracer.pinned("h2d", size, COPY_IN)
        tracer.stream_wait(COMPUTE, tracer.record(COPY_IN))
        forward(tracer, step)
        tracer.stream_wait(COPY_OUT, tracer.record(COMPUTE))
        flying.append(tracer.pinned("d2h", step.results, COPY_OUT))
        if len(flying) > lag:
            tracer.wait(flying.pop(0))
            read(tracer, step)


def rotated(tracer: Tracer, step: Step, steps: int) -> Iterator[None]:
    """As `sync`, with a step said to begin where the one before has just been launched."""
    for number in range(steps):
        prepare(tracer, step)
        for size in step.inputs:
            tracer.copy_in(size)
        forward(tracer, step)
        yield
        tracer.copy_out(step.results)
        read(tracer, step)
        if number == steps - 1:
            return


SCHEDULES: dict[str, Schedule] = {"sync": sync, "async": overlapped, "rotated": rotated}


def run(
    schedule: Schedule, step: Step, steps: int = 8, *, name: str | None = "ProfilerStep#{}", before: int = 3, **how: Any
) -> tuple[Tracer, list[int]]:
    """The trace of some steps of a loop, and the times at which they began and the last ended.

    `name` annotates the steps. The recording begins when `before` steps have gone by.
    """
    tracer = Tracer(**how)
    began: list[int] = []
    with ExitStack() as last:
        for number, _ in enumerate(schedule(tracer, step, before + steps)):
            last.close()
            began.append(tracer.now)
            if name is not None:
                last.enter_context(tracer.around(name.format(number)))
    tracer.forget(began[before])
    return tracer, [*began[before:], tracer.now]


def step_ns(began: Sequence[int], of: int = 2) -> float:
    """The mean step, the first `of` and the last left out."""
    return (began[-2] - began[of]) / (len(began) - 2 - of)

"""Traces of a made-up serving loop, as torch.profiler writes them: phases, small copies, kernels or a graph, a wait."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Event = dict[str, Any]

HOST, DEVICE = 1000, 0


@dataclass
class TracedLoop:
    """A synchronous loop; times in microseconds.

    A step reads results (`update`), prepares inputs (`prepare`, in it `build`, which ends with a small copy and waits
    for it), launches (`launch`) `kernels` kernels of `kernel_us` each or a graph of them, copies results out and waits.
    """

    steps: int = 10
    update_us: float = 200.0
    prepare_us: float = 100.0
    build_us: float = 600.0
    launch_us: float = 30.0
    kernels: int = 20
    kernel_us: float = 150.0
    graph: bool = True
    device: str = "Made-up GPU"
    recorded: dict[str, Any] | None = None
    events: list[Event] = field(default_factory=list)
    _now: float = 1000.0
    _free: float = 0.0
    _correlation: int = 0

    def trace(self) -> dict[str, Any]:
        """The trace as a JSON object; with `recorded` as one by `calibration.record`."""
        self.events = []
        for step in range(self.steps):
            began = self._now
            self._step()
            self._event("user_annotation", f"ProfilerStep#{step}", began, self._now)
        first = {} if self.recorded is None else {"batchsim": self.recorded}
        about = {"deviceProperties": [{"id": 0, "name": self.device}]}
        return first | about | {"traceEvents": self.events}

    def write(self, path: Path) -> Path:
        data = json.dumps(self.trace()).encode()
        path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
        return path

    @property
    def step_us(self) -> float:
        """What a step takes, but for calls of a few microseconds."""
        return self.update_us + self.prepare_us + self.build_us + self.launch_us + self.kernels * self.kernel_us

    def _step(self) -> None:
        self._now += 5
        with_update = self._now
        self._now += self.update_us
        self._event("user_annotation", "update", with_update, self._now)
        prepared = self._now
        self._now += self.prepare_us
        built = self._now
        self._now += self.build_us
        self._copy("HtoD (Pageable -> Device)", blocks=True)
        self._event("user_annotation", "build", built, self._now)
        self._event("user_annotation", "prepare", prepared, self._now + 1)
        self._now += 2
        launched = self._now
        self._now += self.launch_us
        self._launch()
        self._event("user_annotation", "launch", launched, self._now)
        self._copy("DtoH (Device -> Pinned)", blocks=False)
        self._call("cudaStreamSynchronize", max(self._free - self._now, 0) + 4)

    def _launch(self) -> None:
        if self.graph:
            self._call("cudaGraphLaunch", 20)
            for node in range(self.kernels):
                self._activity("kernel", "gemm", self.kernel_us, **{"graph node id": node})
        else:
            for _ in range(self.kernels):
                self._call("cudaLaunchKernel", 5)
                self._activity("kernel", "gemm", self.kernel_us)
                self._now += 3

    def _copy(self, direction: str, *, blocks: bool) -> None:
        self._call("cudaMemcpyAsync", 6)
        self._activity("gpu_memcpy", f"Memcpy {direction}", 2, bytes=512)
        if blocks:
            self._call("cudaStreamSynchronize", max(self._free - self._now, 0) + 3)

    def _call(self, name: str, us: float) -> None:
        self._correlation += 1
        self._event("cuda_runtime", name, self._now, self._now + us, correlation=self._correlation)
        self._now += us

    def _activity(self, category: str, name: str, us: float, **args: Any) -> None:
        start = max(self._now + 2, self._free)
        self._free = start + us
        args = {"device": 0, "stream": 7, "correlation": self._correlation} | args
        self._event(category, name, start, self._free, pid=DEVICE, tid=7, **args)

    def _event(
        self, category: str, name: str, start: float, end: float, pid: int = HOST, tid: int = HOST, **args: Any
    ) -> None:
        event = {"ph": "X", "cat": category, "name": name, "pid": pid, "tid": tid, "args": args}
        self.events.append(event | {"ts": round(start, 3), "dur": round(end - start, 3)})

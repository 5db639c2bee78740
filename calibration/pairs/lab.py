"""What loops are made of: streams, events, graphs and pinned buffers on a GPU; stand-ins that do nothing on a CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]


class Event(Protocol):
    """A mark in the current stream. On the CPU everything has happened by the time that its mark is made."""

    def record(self) -> None: ...
    def wait(self) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool: ...


class _Past:
    def record(self) -> None: ...
    def wait(self) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


class Lab:
    """A device and reproducible data on it: two labs of a seed hand out the same tensors in the same order."""

    def __init__(self, device: str, seed: int = 0) -> None:
        """`device` is `cuda`, or `cpu` for sizes that a test can afford."""
        self.device = torch.device(device)
        self.on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self._generator = torch.Generator(self.device).manual_seed(seed)

    def size(self, full: int, small: int) -> int:
        """`full` on the GPU, `small` on the CPU."""
        return full if self.on_gpu else small

    def weights(self, *shape: int) -> torch.Tensor:
        """Normal values that keep the size of what they are multiplied with: fan-in is the product of all but the
        first dimension for convolutions, and the first for matrices (inputs, outputs)."""
        fan_in = math.prod(shape[1:]) if len(shape) > 2 else shape[0]
        values = torch.randn(*shape, device=self.device, generator=self._generator) / math.sqrt(fan_in)
        return values.to(self.dtype)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=dtype, pin_memory=self.on_gpu)

    def event(self) -> Event:
        return torch.cuda.Event() if self.on_gpu else _Past()  # type: ignore[no-untyped-call]

    def stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.Stream(self.device) if self.on_gpu else None  # type: ignore[no-untyped-call]

    def on(self, stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
        """The block's work goes to `stream`."""
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """`work` as a CUDA graph: call the result to run it again on the same tensors."""
        if not self.on_gpu:
            return work
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries allocate at their first calls, which a graph can not hold
                work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay


def _no_array(tensor: torch.Tensor) -> Array:
    array: Array = tensor.numpy()
    return array


class Uploads:
    """Two pinned buffers and their twins on the device, filled in turn on a stream of their own.

    Right for loops that read each step's results before they begin the step after the next: then whatever read a
    buffer two steps ago has ended.
    """

    def __init__(self, lab: Lab, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._lab, self._stream = lab, lab.stream()
        self._hosts = [lab.pinned(shape, dtype) for _ in range(2)]
        self._arrays = [_no_array(host) for host in self._hosts]
        self._twins = [lab.zeros(*shape, dtype=dtype) for _ in range(2)]
        self._events = [lab.event() for _ in range(2)]

    def buffer(self, step: int) -> Array:
        """Where the host writes the inputs of `step`."""
        return self._arrays[step % 2]

    def send(self, step: int) -> torch.Tensor:
        """The inputs of `step` on the device, for which the current stream waits."""
        slot = step % 2
        with self._lab.on(self._stream):
            self._twins[slot].copy_(self._hosts[slot], non_blocking=True)
            self._events[slot].record()
        self._events[slot].wait()
        return self._twins[slot]


class Downloads:
    """Two pinned buffers for results, which come on a stream of their own by way of a copy on the device."""

    def __init__(self, lab: Lab) -> None:
        self._lab, self._stream = lab, lab.stream()
        self._staged: list[torch.Tensor] = []
        self._hosts: list[torch.Tensor] = []
        self._ready, self._events = [lab.event() for _ in range(2)], [lab.event() for _ in range(2)]

    def send(self, step: int, result: torch.Tensor) -> None:
        """Start to bring `result`, which may be overwritten by what follows in the current stream."""
        slot = step % 2
        if not self._hosts:
            self._staged = [torch.empty_like(result) for _ in range(2)]
            self._hosts = [self._lab.pinned(result.shape, result.dtype) for _ in range(2)]
        self._staged[slot].copy_(result)
        self._ready[slot].record()
        with self._lab.on(self._stream):
            self._ready[slot].wait()
            self._hosts[slot].copy_(self._staged[slot], non_blocking=True)
            self._events[slot].record()

    def read(self, step: int) -> Array:
        """The result of `step`, for which the host waits; good until two steps later."""
        slot = step % 2
        self._events[slot].synchronize()
        return _no_array(self._hosts[slot])


def digest(values: Array) -> float:
    """A number that tells whether two results are the same."""
    return float(np.asarray(values, dtype=np.float64).ravel()[:: max(values.size // 64, 1)].sum())

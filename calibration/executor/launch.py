"""Launching Triton kernels with little host time.

Triton's own launch path binds and specialises the arguments anew at every call, some 20 us of host time each. A
decoder calls a few kernels with few kinds of arguments, so what was compiled for a kind is kept under a short key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton import knobs


class Kernel:
    """A `triton.jit` function, launched by `kernel[grid](*arguments, **constants_and_options)`.

    Run-time arguments are positional, tensors or integers; constants follow by keyword in the order of the
    function's parameters, then Triton's options. A launch is compiled by Triton for the first arguments of its kind:
    their types, the alignment of pointers, the values of integers, constants and options. In Triton's interpreter,
    and while a launch hook is set (a profiler's), every call takes Triton's own path.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self._interpreted = not hasattr(function, "device_caches")
        self._compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Tensor | int, **constants: Any) -> None:
            self._launch(grid, arguments, constants)

        return launch

    def _launch(self, grid: tuple[int, ...], arguments: tuple[Tensor | int, ...], constants: dict[str, Any]) -> None:
        if self._interpreted or getattr(knobs.runtime.launch_enter_hook, "calls", None):
            self.function[grid](*arguments, **constants)
            return
        words: list[int] = []
        kinds: list[Any] = []
        device = 0
        for argument in arguments:
            if isinstance(argument, Tensor):
                pointer = argument.data_ptr()
                words.append(pointer)
                kinds.append((argument.dtype, pointer % 16 == 0))
                device = argument.get_device()
            else:
                words.append(argument)
                kinds.append(argument)
        key = (device, *kinds, *constants.values())
        known = self._compiled.get(key)
        if known is None:
            compiled = self.function[grid](*arguments, **constants)
            parameters = self.function.arg_names[len(arguments) :]
            self._compiled[key] = compiled, tuple(constants[name] for name in parameters)
            return
        compiled, values = known
        x, y, z = (*grid, 1, 1)[:3]
        stream = torch._C._cuda_getCurrentRawStream(device)
        compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *words, *values)


def kernel(function: Any) -> Kernel:
    """Decorate a `triton.jit` function, to be launched through `Kernel`."""
    return Kernel(function)

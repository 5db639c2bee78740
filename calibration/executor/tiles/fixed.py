"""Launching a Triton kernel again and again with the same arguments, with little host time.

Triton encodes each tensor descriptor anew at every launch. Where all addresses are fixed this is done once.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor


class FixedLaunch:
    """`function` over `blocks` blocks with fixed arguments: tensors, descriptors, integers; then constants and options.

    The first call compiles. In Triton's interpreter, and while a launch hook is set (a profiler's), every call takes
    Triton's own path.
    """

    def __init__(self, function: Any, blocks: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        self._function, self._blocks = function, blocks
        self._arguments, self._constants = arguments, constants
        self._interpreted = not hasattr(function, "device_caches")
        self._encoded: tuple[Any, tuple[Any, ...], tuple[Any, ...]] | None = None
        self._device = next(argument for argument in arguments if isinstance(argument, Tensor)).get_device()

    def __call__(self) -> None:
        if self._interpreted or getattr(knobs.runtime.launch_enter_hook, "calls", None):
            self._function[(self._blocks,)](*self._arguments, **self._constants)
            return
        if self._encoded is None:
            compiled = self._function[(self._blocks,)](*self._arguments, **self._constants)
            self._encoded = self._encode(compiled)
            return
        launcher, head, tail = self._encoded
        launcher(self._blocks, 1, 1, torch._C._cuda_getCurrentRawStream(self._device), *head, *tail)

    def _encode(self, compiled: Any) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
        """The C launcher beneath Triton's wrappers, and its arguments after the stream."""
        from triton.backends.nvidia.driver import make_tensordesc_arg

        launcher = inspect.getclosurevars(compiled.run.launch).nonlocals["launcher"]
        encodings = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
        words: list[Any] = []
        for argument in self._arguments:
            if isinstance(argument, TensorDescriptor):
                words += make_tensordesc_arg(argument, next(encodings))
            else:
                words.append(argument.data_ptr() if isinstance(argument, Tensor) else argument)
        constants = [self._constants[name] for name in self._function.arg_names[len(self._arguments) :]]
        head = (
            compiled.function, compiled.run.launch_cooperative_grid, compiled.run.launch_pdl, None, None,
            compiled.packed_metadata, None, None, None,
        )  # fmt: skip
        return launcher, head, (*words, *constants)

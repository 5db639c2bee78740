"""An oracle for memory without a GPU: a tape of what a torch program on the CPU takes and gives back.

Storages that operators return are followed by weak references; what an operator takes inside and gives back before it
returns is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from batchsim.memory.tape import Tape


class Traced(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes to `tape` what is taken while the mode is on; `ignore` is what was there before."""

    def __init__(self, *ignore: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = Tape()
        self._ignored = {_weak(tensor).cdata: tensor for tensor in ignore}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.settle()
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                known = _weak(tensor)
                if known.cdata not in self._live and known.cdata not in self._ignored:
                    self._live[known.cdata] = known, self.tape.new("activations", tensor.untyped_storage().nbytes())
        return result

    def settle(self) -> None:
        """Write down what has gone since the last operator."""
        gone = [cdata for cdata, (storage, _) in self._live.items() if storage.expired()]  # type: ignore[no-untyped-call]
        for cdata in gone:
            self.tape.free(self._live.pop(cdata)[1])


def traced(program: Callable[[], Any], *ignore: torch.Tensor) -> Tape:
    """The tape of a program; what it returns is there to the end."""
    mode = Traced(*ignore)
    with mode:
        kept = program()
        mode.settle()
    del kept
    return mode.tape


def _weak(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]

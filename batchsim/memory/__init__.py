"""What fits on the device: parameters, KV cache, activations, gradients, optimiser, workspace, allocator.

A program's allocations and releases are written down as a tape, from its shape alone, and the tape is played to a
model of PyTorch's caching allocator.
"""

from batchsim.memory.breakdown import Breakdown, Need, break_down, gigabytes
from batchsim.memory.overheads import CPU, Library, library_for
from batchsim.memory.scenarios import breakdown, need_of, peak_bytes

__all__ = [
    "CPU",
    "Breakdown",
    "Library",
    "Need",
    "break_down",
    "breakdown",
    "gigabytes",
    "library_for",
    "need_of",
    "peak_bytes",
]

"""On which multiprocessors kernels run. Import on a CUDA machine only."""

# Triton kernels are not Python functions with types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl

# So many blocks for each multiprocessor, each of which stays there for so long.
BLOCKS, STAYS_NS = 32, 20_000


@triton.jit
def _stay(out, stays_ns):
    begun = tl.extra.cuda.globaltimer()
    now = begun
    while now - begun < stays_ns:
        now = tl.extra.cuda.globaltimer()
    tl.store(out + tl.program_id(0), tl.extra.cuda.smid())


def multiprocessors() -> set[int]:
    """The numbers of the multiprocessors that the current stream's kernels reach; waits for the device."""
    index = torch.cuda.current_device()
    blocks = BLOCKS * torch.cuda.get_device_properties(index).multi_processor_count
    out = torch.full((blocks,), -1, dtype=torch.int32, device="cuda")
    _stay[(blocks,)](out, STAYS_NS, num_warps=1)
    return set(out.tolist())

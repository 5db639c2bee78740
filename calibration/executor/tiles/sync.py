"""Tickets, semaphores and the watchdog of a persistent kernel that runs the tiles of a chain. Import with Triton only.

A program takes tickets until none is left; each names a tile. What a tile reads was written by other programs of the
same launch, so the order of memory is made here. Outputs leave through the tensor memory accelerator (the "async
proxy") or by ordinary stores, and are read through the accelerator:

    writer: wait for its bulk stores; proxy fence; barrier of the program; add to the semaphore, release
    reader: load the semaphore, acquire; barrier of the program (a reduction); proxy fence; bulk loads

`CUDA` is False in Triton's interpreter, which knows none of the instructions.
"""

# Triton kernels are not Python functions with types.
# ruff: noqa: N803, SIM108
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

# Words of a ticket: one row each in the array of tickets, padded to a line of 64 bytes.
TICKET_WORDS = 16
TICKET_FIELDS = ("kernel", "row", "col", "slice", "steps", "tile", "waits_from", "waits_to", "post", "values", "room")
PARTIAL_UNIT = 256  # floats; a tile's partial sums begin at `room` such units

# Words of the state: the next ticket, the programs that have left.
STATE_WORDS = 2


@triton.jit
def clock(CUDA: tl.constexpr):
    """Nanoseconds. Each thread reads its own, so nothing that the program does as one may depend on it."""
    if CUDA:
        now = tl.extra.cuda.globaltimer()
    else:
        now = tl.full((), 0, tl.int64)
    return now


@triton.jit
def multiprocessor(CUDA: tl.constexpr):
    if CUDA:
        number = tl.extra.cuda.smid()
    else:
        number = tl.full((), 0, tl.int32)
    return number


@triton.jit
def claim(state, LANES: tl.constexpr):
    """Take the next ticket; its number is in lane 0 once it arrives, and nothing waits for it until it is used."""
    lane = tl.arange(0, LANES)
    return tl.atomic_add(state + lane * 0, 1, mask=lane == 0, sem="relaxed", scope="gpu")


@triton.jit
def claimed_ticket(claimed, LANES: tl.constexpr):
    """The number of a ticket that was claimed."""
    return tl.max(tl.where(tl.arange(0, LANES) == 0, claimed, -1), 0)


@triton.jit
def ticket(tickets, number, last, WORDS: tl.constexpr):
    """The fields of a ticket, `TICKET_FIELDS`; of the last one where there is none of that number."""
    at = tickets + tl.minimum(number, last - 1) * WORDS
    return (
        tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5),
        tl.load(at + 6), tl.load(at + 7), tl.load(at + 8), tl.load(at + 9), tl.load(at + 10),
    )  # fmt: skip


@triton.jit
def note(trace, tile, began, waited, CUDA: tl.constexpr):
    """Write down when a tile began and ended, how long it waited, and where it ran."""
    tl.store(trace + tile * 4, began)
    tl.store(trace + tile * 4 + 1, clock(CUDA))
    tl.store(trace + tile * 4 + 2, waited)
    tl.store(trace + tile * 4 + 3, multiprocessor(CUDA).to(tl.int64))


@triton.jit
def leave(state, semaphores, count, BLOCK: tl.constexpr):
    """The last program to leave resets tickets and semaphores for the next launch."""
    left = tl.atomic_add(state + 1, 1, sem="acq_rel", scope="gpu")
    if left == tl.num_programs(0) - 1:
        tl.store(state, 0)
        tl.store(state + 1, 0)
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(semaphores + at, tl.zeros((BLOCK,), tl.int32), mask=at < count)


@triton.jit
def _seen(semaphores, CUDA: tl.constexpr):
    if CUDA:
        values = tl.inline_asm_elementwise(
            "ld.acquire.gpu.global.s32 $0, [$1];", "=r,l", [semaphores.to(tl.int64)], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip
    else:
        values = tl.load(semaphores)
    return values


@triton.jit
def _alarm(error, CUDA: tl.constexpr):
    if CUDA:
        word = tl.inline_asm_elementwise(
            "ld.relaxed.gpu.global.s64 $0, [$1];", "=l,l", [error.to(tl.int64)], dtype=tl.int64, is_pure=False, pack=1
        )
    else:
        word = tl.load(error)
    return word


@triton.jit
def ready(waits, tile, step, steps, LANES: tl.constexpr, CUDA: tl.constexpr):
    """Spin until iteration `step` of the main loop may run; the first iteration that may not, or `steps`; the time.

    All entries of the tile are polled together, one a lane. After `limit` nanoseconds (polls, in the interpreter), or
    once any program has raised the alarm, a lane counts as satisfied; the one that loses patience writes
    (tile + 1) * 2^32 + semaphore to `error`. LANES is at least the number of threads, so that the minimum over the
    lanes goes through shared memory and is the same for every warp, whatever each of them saw.
    """
    wait_step, wait_semaphore, wait_value, semaphores, error, limit, waits_from, waits_to = waits
    at = waits_from + tl.arange(0, LANES)
    live = at < waits_to
    when = tl.load(wait_step + at, mask=live, other=0)
    which = tl.load(wait_semaphore + at, mask=live, other=0)
    value = tl.load(wait_value + at, mask=live, other=-1)
    began = clock(CUDA)
    polls = began
    blocked = _seen(semaphores + which, CUDA) < value
    free = tl.min(tl.where(blocked, when, steps), 0)
    while free <= step:
        if CUDA:
            # Polls cost power, which the tiles at work have a use for, and bandwidth of the second-level cache.
            tl.inline_asm_elementwise(
                "nanosleep.u32 100; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
            )
            polls = clock(CUDA)
        else:
            polls += 1
        blocked = (_seen(semaphores + which, CUDA) < value) & (_alarm(error + which * 0, CUDA) == 0)
        late = blocked & (when <= step) & (tl.zeros_like(at) + (polls - began) > limit)
        tl.store(error + which * 0, (tile + 1).to(tl.int64) * 4294967296 + which, mask=late)
        free = tl.min(tl.where(blocked & (late == 0), when, steps), 0)
    if CUDA:
        tl.inline_asm_elementwise("fence.proxy.async; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    return free, clock(CUDA) - began


@triton.jit
def post(semaphores, semaphore, value, CUDA: tl.constexpr):
    """Add `value` to a semaphore (none: -1) once all that the program has stored is there for others to read."""
    if semaphore >= 0:
        if CUDA:
            tl.inline_asm_elementwise(
                "cp.async.bulk.wait_group 0; fence.proxy.async; mov.u32 $0, 0;", "=r", [], dtype=tl.int32,
                is_pure=False, pack=1,
            )  # fmt: skip
        tl.debug_barrier()
        tl.atomic_add(semaphores + semaphore, value, sem="release", scope="gpu")

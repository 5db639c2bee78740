"""The persistent kernel of a chain of 3x3 convolutions, tile by tile. Import with Triton only."""

# Triton kernels are not Python functions with types.
# ruff: noqa: N803, N806
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from calibration.executor.tiles.products import _last, _put, _sum, activated
from calibration.executor.tiles.sync import claim, claimed_ticket, clock, leave, note, post, ready, ticket


@triton.jit
def convolve(
    images, weights, out, kernel, place, waits, partials, arrivals, state, height, width, pixels, room,
    SHAPE: tl.constexpr, LANES: tl.constexpr, CUDA: tl.constexpr,
):  # fmt: skip
    """One tile of the output of convolution `kernel`: ROWS pixels by COLS channels; returns as `products` does.

    images: from each convolution's input to the next `room` pixels, of which `pixels` are in use, with CHANNELS each.
    weights (convs CHANNELS, 9 CHANNELS) in blocks of COLS x DEPTH, its columns tap by tap; out (all pixels, CHANNELS)
    in blocks of ROWS x COLS. SHAPE is (ROWS, COLS, DEPTH, STAGES, SLICES, CHANNELS).

    Pixels are copied by the threads, for no box of a tensor descriptor has the shape of a tile's pixels with zeros for
    what lies beyond an image's border. The copies are ordered by what `ready` acquires, and go past the first-level
    cache, which may hold what the memory was before.
    """
    ROWS: tl.constexpr = SHAPE[0]
    COLS: tl.constexpr = SHAPE[1]
    DEPTH: tl.constexpr = SHAPE[2]
    SLICES: tl.constexpr = SHAPE[4]
    CHANNELS: tl.constexpr = SHAPE[5]
    row, col, share, steps, tile = place
    pixel = row * ROWS + tl.arange(0, ROWS)
    x = pixel % width
    y = pixel // width % height
    # One bit a tap: whether that neighbour of the pixel is within its image.
    inside = tl.zeros((ROWS,), tl.int32)
    for bit in tl.static_range(9):
        down = y + (bit // 3 - 1)
        along = x + (bit % 3 - 1)
        there = (down >= 0) & (down < height) & (along >= 0) & (along < width) & (pixel < pixels)
        inside |= there.to(tl.int32) << bit
    own = images + (kernel * room).to(tl.int64) * CHANNELS + pixel[:, None] * CHANNELS + tl.arange(0, DEPTH)[None, :]
    total = tl.zeros((ROWS, COLS), tl.float32)
    waited = tl.full((), 0, tl.int64)
    step = 0
    while step < steps:
        stop = steps
        if waits[7] > waits[6]:
            stop, spent = ready(waits, tile, step, steps, LANES, CUDA)
            waited += spent
        for k in tl.range(step, stop, num_stages=SHAPE[3]):
            left = (share * steps + k) * DEPTH
            tap = left // CHANNELS
            shift = (tap // 3 - 1) * width + tap % 3 - 1
            near = own + (shift * CHANNELS + left % CHANNELS)
            # Triton cannot tell within a while loop, and would copy value by value.
            near = tl.max_contiguous(tl.multiple_of(near, (16, 16)), (1, DEPTH))
            a = tl.load(near, mask=((inside >> tap) & 1)[:, None] != 0, other=0.0, cache_modifier=".cg")
            w = weights.load([kernel * CHANNELS + col * COLS, left])
            total = tl.dot(a, w.T, total)
        step = stop
    claimed = claim(state, LANES)
    top = (kernel + 1) * room + row * ROWS
    last = True
    if SLICES > 1:
        _put(partials + share * ROWS * COLS, total, ROWS, COLS)
        last = _last(arrivals + tile - share, SLICES)
        if last:
            total = _sum(partials, SLICES, ROWS * COLS, ROWS, COLS)
            out.store([top, col * COLS], activated(total, "relu").to(out.dtype))
    else:
        out.store([top, col * COLS], activated(total, "relu").to(out.dtype))
    return last, waited, claimed


@triton.jit(do_not_specialize=["first", "last", "count", "limit", "height", "width", "pixels", "room"])
def conv_kernel(
    images, weights0, out0, weights1, out1, height, width, pixels, room,
    tickets, wait_step, wait_semaphore, wait_value, state, semaphores, error, partials, arrivals, trace,
    first, last, count, limit,
    TICKET: tl.constexpr, UNIT: tl.constexpr, LANES: tl.constexpr, CUDA: tl.constexpr, TRACE: tl.constexpr,
    SHAPE0: tl.constexpr, SHAPE1: tl.constexpr,
):  # fmt: skip
    """Tickets `first` to `last` of the chain's; even convolutions in tiles of SHAPE0, odd ones in tiles of SHAPE1.

    `weights1` and `out1` are `weights0` and `out0` in other blocks; see `convolve`. `count`: semaphores.
    """
    number = first + claimed_ticket(claim(state, LANES), LANES)
    fields = ticket(tickets, number, last, TICKET)
    while number < last:
        began = clock(CUDA)
        kernel, row, col, share, steps, tile, waits_from, waits_to, semaphore, value, at = fields
        place = row, col, share, steps, tile
        waits = wait_step, wait_semaphore, wait_value, semaphores, error, limit, waits_from, waits_to
        own = partials + at.to(tl.int64) * UNIT
        if SHAPE0 == SHAPE1 or kernel % 2 == 0:
            written, waited, claimed = convolve(
                images, weights0, out0, kernel, place, waits, own, arrivals, state, height, width, pixels, room,
                SHAPE0, LANES, CUDA,
            )  # fmt: skip
        else:
            written, waited, claimed = convolve(
                images, weights1, out1, kernel, place, waits, own, arrivals, state, height, width, pixels, room,
                SHAPE1, LANES, CUDA,
            )  # fmt: skip
        # The next ticket is read while this tile's stores are under way.
        number = first + claimed_ticket(claimed, LANES)
        fields = ticket(tickets, number, last, TICKET)
        if written:
            post(semaphores, semaphore, value, CUDA)
        if TRACE:
            note(trace, tile, began, waited, CUDA)
    leave(state, semaphores, count, LANES)

"""Tiles of matrix products, for the persistent kernels of chains. Import with Triton only.

Operands come through tensor descriptors, which cut off what lies outside, so that no size of a matrix is an argument:
`a` (m, k), `b` (n, k) and `c` (m, n), in blocks of a tile's rows, columns and DEPTH. SHAPE is (ROWS, ROWS_REST, COLS,
COLS_REST, DEPTH, STAGES, SLICES). Triton knows only powers of two, so a tile of 192 rows or columns is one of 128 and a
rest of 64 beside it, which share an operand. With GATED, `b` is (2, n / 2, k), gate and up, in blocks of both, and
`c` = silu(`a` gate^T) * (`a` up^T) has half of COLS columns.

The functions return whether their tile was written (of SLICES shares, the last one to arrive writes it), the
nanoseconds waited, and a claim to the next ticket, made when the main loop is done.
"""

# Triton kernels are not Python functions with types.
# ruff: noqa: N803, N806, SIM108
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from calibration.executor.tiles.sync import claim, ready


@triton.jit
def projected(
    a, a_rest, b, b_rest, c, c_rest, place, waits, partials, arrivals, state,
    SHAPE: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, LANES: tl.constexpr, CUDA: tl.constexpr,
):  # fmt: skip
    """One tile of `c` = activation(`a` `b`^T), in one part or in two."""
    if SHAPE[1] + SHAPE[3] > 0:
        written, waited, claimed = divided(
            a, a_rest, b, b_rest, c, c_rest, place, waits, partials, arrivals, state,
            SHAPE, GATED, ACTIVATION, LANES, CUDA,
        )  # fmt: skip
    else:
        written, waited, claimed = product(
            a, b, c, place, waits, partials, arrivals, state, SHAPE, GATED, ACTIVATION, LANES, CUDA
        )
    return written, waited, claimed


@triton.jit
def product(
    a, b, c, place, waits, partials, arrivals, state,
    SHAPE: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, LANES: tl.constexpr, CUDA: tl.constexpr,
):  # fmt: skip
    """A tile in one part: each warp group of four warps multiplies 64 of its rows with all of its columns."""
    ROWS: tl.constexpr = SHAPE[0]
    COLS: tl.constexpr = SHAPE[2]
    OUT: tl.constexpr = COLS // 2 if GATED else COLS
    DEPTH: tl.constexpr = SHAPE[4]
    SLICES: tl.constexpr = SHAPE[6]
    row, col, share, steps, tile = place
    left = share * steps * DEPTH
    total = tl.zeros((ROWS, COLS), tl.float32)
    waited = tl.full((), 0, tl.int64)
    step = 0
    while step < steps:
        stop = steps
        if waits[7] > waits[6]:
            stop, spent = ready(waits, tile, step, steps, LANES, CUDA)
            waited += spent
        for k in tl.range(step, stop, num_stages=SHAPE[5]):
            x = a.load([row * ROWS, left + k * DEPTH])
            w = _weights(b, col * OUT, left + k * DEPTH, COLS, DEPTH, GATED)
            total = tl.dot(x, w.T, total)
        step = stop
    claimed = claim(state, LANES)
    last = True
    if SLICES > 1:
        _put(partials + share * ROWS * COLS, total, ROWS, COLS)
        last = _last(arrivals + tile - share, SLICES)
        if last:
            total = _sum(partials, SLICES, ROWS * COLS, ROWS, COLS)
            c.store([row * ROWS, col * OUT], _finished(total, ROWS, COLS, GATED, ACTIVATION).to(c.dtype))
    else:
        c.store([row * ROWS, col * OUT], _finished(total, ROWS, COLS, GATED, ACTIVATION).to(c.dtype))
    return last, waited, claimed


@triton.jit
def divided(
    a, a_rest, b, b_rest, c, c_rest, place, waits, partials, arrivals, state,
    SHAPE: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, LANES: tl.constexpr, CUDA: tl.constexpr,
):  # fmt: skip
    """A tile in two parts, one above the other or side by side.

    Shared memory's bandwidth is what bounds a tile, and an operand costs least as the wide second one of a product. So
    parts side by side are computed transposed, weights first.
    """
    TALL: tl.constexpr = SHAPE[1] > 0
    MAIN: tl.constexpr = SHAPE[0] if TALL else SHAPE[2]
    REST: tl.constexpr = SHAPE[1] if TALL else SHAPE[3]
    WIDE: tl.constexpr = SHAPE[2] if TALL else SHAPE[0]
    OUT: tl.constexpr = WIDE // 2 if GATED else WIDE
    DEPTH: tl.constexpr = SHAPE[4]
    SLICES: tl.constexpr = SHAPE[6]
    PART: tl.constexpr = (MAIN + REST) * WIDE
    row, col, share, steps, tile = place
    left = share * steps * DEPTH
    if TALL:
        first = row * (MAIN + REST)
        other = col * OUT
    else:
        first = col * (MAIN + REST)
        other = row * WIDE
    main = tl.zeros((MAIN, WIDE), tl.float32)
    rest = tl.zeros((REST, WIDE), tl.float32)
    waited = tl.full((), 0, tl.int64)
    step = 0
    while step < steps:
        stop = steps
        if waits[7] > waits[6]:
            stop, spent = ready(waits, tile, step, steps, LANES, CUDA)
            waited += spent
        for k in tl.range(step, stop, num_stages=SHAPE[5]):
            at = left + k * DEPTH
            if TALL:
                x = a.load([first, at])
                y = a_rest.load([first + MAIN, at])
                z = _weights(b, other, at, WIDE, DEPTH, GATED)
            else:
                x = b.load([first, at])
                y = b_rest.load([first + MAIN, at])
                z = a.load([other, at])
            main = tl.dot(x, z.T, main)
            rest = tl.dot(y, z.T, rest)
        step = stop
    claimed = claim(state, LANES)
    last = True
    if SLICES > 1:
        _put(partials + share * PART, main, MAIN, WIDE)
        _put(partials + share * PART + MAIN * WIDE, rest, REST, WIDE)
        last = _last(arrivals + tile - share, SLICES)
        if last:
            main = _sum(partials, SLICES, PART, MAIN, WIDE)
            rest = _sum(partials + MAIN * WIDE, SLICES, PART, REST, WIDE)
            _store(c, c_rest, first, other, main, rest, MAIN, REST, WIDE, TALL, GATED, ACTIVATION)
    else:
        _store(c, c_rest, first, other, main, rest, MAIN, REST, WIDE, TALL, GATED, ACTIVATION)
    return last, waited, claimed


@triton.jit
def _weights(b, row, at, ROWS: tl.constexpr, DEPTH: tl.constexpr, GATED: tl.constexpr):
    if GATED:
        w = b.load([0, row, at]).reshape(ROWS, DEPTH)
    else:
        w = b.load([row, at])
    return w


@triton.jit
def _finished(x, ROWS: tl.constexpr, COLS: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr):
    """The activation; GATED, of gate and up side by side."""
    if GATED:
        gate, up = x.reshape(ROWS, 2, COLS // 2).permute(0, 2, 1).split()
        x = gate / (1.0 + tl.exp(-gate)) * up
    else:
        x = activated(x, ACTIVATION)
    return x


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        # The tanh approximation, by one exponential: (1 + tanh(y)) / 2 = 1 / (1 + exp(-2 y)).
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def _store(
    c, c_rest, first, other, main, rest,
    MAIN: tl.constexpr, REST: tl.constexpr, WIDE: tl.constexpr, TALL: tl.constexpr, GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    main = _finished(main, MAIN, WIDE, GATED, ACTIVATION).to(c.dtype)
    rest = _finished(rest, REST, WIDE, GATED, ACTIVATION).to(c.dtype)
    if TALL:
        c.store([first, other], main)
        c_rest.store([first + MAIN, other], rest)
    else:
        c.store([other, first], main.T)
        c_rest.store([other, first + MAIN], rest.T)


@triton.jit
def _within(ROWS: tl.constexpr, COLS: tl.constexpr):
    return tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]


@triton.jit
def _put(partials, values, ROWS: tl.constexpr, COLS: tl.constexpr):
    tl.store(partials + _within(ROWS, COLS), values)


@triton.jit
def _last(arrivals, SLICES: tl.constexpr):
    """Whether this program is the last of a tile's SLICES to arrive; it resets the count."""
    tl.debug_barrier()
    last = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == SLICES - 1
    if last:
        tl.store(arrivals, 0)
    return last


@triton.jit
def _sum(partials, SLICES: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The shares' sum, in their order, whoever arrived last: the same bits in every run."""
    total = tl.zeros((ROWS, COLS), tl.float32)
    for share in range(SLICES):
        # Past the first-level cache, which may hold lines from before.
        total += tl.load(partials + share * PART + _within(ROWS, COLS), cache_modifier=".cg")
    return total

"""Tiles of matrix products, for the persistent kernels of chains. Import with Triton only.

Operands come through tensor descriptors, which cut off what lies outside, so that no size of a matrix is an argument:
`a` (m, k) in blocks of ROWS x DEPTH, `b` (n, k) in blocks of DEPTH columns, `c` (m, n) in blocks of ROWS rows. SHAPE
is (ROWS, MAIN, REST, DEPTH, STAGES, SLICES): Triton knows only powers of two, so a tile of 192 columns is one of
MAIN = 128 and one of REST = 64 side by side. A gated tile is two of the same size, one of either half of `b`.

Each function returns whether the tile was written (of SLICES shares, the last one to arrive writes it), the nanoseconds
waited, and a claim to the next ticket, made when the main loop is done.
"""

# Triton kernels are not Python functions with types.
# ruff: noqa: N803, N806
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from calibration.executor.tiles.sync import claim, ready


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        # The tanh approximation, by one exponential: (1 + tanh(y)) / 2 = 1 / (1 + exp(-2 y)).
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def product(
    a, b, c, place, waits, partials, arrivals, state,
    SHAPE: tl.constexpr, ACTIVATION: tl.constexpr, LANES: tl.constexpr, CUDA: tl.constexpr,
):  # fmt: skip
    """One tile of `c` = activation(`a` `b`^T), REST being 0."""
    ROWS: tl.constexpr = SHAPE[0]
    COLS: tl.constexpr = SHAPE[1]
    DEPTH: tl.constexpr = SHAPE[3]
    SLICES: tl.constexpr = SHAPE[5]
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
        for k in tl.range(step, stop, num_stages=SHAPE[4]):
            x = a.load([row * ROWS, left + k * DEPTH])
            w = b.load([col * COLS, left + k * DEPTH])
            total = tl.dot(x, w.T, total)
        step = stop
    claimed = claim(state, LANES)
    last = True
    if SLICES > 1:
        _put(partials + share * ROWS * COLS, total, ROWS, COLS)
        last = _last(arrivals + tile - share, SLICES)
        if last:
            total = _sum(partials, SLICES, ROWS * COLS, ROWS, COLS)
            c.store([row * ROWS, col * COLS], activated(total, ACTIVATION).to(c.dtype))
    else:
        c.store([row * ROWS, col * COLS], activated(total, ACTIVATION).to(c.dtype))
    return last, waited, claimed


@triton.jit
def double(
    a, b, b_rest, c, c_rest, place, waits, partials, arrivals, state, inner,
    SHAPE: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, LANES: tl.constexpr, CUDA: tl.constexpr,
):  # fmt: skip
    """One tile in two parts: of `c` = activation(`a` `b`^T), or with GATED of silu(`a` gate^T) * (`a` up^T).

    With GATED, `b` is gate and up, `inner` rows each, and MAIN = REST columns of either make one tile of `c`.
    """
    ROWS: tl.constexpr = SHAPE[0]
    MAIN: tl.constexpr = SHAPE[1]
    REST: tl.constexpr = SHAPE[2]
    DEPTH: tl.constexpr = SHAPE[3]
    SLICES: tl.constexpr = SHAPE[5]
    PART: tl.constexpr = ROWS * (MAIN + REST)
    row, col, share, steps, tile = place
    if GATED:
        one = col * MAIN
        two = inner + one
    else:
        one = col * (MAIN + REST)
        two = one + MAIN
    left = share * steps * DEPTH
    main = tl.zeros((ROWS, MAIN), tl.float32)
    rest = tl.zeros((ROWS, REST), tl.float32)
    waited = tl.full((), 0, tl.int64)
    step = 0
    while step < steps:
        stop = steps
        if waits[7] > waits[6]:
            stop, spent = ready(waits, tile, step, steps, LANES, CUDA)
            waited += spent
        for k in tl.range(step, stop, num_stages=SHAPE[4]):
            x = a.load([row * ROWS, left + k * DEPTH])
            w = b.load([one, left + k * DEPTH])
            v = b_rest.load([two, left + k * DEPTH])
            main = tl.dot(x, w.T, main)
            rest = tl.dot(x, v.T, rest)
        step = stop
    claimed = claim(state, LANES)
    last = True
    if SLICES > 1:
        _put(partials + share * PART, main, ROWS, MAIN)
        _put(partials + share * PART + ROWS * MAIN, rest, ROWS, REST)
        last = _last(arrivals + tile - share, SLICES)
        if last:
            main = _sum(partials, SLICES, PART, ROWS, MAIN)
            rest = _sum(partials + ROWS * MAIN, SLICES, PART, ROWS, REST)
            _store(c, c_rest, row * ROWS, one, main, rest, MAIN, GATED, ACTIVATION)
    else:
        _store(c, c_rest, row * ROWS, one, main, rest, MAIN, GATED, ACTIVATION)
    return last, waited, claimed


@triton.jit
def _store(c, c_rest, row, col, main, rest, MAIN: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr):
    if GATED:
        c.store([row, col], (main / (1.0 + tl.exp(-main)) * rest).to(c.dtype))
    else:
        c.store([row, col], activated(main, ACTIVATION).to(c.dtype))
        c_rest.store([row, col + MAIN], activated(rest, ACTIVATION).to(c.dtype))


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

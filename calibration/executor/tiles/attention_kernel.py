"""The persistent kernel of projection, causal attention and projection, tile by tile. Import with Triton only."""

# Triton kernels are not Python functions with types.
# ruff: noqa: N803, N806
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from calibration.executor.tiles.products import projected
from calibration.executor.tiles.sync import claim, claimed_ticket, clock, leave, note, post, ready, ticket


@triton.jit
def attend(q, kv, o, place, waits, state, HEADS: tl.constexpr, LANES: tl.constexpr, CUDA: tl.constexpr):
    """A tile of causal attention: a head's queries `row` ROWS to (`row` + 1) ROWS, and all keys up to them.

    q, kv: the fused (tokens, (QUERY_HEADS + 2 KV_HEADS) DIM) tensor in blocks of ROWS and of DEPTH rows, DIM columns;
    o (tokens, QUERY_HEADS DIM). HEADS is (ROWS, DEPTH, DIM, STAGES, QUERY_HEADS, KV_HEADS). Returns the nanoseconds
    waited and a claim to the next ticket.
    """
    ROWS: tl.constexpr = HEADS[0]
    DEPTH: tl.constexpr = HEADS[1]
    DIM: tl.constexpr = HEADS[2]
    QUERY_HEADS: tl.constexpr = HEADS[4]
    KV_HEADS: tl.constexpr = HEADS[5]
    SHARE: tl.constexpr = QUERY_HEADS // KV_HEADS
    SCALE: tl.constexpr = 1.4426950408889634 / (DIM**0.5)  # exp(x) is exp2(x log2(e))
    row, head, _, steps, tile = place
    top = row * ROWS
    keys = (QUERY_HEADS + head // SHARE) * DIM
    values = keys + KV_HEADS * DIM
    waited = tl.full((), 0, tl.int64)
    stop = steps
    if waits[7] > waits[6]:
        stop, waited = ready(waits, tile, 0, steps, LANES, CUDA)
    query = q.load([top, head * DIM])
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, DIM), tl.float32)
    ahead = tl.arange(0, ROWS)[:, None] - tl.arange(0, DEPTH)[None, :]
    step = 0
    while step < steps:
        for k in tl.range(step, stop, num_stages=HEADS[3]):
            key = kv.load([k * DEPTH, keys])
            scores = tl.dot(query, key.T)
            if (k + 1) * DEPTH > top:
                scores = tl.where(ahead >= k * DEPTH - top, scores, -float("inf"))
            higher = tl.maximum(peak, tl.max(scores, 1) * SCALE)
            shares = tl.exp2(scores * SCALE - higher[:, None])
            fade = tl.exp2(peak - higher)
            weight = weight * fade + tl.sum(shares, 1)
            value = kv.load([k * DEPTH, values])
            total = tl.dot(shares.to(q.dtype), value, total * fade[:, None])
            peak = higher
        step = stop
        if step < steps:
            stop, spent = ready(waits, tile, step, steps, LANES, CUDA)
            waited += spent
    claimed = claim(state, LANES)
    o.store([top, head * DIM], (total / weight[:, None]).to(o.dtype))
    return waited, claimed


@triton.jit(do_not_specialize=["first", "last", "count", "limit"])
def attention_kernel(
    a0, a0_rest, b0, b0_rest, c0, c0_rest, q, kv, o, a2, a2_rest, b2, b2_rest, c2, c2_rest,
    tickets, wait_step, wait_semaphore, wait_value, state, semaphores, error, partials, arrivals, trace,
    first, last, count, limit,
    TICKET: tl.constexpr, UNIT: tl.constexpr, LANES: tl.constexpr, CUDA: tl.constexpr, TRACE: tl.constexpr,
    SHAPE0: tl.constexpr, HEADS: tl.constexpr, SHAPE2: tl.constexpr,
):  # fmt: skip
    """Tickets `first` to `last` of the chain's: `c0` = `a0` `b0`^T, its attention `o`, and `c2` = `a2` `b2`^T.

    `q` and `kv` are `c0` in other blocks, `a2` is `o`. Shapes as in `products` and `attend`. `count`: semaphores.
    """
    number = first + claimed_ticket(claim(state, LANES), LANES)
    fields = ticket(tickets, number, last, TICKET)
    while number < last:
        began = clock(CUDA)
        kernel, row, col, share, steps, tile, waits_from, waits_to, semaphore, value, at = fields
        place = row, col, share, steps, tile
        waits = wait_step, wait_semaphore, wait_value, semaphores, error, limit, waits_from, waits_to
        room = partials + at.to(tl.int64) * UNIT
        if kernel == 0:
            written, waited, claimed = projected(
                a0, a0_rest, b0, b0_rest, c0, c0_rest, place, waits, room, arrivals, state,
                SHAPE0, False, "none", LANES, CUDA,
            )  # fmt: skip
        elif kernel == 1:
            waited, claimed = attend(q, kv, o, place, waits, state, HEADS, LANES, CUDA)
            written = True
        else:
            written, waited, claimed = projected(
                a2, a2_rest, b2, b2_rest, c2, c2_rest, place, waits, room, arrivals, state,
                SHAPE2, False, "none", LANES, CUDA,
            )  # fmt: skip
        # The next ticket is read while this tile's stores are under way.
        number = first + claimed_ticket(claimed, LANES)
        fields = ticket(tickets, number, last, TICKET)
        if written:
            post(semaphores, semaphore, value, CUDA)
        if TRACE:
            note(trace, tile, began, waited, CUDA)
    leave(state, semaphores, count, LANES)

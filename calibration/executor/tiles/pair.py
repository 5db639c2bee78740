"""The persistent kernel of two dependent matrix products, tile by tile. Import with Triton only."""

# Triton kernels are not Python functions with types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from calibration.executor.tiles.products import projected
from calibration.executor.tiles.sync import claim, claimed_ticket, clock, leave, note, post, ticket


@triton.jit(do_not_specialize=["first", "last", "count", "limit"])
def pair_kernel(
    a0, a0_rest, b0, b0_rest, c0, c0_rest, a1, a1_rest, b1, b1_rest, c1, c1_rest,
    a2, a2_rest, b2, b2_rest, c2, c2_rest,
    tickets, wait_step, wait_semaphore, wait_value, state, semaphores, error, partials, arrivals, trace,
    first, last, count, limit,
    TICKET: tl.constexpr, UNIT: tl.constexpr, LANES: tl.constexpr, CUDA: tl.constexpr, TRACE: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, SHAPE0: tl.constexpr, SHAPE1: tl.constexpr,
    SHAPE2: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Tickets `first` to `last` of the chain's: `c0` = activation(`a0` `b0`^T) and `c1` = `a1` `b1`^T, `a1` being `c0`.

    Shapes, and what GATED does to the first product, as in `products`. With TAIL `c2` = `a2` `b2`^T are the last
    columns of the second product, `a2` being `c0` as well. `count`: semaphores.
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
                SHAPE0, GATED, ACTIVATION, LANES, CUDA,
            )  # fmt: skip
        elif TAIL and kernel == 2:
            written, waited, claimed = projected(
                a2, a2_rest, b2, b2_rest, c2, c2_rest, place, waits, room, arrivals, state,
                SHAPE2, False, "none", LANES, CUDA,
            )  # fmt: skip
        else:
            written, waited, claimed = projected(
                a1, a1_rest, b1, b1_rest, c1, c1_rest, place, waits, room, arrivals, state,
                SHAPE1, False, "none", LANES, CUDA,
            )  # fmt: skip
        # The next ticket is read while this tile's stores are under way.
        number = first + claimed_ticket(claimed, LANES)
        fields = ticket(tickets, number, last, TICKET)
        if written:
            post(semaphores, semaphore, value, CUDA)
        if TRACE:
            note(trace, tile, began, waited, CUDA)
    leave(state, semaphores, count, LANES)

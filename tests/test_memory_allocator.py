"""The allocator's rules, and bounds of any tape that is played to it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchsim.memory.allocator import MIB, CachingAllocator, OutOfMemoryError, fits, play
from batchsim.memory.tape import GRAPHS, Tape


@pytest.mark.parametrize(
    ("size", "block", "segment"),
    [
        (1, 512, 2 * MIB), (512, 512, 2 * MIB), (513, 1024, 2 * MIB), (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB), (10 * MIB - 512, 10 * MIB - 512, 20 * MIB), (10 * MIB, 10 * MIB, 10 * MIB),
        # A piece of up to 1 MiB is not cut off: the request gets it, and it counts as allocated.
        (11 * MIB + 512, 12 * MIB, 12 * MIB), (12 * MIB + 1, 14 * MIB - 2 * MIB + 512, 14 * MIB),
    ],
)  # fmt: skip
def test_one_block(size: int, block: int, segment: int) -> None:
    allocator = CachingAllocator()
    allocator.malloc(size)
    assert (allocator.allocated, allocator.reserved) == (block, segment)


def test_the_smallest_free_block_that_holds_a_request_is_taken_and_neighbours_join() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.malloc(size * MIB) for size in (30, 14, 40)]
    for block in blocks:
        allocator.release(block)
    allocator.malloc(13 * MIB)
    assert allocator.allocated == 14 * MIB  # of the segment of 14, not cut
    first, second = allocator.malloc(16 * MIB), allocator.malloc(13 * MIB)
    assert allocator.reserved == 84 * MIB  # both of the segment of 30
    allocator.release(first)
    allocator.release(second)
    allocator.malloc(30 * MIB)
    assert allocator.reserved == 84 * MIB  # in one piece again


def test_free_segments_go_back_before_the_device_is_out_of_memory() -> None:
    allocator = CachingAllocator(100 * MIB)
    allocator.release(allocator.malloc(60 * MIB))
    kept = allocator.malloc(30 * MIB)
    assert allocator.reserved == 60 * MIB
    with pytest.raises(OutOfMemoryError):
        allocator.malloc(70 * MIB)  # what is kept pins the whole segment
    allocator.release(kept)
    allocator.malloc(70 * MIB)
    assert allocator.reserved == 70 * MIB


def test_a_block_serves_the_stream_that_had_it() -> None:
    allocator = CachingAllocator(100 * MIB)
    allocator.release(allocator.malloc(40 * MIB))
    allocator.release(allocator.malloc(40 * MIB, "another"))
    assert allocator.reserved == 80 * MIB
    allocator.release(allocator.malloc(40 * MIB, GRAPHS))  # what the streams had goes back first
    allocator.empty_cache()
    assert allocator.reserved == 40 * MIB
    with pytest.raises(OutOfMemoryError):
        allocator.malloc(80 * MIB)


def test_segments_go_where_the_highest_gap_is() -> None:
    allocator = CachingAllocator()
    first, second, third = (allocator.malloc(size * MIB) for size in (20, 30, 40))
    assert first.address == second.address + second.size
    assert second.address == third.address + third.size
    for block in (first, second):
        allocator.release(block)
    allocator.empty_cache()
    again, small, below = (allocator.malloc(size * MIB) for size in (32, 18, 12))
    assert again.address + again.size == first.address + first.size
    assert small.address == second.address
    assert below.address + below.size == third.address


@st.composite
def tapes(draw: st.DrawFn) -> Tape:
    tape = Tape()
    held: list[int] = []
    sizes: list[int] = draw(st.lists(st.integers(0, 40 * MIB), max_size=60))
    for size in sizes:
        place: int = draw(st.integers(0, 60))
        if place < len(held):
            tape.free(held.pop(place))
        else:
            held.append(tape.new("activations", size))
    return tape


@given(tapes())
def test_bounds_of_any_tape(tape: Tape) -> None:
    usage = play(tape)
    assert sum(usage.terms.values()) + usage.rounding == usage.allocated <= usage.reserved
    assert fits(tape, usage.reserved)
    assert not usage.allocated or not fits(tape, usage.allocated - 1)

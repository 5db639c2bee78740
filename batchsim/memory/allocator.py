"""PyTorch's caching allocator: what it counts as allocated and what it reserves, when a tape is played to it.

The rules are those of c10/cuda/CUDACachingAllocator.cpp with its default settings. Each stream, and each pool of
graphs, has segments of its own. Sizes are rounded up to 512 bytes. Blocks of at most 1 MiB are cut from segments of 2
MiB; larger ones from free blocks, or from new segments: of 20 MiB for less than 10 MiB, else of their own size,
rounded up to 2 MiB. The smallest free block that holds a request is taken, of several the one with the lowest
address, and cut where more than 1 MiB (in small segments: 512 bytes) would be left; otherwise the request gets all of
it, which then counts as allocated. A released block is joined with free neighbours. Where the device has no memory
left, segments that are free as a whole go back to it, and it is asked again. The driver gives addresses from the top
down, as was seen in histories of the allocator; so of blocks of one size the latest segment's is taken.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from batchsim.memory.tape import GRAPHS, MAIN, Allocate, EmptyCache, Phase, Pool, Release, Tape, Term

MIB = 1 << 20
ALIGNMENT = 512
ADDRESSES = 1 << 47  # bytes of a process's address space
SMALL, SMALL_SEGMENT = MIB, 2 * MIB
LARGE, LARGE_SEGMENT, LARGE_ALIGNMENT = 10 * MIB, 20 * MIB, 2 * MIB


def rounded(size: int) -> int:
    """Bytes of the block that holds `size` bytes."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def segment_size(size: int) -> int:
    """Bytes that are asked of the device for a block of `size` bytes."""
    if size <= SMALL:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if size < LARGE else -(-size // LARGE_ALIGNMENT) * LARGE_ALIGNMENT


@dataclass(frozen=True, slots=True)
class Usage:
    """What playing a tape took, bytes.

    `terms` are what was asked for at the moment of the allocated peak, in the phase `phase`, and `rounding` what the
    blocks were larger: together `allocated`, torch's `max_memory_allocated`. `reserved` is `max_memory_reserved`.
    """

    allocated: int
    reserved: int
    terms: Mapping[Term, int]
    rounding: int
    phase: str


@dataclass(slots=True, eq=False)
class _Block:
    """A piece of a segment, linked with those before and after it."""

    address: int
    size: int
    small: bool
    pool: Pool
    before: _Block | None = None
    after: _Block | None = None

    @property
    def whole(self) -> bool:
        return self.before is None and self.after is None


class OutOfMemoryError(Exception):
    """The device has no memory left for a block."""


class CachingAllocator:
    """The allocator, on a device that has `capacity` bytes to give; without it as many as are asked for."""

    def __init__(self, capacity: int | None = None) -> None:
        self._capacity = capacity
        # Ranges of addresses that no segment has, as (end, bytes) from low to high.
        self._holes = [(ADDRESSES, ADDRESSES)]
        # Free blocks as (size, address) in order, by pool; and those blocks by their addresses.
        self._free: dict[tuple[Pool, bool], list[tuple[int, int]]] = {}
        self._blocks: dict[int, _Block] = {}
        self.allocated = self.reserved = 0

    def malloc(self, size: int, pool: Pool = MAIN) -> _Block:
        """A block for `size` bytes.

        Raises:
            OutOfMemoryError: the device has none left.
        """
        size = rounded(size)
        small = size <= SMALL
        free = self._free.setdefault((pool, small), [])
        at = bisect_left(free, (size, 0))
        block = self._blocks.pop(free.pop(at)[1]) if at < len(free) else self._segment(size, small, pool)
        if block.size - size >= ALIGNMENT if small else block.size - size > SMALL:
            rest = _Block(block.address + size, block.size - size, small, pool, block, block.after)
            if rest.after is not None:
                rest.after.before = rest
            block.size, block.after = size, rest
            self._put(rest)
        self.allocated += block.size
        return block

    def release(self, block: _Block) -> None:
        """Take a block back."""
        self.allocated -= block.size
        for other in (block.before, block.after):
            if other is not None and self._take(other):
                first, second = (other, block) if other is block.before else (block, other)
                first.size, first.after = first.size + second.size, second.after
                if second.after is not None:
                    second.after.before = first
                block = first
        self._put(block)

    def empty_cache(self) -> None:
        """Give segments back to the device that nothing uses; graphs keep theirs as long as they live."""
        for (pool, _), free in self._free.items():
            if not pool.startswith(GRAPHS):
                for size, address in free:
                    if self._blocks[address].whole:
                        del self._blocks[address]
                        self.reserved -= size
                        self._return(address, size)
                free[:] = [entry for entry in free if entry[1] in self._blocks]

    def _segment(self, size: int, small: bool, pool: Pool) -> _Block:
        size = segment_size(size)
        if self._capacity is not None and self.reserved + size > self._capacity:
            self.empty_cache()
            if self.reserved + size > self._capacity:
                raise OutOfMemoryError
        self.reserved += size
        at = max(at for at, (_, room) in enumerate(self._holes) if room >= size)
        end, room = self._holes[at]
        self._holes[at : at + 1] = [(end - size, room - size)] if room > size else []
        return _Block(end - size, size, small, pool)

    def _return(self, address: int, size: int) -> None:
        """Join a range of addresses with the holes beside it."""
        at = bisect_left(self._holes, (address, 0))
        end = address + size
        if at < len(self._holes) and self._holes[at][0] - self._holes[at][1] == end:
            above, room = self._holes.pop(at)
            end, size = above, size + room
        if at and self._holes[at - 1][0] == address:
            at -= 1
            size += self._holes.pop(at)[1]
        self._holes.insert(at, (end, size))

    def _put(self, block: _Block) -> None:
        insort(self._free[block.pool, block.small], (block.size, block.address))
        self._blocks[block.address] = block

    def _take(self, block: _Block) -> bool:
        """Take `block` out of the free ones, if it is one."""
        if self._blocks.get(block.address) is not block:
            return False
        free = self._free[block.pool, block.small]
        del free[bisect_left(free, (block.size, block.address))]
        del self._blocks[block.address]
        return True


def play(tape: Tape, capacity: int | None = None) -> Usage:
    """What a tape takes.

    Raises:
        OutOfMemoryError: more than `capacity` bytes.
    """
    allocator = CachingAllocator(capacity)
    held: dict[int, tuple[_Block, Allocate]] = {}
    live: Counter[Term] = Counter()
    phase, peak, reserved = "", 0, 0
    terms: dict[Term, int] = {}
    peak_phase = ""
    for event in tape.events:
        match event:
            case Allocate(number, size, term, pool):
                held[number] = allocator.malloc(size, pool), event
                live[term] += size
                reserved = max(reserved, allocator.reserved)
                if allocator.allocated > peak:
                    peak, peak_phase, terms = allocator.allocated, phase, dict(live)
            case Release(number):
                if number in held:
                    block, asked = held.pop(number)
                    allocator.release(block)
                    live[asked.term] -= asked.size
            case Phase(name):
                phase = name
            case EmptyCache():
                allocator.empty_cache()
    terms = {term: size for term, size in terms.items() if size}
    return Usage(peak, reserved, terms, peak - sum(terms.values()), peak_phase)


def fits(tape: Tape, capacity: int) -> bool:
    """Whether a device that has `capacity` bytes to give can play a tape."""
    try:
        play(tape, capacity)
    except OutOfMemoryError:
        return False
    return True

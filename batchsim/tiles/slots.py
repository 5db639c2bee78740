"""Which multiprocessor the next block goes to."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from math import lcm


class Multiprocessors:
    """Room for blocks: one of a kernel takes `1 / occupancy` of a multiprocessor, counted in units that it is whole in.

    `units`: what a block of each kernel takes.
    """

    def __init__(self, count: int, occupancy: Sequence[int]) -> None:
        self._full = lcm(*occupancy)
        self.units = [self._full // blocks for blocks in occupancy]
        self._used = [0] * count
        # Multiprocessors by the units in use, as heaps; entries that are out of date are skipped when they come up.
        self._by_use: list[list[int]] = [[] for _ in range(self._full + 1)]
        self._by_use[0] = list(range(count))
        self._slots = [list(range(max(occupancy))) for _ in range(count)]

    def take(self, kernel: int) -> tuple[int, int] | None:
        """Take a slot for a block of `kernel` on the multiprocessor with the most room, the first of equals.

        Its number and the slot's; None: none has room.
        """
        units = self.units[kernel]
        for used in range(self._full - units + 1):
            heap = self._by_use[used]
            while heap:
                sm = heappop(heap)
                if self._used[sm] == used:
                    self._used[sm] = used + units
                    heappush(self._by_use[used + units], sm)
                    return sm, heappop(self._slots[sm])
        return None

    def give(self, kernel: int, sm: int, slot: int) -> None:
        """A block has left its slot."""
        self._used[sm] -= self.units[kernel]
        heappush(self._by_use[self._used[sm]], sm)
        heappush(self._slots[sm], slot)

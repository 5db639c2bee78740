"""The pool of KV blocks: free ones, those of requests, and those that keep prompts for requests to come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile


class BlockPool:
    """KV blocks by number, `num_blocks` of them (None: as many as are asked for).

    A block can be registered under the hash of the prompt up to its end. Registered blocks are shared: they count
    their users, and stay cached when the last one has left, until a block is wanted and none is free. Then the one
    that was left first is evicted, and of one request's the last of its prompt first.
    """

    def __init__(self, num_blocks: int | None) -> None:
        self.num_blocks = num_blocks
        self._free: list[int] = [] if num_blocks is None else list(range(num_blocks - 1, -1, -1))
        self._made = num_blocks or 0
        self._cached: dict[int, int] = {}  # block by hash
        self._hashes: dict[int, int] = {}  # hash by block
        self._users: dict[int, int] = {}  # users of each registered block
        self._unused: dict[int, None] = {}  # registered blocks without users, in the order in which they were left

    @property
    def used(self) -> int:
        """Blocks that a request holds."""
        return self._made - len(self._free) - len(self._unused)

    def can_take(self, count: int, keep: Iterable[int] = ()) -> bool:
        """Whether `count` blocks can be had without evicting any of `keep`."""
        if self.num_blocks is None:
            return True
        return count <= len(self._free) + len(self._unused) - sum(block in self._unused for block in keep)

    def take(self, count: int) -> list[int]:
        """`count` blocks for one request. There must be so many."""
        free = self._free
        if self.num_blocks is None and count > len(free):
            fresh = count - len(free)
            free[:0] = range(self._made + fresh - 1, self._made - 1, -1)
            self._made += fresh
        return [free.pop() if free else self._evict() for _ in range(count)]

    def give(self, blocks: Sequence[int]) -> None:
        """Take back what a request holds."""
        users = self._users
        for block in reversed(blocks):
            if block not in users:
                self._free.append(block)
                continue
            users[block] -= 1
            if not users[block]:
                self._unused[block] = None

    def cached(self, hashes: Iterable[int]) -> list[int]:
        """The blocks of the longest beginning of `hashes` that is cached."""
        return [self._cached[key] for key in takewhile(self._cached.__contains__, hashes)]

    def share(self, blocks: Iterable[int]) -> None:
        """One more request uses these registered blocks."""
        for block in blocks:
            self._users[block] += 1
            self._unused.pop(block, None)

    def register(self, key: int, block: int) -> bool:
        """Keep `block`, held by one request, under the hash `key`; not if that has a block already."""
        if key in self._cached:
            return False
        self._cached[key], self._hashes[block], self._users[block] = block, key, 1
        return True

    def _evict(self) -> int:
        block = next(iter(self._unused))
        del self._unused[block], self._users[block], self._cached[self._hashes.pop(block)]
        return block

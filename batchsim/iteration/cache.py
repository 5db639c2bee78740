"""Compiled: the prompts' blocks that are kept, as `batchsim.batching.blocks` keeps them.

A hash table with linear probing finds the entry of a block's hash; entries without users form a list, the one that
was left first at its head.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from batchsim.iteration.compiled import Bool, Int, njit

# A block's entry: four words of the flat array; an entry's number is where it is there.
KEY, USERS, BEFORE, AFTER = (np.int64(word) for word in range(4))


@njit
def _home(s: Any, key: Int) -> Int:
    x = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64(x >> np.uint64(20)) & s.slots_mask


@njit
def _place(s: Any, m: Any, key: Int) -> Int:
    """The slot that holds `key`, or the free one where it would go."""
    at = _home(s, key)
    while m[s.slots_at + at] >= 0 and m[m[s.slots_at + at] + KEY] != key:
        at = (at + 1) & s.slots_mask
    return at


@njit
def block_key(c: Any, m: Any, r: Any, block: Int) -> Int:
    """See `batchsim.batching.continuous.block_hashes`."""
    last = (block + 1) * c.block_size - 1
    return m[c.hash_ids_at + r.hash_start + last // c.hash_tokens] * c.hash_tokens + last % c.hash_tokens


@njit
def find(s: Any, m: Any, key: Int) -> Int:
    """The entry of `key`, or -1."""
    return m[s.slots_at + _place(s, m, key)]


@njit
def register(s: Any, m: Any, key: Int) -> Bool:
    """Keep a block that one request holds under `key`; not if that has one already."""
    at = s.slots_at + _place(s, m, key)
    if m[at] >= 0:
        return False
    entry = s.spare
    s.spare = m[entry + AFTER]
    m[entry + KEY], m[entry + USERS] = key, 1
    m[at] = entry
    return True


@njit
def share(s: Any, m: Any, entry: Int) -> None:
    """One more request uses the block."""
    m[entry + USERS] += 1
    if m[entry + USERS] == 1:
        _unlink(s, m, entry)
        s.used += 1


@njit
def leave(s: Any, m: Any, entry: Int) -> None:
    """One request fewer uses the block."""
    m[entry + USERS] -= 1
    if m[entry + USERS] == 0:
        m[entry + BEFORE], m[entry + AFTER] = s.newest, -1
        if s.newest >= 0:
            m[s.newest + AFTER] = entry
        else:
            s.oldest = entry
        s.newest = entry
        s.unused += 1
        s.used -= 1


@njit
def evict(s: Any, m: Any) -> None:
    """Forget the block that was left first."""
    entry = s.oldest
    _unlink(s, m, entry)
    hole = _place(s, m, m[entry + KEY])
    # Close the gap in the run of occupied slots, so that probing still finds all that come after it.
    at = hole
    while True:
        at = (at + 1) & s.slots_mask
        if m[s.slots_at + at] < 0:
            break
        home = _home(s, m[m[s.slots_at + at] + KEY])
        if (at - home) & s.slots_mask >= (at - hole) & s.slots_mask:
            m[s.slots_at + hole] = m[s.slots_at + at]
            hole = at
    m[s.slots_at + hole] = -1
    m[entry + AFTER] = s.spare
    s.spare = entry


@njit
def _unlink(s: Any, m: Any, entry: Int) -> None:
    before, after = m[entry + BEFORE], m[entry + AFTER]
    if before >= 0:
        m[before + AFTER] = after
    else:
        s.oldest = after
    if after >= 0:
        m[after + BEFORE] = before
    else:
        s.newest = before
    s.unused -= 1

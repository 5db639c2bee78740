"""Policies of synchronisation between the tiles of dependent kernels, and the compiler that derives and proves them.

After cuSync (Jangda et al., CGO 2024): each tile of a producer posts to one semaphore, each tile of a consumer waits
until the semaphores that its inputs count on are full. Which tiles share a semaphore is the policy.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from batchsim.tiles.graph import Chain, Dependence, Interval, Kernel, Region, TileId

Ints = npt.NDArray[np.int32]

STREAM_SYNC = "StreamSync"


class PolicyError(ValueError):
    """A policy that would read what is not written yet, or hang; the message says which tile, and why."""


@dataclass(frozen=True)
class Grouping:
    """Which tiles of one producer share a semaphore: `semaphore[row, col]`, numbered from 0 without gaps."""

    name: str
    semaphore: Ints

    @property
    def semaphores(self) -> int:
        return int(self.semaphore.max()) + 1


@dataclass(frozen=True)
class Policy:
    """A compiled policy of a chain, the same for the simulation and for the kernels on a device.

    Tiles are numbered through the chain, kernel by kernel, rows first, the slices of a tile together.

    order: tiles in the order in which they are handed to free slots.
    posts: for each tile the semaphore that it adds 1 to when its output is written, or -1.
    waits_from: tile t waits for entries `waits_from[t]` up to `waits_from[t + 1]` of the three arrays that follow,
        in the order of their steps.
    wait_step, wait_semaphore, wait_value: before iteration `wait_step` of its main loop, until the semaphore holds at
        least `wait_value`.
    barrier: kernels are launched one after the other on one stream, and no tile waits (StreamSync).
    """

    name: str
    chain: Chain
    order: Ints
    posts: Ints
    waits_from: Ints
    wait_step: Ints
    wait_semaphore: Ints
    wait_value: Ints
    semaphores: int
    barrier: bool = False

    @cached_property
    def kernel_of(self) -> Ints:
        """The kernel of each tile."""
        return np.repeat(np.arange(len(self.chain.kernels), dtype=np.int32), [k.tiles for k in self.chain.kernels])

    @cached_property
    def places(self) -> Ints:
        """(tiles, 4): kernel, row, column and slice of each tile."""
        parts = []
        for index, kernel in enumerate(self.chain.kernels):
            rows, cols, slices = kernel.grid
            grid = np.indices((rows, cols, slices), dtype=np.int32).reshape(3, -1)
            parts.append(np.column_stack([np.full(kernel.tiles, index, dtype=np.int32), *grid]))
        return np.concatenate(parts)


def groupings(chain: Chain, producer: int) -> list[Grouping]:
    """The groupings of a producer's tiles that its consumers' regions suggest, finest first, no two alike.

    TileSync (Conv2DTileSync where consumers read beyond their own rows): a semaphore for every tile. StridedSync: for
    the tiles of a row that some column of consumers reads together. RowSync: for a row of tiles. TileSync/n and
    RowSync/n: for n neighbouring tiles of a row, for n neighbouring rows.
    """
    kernel = chain.kernels[producer]
    rows, cols, _ = kernel.grid
    readers = [dependence for dependence in chain.dependences if dependence.producer == producer]
    halo = any(_halo(region, kernel, chain.kernels[d.consumer]) for d in readers for region in d.regions)
    row = np.arange(rows, dtype=np.int32)[:, None]
    col = np.arange(cols, dtype=np.int32)[None, :]

    def of(groups_of_col: Ints, rows_each: int = 1) -> Ints:
        count = int(groups_of_col.max()) + 1
        return np.ascontiguousarray((row // rows_each) * count + groups_of_col, dtype=np.int32)

    one = np.zeros_like(col)
    found = [Grouping("Conv2DTileSync" if halo else "TileSync", of(col))]
    found += [Grouping(f"TileSync/{n}", of(col // n)) for n in (2, 4, 8) if n < cols]
    strides = _strides(chain, readers, kernel)
    if 0 < strides.max() < cols - 1:
        found.append(Grouping("StridedSync", of(strides)))
    found.append(Grouping("RowSync", of(one)))
    found += [Grouping(f"RowSync/{n}", of(one, n)) for n in (2, 4) if n < rows]
    distinct: dict[bytes, Grouping] = {}
    for grouping in found:
        distinct.setdefault(grouping.semaphore.tobytes(), grouping)
    return list(distinct.values())


def compile_policy(chain: Chain, grouping: Sequence[Grouping | None] | None = None, name: str = "") -> Policy:
    """The policy of a grouping for each kernel, None for kernels that nothing depends on; proven by the caller.

    Without groupings StreamSync: kernel after kernel.
    """
    tiles = chain.tiles
    order = _order(chain, heavy_first=grouping is None)
    posts = np.full(tiles, -1, dtype=np.int32)
    if grouping is None:
        none = np.zeros(0, dtype=np.int32)
        return Policy(
            STREAM_SYNC, chain, order, posts, np.zeros(tiles + 1, dtype=np.int32), none, none, none, 0, barrier=True
        )
    base, totals = 0, []
    first_of: list[int] = []
    for index, (kernel, group) in enumerate(zip(chain.kernels, grouping, strict=True)):
        first_of.append(base)
        if group is None:
            continue
        if group.semaphore.shape != kernel.grid[:2]:
            raise PolicyError(f"{group.name}: semaphores for {group.semaphore.shape} tiles of a grid {kernel.grid[:2]}")
        posts[chain.bases[index] : chain.bases[index + 1]] = np.repeat(group.semaphore.ravel(), kernel.slices) + base
        totals.append(np.bincount(group.semaphore.ravel(), minlength=group.semaphores) * kernel.slices)
        base += group.semaphores
    total = np.concatenate(totals) if totals else np.zeros(0, dtype=np.int64)

    counts = np.zeros(tiles + 1, dtype=np.int32)
    entries: list[tuple[tuple[int, int], ...]] = []
    for consumer, kernel in enumerate(chain.kernels):
        readers = [dependence for dependence in chain.dependences if dependence.consumer == consumer]
        known: dict[object, tuple[tuple[int, int], ...]] = {}
        for tile in kernel:
            key = (*(chain.spans(dependence, tile) for dependence in readers), kernel.steps.at(tile))
            waits = known.get(key)
            if waits is None:
                waits = known[key] = _waits(chain, readers, grouping, first_of, tile)
            counts[chain.bases[consumer] + kernel.number(tile) + 1] = len(waits)
            entries.append(waits)
    flat = np.array([entry for waits in entries for entry in waits], dtype=np.int32).reshape(-1, 2)
    semaphore = np.ascontiguousarray(flat[:, 1])
    return Policy(
        name or "+".join(dict.fromkeys(group.name for group in grouping if group is not None)),
        chain,
        order,
        posts,
        np.cumsum(counts, dtype=np.int32),
        np.ascontiguousarray(flat[:, 0]),
        semaphore,
        total[semaphore].astype(np.int32),
        base,
    )


def policies(chain: Chain, only: Collection[str] | None = None) -> list[Policy]:
    """StreamSync, and every proven policy that gives all producers the same kind of grouping, or those `only`.

    Where a producer has no grouping of a kind (a grid of one column has no StridedSync), it takes the next coarser.
    """
    producers = sorted({dependence.producer for dependence in chain.dependences})
    offered = {producer: groupings(chain, producer) for producer in producers}
    kinds = sorted({group.name for groups in offered.values() for group in groups}, key=_coarseness)
    found, seen = [compile_policy(chain)], set()
    for kind in kinds:
        picked = {
            producer: next((g for g in groups if _coarseness(g.name) >= _coarseness(kind)), groups[-1])
            for producer, groups in offered.items()
        }
        if (only is not None and kind not in only) or not any(group.name == kind for group in picked.values()):
            continue
        key = tuple(group.semaphore.tobytes() for group in picked.values())
        if key in seen:
            continue
        seen.add(key)
        policy = compile_policy(chain, [picked.get(index) for index in range(len(chain.kernels))])
        prove(policy)
        found.append(policy)
    return found


def prove(policy: Policy, slots: int | None = None) -> None:
    """Check that the policy's numbers are in bounds, that it waits for all that is read, and that it cannot hang.

    A tile that waits holds its slot. With producers handed out before their consumers, as `compile_policy` orders
    them, any number of slots will do; other orders are checked for `slots` of them.

    Raises:
        PolicyError: with the first tile that breaks a rule.
    """
    chain = policy.chain
    if not np.array_equal(np.sort(policy.order), np.arange(chain.tiles)):
        raise PolicyError(f"{policy.name}: the order does not hand out every tile once")
    _prove_bounds(policy)
    if policy.barrier:
        if np.any(np.diff(policy.kernel_of[policy.order]) < 0):
            raise PolicyError(f"{policy.name}: kernels are not launched in their order")
        return
    _prove_coverage(policy)
    _prove_progress(policy, slots)


def _prove_bounds(policy: Policy) -> None:
    for values, low, high, what in (
        (policy.posts, -1, policy.semaphores, "posts to"),
        (policy.wait_semaphore, 0, policy.semaphores, "waits for"),
    ):
        if len(values) and not (low <= values.min() and values.max() < high):
            raise PolicyError(f"{policy.name}: a tile {what} a semaphore out of 0 to {policy.semaphores - 1}")
    posted = np.bincount(policy.posts[policy.posts >= 0], minlength=policy.semaphores)
    late = np.flatnonzero(policy.wait_value > posted[policy.wait_semaphore])
    if len(late):
        entry = int(late[0])
        semaphore = int(policy.wait_semaphore[entry])
        raise PolicyError(
            f"{policy.name}: a tile waits for {policy.wait_value[entry]} posts to semaphore {semaphore}, "
            f"which gets {posted[semaphore]}: it would wait for ever"
        )


def _prove_coverage(policy: Policy) -> None:
    """Every producer tile that is read is waited for, in time.

    A semaphore that several tiles post to tells only by its full count that one of them is done.
    """
    chain = policy.chain
    posted = np.bincount(policy.posts[policy.posts >= 0], minlength=policy.semaphores)
    for dependence in chain.dependences:
        producer, consumer = chain.kernels[dependence.producer], chain.kernels[dependence.consumer]
        base, cols = chain.bases[dependence.producer], producer.grid[1]
        proven: set[object] = set()
        for tile in consumer:
            number = chain.bases[dependence.consumer] + consumer.number(tile)
            waits = slice(policy.waits_from[number], policy.waits_from[number + 1])
            held = (
                policy.wait_step[waits].tobytes(),
                policy.wait_semaphore[waits].tobytes(),
                policy.wait_value[waits].tobytes(),
            )
            key = chain.spans(dependence, tile), consumer.steps.at(tile), held
            if key in proven:
                continue
            proven.add(key)
            full: dict[int, int] = {}  # semaphore: the first step before which its full count is waited for
            for entry in range(waits.start, waits.stop):
                semaphore = int(policy.wait_semaphore[entry])
                if policy.wait_value[entry] >= posted[semaphore]:
                    step = int(policy.wait_step[entry])
                    full[semaphore] = min(step, full.get(semaphore, step))
            for need in chain.needs(dependence, tile):
                first = base + (need.row * cols + need.col) * producer.slices
                for share in range(producer.slices):
                    waited = full.get(int(policy.posts[first + share]))
                    if waited is None or waited > need.step:
                        when = "never" if waited is None else f"only before step {waited}"
                        raise PolicyError(
                            f"{policy.name}: tile {tuple(tile)} of {consumer.name} reads tile "
                            f"({need.row}, {need.col}, {share}) of {producer.name} at step {need.step} "
                            f"and waits for it {when}"
                        )


def _prove_progress(policy: Policy, slots: int | None) -> None:
    position = np.empty(len(policy.order), dtype=np.int64)
    position[policy.order] = np.arange(len(policy.order))
    last_post = np.full(policy.semaphores, -1, dtype=np.int64)
    posting = np.flatnonzero(policy.posts >= 0)
    np.maximum.at(last_post, policy.posts[posting], position[posting])
    waiting = np.repeat(np.arange(len(policy.posts)), np.diff(policy.waits_from))
    if not len(waiting) or np.all(last_post[policy.wait_semaphore] < position[waiting]):
        return
    if slots is None:
        raise PolicyError(f"{policy.name}: consumers are handed out before their producers, for any number of slots")
    stuck = blocked_tile(policy, slots)
    if stuck is not None:
        _, row, col, _ = policy.places[stuck]
        kernel = policy.chain.kernels[policy.kernel_of[stuck]].name
        raise PolicyError(
            f"{policy.name}: all {slots} slots hold tiles that wait, ({row}, {col}) of {kernel} among them, "
            "for tiles that no slot is left for"
        )


def blocked_tile(policy: Policy, slots: int) -> int | None:
    """A tile that waits for ever on `slots` slots, or None.

    Durations do not matter: a tile that ends never takes anything from another, so all orders of ending reach the same.
    """
    counts = np.zeros(policy.semaphores, dtype=np.int64)
    running: list[int] = []
    upcoming = iter(policy.order.tolist())
    while True:
        while len(running) < slots and (tile := next(upcoming, None)) is not None:
            running.append(tile)
        if not running:
            return None
        for tile in running:
            waits = slice(policy.waits_from[tile], policy.waits_from[tile + 1])
            if np.all(counts[policy.wait_semaphore[waits]] >= policy.wait_value[waits]):
                running.remove(tile)
                if policy.posts[tile] >= 0:
                    counts[policy.posts[tile]] += 1
                break
        else:
            return running[0]


def _order(chain: Chain, *, heavy_first: bool) -> Ints:
    """Tiles by kernel, by group of rows, by column, by row: rows end early, and few weights are in use at a time.

    `heavy_first`: those with the longest main loops before the others, where no tile waits for its producer.
    """
    parts = []
    for base, kernel in zip(chain.bases, chain.kernels, strict=False):
        rows, cols, slices = kernel.grid
        row, col, share = np.indices((rows, cols, slices)).reshape(3, -1)
        group = max(min(kernel.group, rows // 2), 1)
        light = np.array([-kernel.steps.at(tile) for tile in kernel]) if heavy_first else np.zeros_like(row)
        parts.append(base + np.lexsort((share, row, col, row // group, light)))
    return np.concatenate(parts).astype(np.int32)


def _waits(
    chain: Chain, readers: Sequence[Dependence], grouping: Sequence[Grouping | None], first_of: Sequence[int],
    tile: TileId,
) -> tuple[tuple[int, int], ...]:  # fmt: skip
    """(step, semaphore) of what a consumer's tile waits for, each semaphore once, in the order of steps."""
    step_of: dict[int, int] = {}
    for dependence in readers:
        group = grouping[dependence.producer]
        if group is None:
            raise PolicyError(f"no grouping for {chain.kernels[dependence.producer].name}, which others depend on")
        for need in chain.needs(dependence, tile):
            semaphore = first_of[dependence.producer] + int(group.semaphore[need.row, need.col])
            step_of[semaphore] = min(need.step, step_of.get(semaphore, need.step))
    return tuple(sorted((step, semaphore) for semaphore, step in step_of.items()))


def _strides(chain: Chain, readers: Sequence[Dependence], kernel: Kernel) -> Ints:
    """A group for each column of a producer's grid: columns that one consumer tile reads together share one."""
    _, cols, _ = kernel.grid
    group = list(range(cols))

    def find(col: int) -> int:
        while group[col] != col:
            col = group[col]
        return col

    for dependence in readers:
        consumer = chain.kernels[dependence.consumer]
        _, consumer_cols, slices = consumer.grid
        for col in range(consumer_cols):
            for share in range(slices):
                read = sorted({need.col for need in chain.needs(dependence, TileId(0, col, share))})
                for other in read[1:]:
                    group[find(other)] = find(read[0])
    roots = [find(col) for col in range(cols)]
    number = {root: index for index, root in enumerate(dict.fromkeys(roots))}
    return np.array([[number[root] for root in roots]], dtype=np.int32)


def _halo(region: Region, producer: Kernel, consumer: Kernel) -> bool:
    """Whether tiles of a row read rows of the producer that tiles of the row above read as well."""

    def spans(interval: Interval, row: int) -> tuple[int, int]:
        return interval.at(TileId(row, 0), producer.rows)

    if consumer.grid[0] < 2 or region.walk == "rows":
        return False
    (_, bottom), (top, _) = spans(region.rows, 0), spans(region.rows, 1)
    return top < bottom and spans(region.rows, 0) != spans(region.rows, 1)


def _coarseness(name: str) -> tuple[int, int]:
    kind, _, count = name.partition("/")
    rank = {"TileSync": 0, "Conv2DTileSync": 0, "StridedSync": 1, "RowSync": 2}[kind]
    return rank, int(count or 1)

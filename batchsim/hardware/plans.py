"""How a library tiles a matrix product on a device: as it was recorded, or as a library would choose."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any, TypeAlias

from batchsim.hardware.catalogue import Device
from batchsim.hardware.kernels import Kernel

# Tiles that libraries have: columns (of the weights) and rows (tokens), and into how many shares a depth is split.
COLUMNS = (64, 128, 256)
ROWS = (8, 16, 32, 64, 128, 256)
SHARES = (1, 2, 4)
LARGEST = 256 * 128
CLUSTER = 2  # blocks that start together


@dataclass(frozen=True, slots=True)
class Plan:
    """Tiles of `columns` x `rows`, the depth in `shares`: so many `tiles`, by so many `blocks` in clusters.

    `tile_ns`: what a tile takes that has the memory to itself; `whole_ns`: the product on the whole device; 0: not
    measured.
    """

    columns: int
    rows: int
    shares: int
    tiles: int
    blocks: int
    cluster: int = CLUSTER
    tile_ns: float = 0.0
    whole_ns: float = 0.0


# By family and multiprocessors of the device, by columns and depth of the product, by rows.
Plans: TypeAlias = Mapping[tuple[str, int], Mapping[tuple[int, int], Sequence[tuple[int, Plan]]]]


def plan_of(kernel: Kernel, device: Device, plans: Plans, cost: Callable[[Kernel, Plan], float]) -> Plan:
    """The tiles of a product on a device, or on the whole of which it is a part.

    Of a product that was not recorded, those for which `cost` is the least.
    """
    entries = plans.get((device.family, device.planned), {}).get((kernel.columns, kernel.depth))
    if entries is not None:
        at = bisect_left(entries, (kernel.rows,))
        if at < len(entries):
            rows, known = entries[at]
            return known if rows == kernel.rows else _at(known, kernel, device)
    return min(_choices(kernel, device.planned), key=lambda plan: cost(kernel, plan))


def _at(known: Plan, kernel: Kernel, device: Device) -> Plan:
    """The plan of a product of more rows, for fewer."""
    return _plan(kernel, known.columns, known.rows, known.shares, device.planned, known.cluster, known.tile_ns)


@cache
def _choices(kernel: Kernel, sms: int) -> tuple[Plan, ...]:
    found, whole = [], max(sms // CLUSTER * CLUSTER, 1)
    for columns in COLUMNS:
        for rows in ROWS:
            if columns * rows > LARGEST or rows >= 2 * max(kernel.rows, ROWS[0]):
                continue
            found += [_plan(kernel, columns, rows, shares, whole) for shares in SHARES]
    return tuple(found)


def _plan(
    kernel: Kernel, columns: int, rows: int, shares: int, sms: int, cluster: int = CLUSTER, tile_ns: float = 0.0
) -> Plan:
    tiles = ceil(kernel.columns / columns) * ceil(kernel.rows / rows) * shares
    return Plan(columns, rows, shares, tiles, min(tiles, sms), cluster, tile_ns)


def read_plans(text: str) -> Plans:
    """Recorded plans from JSON text."""
    content: dict[str, Any] = json.loads(text)
    found: dict[tuple[int, int], list[tuple[int, Plan]]] = {}
    for columns, depth, rows, *plan in content["products"]:
        found.setdefault((columns, depth), []).append((rows, Plan(*plan)))
    for entries in found.values():
        entries.sort(key=lambda entry: entry[0])
    return {(content["family"], content["sms"]): found}

"""Matrix products on parts of a device: what a tile takes that has the memory to itself, recorded or by its size.

Libraries' kernels tell their tiles by their names; how many blocks they launch was recorded with them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import exp, log

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, minimize_scalar

from batchsim.hardware import CATALOGUE
from batchsim.hardware.kernels import product
from batchsim.hardware.law import Law, Rules, View
from batchsim.hardware.plans import Plan

DEVICE = CATALOGUE["h200"]
WHOLE = DEVICE.sms
# cuBLAS's kernels for Hopper (CUDA 13) tell their tile, columns first, and their clusters.
NAME = re.compile(r"nvjet_sm90_tst_(\d+)x(\d+)_64x\d+_(\d)x(\d)_")
# From so many rows on a product alone, measured in a short burst, keeps a higher clock than a forward does.
BURST_ROWS = 256
ROUGH = 0.03  # relative errors beyond which a point counts less than in proportion

Product = tuple[int, int, int]  # columns, depth and rows
Timed = dict[Product, list[tuple[int, float]]]  # (multiprocessors, us), in graphs
Floats = NDArray[np.float64]


def plan_by_name(columns: int, rows: int, name: str, grid: Sequence[int]) -> Plan:
    """The tiles of a kernel of that name; without times."""
    found = NAME.match(name)
    assert found is not None
    wide, high, *cluster = map(int, found.groups())
    tiles, blocks, size = -(-columns // wide) * -(-rows // high), int(np.prod(grid)), cluster[0] * cluster[1]
    shares = max(1, blocks // tiles) if "splitK" in name else 1
    # Grids are rounded up to whole clusters of a row or column; blocks without a tile do nothing.
    return Plan(wide, high, shares, tiles * shares, min(blocks, -(-tiles * shares // size) * size), size)


def timed_plans(plans: Mapping[Product, Plan], timed: Timed, law: Law, without: int = 0) -> dict[Product, Plan]:
    """The plans with what a tile takes, from parts of the device (but those of `without` multiprocessors)."""
    found = {}
    for key, plan in plans.items():
        times = [(sms, us) for sms, us in timed[key] if sms not in (WHOLE, without)]
        whole = [us for sms, us in timed[key] if sms == WHOLE and key[2] <= BURST_ROWS]
        known = replace(plan, whole_ns=round(whole[0] * 1e3) if whole else 0)
        found[key] = replace(known, tile_ns=round(_tile_ns(key, known, times, law)))
    return found


def _tile_ns(key: Product, plan: Plan, times: Sequence[tuple[int, float]], law: Law) -> float:
    kernel = product("product", 1, key[2], key[0], key[1], 2)
    view = {sms: View(Rules(law, {}), DEVICE.cut(sms), "bf16", 1, False) for sms, _ in times}

    def cost(logarithm: float) -> float:
        tried = replace(plan, tile_ns=exp(logarithm))
        errors = [log(view[sms].planned_ns(kernel, tried) / us / 1e3) for sms, us in times]
        return float(sum((1 + (error / ROUGH) ** 2) ** 0.5 for error in errors))

    grid = np.linspace(log(300), log(2e6), 50)
    at = int(np.argmin([cost(point) for point in grid]))
    bounds = grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)]
    return exp(float(minimize_scalar(cost, bounds=bounds, method="bounded").x))


def products_text(plans: Mapping[Product, Plan]) -> str:
    """The recorded products, as batchsim reads them."""
    rows = [
        [*key, p.columns, p.rows, p.shares, p.tiles, p.blocks, p.cluster, p.tile_ns, p.whole_ns]
        for key, p in sorted(plans.items())
    ]
    told = ",\n  ".join(map(json.dumps, rows))
    return f'{{\n "family": "{DEVICE.family}",\n "sms": {WHOLE},\n "products": [\n  {told}\n ]\n}}\n'


def tile_law(plans: Mapping[Product, Plan], law: Law) -> Law:
    """The law with the constants by which tiles that were not recorded take as long as those that were."""
    sizes = np.array([(p.columns, max(p.rows, 16), key[1] / p.shares) for key, p in plans.items()])
    times = np.array([p.tile_ns for p in plans.values()])
    rate = DEVICE.matrix_rate("bf16") * 1e3 / WHOLE

    def errors(point: Floats) -> Floats:
        found: Floats = np.log((point[1] + 2 * sizes.prod(axis=1) / (rate * point[0])) / times)
        return found

    start = np.array([1.0, 2000.0])
    efficiency, own = least_squares(errors, start, x_scale=start, bounds=(0.01, np.inf), loss="soft_l1", f_scale=0.1).x
    return law.model_copy(update={"matrix_efficiency": float(efficiency), "tile_ns": float(own)})

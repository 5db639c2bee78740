"""A run on a device, from the times that its tiles left behind."""

from __future__ import annotations

from dataclasses import replace
from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

from batchsim.tiles.policy import Policy
from batchsim.tiles.sm import TileRun, TileSpan

Times = npt.NDArray[np.int64]


def run_of(
    policy: Policy, simulated: TileRun, sms: int, start_ns: Times, end_ns: Times, waited_ns: Times, sm: Times
) -> TileRun:
    """The run whose tiles, by their numbers, began, ended, waited and were placed so on a device of `sms`.

    Waves are as simulated. A device tells how long a tile waited, not when: the wait is put at the tile's beginning.
    It does not tell the slot either: tiles take the first that is free on their multiprocessor.
    """
    origin = int(start_ns.min())
    busy: dict[int, list[tuple[int, int]]] = {}
    free: dict[int, list[int]] = {}
    spans = []
    for tile in np.lexsort((end_ns, start_ns)).tolist():
        kernel, row, col, share = policy.places[tile].tolist()
        place, start, end = int(sm[tile]), int(start_ns[tile]) - origin, int(end_ns[tile]) - origin
        running, slots = busy.setdefault(place, []), free.setdefault(place, [])
        while running and running[0][0] <= start:
            heappush(slots, heappop(running)[1])
        slot = heappop(slots) if slots else len(running)
        heappush(running, (end, slot))
        waited = int(waited_ns[tile])
        waits = ((start, start + waited),) if waited else ()
        spans.append(TileSpan(kernel, row, col, share, place, slot, start, end, waits))
    total_ns = int(end_ns.max()) - origin
    kernels = policy.chain.kernels
    weights = np.array([1 / kernels[index].occupancy for index in policy.kernel_of])
    utilisation = float(((end_ns - start_ns - waited_ns) * weights).sum() / (sms * total_ns))
    return replace(simulated, total_ns=total_ns, utilisation=utilisation, spans=tuple(spans))

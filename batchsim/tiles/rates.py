"""How fast tiles run that share multiprocessors and memory: a fluid whose rates change with the mix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import ceil

import simpy
from simpy.events import EventPriority

from batchsim.streams import Environment
from batchsim.tiles.costs import TileCost, TileDevice

AFTER_ALL = EventPriority(2)  # of what runs when an instant's other events have
TOLERANCE_NS = 1e-6

Mix = tuple[int, ...]  # how many tiles of each kernel compute on a multiprocessor


@dataclass(slots=True, eq=False)
class Work:
    """A stretch of a tile's main loop, from iteration `step`; `done` is called at its end.

    `poll_ns`: what polls add to an iteration, on average; loads go on meanwhile. `row` and `col` tell tiles of a kernel
    apart that load different slices of the operands. `target`: where the group's clock stands at the end.
    """

    kernel: int
    sm: int
    row: int
    col: int
    step: int
    poll_ns: float
    done: Callable[[], object]
    cohort: int = 0
    target: float = 0.0
    group: Group | None = None


@dataclass(slots=True)
class Group:
    """Tiles of a kernel that poll alike, on multiprocessors with the same mix: all at the same rate, iterations / ns.

    `alone_ns`: an iteration if memory took no time. `clock`: iterations that a tile would have done that had always
    been here.
    """

    kernel: int
    mix: Mix
    alone_ns: float
    count: int = 0
    clock: float = 0.0
    rate: float = 0.0
    heap: list[tuple[float, int, Work]] = field(default_factory=list)


@dataclass(slots=True)
class Demand:
    """What the computing tiles of one kernel ask of the memory: tiles by row and by column, and how many.

    Only tiles at the same place of their main loop load the same: rows and columns are told apart by cohort.
    `cohorts`: the latest one that began at each iteration, and when it last grew.
    """

    tiles: int = 0
    rows: dict[tuple[int, int], int] = field(default_factory=dict)
    cols: dict[tuple[int, int], int] = field(default_factory=dict)
    cohorts: dict[int, tuple[int, int]] = field(default_factory=dict)


class Rates:
    """The tiles that compute at this moment."""

    def __init__(self, env: Environment, costs: Sequence[TileCost], occupancy: Sequence[int], device: TileDevice):
        self.env = env
        self.costs = costs
        self.device = device
        self._demands = [Demand() for _ in costs]
        self._shared = max(occupancy) > 1
        self._alone = [tuple(int(k == kernel) for k in range(len(costs))) for kernel in range(len(costs))]
        self._traffic = 0.0  # bytes per nanosecond that device memory delivers
        self._groups: dict[tuple[int, Mix, float], Group] = {}
        self._on: list[list[Work]] = [[] for _ in range(device.sms)]
        self._mixes: dict[Mix, int] = {}
        self._advanced_ns = 0
        self._sequence = 0
        self._wake: simpy.Event | None = None
        self._settling = False

    def run(self, work: Work, iterations: float) -> None:
        """Begin a stretch of `iterations`."""
        self._advance()
        demand = self._demands[work.kernel]
        demand.tiles += 1
        work.cohort = self._cohort(work)
        for counts, key in ((demand.rows, (work.row, work.cohort)), (demand.cols, (work.col, work.cohort))):
            counts[key] = counts.get(key, 0) + 1
        mix = self._alone[work.kernel]
        if self._shared:
            on = self._on[work.sm]
            self._count(on, -1)
            on.append(work)
            mix = self._count(on, 1)
            self._regroup(on, mix, work)
        else:
            self._mixes[mix] = self._mixes.get(mix, 0) + 1
        self._join(work, mix, iterations)
        self._settle_later()

    def _cohort(self, work: Work) -> int:
        """Tiles that begin at the same iteration, before L2 had to make room for as much as it holds, load once."""
        if not self.device.l2_bytes:
            return 0
        cohorts, now = self._demands[work.kernel].cohorts, self.env.now
        number, joined_ns = cohorts.get(work.step, (0, -1))
        if joined_ns < 0 or (now - joined_ns) * self._traffic > self.device.l2_bytes:
            self._sequence += 1
            number = self._sequence
        cohorts[work.step] = number, now
        return number

    def _count(self, on: list[Work], change: int) -> Mix:
        """Count a multiprocessor in, or out, by its mix."""
        counts = [0] * len(self.costs)
        for work in on:
            counts[work.kernel] += 1
        mix = tuple(counts)
        if on:
            self._mixes[mix] = self._mixes.get(mix, 0) + change
        return mix

    def _regroup(self, on: list[Work], mix: Mix, new: Work | None) -> None:
        """The tiles of a multiprocessor go to the groups of its new mix."""
        for work in on:
            group = work.group
            if work is not new and group is not None and group.mix != mix:
                group.count -= 1
                self._join(work, mix, work.target - group.clock)

    def _end(self, work: Work) -> None:
        demand = self._demands[work.kernel]
        demand.tiles -= 1
        for counts, key in ((demand.rows, (work.row, work.cohort)), (demand.cols, (work.col, work.cohort))):
            if counts[key] == 1:
                del counts[key]
            else:
                counts[key] -= 1
        if self._shared:
            on = self._on[work.sm]
            self._count(on, -1)
            on.remove(work)
            self._regroup(on, self._count(on, 1), None)
        else:
            self._mixes[self._alone[work.kernel]] -= 1

    def _join(self, work: Work, mix: Mix, iterations: float) -> None:
        key = work.kernel, mix, work.poll_ns
        group = self._groups.get(key)
        if group is None:
            load = max(1.0, sum(count * cost.share for count, cost in zip(mix, self.costs, strict=True)))
            cost = self.costs[work.kernel]
            alone_ns = cost.step_ns * load
            alone_ns = max(alone_ns, alone_ns * min(cost.share, 1.0) + work.poll_ns)
            group = self._groups[key] = Group(work.kernel, mix, alone_ns)
        group.count += 1
        work.group = group
        work.target = group.clock + iterations
        self._sequence += 1
        heappush(group.heap, (work.target, self._sequence, work))

    def _advance(self) -> None:
        passed = self.env.now - self._advanced_ns
        if passed:
            self._advanced_ns += passed
            for group in self._groups.values():
                group.clock += passed * group.rate

    def _settle_later(self) -> None:
        if not self._settling:
            self._settling = True
            event = simpy.Event(self.env)
            event._ok, event._value = True, None
            event.callbacks.append(self._settle)
            self.env.schedule(event, AFTER_ALL)

    def _settle(self, _event: simpy.Event) -> None:
        """Set the rates of the mix, and wake up when the first stretch ends at them."""
        self._settling = False
        self._set_rates()
        soonest = None
        for group in self._groups.values():
            heap = group.heap
            while heap and (heap[0][2].group is not group or heap[0][2].target != heap[0][0]):
                heappop(heap)  # moved to another group
            if heap:
                left = (heap[0][0] - group.clock) / group.rate
                if soonest is None or left < soonest:
                    soonest = left
        self._wake = None
        if soonest is not None:
            self._wake = simpy.Timeout(self.env, max(ceil(soonest - TOLERANCE_NS), 0))
            self._wake.callbacks.append(self._ends)

    def _ends(self, event: simpy.Event) -> None:
        if event is not self._wake:
            return
        self._wake = None
        self._advance()
        ended = []
        for group in self._groups.values():
            heap, reach = group.heap, group.clock + TOLERANCE_NS * group.rate
            while heap and heap[0][0] <= reach:
                target, _, work = heappop(heap)
                if work.group is group and work.target == target:
                    group.count -= 1
                    work.group = None
                    ended.append(work)
        for work in ended:
            self._end(work)
        for work in ended:
            work.done()
        self._settle_later()

    def _set_rates(self) -> None:
        device, costs, demands = self.device, self.costs, self._demands
        groups = [group for group in self._groups.values() if group.count]
        for group in groups:
            group.rate = 1.0 / group.alone_ns
        if device.l2_bytes_per_ns:
            self._limit(groups, [c.row_bytes + c.col_bytes for c in costs], device.l2_bytes_per_ns)
        if device.dram_bytes_per_ns:
            loads = [
                (len(d.rows) * c.row_bytes + len(d.cols) * c.col_bytes) / d.tiles if d.tiles else 0.0
                for d, c in zip(demands, costs, strict=True)
            ]
            self._limit(groups, loads, device.dram_bytes_per_ns)
            self._traffic = sum(group.count * group.rate * loads[group.kernel] for group in groups)

    def _limit(self, groups: Sequence[Group], loads: Sequence[float], offered: float) -> None:
        """Lower the rates by what is wanted of a bandwidth, if an iteration of a kernel's tile `loads` so many bytes.

        Every multiprocessor may have the same share of it; what others leave of theirs counts in. Time for arithmetic
        and time for loads at that share make an iteration's time as the `overlap`-norm of the two.
        """
        wants: dict[Mix, float] = {}  # of all multiprocessors of a mix together
        for group in groups:
            wants[group.mix] = wants.get(group.mix, 0.0) + group.count * group.rate * loads[group.kernel]
        mixes = sorted((want / self._mixes[mix], self._mixes[mix], mix) for mix, want in wants.items())
        everyone = left = sum(count for _, count, _ in mixes)
        slack, share = offered, 0.0
        for want, count, _ in mixes:
            share = slack / left
            if want > share:
                break
            slack -= want * count
            left -= count
        else:
            share = mixes[-1][0] + slack / everyone if mixes else 0.0
        overlap = self.device.overlap
        scales = {}
        for want, _, mix in mixes:
            if overlap:
                scales[mix] = (1.0 + (want / share) ** overlap) ** (-1.0 / overlap)
            else:
                scales[mix] = min(1.0, share / want) if want else 1.0
        for group in groups:
            group.rate *= scales[group.mix]

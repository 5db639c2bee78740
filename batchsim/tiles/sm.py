"""The model of a device's multiprocessors: a compiled policy in, the time and the place of every tile out.

Tiles are handed out in the policy's order, each to the multiprocessor with the most room, as the hardware's block
scheduler does and persistent blocks that draw tickets. A tile that waits keeps its slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from heapq import heappop, heappush
from math import ceil, lcm

import numpy as np
import simpy

from batchsim.streams import Environment, Waiting
from batchsim.tiles.costs import TileCost, TileDevice
from batchsim.tiles.graph import TileId
from batchsim.tiles.policy import Policy, PolicyError
from batchsim.tiles.rates import Rates, Work

__all__ = ["TileCost", "TileDevice", "TileRun", "TileSpan", "simulate"]

REMEMBERED = 16384
_remembered: dict[object, TileRun] = {}


@dataclass(frozen=True, slots=True)
class TileSpan:
    """One tile from taking its slot to leaving it; `waits` are the stretches in which it did nothing but wait."""

    kernel: int
    row: int
    col: int
    slice: int
    sm: int
    slot: int
    start_ns: int
    end_ns: int
    waits: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class TileRun:
    """A policy, by name, as simulated.

    kernel_waves: tiles of each kernel / blocks of it that the device holds. waves: their sum; launched one after the
        other, kernels round theirs up.
    utilisation: share of the slots' time in which a tile is in them and does not wait.
    """

    policy: str
    total_ns: int
    waves: float
    kernel_waves: tuple[float, ...]
    utilisation: float
    spans: tuple[TileSpan, ...] = field(default=(), repr=False)


def simulate(policy: Policy, costs: Mapping[str, TileCost], device: TileDevice, *, record: bool = False) -> TileRun:
    """Run a policy's tiles on a device; `costs` by the names that the chain's kernels give theirs.

    Raises:
        PolicyError: the tiles that hold all slots wait for others that get none.
    """
    kernels = policy.chain.kernels
    given = tuple(costs[kernel.cost] for kernel in kernels)
    key = policy.name, kernels, _digest(policy), given, device
    if not record and key in _remembered:
        return _remembered[key]
    run = _run(policy, given, device, record)
    if not record:
        if len(_remembered) >= REMEMBERED:
            _remembered.clear()
        _remembered[key] = run
    return run


def _digest(policy: Policy) -> bytes:
    digest = blake2b(bytes([policy.barrier]))
    arrays = policy.order, policy.posts, policy.waits_from, policy.wait_step, policy.wait_semaphore, policy.wait_value
    for array in arrays:
        digest.update(array.tobytes())
    return digest.digest()


def _run(policy: Policy, costs: Sequence[TileCost], device: TileDevice, record: bool) -> TileRun:
    kernels = policy.chain.kernels
    simulation = _Simulation(policy, costs, device, record)
    total_ns = simulation.run()
    waves = tuple(kernel.tiles / (device.sms * kernel.occupancy) for kernel in kernels)
    return TileRun(
        policy.name,
        total_ns,
        float(sum(ceil(w) for w in waves) if policy.barrier else sum(waves)),
        waves,
        simulation.busy_ns / (device.sms * total_ns) if total_ns else 0.0,
        tuple(simulation.spans),
    )


class Multiprocessors:
    """Room for blocks: a block takes `1 / occupancy` of a multiprocessor. Units make that an integer."""

    def __init__(self, count: int, occupancy: list[int]) -> None:
        self.full = lcm(*occupancy)
        self._used = [0] * count
        self._by_use: list[list[int]] = [[] for _ in range(self.full + 1)]  # heaps; entries that moved on are skipped
        self._by_use[0] = list(range(count))
        self._slots: list[list[int]] = [list(range(max(occupancy))) for _ in range(count)]

    def take(self, units: int) -> int | None:
        """The multiprocessor with the most room, first of equals, now with `units` less of it; None: it has too little."""
        for used in range(self.full - units + 1):
            heap = self._by_use[used]
            while heap:
                sm = heappop(heap)
                if self._used[sm] == used:
                    self._used[sm] = used + units
                    heappush(self._by_use[used + units], sm)
                    return sm
        return None

    def give(self, sm: int, units: int) -> None:
        self._used[sm] -= units
        heappush(self._by_use[self._used[sm]], sm)

    def take_slot(self, sm: int) -> int:
        return heappop(self._slots[sm])

    def give_slot(self, sm: int, slot: int) -> None:
        heappush(self._slots[sm], slot)


class _Simulation:
    def __init__(self, policy: Policy, costs: Sequence[TileCost], device: TileDevice, record: bool) -> None:
        kernels = policy.chain.kernels
        occupancy = [kernel.occupancy for kernel in kernels]
        self.env = Environment()
        self.policy, self.kernels, self.device, self.record = policy, kernels, device, record
        self.sms = Multiprocessors(device.sms, occupancy)
        self.units = [self.sms.full // count for count in occupancy]
        self.rates = Rates(self.env, costs, occupancy, device)
        self.start_ns = [round(cost.start_ns) for cost in costs]
        self.end_ns = [round(cost.end_ns) for cost in costs]
        self.post_ns, self.wait_ns = round(device.post_ns), round(device.wait_ns)
        self.refill_ns, self.reduce_ns = round(device.refill_ns), round(device.reduce_ns)
        self.spans: list[TileSpan] = []
        self.busy_ns = 0.0  # of whole multiprocessors
        # Plain lists: reading one number of an array takes longer than a tile's whole event.
        self.order, self.places, self.posts = policy.order.tolist(), policy.places.tolist(), policy.posts.tolist()
        self.waits_from = policy.waits_from.tolist()
        self.wait_step, self.wait_semaphore = policy.wait_step.tolist(), policy.wait_semaphore.tolist()
        self.wait_value = policy.wait_value.tolist()
        self.factor = _factors(len(self.order), device.spread)
        self.counts = [0] * policy.semaphores
        self.waiting: dict[int, list[tuple[int, simpy.Event]]] = {}
        self.reduced_ns: dict[tuple[int, int, int], int] = {}
        self.next = 0  # place in the order of the tile to be handed out
        self.running = 0
        self.open = 0 if policy.barrier or device.wait_kernel_ns else len(kernels)  # the last kernel that may start
        self.begun = -1  # the last kernel that did

    def run(self) -> int:
        self._hand_out()
        self.env.run()
        if self.running or self.next < len(self.order):
            raise PolicyError(
                f"{self.policy.name}: {self.running} tiles hold every slot of {self.device.name} and wait for tiles "
                "that no slot is left for"
            )
        return self.env.now

    def _hand_out(self) -> None:
        order, places, units, sms = self.order, self.places, self.units, self.sms
        while self.next < len(order):
            tile = order[self.next]
            kernel = places[tile][0]
            if kernel > self.open:
                if self.policy.barrier and not self.running:
                    self.running = -1  # nothing else comes here until the gap has passed
                    self._later(round(self.device.launch_gap_ns), self._open_next)
                return
            sm = sms.take(units[kernel])
            if sm is None:
                return
            self.next += 1
            self.running += 1
            simpy.Process(self.env, self._tile(tile, sm))
            if kernel > self.begun:
                self.begun = kernel
                if self.device.wait_kernel_ns and not self.policy.barrier:
                    self._later(round(self.device.wait_kernel_ns), self._open_next)

    def _open_next(self) -> None:
        self.open += 1
        self.running = max(self.running, 0)
        self._hand_out()

    def _later(self, delay_ns: int, call: object) -> None:
        simpy.Timeout(self.env, delay_ns).callbacks.append(lambda _: call())  # type: ignore[operator]

    def _tile(self, tile: int, sm: int) -> Waiting:
        """One block: waits are passed in the order of their steps; the main loop runs up to the first that holds it."""
        env, counts, semaphores, values = self.env, self.counts, self.wait_semaphore, self.wait_value
        kernel, row, col, share = self.places[tile]
        slices = self.kernels[kernel].slices
        entry, last = self.waits_from[tile], self.waits_from[tile + 1]
        steps = self.kernels[kernel].steps.at(TileId(row, col, share))
        factor = self.factor[tile] if self.factor else 1.0
        started, waited, waits = env.now, 0, []
        poll_ns = self.wait_ns * (last - entry) / steps if steps else 0.0
        slot = self.sms.take_slot(sm)
        work: Work | None = None
        done, delay_ns = 0, self.start_ns[kernel]
        while True:
            while entry < last and counts[semaphores[entry]] >= values[entry]:
                entry += 1
            if delay_ns:
                yield simpy.Timeout(env, delay_ns)
                delay_ns = 0
            step = steps if entry == last else self.wait_step[entry]
            if step > done:
                event = simpy.Event(env)
                work = Work(kernel, sm, row * slices + share, col * slices + share, done, poll_ns, event.succeed)
                self.rates.run(work, (step - done) * factor)
                yield event
                done = step
            if entry == last:
                break
            if counts[semaphores[entry]] < values[entry]:
                began, event = env.now, simpy.Event(env)
                self.waiting.setdefault(semaphores[entry], []).append((values[entry], event))
                yield event
                waited += env.now - began
                waits.append((began, env.now))
                delay_ns = self.refill_ns
                entry += 1
        end_ns = self.end_ns[kernel]
        if slices > 1:  # one share after the other, in the order in which they get here
            key = kernel, row, col
            free = max(env.now, self.reduced_ns.get(key, 0)) + self.reduce_ns
            self.reduced_ns[key] = free
            end_ns += free - env.now
        semaphore = self.posts[tile]
        if semaphore >= 0:
            end_ns += self.post_ns
        if end_ns:
            yield simpy.Timeout(env, end_ns)
        if semaphore >= 0:
            self._post(semaphore)
        self._leave(tile, sm, slot, started, waited, waits)

    def _post(self, semaphore: int) -> None:
        self.counts[semaphore] += 1
        waiting = self.waiting.get(semaphore)
        if waiting:
            for value, event in waiting:
                if value <= self.counts[semaphore]:
                    event.succeed()
            self.waiting[semaphore] = [entry for entry in waiting if entry[0] > self.counts[semaphore]]

    def _leave(self, tile: int, sm: int, slot: int, started: int, waited: int, waits: list[tuple[int, int]]) -> None:
        kernel, row, col, share = self.places[tile]
        now = self.env.now
        self.busy_ns += (now - started - waited) / self.kernels[kernel].occupancy
        if self.record:
            self.spans.append(TileSpan(kernel, row, col, share, sm, slot, started, now, tuple(waits)))
        self.sms.give(sm, self.units[kernel])
        self.sms.give_slot(sm, slot)
        self.running -= 1
        self._hand_out()


def _factors(tiles: int, spread: float) -> list[float]:
    """How much longer or shorter than the mean each tile takes: normal, cut at three deviations, always the same."""
    if not spread:
        return []
    draws = np.random.default_rng(np.random.SeedSequence(0)).standard_normal(tiles)
    return list((1.0 + spread * np.clip(draws, -3, 3)).tolist())

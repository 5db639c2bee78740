"""The model of a device's multiprocessors: a compiled policy in, the time and the place of every tile out.

Tiles are handed out in the policy's order, each to the multiprocessor with the most room, as the hardware's block
scheduler does and persistent blocks that draw tickets. A tile that waits keeps its slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from math import ceil
from zlib import crc32

import numpy as np
import simpy

from batchsim.streams import Environment, Waiting
from batchsim.tiles.costs import TileCost, TileDevice
from batchsim.tiles.graph import TileId
from batchsim.tiles.policy import Policy, PolicyError
from batchsim.tiles.rates import Rates, Work
from batchsim.tiles.slots import Multiprocessors

__all__ = ["TileCost", "TileDevice", "TileRun", "TileSpan", "simulate"]

# Runs by all that they depend on, without the arrays of their policies, which would fill the memory.
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


class _Simulation:
    """One run. Tiles are SimPy processes; what they compute meanwhile is a fluid, `Rates`."""

    def __init__(self, policy: Policy, costs: Sequence[TileCost], device: TileDevice, record: bool) -> None:
        kernels = policy.chain.kernels
        occupancy = [kernel.occupancy for kernel in kernels]
        self.env = Environment()
        self.policy, self.kernels, self.device, self.record = policy, kernels, device, record
        self.sms = Multiprocessors(device.sms, occupancy)
        self.rates = Rates(self.env, costs, occupancy, device)
        self.start_ns = [round(cost.start_ns) for cost in costs]
        self.end_ns = [round(cost.end_ns) for cost in costs]
        self.reduce_ns = [round(cost.reduce_ns) for cost in costs]
        self.spans: list[TileSpan] = []
        self.busy_ns = 0.0  # of whole multiprocessors
        # Plain lists: reading one number of an array takes longer than a tile's whole event.
        self.order, self.places, self.posts = policy.order.tolist(), policy.places.tolist(), policy.posts.tolist()
        self.waits_from = policy.waits_from.tolist()
        self.wait_step, self.wait_semaphore = policy.wait_step.tolist(), policy.wait_semaphore.tolist()
        self.wait_value = policy.wait_value.tolist()
        self.factors = _factors(len(self.order), device)
        self.counts = [0] * policy.semaphores
        self.waiting: dict[int, list[tuple[int, simpy.Event]]] = {}
        self.reduced_ns: dict[tuple[int, int, int], int] = {}
        self.next = 0  # place in the order of the tile to be handed out
        self.running = 0
        self.open = 0 if policy.barrier or device.wait_kernel_ns else len(kernels)  # the last kernel that may start
        self.opening = False
        self.begun = -1  # the last kernel that did

    def run(self) -> int:
        self._hand_out()
        self.env.run()
        if self.next < len(self.order) or self.running:
            device = self.device.name
            raise PolicyError(
                f"{self.policy.name}: {self.running} tiles wait for some that no slot of {device} is free for"
            )
        return self.env.now

    def _hand_out(self) -> None:
        """Hand out tiles, in their order, as long as there is room for the next."""
        while self.next < len(self.order):
            tile = self.order[self.next]
            kernel = self.places[tile][0]
            if kernel > self.open:
                if self.policy.barrier and not self.running and not self.opening:
                    self._open_after(self.device.launch_gap_ns)
                return
            place = self.sms.take(kernel)
            if place is None:
                return
            self.next += 1
            self.running += 1
            simpy.Process(self.env, self._tile(tile, *place))
            if kernel > self.begun:
                self.begun = kernel
                if self.device.wait_kernel_ns and not self.policy.barrier:
                    self._open_after(self.device.wait_kernel_ns)

    def _open_after(self, delay_ns: float) -> None:
        """Let the next kernel start after a while."""
        self.opening = True
        simpy.Timeout(self.env, round(delay_ns)).callbacks.append(self._open_next)

    def _open_next(self, _event: simpy.Event) -> None:
        self.opening = False
        self.open += 1
        self._hand_out()

    def _tile(self, tile: int, sm: int, slot: int) -> Waiting:
        """One block, from taking its slot to leaving it."""
        env, started = self.env, self.env.now
        kernel, row, col, share = self.places[tile]
        waits: list[tuple[int, int]] = []
        yield from self._main_loop(tile, sm, waits)
        end_ns = self.end_ns[kernel]
        if self.kernels[kernel].slices > 1:  # one share after the other, in the order in which they get here
            reduced_ns = max(env.now, self.reduced_ns.get((kernel, row, col), 0)) + self.reduce_ns[kernel]
            self.reduced_ns[kernel, row, col] = reduced_ns
            end_ns += reduced_ns - env.now
        semaphore = self.posts[tile]
        if semaphore >= 0:
            end_ns += round(self.device.post_ns)
        if end_ns:
            yield simpy.Timeout(env, end_ns)
        if semaphore >= 0:
            self._post(semaphore)
        waited_ns = sum(end - begin for begin, end in waits)
        self.busy_ns += (env.now - started - waited_ns) / self.kernels[kernel].occupancy
        if self.record:
            self.spans.append(TileSpan(kernel, row, col, share, sm, slot, started, env.now, tuple(waits)))
        self.sms.give(kernel, sm, slot)
        self.running -= 1
        self._hand_out()

    def _main_loop(self, tile: int, sm: int, waits: list[tuple[int, int]]) -> Waiting:
        """All iterations, in stretches up to the first that the semaphores hold up; notes down how long they did."""
        env, counts, semaphores, values = self.env, self.counts, self.wait_semaphore, self.wait_value
        kernel, row, col, share = self.places[tile]
        slices, steps = self.kernels[kernel].slices, self.kernels[kernel].steps.at(TileId(row, col, share))
        entry, last = self.waits_from[tile], self.waits_from[tile + 1]
        poll_ns = self.device.wait_ns * (last - entry) / max(steps, 1)
        factor = self.factors[tile] if self.factors else 1.0
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
                return
            if counts[semaphores[entry]] < values[entry]:
                began, event = env.now, simpy.Event(env)
                self.waiting.setdefault(semaphores[entry], []).append((values[entry], event))
                yield event
                waits.append((began, env.now))
                delay_ns = round(self.device.refill_ns)
                entry += 1

    def _post(self, semaphore: int) -> None:
        self.counts[semaphore] += 1
        waiting = self.waiting.get(semaphore)
        if waiting:
            for value, event in waiting:
                if value <= self.counts[semaphore]:
                    event.succeed()
            self.waiting[semaphore] = [entry for entry in waiting if entry[0] > self.counts[semaphore]]


def _factors(tiles: int, device: TileDevice) -> list[float]:
    """How much longer or shorter than the mean each tile takes: normal, cut at three deviations."""
    if not device.spread:
        return []
    sequence = np.random.SeedSequence(0, spawn_key=(device.replication, crc32(b"tiles")))
    draws = np.clip(np.random.default_rng(sequence).standard_normal(tiles), -3, 3)
    return [1.0 + device.spread * draw for draw in draws.tolist()]

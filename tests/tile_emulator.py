"""Runs a policy's tiles with numbers in them, in any interleaving that the policy allows, on buffers of poison."""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from batchsim.tiles.graph import Chain, TileId
from batchsim.tiles.policy import Policy

Buffers = list[npt.NDArray[np.float64]]


class StuckError(Exception):
    """Every slot waits."""


def emulate(policy: Policy, slots: int, seed: int) -> Buffers:
    """What the kernels write if their tiles advance, one iteration at a time, in a random order.

    A tile adds up what it reads, weighted by where it stands, so that one element read too early leaves a NaN, and one
    read twice or not at all a wrong sum. Slices of a tile add up in its output, which starts as NaN: the first replaces
    it.
    """
    chain, rng = policy.chain, random.Random(seed)
    written = [np.full((kernel.rows, kernel.cols), np.nan) for kernel in chain.kernels]
    counts = [0] * policy.semaphores
    upcoming = iter(policy.order.tolist())
    running: list[tuple[int, Generator[bool, None, None]]] = []
    while True:
        while len(running) < slots and (number := next(upcoming, None)) is not None:
            kernel = int(policy.kernel_of[number])
            if policy.barrier and running and kernel != running[-1][0]:
                upcoming = iter([number, *upcoming])
                break
            running.append((kernel, _tile(policy, number, counts, written)))
        if not running:
            return written
        rng.shuffle(running)
        for place, (_, tile) in enumerate(running):
            advanced = next(tile, None)
            if advanced is None:
                del running[place]
                break
            if advanced:
                break
        else:
            raise StuckError


def in_sequence(chain: Chain) -> Buffers:
    """The same sums without tiles in the way: kernel after kernel."""
    written = [np.full((kernel.rows, kernel.cols), np.nan) for kernel in chain.kernels]
    for index, kernel in enumerate(chain.kernels):
        for tile in kernel:
            total = float(tile.slice + 1)
            for dependence in (d for d in chain.dependences if d.consumer == index):
                for (top, bottom), (left, right) in chain.spans(dependence, tile):
                    total += _weighed(written[dependence.producer], top, bottom, left, right)
            _write(written[index], kernel.tile, tile, total)
    return written


def _tile(policy: Policy, number: int, counts: list[int], written: Buffers) -> Generator[bool, None, None]:
    """Yields whether it advanced, after each iteration and each vain look at a semaphore."""
    chain = policy.chain
    index, *place = policy.places[number].tolist()
    kernel, tile = chain.kernels[index], TileId(*place)
    readers = [dependence for dependence in chain.dependences if dependence.consumer == index]
    entries = range(policy.waits_from[number], policy.waits_from[number + 1])
    steps, total = max(kernel.steps.at(tile), 1), float(tile.slice + 1)
    for step in range(steps):
        for entry in entries:
            while policy.wait_step[entry] == step and counts[policy.wait_semaphore[entry]] < policy.wait_value[entry]:
                yield False
        for dependence in readers:
            for region, ((top, bottom), (left, right)) in zip(
                dependence.regions, chain.spans(dependence, tile), strict=True
            ):
                now = top, bottom, left, right
                if region.walk == "rows":
                    now = (*_part(top, bottom, step, steps), left, right)
                elif region.walk == "cols":
                    now = (top, bottom, *_part(left, right, step, steps))
                elif step:
                    continue
                total += _weighed(written[dependence.producer], *now)
        yield True
    _write(written[index], kernel.tile, tile, total)
    if policy.posts[number] >= 0:
        counts[policy.posts[number]] += 1


def _part(lo: int, hi: int, step: int, steps: int) -> tuple[int, int]:
    """The elements that iteration `step` begins with: element i is reached in iteration i * steps // count."""
    count = hi - lo
    return lo - (-step * count // steps), lo - (-(step + 1) * count // steps)


def _weighed(buffer: npt.NDArray[np.float64], top: int, bottom: int, left: int, right: int) -> float:
    part = buffer[top:bottom, left:right]
    weights = 1.0 + np.add.outer(np.arange(top, bottom) % 7, np.arange(left, right) % 5)
    return float((part * weights[: part.shape[0], : part.shape[1]]).sum()) / buffer.size


def _write(buffer: npt.NDArray[np.float64], size: tuple[int, int], tile: TileId, value: float) -> None:
    rows, cols = size
    part = buffer[tile.row * rows : (tile.row + 1) * rows, tile.col * cols : (tile.col + 1) * cols]
    part[:] = np.where(np.isnan(part), 0.0, part) + value


def without_wait(policy: Policy, entry: int) -> Policy:
    """The policy with one of its waits dropped."""
    owner = int(np.searchsorted(policy.waits_from, entry, side="right")) - 1
    waits_from = policy.waits_from.copy()
    waits_from[owner + 1 :] -= 1
    return replace(
        policy,
        waits_from=waits_from,
        wait_step=np.delete(policy.wait_step, entry),
        wait_semaphore=np.delete(policy.wait_semaphore, entry),
        wait_value=np.delete(policy.wait_value, entry),
    )


def consumers_first(policy: Policy) -> Policy:
    """The policy with the last kernel's tiles handed out before all others."""
    last = policy.kernel_of[policy.order] == len(policy.chain.kernels) - 1
    return replace(policy, order=np.concatenate([policy.order[last], policy.order[~last]]))

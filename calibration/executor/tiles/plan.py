"""A compiled policy on the device: tickets, semaphores and what else a launch keeps there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batchsim.errors import RunError
from batchsim.tiles.policy import Policy
from calibration.executor.tiles.sync import PARTIAL_UNIT, STATE_WORDS, TICKET_WORDS

LIMIT_NS = 50_000_000


@dataclass(frozen=True, slots=True)
class Trace:
    """What each tile did, by tile number: begun, ended, time spent waiting, all in ns, and the multiprocessor."""

    start_ns: npt.NDArray[np.int64]
    end_ns: npt.NDArray[np.int64]
    waited_ns: npt.NDArray[np.int64]
    sm: npt.NDArray[np.int64]


class Plan:
    """A policy's arrays on `device`, shared by all launches under it that follow each other on one stream.

    `limit` is how long a tile may wait: nanoseconds, or polls in Triton's interpreter. `traced` keeps times of tiles.
    """

    def __init__(self, policy: Policy, device: str = "cuda", *, limit: int = LIMIT_NS, traced: bool = False) -> None:
        self.policy, self.limit, self.traced = policy, limit, traced
        chain = policy.chain

        def words(values: npt.ArrayLike) -> Tensor:
            filled = np.asarray(values, dtype=np.int32)
            return torch.from_numpy(filled if filled.size else np.zeros(1, dtype=np.int32)).to(device)

        def zeros(count: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(max(count, 1), dtype=dtype, device=device)

        self.tickets = words(_tickets(policy))
        self.wait_step = words(policy.wait_step)
        self.wait_semaphore = words(policy.wait_semaphore)
        self.wait_value = words(policy.wait_value)
        self.state, self.semaphores = zeros(STATE_WORDS), zeros(policy.semaphores)
        self.error = zeros(1, torch.int64)
        split = any(kernel.slices > 1 for kernel in chain.kernels)
        self.arrivals = zeros(chain.tiles if split else 0)
        self.partials = zeros(int(_rooms(policy)[-1]) * PARTIAL_UNIT, torch.float32)
        self.trace_words = zeros(4 * chain.tiles if traced else 0, torch.int64)
        self.most_waits = int(np.diff(policy.waits_from).max(initial=0))

    @property
    def launches(self) -> list[tuple[int, int, int]]:
        """First and last (excluded) ticket of each launch, and the blocks of one multiprocessor."""
        kernels = self.policy.chain.kernels
        if not self.policy.barrier:
            return [(0, len(self.policy.order), min(kernel.occupancy for kernel in kernels))]
        bases = self.policy.chain.bases
        return [(bases[i], bases[i + 1], kernel.occupancy) for i, kernel in enumerate(kernels)]

    def check(self) -> None:
        """Wait for the device; after a run in which a tile waited too long, make the plan fit for use again.

        Raises:
            RunError: for such a run, whose output is worth nothing.
        """
        word = int(self.error.item())
        if word == 0:
            return
        for kept in (self.state, self.semaphores, self.arrivals, self.error):
            kept.zero_()
        tile, semaphore = (word >> 32) - 1, word & 0xFFFFFFFF
        kernel, row, col, share = self.policy.places[tile].tolist()
        place = f"({row}, {col})" + (f" share {share}" if self.policy.chain.kernels[kernel].slices > 1 else "")
        raise RunError(
            f"{self.policy.name}: tile {place} of {self.policy.chain.kernels[kernel].name} waited "
            f"{self.limit / 1e6:g} ms for semaphore {semaphore}; the run was given up"
        )

    def trace(self) -> Trace:
        """Times of the last run; the device's clock."""
        start, end, waited, sm = self.trace_words.view(-1, 4).T.cpu().numpy()
        return Trace(start, end, waited, sm)


def _tickets(policy: Policy) -> npt.NDArray[np.int32]:
    """A row of words for each ticket, in the order in which they are taken; the fields are `sync.TICKET_FIELDS`."""
    kernels = policy.chain.kernels
    places = policy.places
    steps = np.array([kernel.steps.at(tile) for kernel in kernels for tile in kernel], dtype=np.int32)
    slices = np.array([kernel.slices for kernel in kernels], dtype=np.int32)
    tiles = np.arange(len(places), dtype=np.int32)
    fields = [
        *places.T, steps, tiles, policy.waits_from[:-1], policy.waits_from[1:], policy.posts, slices[places[:, 0]],
        _rooms(policy)[tiles - places[:, 3]],
    ]  # fmt: skip
    tickets = np.zeros((len(places), TICKET_WORDS), dtype=np.int32)
    tickets[:, : len(fields)] = np.stack(fields, axis=1)[policy.order]
    return tickets


def _rooms(policy: Policy) -> npt.NDArray[np.int64]:
    """Where each tile's partial sums begin, in units of memory, and where the last end; tiles in one share need none.

    There is room for twice the output's size, since a gated tile sums both halves.
    """
    kernels = policy.chain.kernels
    sizes = [2 * -(-kernel.tile[0] * kernel.tile[1] // PARTIAL_UNIT) if kernel.slices > 1 else 0 for kernel in kernels]
    return np.concatenate(([0], np.cumsum(np.repeat(sizes, [kernel.tiles for kernel in kernels]))))

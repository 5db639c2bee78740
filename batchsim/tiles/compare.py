"""Which policy pays: a chain's policies by simulated time, and two other ways to fill the last wave beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from batchsim.tiles.costs import TileCost, TileDevice
from batchsim.tiles.graph import Chain, Index, Kernel
from batchsim.tiles.policy import STREAM_SYNC, Grouping, compile_policy, policies
from batchsim.tiles.sm import TileRun, simulate

STREAM_K = "Stream-K"
PDL = "PDL"
MARGIN = 0.01


def rank(chain: Chain, costs: Mapping[str, TileCost], device: TileDevice) -> list[TileRun]:
    """StreamSync and every policy that the compiler derives, the fastest first; each chain is simulated once."""
    return list(_rank(chain, tuple(sorted(costs.items())), device))


@lru_cache(maxsize=4096)
def _rank(chain: Chain, costs: tuple[tuple[str, TileCost], ...], device: TileDevice) -> tuple[TileRun, ...]:
    runs = [simulate(policy, dict(costs), device) for policy in policies(chain)]
    return tuple(sorted(runs, key=lambda run: run.total_ns))


def tiles_of(chain: Chain) -> str:
    """What margins are kept by: the costs of a chain's kernels, which split their contractions, and which are crowded.

    Waiting tiles that share a multiprocessor with working ones slow them in ways that the model does not know.
    """
    return " + ".join(
        kernel.cost + " split" * (kernel.slices > 1) + " crowded" * (kernel.occupancy > 1) for kernel in chain.kernels
    )


def margin_of(chain: Chain, margins: Mapping[str, float]) -> float:
    """The gain that a policy of the chain has to promise to be believed; of unknown tiles the largest margin."""
    return max(MARGIN, margins.get(tiles_of(chain), max(margins.values(), default=MARGIN)))


def choose(runs: Sequence[TileRun], margin: float = MARGIN) -> TileRun:
    """The fastest run; StreamSync unless another one is faster by more than `margin`, a share of its time."""
    baseline = next(run for run in runs if run.policy == STREAM_SYNC)
    fastest = min(runs, key=lambda run: run.total_ns)
    return fastest if fastest.total_ns < baseline.total_ns * (1 - margin) else baseline


def programmatic(chain: Chain, costs: Mapping[str, TileCost], device: TileDevice) -> TileRun:
    """Programmatic dependent launch: blocks of a kernel take free slots early, and wait for all of the one before."""
    producers = {dependence.producer for dependence in chain.dependences}
    grouping = [
        Grouping(PDL, np.zeros(kernel.grid[:2], dtype=np.int32)) if index in producers else None
        for index, kernel in enumerate(chain.kernels)
    ]
    return simulate(compile_policy(chain, grouping, PDL), costs, device)


def stream_k(chain: Chain, costs: Mapping[str, TileCost], device: TileDevice) -> TileRun:
    """Stream-K (Osama et al., PPoPP 2023): the iterations of a kernel cut evenly over its slots, kernel after kernel.

    A tile that is cut is put together by one more pass over its parts, `device.fixup_ns`.
    """
    kernels, named = [], {}
    for index, kernel in enumerate(chain.kernels):
        slots = device.sms * kernel.occupancy
        iterations = sum(kernel.steps.at(tile) for tile in kernel)
        blocks = min(slots, iterations)
        cost = costs[kernel.cost]
        if kernel.tiles % slots:
            cost = replace(cost, end_ns=cost.end_ns + device.fixup_ns)
        named[str(index)] = cost
        kernels.append(
            Kernel(kernel.name, 1, blocks, (1, 1), Index(-(-iterations // blocks)), 1, kernel.occupancy, str(index))
        )
    return replace(simulate(compile_policy(Chain(chain.name, tuple(kernels))), named, device), policy=STREAM_K)

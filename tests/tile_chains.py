"""Running a chain of kernels under a policy, poisoned beforehand, for the tests of the kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from batchsim.tiles.policy import Policy
    from calibration.executor.tiles import TileChain


def worst_error(chain: TileChain, policy: Policy, seeds: range, *, limit: int, graph: bool = False) -> float:
    """The largest error of a run for each seed, eager and, with `graph`, replayed; NaN if anything was left unwritten.

    The plan has to be left as it was found: no ticket taken, no semaphore posted to.
    """
    from calibration.executor.tiles import Plan

    bound = chain.bind(Plan(policy, str(chain.x.device), limit=limit))
    errors = []
    for seed in seeds:
        chain.poison(seed)
        bound.launch()
        bound.check()
        errors.append(chain.error())
    if graph:
        captured = bound.capture()
        for seed in seeds:
            chain.poison(seed + len(seeds))
            for _ in range(3):
                captured.replay()
            bound.check()
            errors.append(chain.error())
    for kept in (bound.plan.state, bound.plan.semaphores, bound.plan.arrivals):
        assert not kept.any()
    return float(np.max(errors))

"""A case's baseline and its chosen policy on the device, tile by tile. Import with torch and Triton only."""

from __future__ import annotations

from dataclasses import replace

import torch

from batchsim.errors import RunError
from batchsim.tiles.graph import Chain
from batchsim.tiles.result import CaseResult, Recorded
from batchsim.tiles.sm import TileRun
from batchsim.tiles.traced import run_of
from calibration.executor.tiles import BUILDS, Mlp, Plan, TileChain, Trace, tiling

WARM_UPS = 3
REPEATS = 9


def measure(case: CaseResult) -> list[TileRun]:
    """The policies of `case.runs` as they run on the device: of several runs the one of median length.

    Raises:
        RunError: there are no kernels for such a chain, or a tile waited too long.
    """
    return [_measured(recorded, case.device.sms) for recorded in case.runs]


def _measured(recorded: Recorded, sms: int) -> TileRun:
    chain = _on_device(recorded.policy.chain)
    # The chain on the device has a name of its own.
    policy = replace(recorded.policy, chain=chain.chain)
    bound = chain.bind(Plan(policy, traced=True))
    traces: list[Trace] = []
    for number in range(WARM_UPS + REPEATS):
        bound.launch()
        bound.check()
        torch.cuda.synchronize()
        if number >= WARM_UPS:
            traces.append(bound.trace())
    traces.sort(key=lambda trace: int(trace.end_ns.max() - trace.start_ns.min()))
    median = traces[len(traces) // 2]
    return run_of(policy, recorded.run, sms, median.start_ns, median.end_ns, median.waited_ns, median.sm)


def _on_device(chain: Chain) -> TileChain:
    """The chain's kernels over random tensors."""
    costs = [kernel.cost for kernel in chain.kernels]
    if len(costs) == 2 and set(costs) <= BUILDS.keys():
        first, second = chain.kernels
        one, two = (tiling(kernel.cost, kernel.slices) for kernel in chain.kernels)
        gated = first.tile[1] * 2 == one.cols
        pair = Mlp.random(first.rows, second.cols, first.cols, (one, two), gated=gated)
        if (pair.chain.kernels, pair.chain.dependences) == (chain.kernels, chain.dependences):
            return pair
    raise RunError(
        f"{chain.name}: there are no kernels for this chain in these tiles; measured are plain and gated MLPs"
    )

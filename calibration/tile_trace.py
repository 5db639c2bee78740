"""A case's baseline and its chosen policy on the device, tile by tile. Import with torch and Triton only."""

from __future__ import annotations

from dataclasses import replace

import torch

from batchsim.errors import RunError
from batchsim.tiles.graph import Chain, Kernel
from batchsim.tiles.result import CaseResult, Recorded
from batchsim.tiles.shapes import Tiling
from batchsim.tiles.sm import TileRun
from batchsim.tiles.traced import run_of
from calibration.executor.tiles import Plan, TileChain, Trace
from calibration.executor.tiles.builds import ALL_BUILDS
from calibration.executor.tiles.offers import make_chain

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
    sizes = _sizes(chain)
    if sizes is not None and all(kernel.cost in ALL_BUILDS for kernel in chain.kernels):
        made = make_chain(*sizes, tuple(_tiling(kernel) for kernel in chain.kernels[: _TILINGS[sizes[0]]]))
        if (made.chain.kernels, made.chain.dependences) == (chain.kernels, chain.dependences):
            return made
    raise RunError(
        f"{chain.name}: there are no kernels for this chain in these tiles; there are for MLPs, joined gated MLPs, "
        "attention and convolutions of square images, in the tiles of the shipped profile"
    )


# How many kernels of a chain have a tiling of their own.
_TILINGS = {"mlp": 2, "gated_mlp": 2, "attention": 3, "conv": 2}


def _sizes(chain: Chain) -> tuple[str, tuple[int, ...]] | None:
    """Kind and sizes of a chain, as `offers.SIZES` has them."""
    first, last = chain.kernels[0], chain.kernels[-1]
    match [kernel.name for kernel in chain.kernels]:
        case ["up", "down"]:
            return "mlp", (first.rows, last.cols, first.cols)
        case ["gate_up", "down"]:
            return "gated_mlp", (first.rows, last.cols, first.cols)
        case ["qkv", "attention", "output"]:
            core = chain.kernels[1]
            head_dim = core.tile[1]
            heads, all_heads = core.cols // head_dim, first.cols // head_dim
            return "attention", (first.rows, last.cols, heads, (all_heads - heads) // 2, head_dim)
        case ["conv1", *_]:
            # A tile's pixels reach one line and one pixel above its own.
            side = -chain.dependences[0].regions[0].rows.lo.start - 1
            return "conv", (first.rows // side**2, side, side, first.cols, len(chain.kernels))
    return None


def _tiling(kernel: Kernel) -> Tiling:
    build = ALL_BUILDS[kernel.cost]
    cols = build.cols if build.gated else kernel.tile[1]
    return Tiling(kernel.tile[0], cols, build.depth, kernel.slices, kernel.occupancy, kernel.cost, kernel.group)

"""Tiles of attention and of convolutions that the kernels are compiled for, beside the matrix products of `tilings`."""

from __future__ import annotations

from collections import ChainMap

from batchsim.errors import InputError
from batchsim.tiles.shapes import Tiling
from calibration.executor.tiles.tilings import BUILDS, Build

# `rows` queries of one head, `depth` keys an iteration; `cols` is the head's size that stages are counted for.
ATTENTION_BUILDS = {
    f"attention {build.rows}x{build.depth}": build
    for build in (
        Build(128, 128, 64, warps=8, stages=3),
        Build(64, 128, 64, warps=4, stages=2, occupancy=2),
    )
}

# `rows` pixels, `cols` output channels, `depth` input channels of one tap an iteration.
CONV_BUILDS = {
    f"conv {build.rows}x{build.cols}x{build.depth}": build
    for build in (
        Build(128, 128, 64, warps=8, stages=3, occupancy=2),
        Build(128, 64, 64, warps=4, stages=4, occupancy=2),
        Build(64, 128, 64, warps=4, stages=4, occupancy=2),
        Build(64, 64, 64, warps=4, stages=4, occupancy=3),
        Build(64, 128, 128, warps=4, stages=3),
        Build(64, 64, 128, warps=4, stages=3, occupancy=2),
    )
}


ALL_BUILDS = ChainMap(BUILDS, ATTENTION_BUILDS, CONV_BUILDS)


def attention_tiling(name: str, head_dim: int) -> Tiling:
    """The tiling of that name, for heads of `head_dim`."""
    build = ALL_BUILDS[name]
    return Tiling(build.rows, head_dim, build.depth, 1, build.occupancy, name)


def conv_tiling(name: str, slices: int = 1, group: int = 1) -> Tiling:
    """The tiling of that name, its contraction in `slices` shares."""
    build = ALL_BUILDS[name]
    return Tiling(build.rows, build.cols, build.depth, slices, build.occupancy, name, group)


def one_build(*tilings: Tiling) -> dict[str, int]:
    """Triton's options for a kernel with tiles of all these tilings: one number of warps."""
    warps = {ALL_BUILDS[tiling.cost].warps for tiling in tilings}
    if len(warps) > 1:
        names = " and ".join(dict.fromkeys(tiling.cost for tiling in tilings))
        raise InputError(None, "tilings", names, "tilings of the same number of warps")
    return {"num_warps": warps.pop()}

"""Chains of dependent kernels run tile by tile on a GPU, under the policies that `batchsim.tiles` compiles.

Importing needs Triton. `Mlp`, `Attention` and `Conv` hold the tensors of a chain; `bind` puts it under a policy;
`Bound.launch` runs it, eagerly or inside a graph's capture; `Bound.check` tells of a tile that waited too long.
`offered` are the tilings worth running for given sizes.
"""

from calibration.executor.tiles.attention import Attention
from calibration.executor.tiles.chain import Bound, TileChain, captured
from calibration.executor.tiles.conv import Conv
from calibration.executor.tiles.mlp import Mlp, TileMlp
from calibration.executor.tiles.offers import make_chain, offered
from calibration.executor.tiles.plan import Plan, Trace
from calibration.executor.tiles.tilings import BUILDS, Build, tiling

__all__ = [
    "BUILDS", "Attention", "Bound", "Build", "Conv", "Mlp", "Plan", "TileChain", "TileMlp", "Trace", "captured",
    "make_chain", "offered", "tiling",
]  # fmt: skip

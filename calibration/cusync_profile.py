"""The tile profile of cuSync's V100, from the published times of its baselines: a median for every tile.

python -m calibration.cusync_profile
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from batchsim.files import write_text
from batchsim.tiles.costs import TileCost
from batchsim.tiles.profile import TileProfile, TilingEntry
from batchsim.tiles.shapes import Tiling
from calibration.cusync import Kind, fitted_device, published, step_ns

PROFILE = Path(__file__).parent / "profiles" / "tiles" / "v100-cusync.json"
# Of the published tiles, those that convolutions of 64 to 512 channels can use.
CONVOLUTION_TILES = ((64, 128), (128, 128))
SOURCE = "Jangda et al., CGO 2024: event-timed baselines of microsoft/cusync, mlp-gpt3-v100.csv and mlp-llama-v100.csv"


def profile() -> TileProfile:
    """Costs of every published tile: the median over the rows of the baseline that use it."""
    device = fitted_device()
    found: dict[tuple[tuple[int, int, int], int], list[TileCost]] = {}
    for row in published():
        for kernel, kind, us in zip(row.chain().kernels, row.kinds, row.us, strict=True):
            cost = kind.cost(step_ns(kernel, kind, us, device))
            found.setdefault((kind.tile, kind.occupancy), []).append(cost)
    costs: dict[str, TileCost] = {}
    entries = []
    for (tile, occupancy), seen in sorted(found.items()):
        name = "x".join(map(str, tile)) + (f" by {occupancy}" if occupancy > 1 else "")
        middle = round(float(np.median([cost.step_ns for cost in seen])), 2)
        costs[name] = Kind(tile, (1, 1, 1), occupancy).cost(middle)
        kinds = ("gemm", "conv") if tile[:2] in CONVOLUTION_TILES else ("gemm",)
        tiling = Tiling(*tile, 1, occupancy, name)
        entries += [TilingEntry.model_validate({"kind": kind, "tiling": tiling}) for kind in kinds]
    about = {
        "device": device.name,
        "source": SOURCE,
        "note": "convolutions are taken to run at the pace of matrix products of the same tile",
        "command": "python -m calibration.cusync_profile",
    }
    return TileProfile(
        schema_version=1, kind="tile_profile", name=PROFILE.stem, provenance=about, device=device, costs=costs,
        tilings=entries,
    )  # fmt: skip


if __name__ == "__main__":
    write_text(PROFILE, profile().model_dump_json(indent=1) + "\n")

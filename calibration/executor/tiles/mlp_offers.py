"""The tilings worth running for MLPs."""

from __future__ import annotations

from dataclasses import replace

from batchsim.tiles.shapes import Tiling
from calibration.executor.tiles.tilings import tiling

SMS = 132  # of an H200
LEAST_STEPS = 4  # of a share's main loop: with fewer, summing the shares costs more than it saves
TAIL_SLICES = 4


def mlp_offers(rows: int, hidden: int, inner: int, *, gated: bool) -> list[tuple[Tiling, ...]]:
    """Tilings of the two products, and of a tail where there is one.

    Small tiles and shares that fill the device for few rows; for many rows large tiles, in two heights of the groups
    in which their rows are handed out (high groups load weights less often, low ones end their first rows earlier).
    """

    def up(name: str, slices: int = 1) -> Tiling:
        return tiling(f"{'gated' if gated else 'gemm'} {name}x64", slices)

    def down(name: str, slices: int = 1) -> Tiling:
        return tiling(f"gemm {name}x64", slices)

    if rows <= 64:
        names = ("64x256",) if gated else ("64x256", "64x128")
        return [
            (up(name, _filling(rows, inner * (1 + gated), hidden, up(name))),
             down(name, _filling(rows, hidden, inner, down(name))))
            for name in names
        ]  # fmt: skip
    if rows <= 512:
        halves = (up("128x256", 2), down("128x256"))
        if gated:
            return [(up("128x256"), down("128x256")), halves, (up("64x256"), down("64x256"))]
        return [(up("128x256"), down("128x256")), halves, (up("128x256"), down("256x192"))]
    pairs = [("128x256", "128x256")] if gated else [("128x256", "128x256"), ("256x192",) * 2, ("128x256", "256x192")]
    offers: list[tuple[Tiling, ...]] = []
    for first, second in pairs:
        offers.append((up(first), down(second)))
        offers.append((up(first), down(second), down(second, TAIL_SLICES)))
        if first == "128x256":
            offers.append((replace(up(first), group=2), replace(down(second), group=2)))
    return offers


def _filling(rows: int, cols: int, depth: int, tile: Tiling) -> int:
    """The most shares of equal length by which the tiles of a product still run at once."""
    tiles = -(-rows // tile.rows) * -(-cols // tile.cols)
    steps = depth // tile.depth
    most = SMS * tile.occupancy // tiles
    fitting = (s for s in range(1, steps + 1) if steps % s == 0 and s <= most and steps // s >= LEAST_STEPS)
    return max(fitting, default=1)

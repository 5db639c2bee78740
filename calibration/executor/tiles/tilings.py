"""Tiles that the kernels are compiled for, by the names under which their costs are kept."""

from __future__ import annotations

from dataclasses import dataclass

from batchsim.tiles.shapes import Tiling


@dataclass(frozen=True, slots=True)
class Build:
    """How a tile of `rows` x `cols` outputs, `depth` of the contraction an iteration, is compiled and laid out.

    `warps` of a block, `stages` of its pipeline of loads, `occupancy` blocks to a multiprocessor: as many as its
    227 KiB of shared memory and 65,536 registers hold. `group` rows of tiles are handed out together.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    occupancy: int = 1
    gated: bool = False

    @property
    def name(self) -> str:
        return f"{'gated' if self.gated else 'gemm'} {self.rows}x{self.cols}x{self.depth}"

    @property
    def group(self) -> int:
        """Enough rows that the tiles under way share their weights; the same height whatever the tile's."""
        return max(1024 // self.rows, 1)

    def shape(self, slices: int) -> tuple[int, int, int, int, int, int, int]:
        """SHAPE of `products`: rows and their rest, columns and their rest, depth, stages, slices.

        Raises ValueError for a tile in more than two parts.
        """
        rows, cols = (1 << (size.bit_length() - 1) for size in (self.rows, self.cols))
        rests = self.rows - rows, self.cols - cols
        if (all(rests) or any(rest & (rest - 1) for rest in rests)) or (self.gated and rests[1]):
            raise ValueError(f"{self.name}: only rows (or columns, if not gated) may be the sum of two powers of two")
        return rows, rests[0], cols, rests[1], self.depth, self.stages, slices


def _named(*builds: Build) -> dict[str, Build]:
    return {build.name: build for build in builds}


BUILDS = _named(
    Build(256, 192, 64, warps=8, stages=4),
    Build(192, 256, 64, warps=8, stages=4),
    Build(128, 256, 64, warps=8, stages=4),
    Build(128, 128, 64, warps=4, stages=3, occupancy=2),
    Build(64, 256, 64, warps=4, stages=4),
    Build(64, 128, 64, warps=4, stages=4, occupancy=2),
    Build(192, 256, 64, warps=8, stages=4, gated=True),
    Build(128, 256, 64, warps=8, stages=4, gated=True),
    Build(128, 128, 64, warps=4, stages=3, occupancy=2, gated=True),
    Build(64, 256, 64, warps=4, stages=4, gated=True),
)


def tiling(name: str, slices: int = 1) -> Tiling:
    """The tiling of that name, its contraction in `slices` shares."""
    build = BUILDS[name]
    return Tiling(build.rows, build.cols, build.depth, slices, build.occupancy, name, build.group)

"""Chains of kernels as grids of tiles, and what each tile reads of the kernels before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal, NamedTuple

from batchsim.errors import shown

Walk = Literal["rows", "cols"]


class GraphError(ValueError):
    """A chain that contradicts itself; the message says where."""


class TileId(NamedTuple):
    """One tile of a kernel: its row, its column, and its share of a split contraction."""

    row: int
    col: int
    slice: int = 0


@dataclass(frozen=True, slots=True)
class Index:
    """`start + scale * floor((row r + col c + slice s) / divisor)`: quasi-affine in a tile's indices r, c, s."""

    start: int = 0
    row: int = 0
    col: int = 0
    slice: int = 0
    divisor: int = 1
    scale: int = 1

    def at(self, tile: TileId) -> int:
        return self.start + self.scale * (
            (self.row * tile.row + self.col * tile.col + self.slice * tile.slice) // self.divisor
        )


@dataclass(frozen=True, slots=True)
class Interval:
    """Elements `lo` to `hi`, the latter excluded; what lies outside the tensor is cut off."""

    lo: Index
    hi: Index

    def at(self, tile: TileId, size: int) -> tuple[int, int]:
        return max(self.lo.at(tile), 0), min(self.hi.at(tile), size)


def whole(size: int) -> Interval:
    """All of a dimension of `size` elements, whichever tile asks."""
    return Interval(Index(), Index(size))


@dataclass(frozen=True, slots=True)
class Region:
    """The part of a producer's output that a consumer's tile reads, in elements.

    `walk` names the dimension that the tile's main loop goes along, first element to last, in equal steps; None: all of
    it is wanted before the first step.
    """

    rows: Interval
    cols: Interval
    walk: Walk | None = None


@dataclass(frozen=True)
class Kernel:
    """A kernel that computes an output of `rows` x `cols` elements in tiles of `tile`.

    `slices`: shares that the contraction of each tile is split into, each a block of its own. `steps`: iterations of a
    tile's main loop. `occupancy`: blocks of the kernel that one multiprocessor holds. `cost` names the measured costs
    of its tiles. `group`: rows of tiles that are handed out together, column by column, at most half of them all.
    """

    name: str
    rows: int
    cols: int
    tile: tuple[int, int]
    steps: Index
    slices: int = 1
    occupancy: int = 1
    cost: str = ""
    group: int = 1

    def __post_init__(self) -> None:
        for key in ("rows", "cols", "slices", "occupancy", "group"):
            if getattr(self, key) < 1:
                raise GraphError(f"kernel {self.name}: {key} is {getattr(self, key)}; it has to be at least 1")
        if min(self.tile) < 1:
            raise GraphError(f"kernel {self.name}: a tile of {self.tile[0]} x {self.tile[1]} elements holds none")

    @cached_property
    def grid(self) -> tuple[int, int, int]:
        """Tiles by rows, columns and slices."""
        return -(-self.rows // self.tile[0]), -(-self.cols // self.tile[1]), self.slices

    @property
    def tiles(self) -> int:
        rows, cols, slices = self.grid
        return rows * cols * slices

    def __iter__(self) -> Iterator[TileId]:
        """Tiles row by row; the slices of a tile follow each other."""
        rows, cols, slices = self.grid
        return (TileId(*tile) for tile in product(range(rows), range(cols), range(slices)))

    def number(self, tile: TileId) -> int:
        """The tile's place in that order."""
        _, cols, slices = self.grid
        return (tile.row * cols + tile.col) * slices + tile.slice


@dataclass(frozen=True, slots=True)
class Dependence:
    """Tiles of kernel `consumer` read `regions` of the output of kernel `producer`: numbers in the chain."""

    producer: int
    consumer: int
    regions: tuple[Region, ...]


class Need(NamedTuple):
    """A tile (`row`, `col`) of a producer, whole, wanted before iteration `step` of the consumer's main loop."""

    row: int
    col: int
    step: int


@dataclass(frozen=True)
class Chain:
    """Kernels in the order of their launches, and the dependences between them."""

    name: str
    kernels: tuple[Kernel, ...]
    dependences: tuple[Dependence, ...] = ()

    def __post_init__(self) -> None:
        if not self.kernels:
            raise GraphError(f"chain {shown(self.name)} has no kernel")
        seen = set()
        for dependence in self.dependences:
            producer, consumer = dependence.producer, dependence.consumer
            if not 0 <= producer < consumer < len(self.kernels):
                raise GraphError(
                    f"chain {shown(self.name)}: kernel {consumer} cannot depend on kernel {producer}; "
                    f"a kernel depends on those before it, of 0 to {len(self.kernels) - 1}"
                )
            if (producer, consumer) in seen:
                raise GraphError(f"chain {shown(self.name)}: the dependence of {consumer} on {producer} stands twice")
            seen.add((producer, consumer))

    @property
    def tiles(self) -> int:
        return sum(kernel.tiles for kernel in self.kernels)

    @cached_property
    def bases(self) -> tuple[int, ...]:
        """Number of each kernel's first tile, when the tiles of the whole chain are numbered through."""
        bases = [0]
        for kernel in self.kernels:
            bases.append(bases[-1] + kernel.tiles)
        return tuple(bases)

    def spans(self, dependence: Dependence, tile: TileId) -> tuple[tuple[tuple[int, int], tuple[int, int]], ...]:
        """Rows and columns, in elements, of each region that `tile` of the consumer reads."""
        producer = self.kernels[dependence.producer]
        return tuple(
            (region.rows.at(tile, producer.rows), region.cols.at(tile, producer.cols)) for region in dependence.regions
        )

    def needs(self, dependence: Dependence, tile: TileId) -> list[Need]:
        """What `tile` of the consumer reads of the producer, each tile once, in the order of rows and columns."""
        producer, consumer = self.kernels[dependence.producer], self.kernels[dependence.consumer]
        steps = max(consumer.steps.at(tile), 1)
        tile_rows, tile_cols = producer.tile
        first: dict[tuple[int, int], int] = {}
        # The main loop's steps divide what is read before it is cut off at the tensor's end.
        for region, ((top, bottom), (left, right)) in zip(
            dependence.regions, self.spans(dependence, tile), strict=True
        ):
            if top >= bottom or left >= right:
                continue
            for row in range(top // tile_rows, -(-bottom // tile_rows)):
                for col in range(left // tile_cols, -(-right // tile_cols)):
                    step = 0
                    if region.walk == "rows":
                        step = _step(region.rows, tile, max(row * tile_rows, top), steps)
                    elif region.walk == "cols":
                        step = _step(region.cols, tile, max(col * tile_cols, left), steps)
                    first[row, col] = min(step, first.get((row, col), step))
        return [Need(row, col, step) for (row, col), step in sorted(first.items())]


def _step(walked: Interval, tile: TileId, element: int, steps: int) -> int:
    """The step at which a walk along an interval reaches an element of it."""
    lo, hi = walked.lo.at(tile), walked.hi.at(tile)
    return (element - lo) * steps // (hi - lo)

"""Chains of kernels that a scenario spells out: grids, tiles, and what each tile reads of the kernels before it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from batchsim.errors import InputError, one_of, shown
from batchsim.fields import Count, Model, Text
from batchsim.refusal import choice, refused
from batchsim.tiles.graph import Chain, Dependence, GraphError, Index, Interval, Kernel, Region, whole

Small = Annotated[int, Field(ge=1, le=64)]
Offset = Annotated[int, Field(ge=-10_000_000, le=10_000_000)]


def _start(value: object) -> object:
    return {"start": value} if isinstance(value, int) and not isinstance(value, bool) else value


def _or_start(schema: dict[str, Any]) -> None:
    mapping = {key: schema.pop(key) for key in ("$ref", "type", "properties") if key in schema}
    schema["anyOf"] = [mapping, {"type": "integer"}]


class IndexSpec(Model):
    """`start + scale * floor((row * r + col * c + slice * s) / divisor)` of a tile in row r, column c, share s.

    An integer alone is `start`.
    """

    start: Offset = 0
    """The value at tile 0."""
    row: Offset = 0
    """Factor of the tile's row."""
    col: Offset = 0
    """Factor of the tile's column."""
    slice: Offset = 0
    """Factor of the tile's share of a split contraction."""
    divisor: Count = 1
    """What the sum is divided by, rounding down."""
    scale: Offset = 1
    """Factor of the quotient."""

    def index(self) -> Index:
        return Index(self.start, self.row, self.col, self.slice, self.divisor, self.scale)


Bound = Annotated[IndexSpec, BeforeValidator(_start), Field(json_schema_extra=_or_start)]


class IntervalSpec(Model):
    """Elements `lo` to `hi`, the latter excluded; what lies outside the producer's output is cut off."""

    lo: Bound
    """The first element."""
    hi: Bound
    """The one after the last."""

    def interval(self) -> Interval:
        return Interval(self.lo.index(), self.hi.index())


class RegionSpec(Model):
    """A part of the producer's output that a tile of the consumer reads."""

    rows: IntervalSpec | None = None
    """Rows, in elements; without it all."""
    cols: IntervalSpec | None = None
    """Columns, in elements; without it all."""
    walk: Literal["rows", "cols"] | None = None
    """What the tile's main loop goes along; without it all of the region is wanted before the first step."""


class _Edge(Model):
    producer: Text
    """The kernel whose output is read: its name."""
    consumer: Text
    """The kernel that reads it, a later one: its name."""


class RowEdge(_Edge):
    """A matrix product's left operand: a tile reads its own rows, its share of the columns along its main loop."""

    kind: Literal["row"]
    """What a tile reads."""


class TileEdge(_Edge):
    """Element by element: a tile reads what stands where it writes."""

    kind: Literal["tile"]
    """What a tile reads."""


class StridedEdge(_Edge):
    """Several tensors side by side in the producer's columns, such as gate and up, or queries, keys and values."""

    kind: Literal["strided"]
    """What a tile reads."""
    parts: Annotated[int, Field(ge=2, le=64)]
    """Tensors side by side, equally wide."""
    read: Literal["own", "all"] = "own"
    """Of each: the columns that the tile itself writes, or all of them along its main loop."""


class Conv3x3Edge(_Edge):
    """A 3x3 convolution as a matrix product: a tile reads its pixels, and a line and a pixel more on either side."""

    kind: Literal["conv3x3"]
    """What a tile reads."""
    width: Count
    """Pixels in one line of an image."""


class BatchedEdge(_Edge):
    """A batch of matrices below one another: a tile reads the whole matrix of its place in the batch."""

    kind: Literal["batched"]
    """What a tile reads."""
    batches: Count
    """Matrices in the batch."""


class AffineEdge(_Edge):
    """Regions whose bounds are quasi-affine in the tile's row, column and share."""

    kind: Literal["affine"]
    """What a tile reads."""
    regions: Annotated[tuple[RegionSpec, ...], Field(strict=False, min_length=1, max_length=64)]
    """What a tile reads of the producer's output."""


Edge = Annotated[RowEdge | TileEdge | StridedEdge | Conv3x3Edge | BatchedEdge | AffineEdge, Field(discriminator="kind")]


class KernelSpec(Model):
    """A kernel that writes `rows` x `cols` elements, a tile of them in each of its blocks."""

    name: Text
    """What dependences, tables and pictures call it."""
    rows: Count
    """Rows of its output."""
    cols: Count
    """Columns of its output."""
    tile: Annotated[tuple[Count, Count], Field(strict=False)]
    """Rows and columns of a tile."""
    k: Count | None = None
    """Length of the contraction; or give `steps`."""
    depth: Count = 64
    """How much of the contraction one step of the main loop takes."""
    steps: Count | None = None
    """Steps of a tile's main loop, in place of `k` and `depth`."""
    slices: Small = 1
    """Shares that the contraction is split into, each a block of its own."""
    occupancy: Small = 1
    """Blocks that one multiprocessor holds."""
    cost: Text | None = None
    """The profile's name for the costs of a tile; or give `tile_us`."""
    tile_us: Annotated[float, Field(gt=0, ge=0.001, le=1e9, allow_inf_nan=False)] | None = None
    """Microseconds that a tile takes on its own, in place of costs of the profile."""

    @model_validator(mode="after")
    def _unambiguous(self) -> Self:
        for one, other in (("k", "steps"), ("cost", "tile_us")):
            given = [key for key in (one, other) if getattr(self, key) is not None]
            if len(given) != 1:
                raise refused(one_of(given) if given else "neither", f"either {one} or {other}", one)
        return self

    def kernel(self) -> Kernel:
        steps = self.steps or -(-(self.k or 1) // (self.depth * self.slices))
        cost = self.cost or f"{self.name}, tile_us"
        return Kernel(self.name, self.rows, self.cols, self.tile, Index(steps), self.slices, self.occupancy, cost)

    def share(self, cols: int) -> int:
        """Of `cols` columns of the left operand, those that one share of the contraction reads."""
        step = self.depth if self.k is not None else 1
        return -(-cols // (self.slices * step)) * step


class CustomChain(Model):
    """Kernels in the order of their launches, and what each reads of those before it."""

    kind: Literal["custom"]
    """A chain that is spelt out."""
    name: Text = "custom"
    """A title for tables and pictures."""
    kernels: Annotated[tuple[KernelSpec, ...], Field(strict=False, min_length=1, max_length=64)]
    """The kernels, in the order of their launches."""
    dependences: Annotated[tuple[Edge, ...], Field(strict=False, min_length=1, max_length=256)]
    """What the tiles of one kernel read of another."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [kernel.name for kernel in self.kernels]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise refused(f"{shown(name)} twice", "a name of its own for each kernel", f"kernels.{i}.name")
        for i, edge in enumerate(self.dependences):
            for key in ("producer", "consumer"):
                if (name := getattr(edge, key)) not in names:
                    raise refused(shown(name), choice(name, names), f"dependences.{i}.{key}")
            if names.index(edge.producer) >= names.index(edge.consumer):
                raise refused(shown(edge.consumer), f"a kernel after {edge.producer}", f"dependences.{i}.consumer")
            if edge in self.dependences[:i] or (edge.producer, edge.consumer) in [
                (other.producer, other.consumer) for other in self.dependences[:i]
            ]:
                raise refused("the same two kernels again", "one dependence for each two", f"dependences.{i}")
            self._fitting(edge, f"dependences.{i}")
        return self

    def _fitting(self, edge: Edge, key: str) -> None:
        producer, consumer = self._of(edge.producer), self._of(edge.consumer)
        match edge:
            case StridedEdge() if producer.cols % edge.parts:
                wanted = f"a divisor of the {producer.cols} columns of {producer.name}"
                raise refused(str(edge.parts), wanted, f"{key}.parts")
            case StridedEdge(read="own") if consumer.cols > producer.cols // edge.parts:
                wanted = (
                    f"at most {producer.cols // edge.parts}, the columns of one of {edge.parts} parts, or read: all"
                )
                raise refused(f"{consumer.cols} columns of {consumer.name}", wanted, f"{key}.read")
            case BatchedEdge() if producer.rows % edge.batches or consumer.rows % (edge.batches * consumer.tile[0]):
                wanted = (
                    f"a divisor of the {producer.rows} rows of {producer.name} and of the "
                    f"{consumer.rows} rows of {consumer.name} in whole tiles of {consumer.tile[0]}"
                )
                raise refused(str(edge.batches), wanted, f"{key}.batches")

    def _of(self, name: str) -> KernelSpec:
        return next(kernel for kernel in self.kernels if kernel.name == name)

    def chain(self) -> Chain:
        """The chain as the compiler of policies takes it."""
        names = [kernel.name for kernel in self.kernels]
        edges = tuple(
            Dependence(names.index(edge.producer), names.index(edge.consumer), self._regions(edge))
            for edge in self.dependences
        )
        try:
            return Chain(self.name, tuple(kernel.kernel() for kernel in self.kernels), edges)
        except GraphError as error:
            raise InputError(None, "chain", str(error), "a chain without contradictions") from None

    def _regions(self, edge: Edge) -> tuple[Region, ...]:
        producer, consumer = self._of(edge.producer), self._of(edge.consumer)
        height, width = consumer.tile
        own_rows = Interval(Index(row=height), Index(start=height, row=height))

        def shares(start: int, cols: int) -> Region:
            share = consumer.share(cols)
            span = Interval(Index(start, slice=share), Index(start + min(share, cols), slice=share))
            return Region(own_rows, span, "cols")

        def own(start: int) -> Region:
            return Region(own_rows, Interval(Index(start, col=width), Index(start + width, col=width)))

        match edge:
            case RowEdge():
                return (shares(0, producer.cols),)
            case TileEdge():
                return (own(0),)
            case StridedEdge():
                part = producer.cols // edge.parts
                starts = range(0, producer.cols, part)
                return tuple(own(start) if edge.read == "own" else shares(start, part) for start in starts)
            case Conv3x3Edge():
                reach = edge.width + 1
                rows = Interval(Index(-reach, row=height), Index(height + reach, row=height))
                return (Region(rows, whole(producer.cols)),)
            case BatchedEdge():
                each, tiles = producer.rows // edge.batches, consumer.rows // edge.batches // height
                rows = Interval(Index(row=1, divisor=tiles, scale=each), Index(each, row=1, divisor=tiles, scale=each))
                return (Region(rows, whole(producer.cols), "rows"),)
            case AffineEdge():
                return tuple(
                    Region(
                        region.rows.interval() if region.rows else whole(producer.rows),
                        region.cols.interval() if region.cols else whole(producer.cols),
                        region.walk,
                    )
                    for region in edge.regions
                )

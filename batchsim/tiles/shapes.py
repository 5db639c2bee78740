"""Chains of kernels from model shapes: pairs of matrix products, gated MLPs, attention, convolutions."""

from __future__ import annotations

from dataclasses import dataclass

from batchsim.tiles.graph import Chain, Dependence, Index, Interval, Kernel, Region, whole

# Tiles of a tail before they are split, about a wave.
TAIL_TILES = 128


@dataclass(frozen=True, slots=True)
class Tiling:
    """A tile of `rows` x `cols` outputs, `depth` of the contraction an iteration, the contraction in `slices` shares.

    `occupancy`: blocks that one multiprocessor holds; `cost` names the measured costs. `group`: rows of tiles that are
    handed out together, so that fewer of the weights are in use at a time.
    """

    rows: int
    cols: int
    depth: int = 64
    slices: int = 1
    occupancy: int = 1
    cost: str = ""
    group: int = 1


def gemm(name: str, m: int, n: int, k: int, tiling: Tiling) -> Kernel:
    """`m` x `n` outputs, each the product of `k` pairs."""
    return Kernel(
        name, m, n, (tiling.rows, tiling.cols), Index(-(-k // (tiling.depth * tiling.slices))),
        tiling.slices, tiling.occupancy, tiling.cost, tiling.group,
    )  # fmt: skip


def rows_of(consumer: Tiling, k: int) -> Region:
    """What a tile of a matrix product reads of its left operand of `k` columns: its rows, along its share of `k`."""
    share = -(-k // (consumer.slices * consumer.depth)) * consumer.depth
    return Region(
        Interval(Index(row=consumer.rows), Index(start=consumer.rows, row=consumer.rows)),
        Interval(Index(slice=share), Index(start=share, slice=share)),
        "cols",
    )


def mlp(
    m: int, hidden: int, inner: int, first: Tiling, second: Tiling, tail: Tiling | None = None, *, name: str = "mlp"
) -> Chain:
    """`(m, hidden) -> (m, inner) -> (m, hidden)`, the activation in the first product's epilogue.

    With `tail` the last columns of the second product, `tail_cols` of them, are a kernel of their own, whose tiles are
    split into shares: handed out last, they leave less of the device idle at the end than whole tiles would.
    """
    return Chain(name, (gemm("up", m, inner, hidden, first), *_down(m, hidden, inner, second, tail)),
                 _reading(inner, second, tail))  # fmt: skip


def tail_cols(m: int, hidden: int, tail: Tiling, slots: int = TAIL_TILES) -> int:
    """Columns of a tail: about `slots` tiles, at most half of all columns."""
    rows = -(-m // tail.rows)
    return min(-(-slots // rows), hidden // tail.cols // 2) * tail.cols


def _down(m: int, hidden: int, inner: int, second: Tiling, tail: Tiling | None) -> tuple[Kernel, ...]:
    if tail is None:
        return (gemm("down", m, hidden, inner, second),)
    cols = tail_cols(m, hidden, tail)
    return gemm("down", m, hidden - cols, inner, second), gemm("down tail", m, cols, inner, tail)


def _reading(inner: int, *consumers: Tiling | None) -> tuple[Dependence, ...]:
    """Dependences of products on the first kernel."""
    return tuple(
        Dependence(0, 1 + index, (rows_of(consumer, inner),))
        for index, consumer in enumerate(each for each in consumers if each is not None)
    )


def gated_mlp(
    m: int, hidden: int, inner: int, first: Tiling, second: Tiling, tail: Tiling | None = None, *,
    name: str = "gated mlp",
) -> Chain:  # fmt: skip
    """Gate and up halves in one product; a tile of `first.cols` columns holds half of each, and writes their product.

    The output of the first kernel is (m, inner): its tiles are `first.cols / 2` columns wide. `tail` as in `mlp`.
    """
    up = Kernel(
        "gate_up", m, inner, (first.rows, first.cols // 2), Index(-(-hidden // (first.depth * first.slices))),
        first.slices, first.occupancy, first.cost, first.group,
    )  # fmt: skip
    return Chain(name, (up, *_down(m, hidden, inner, second, tail)), _reading(inner, second, tail))


def split_gated_mlp(m: int, hidden: int, inner: int, first: Tiling, second: Tiling, name: str = "gated mlp") -> Chain:
    """Gate and up halves side by side in the first product's output; the second one reads both, and gates them."""
    share = rows_of(second, inner)
    halves = tuple(
        Region(
            share.rows,
            Interval(
                Index(start=half * inner, slice=share.cols.lo.slice),
                Index(start=half * inner + share.cols.hi.start, slice=share.cols.hi.slice),
            ),
            "cols",
        )
        for half in (0, 1)
    )
    return Chain(
        name,
        (gemm("gate_up", m, 2 * inner, hidden, first), gemm("down", m, hidden, inner, second)),
        (Dependence(0, 1, halves),),
    )


def attention(
    m: int, hidden: int, heads: int, kv_heads: int, head_dim: int, qkv: Tiling, queries: Tiling, output: Tiling,
    name: str = "attention",
) -> Chain:  # fmt: skip
    """Projections, causal attention over the `m` tokens of one prompt, output projection.

    A tile of the attention holds `queries.rows` queries of one head and goes along the keys, `queries.depth` at a
    time; grouped heads read the same keys and values.
    """
    group = heads // kv_heads
    rows = queries.rows
    own = Interval(Index(row=rows), Index(start=rows, row=rows))
    before = Interval(Index(), Index(start=rows, row=rows))

    def head(start: int, share: int) -> Interval:
        return Interval(
            Index(start, col=1, divisor=share, scale=head_dim),
            Index(start + head_dim, col=1, divisor=share, scale=head_dim),
        )

    keys, values = heads * head_dim, (heads + kv_heads) * head_dim
    steps = Index(1, row=rows, divisor=queries.depth) if rows % queries.depth else Index(
        rows // queries.depth, row=rows // queries.depth
    )  # fmt: skip
    core = Kernel("attention", m, keys, (rows, head_dim), steps, 1, queries.occupancy, queries.cost, queries.group)
    return Chain(
        name,
        (
            gemm("qkv", m, (heads + 2 * kv_heads) * head_dim, hidden, qkv),
            core,
            gemm("output", m, hidden, keys, output),
        ),
        (
            Dependence(
                0,
                1,
                (
                    Region(own, head(0, 1)),
                    Region(before, head(keys, group), "rows"),
                    Region(before, head(values, group), "rows"),
                ),
            ),
            Dependence(1, 2, (rows_of(output, keys),)),
        ),
    )


def conv_pair(
    images: int, height: int, width: int, channels: int, first: Tiling, second: Tiling, convs: int = 2,
    name: str = "conv",
) -> Chain:  # fmt: skip
    """`convs` 3x3 convolutions of stride 1 with padding, as implicit matrix products.

    A row of the product is a pixel, a column an output channel. A tile reads its own pixels and a halo of one line and
    one pixel on either side, all channels; pixels of all images follow each other.
    """
    pixels = images * height * width

    def conv(name: str, tiling: Tiling) -> Kernel:
        return gemm(name, pixels, channels, 9 * channels, tiling)

    def halo(tiling: Tiling) -> Region:
        reach = width + 1
        return Region(
            Interval(Index(start=-reach, row=tiling.rows), Index(start=tiling.rows + reach, row=tiling.rows)),
            whole(channels),
        )

    tilings = [first if index % 2 == 0 else second for index in range(convs)]
    return Chain(
        name,
        tuple(conv(f"conv{index + 1}", tiling) for index, tiling in enumerate(tilings)),
        tuple(Dependence(index, index + 1, (halo(tilings[index + 1]),)) for index in range(convs - 1)),
    )

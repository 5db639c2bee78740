"""The tilings worth running for a chain of given sizes, and chains of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from batchsim.errors import InputError
from batchsim.tiles.shapes import Tiling
from calibration.executor.tiles.attention import Attention
from calibration.executor.tiles.builds import CONV_BUILDS, attention_tiling, conv_tiling
from calibration.executor.tiles.chain import TileChain
from calibration.executor.tiles.conv import Conv
from calibration.executor.tiles.mlp import Mlp
from calibration.executor.tiles.tilings import tiling

# What each kind's sizes are, in their order.
SIZES = {
    "mlp": ("rows", "hidden", "inner"),
    "gated_mlp": ("rows", "hidden", "inner"),
    "attention": ("rows", "hidden", "heads", "kv_heads", "head_dim"),
    "conv": ("images", "height", "width", "channels", "convs"),
}
SMS = 132  # of an H200
LEAST_STEPS = 4  # of a share's main loop: with fewer, summing the shares costs more than it saves
TAIL_SLICES = 4


def offered(kind: str, sizes: tuple[int, ...]) -> list[tuple[Tiling, ...]]:
    """Tilings of the kernels of a chain, a tuple each, the most promising first. `SIZES` names kinds and sizes."""
    _check(kind, sizes)
    return _OFFERS[kind](*sizes)


def make_chain(
    kind: str, sizes: tuple[int, ...], tilings: tuple[Tiling, ...], like: TileChain | None = None
) -> TileChain:
    """A chain of random tensors on the GPU, or over those of `like`, a chain of the same kind and sizes."""
    _check(kind, sizes)
    if kind in ("mlp", "gated_mlp"):
        if isinstance(like, Mlp):
            middle, out = like.written
            return Mlp(
                like.x, like.first, like.second, middle, out, tilings, gated=like.gated, activation=like.activation
            )
        rows, hidden, inner = sizes
        return Mlp.random(rows, hidden, inner, tilings, gated=kind == "gated_mlp")
    if kind == "attention":
        qkv, queries, output = tilings
        if isinstance(like, Attention):
            return like.with_tilings((qkv, queries, output))
        rows, hidden, heads, kv_heads, head_dim = sizes
        return Attention.random(rows, hidden, heads, kv_heads, head_dim, (qkv, queries, output))
    even, odd = tilings
    if isinstance(like, Conv):
        return like.with_tilings((even, odd))
    images, height, width, channels, convs = sizes
    return Conv.random(images, height, width, channels, convs, (even, odd))


def _check(kind: str, sizes: tuple[int, ...]) -> None:
    if kind not in SIZES:
        raise InputError(None, "kind", kind, f"one of {', '.join(SIZES)}")
    if len(sizes) != len(SIZES[kind]):
        raise InputError(None, "sizes", str(sizes), ", ".join(SIZES[kind]))


def _product(name: str, slices: int = 1, *, gated: bool = False) -> Tiling:
    return tiling(f"{'gated' if gated else 'gemm'} {name}x64", slices)


def _tiles(rows: int, cols: int, tile: Tiling) -> int:
    return -(-rows // tile.rows) * -(-cols // tile.cols)


def _filling(tiles: int, depth: int, tile: Tiling) -> int:
    """The most shares of equal length by which `tiles` tiles still run at once."""
    steps, ragged = divmod(depth, tile.depth)
    most = SMS * tile.occupancy // tiles
    if ragged:
        return 1
    return max(
        (s for s in range(1, steps + 1) if steps % s == 0 and s <= most and steps // s >= LEAST_STEPS), default=1
    )


def _distinct(offers: Iterable[tuple[Tiling, ...]]) -> list[tuple[Tiling, ...]]:
    return list(dict.fromkeys(offers))


def _mlp(rows: int, hidden: int, inner: int, *, gated: bool) -> list[tuple[Tiling, ...]]:
    """Tilings of the two products, and of a tail where there is one.

    Small tiles and shares that fill the device for few rows; for many rows large tiles, in two heights of the groups
    in which their rows are handed out (high groups load weights less often, low ones end their first rows earlier).
    """

    up, down = partial(_product, gated=gated), _product

    if rows <= 64:
        names = ("64x256",) if gated else ("64x256", "64x128")
        wide = inner * (1 + gated)  # a gated tile's columns are those of both halves
        return [
            (
                up(name, _filling(_tiles(rows, wide, up(name)), hidden, up(name))),
                down(name, _filling(_tiles(rows, hidden, down(name)), inner, down(name))),
            )
            for name in names
        ]
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


def _attention(rows: int, hidden: int, heads: int, kv_heads: int, head_dim: int) -> list[tuple[Tiling, ...]]:
    wide, core = (heads + 2 * kv_heads) * head_dim, heads * head_dim
    large, small = (attention_tiling(f"attention {name}", head_dim) for name in ("128x64", "64x64"))

    def best(cols: int, depth: int) -> Tiling:
        """The large tile whose waves hold the device for the shortest; tiles in two parts are not worth sharing out."""
        tiles = [_product(name) for name in ("128x256", "256x192", "192x256")]
        tiles.append(_product("128x256", _filling(_tiles(rows, cols, tiles[0]), depth, tiles[0])))
        return min(tiles, key=lambda one: _waves(rows, cols, one) * one.rows * one.cols / one.slices)

    one = _product("128x128")
    offers = [(one, small, one)]
    if rows <= 512:
        slices = _filling(_tiles(rows, wide, one), hidden, one), _filling(_tiles(rows, hidden, one), core, one)
        offers.append((_product("128x128", slices[0]), small, _product("128x128", slices[1])))
    if rows > 64:
        plain = _product("128x256")
        offers = [(best(wide, hidden), large, best(hidden, core)), (plain, large, plain), *offers]
    return _distinct(offers)


def _waves(rows: int, cols: int, tile: Tiling) -> int:
    return -(-_tiles(rows, cols, tile) * tile.slices // (SMS * tile.occupancy))


def _conv(images: int, height: int, width: int, channels: int, _: int) -> list[tuple[Tiling, ...]]:
    pixels = images * height * width
    offers = []
    for name, build in CONV_BUILDS.items():
        tiles = _tiles(pixels, channels, conv_tiling(name))
        if max(build.cols, build.depth) > channels or (build.rows > 64 and tiles < SMS / 2):
            continue
        one = conv_tiling(name, _filling(tiles, 9 * channels, replace(conv_tiling(name), occupancy=1)))
        # One block to a multiprocessor where that is enough: a tile that waits beside one at work leaves others idle.
        offers.append((replace(one, occupancy=1) if tiles * one.slices <= SMS else one,) * 2)
    return _distinct(offers)


_OFFERS: dict[str, Callable[..., list[tuple[Tiling, ...]]]] = {
    "mlp": partial(_mlp, gated=False), "gated_mlp": partial(_mlp, gated=True), "attention": _attention, "conv": _conv,
}  # fmt: skip

"""A scenario's chains as cases to compare, each with the tilings that are tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product

from batchsim.errors import InputError, one_of
from batchsim.tiles.custom import CustomChain
from batchsim.tiles.graph import Chain
from batchsim.tiles.models import DECODERS
from batchsim.tiles.profile import Kind, TileProfile
from batchsim.tiles.scenario import (
    AttentionChain,
    ConvChain,
    GatedChain,
    MlpChain,
    QueriesSpec,
    TileSpec,
    TilesScenario,
)
from batchsim.tiles.shapes import Tiling, attention, conv_pair, gated_mlp, mlp, split_gated_mlp
from batchsim.tiles.sm import TileCost

# Beyond, deriving the policies of a chain would take minutes.
MAX_TILES = 50_000
TAPS = 9  # of a 3x3 convolution


@dataclass(frozen=True)
class Candidate:
    """A chain in one choice of tiles; `tiling` is what tables call that."""

    tiling: str
    chain: Chain


@dataclass(frozen=True)
class Case:
    """What is compared: one chain on one size of input, in every tiling that is to be tried.

    `layers`: how often a forward of the model runs it. `costs`: those of the profile, and those that the scenario
    spells out. `margins`: the profile's.
    """

    name: str
    candidates: tuple[Candidate, ...]
    costs: Mapping[str, TileCost]
    layers: int = 1
    margins: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Shape:
    """A chain whose tiles are still to be chosen: `kinds` of its kernels, and what makes the chain of their tiles."""

    name: str
    kinds: dict[str, Kind]
    build: Callable[..., Chain]
    layers: int


def cases(scenario: TilesScenario, profile: TileProfile) -> list[Case]:
    """The cases of a scenario, in the order of the file.

    Raises:
        InputError: a tile that the profile has no costs for, or too many tiles; without a file.
    """
    found = []
    for i, spec in enumerate(scenario.chain):
        key = f"chain.{i}" if len(scenario.chain) > 1 else "chain"
        if isinstance(spec, CustomChain):
            found.append(_custom(spec, profile, key))
            continue
        shapes = _convolutions(spec) if isinstance(spec, ConvChain) else _decoder(spec)
        for shape in shapes:
            tilings = [_tilings(kind, getattr(spec.tile, name), profile, f"{key}.tile.{name}")
                       for name, kind in shape.kinds.items()]  # fmt: skip
            candidates = [
                Candidate(_tiling_text(list(shape.kinds), some), shape.build(*some))
                for some in product(*tilings)
                if profile.together(some)
            ]
            free = [number for number, name in enumerate(shape.kinds) if getattr(spec.tile, name) is None]
            suited = [
                each
                for each in candidates
                if _fits(each.chain, shape)
                and profile.suits((each.chain.kernels[number] for number in free), each.chain.kernels[0].rows)
            ]
            if len(free) == len(shape.kinds):
                suited = [_uncrowded(candidate, profile.device.sms) for candidate in suited or candidates]
            small = _small(suited or candidates, key)
            found.append(Case(shape.name, small, profile.costs, shape.layers, profile.margins))
    return found


def _decoder(spec: MlpChain | GatedChain | AttentionChain) -> Iterator[_Shape]:
    decoder, parallel = DECODERS[spec.model], spec.tensor_parallel
    divided = f", tp {parallel}" if parallel > 1 else ""
    for m in spec.m:
        name = f"{spec.model} {spec.kind.replace('_', ' ')}{divided}, m = {m}"
        match spec:
            case MlpChain():
                build = partial(mlp, m, decoder.hidden, spec.width, name=name)
                yield _Shape(name, {"up": "gemm", "down": "gemm"}, build, decoder.layers)
            case GatedChain(halves="joined"):
                build = partial(gated_mlp, m, decoder.hidden, spec.width, name=name)
                yield _Shape(name, {"gate_up": "gated", "down": "gemm"}, build, decoder.layers)
            case GatedChain():
                build = partial(split_gated_mlp, m, decoder.hidden, spec.width, name=name)
                yield _Shape(name, {"gate_up": "gemm", "down": "gemm"}, build, decoder.layers)
            case AttentionChain():
                heads = decoder.heads // parallel, decoder.kv_heads // parallel, decoder.head_dim
                build = partial(attention, m, decoder.hidden, *heads, name=name)
                kinds: dict[str, Kind] = {"qkv": "gemm", "attention": "attention", "output": "gemm"}
                yield _Shape(name, kinds, build, decoder.layers)


def _convolutions(spec: ConvChain) -> Iterator[_Shape]:
    for stage in spec.stages:
        for images in spec.images:
            name = f"{spec.model} {stage.channels} channels, {images} image{'s'[: images > 1]}"
            pair = partial(conv_pair, images, stage.height, stage.width, stage.channels, convs=stage.convs, name=name)
            yield _Shape(name, {"conv": "conv"}, partial(_same, pair), stage.layers)


def _same(pair: Callable[[Tiling, Tiling], Chain], tiling: Tiling) -> Chain:
    return pair(tiling, tiling)


def _tilings(kind: Kind, spec: TileSpec | QueriesSpec | None, profile: TileProfile, key: str) -> list[Tiling]:
    """The tile that the scenario asks for, with what the profile knows about it, or all that the profile has."""
    known = profile.tilings_of(kind)
    if spec is None:
        if not known:
            raise InputError(None, key, "no tile", f"one: profile {profile.name} has no tilings of kind {kind}")
        return known
    sides = (spec.rows, spec.cols, spec.depth) if isinstance(spec, TileSpec) else (spec.rows, spec.depth)
    slices = spec.slices if isinstance(spec, TileSpec) else 1
    alike = [tiling for tiling in known if _sides(tiling, len(sides)) == sides]
    match = next((tiling for tiling in alike if tiling.slices == slices), alike[0] if alike else None)
    cost = spec.cost or (match.cost if match else "")
    if cost not in profile.costs:
        if spec.cost:
            raise InputError(None, f"{key}.cost", repr(cost), f"costs of profile {profile.name}: {_names(profile)}")
        have = [_text(tiling, len(sides)) for tiling in known]
        wanted = f"{one_of(list(dict.fromkeys(have)))}, which profile {profile.name} has" if have else "a `cost`"
        raise InputError(None, key, f"a tile of {'x'.join(map(str, sides))} without costs", wanted)
    occupancy = spec.occupancy or (match.occupancy if match else 1)
    group = match.group if match else 1
    cols = spec.cols if isinstance(spec, TileSpec) else 1
    return [Tiling(spec.rows, cols, spec.depth, slices, occupancy, cost, group)]


def _custom(spec: CustomChain, profile: TileProfile, key: str) -> Case:
    costs = dict(profile.costs)
    for i, kernel in enumerate(spec.kernels):
        if kernel.tile_us is not None:
            steps = kernel.kernel().steps.start
            costs[kernel.kernel().cost] = TileCost(
                step_ns=kernel.tile_us * 1000 / steps, start_ns=0.0, end_ns=0.0, row_bytes=0.0, col_bytes=0.0
            )
        elif kernel.cost not in profile.costs:
            wanted = f"costs of profile {profile.name}: {_names(profile)}; or tile_us"
            raise InputError(None, f"{key}.kernels.{i}.cost", repr(kernel.cost), wanted)
    chain = spec.chain()
    names = [kernel.name for kernel in spec.kernels]
    tiles = [
        Tiling(*kernel.tile, kernel.depth if kernel.k else 0, kernel.slices, kernel.occupancy)
        for kernel in spec.kernels
    ]
    candidate = Candidate(_tiling_text(names, tiles), chain)
    return Case(spec.name, _small([candidate], key), costs)


def _fits(chain: Chain, shape: _Shape) -> bool:
    """Whether tiles of convolutions hold no more channels than there are; a step takes those of one tap."""
    return "conv" not in shape.kinds or all(k.tile[1] <= k.cols and k.steps.start >= TAPS for k in chain.kernels)


def _uncrowded(candidate: Candidate, sms: int) -> Candidate:
    """The candidate with a multiprocessor to each tile of kernels that have so few, as the hardware would do it.

    Of a chain in one launch, tiles that wait would otherwise sit beside tiles that work, while others stood empty.
    """
    chain = candidate.chain
    kernels = tuple(
        replace(kernel, occupancy=1) if kernel.occupancy > 1 and kernel.tiles <= sms else kernel
        for kernel in chain.kernels
    )
    return replace(candidate, chain=replace(chain, kernels=kernels))


def _small(candidates: list[Candidate], key: str) -> tuple[Candidate, ...]:
    small = tuple(candidate for candidate in candidates if candidate.chain.tiles <= MAX_TILES)
    if not small:
        fewest = min(candidate.chain.tiles for candidate in candidates)
        raise InputError(None, key, f"a chain of {fewest:,} tiles", f"at most {MAX_TILES:,}: larger tiles, less input")
    return small


def _sides(tiling: Tiling, count: int) -> tuple[int, ...]:
    """Rows, columns and depth; of an attention kernel, whose columns are a head's, two of them."""
    return (tiling.rows, tiling.cols, tiling.depth) if count == 3 else (tiling.rows, tiling.depth)


def _text(tiling: Tiling, count: int = 3) -> str:
    sides = [str(side) for side in _sides(tiling, count) if side]
    return "x".join(sides) + (f" split {tiling.slices}" if tiling.slices > 1 else "")


def _tiling_text(names: list[str], tilings: tuple[Tiling, ...] | list[Tiling]) -> str:
    texts = [_text(tiling, 2 if name == "attention" else 3) for name, tiling in zip(names, tilings, strict=True)]
    return texts[0] if len(set(texts)) == 1 else " + ".join(texts)


def _names(profile: TileProfile) -> str:
    return one_of(list(profile.costs)) if profile.costs else "none"

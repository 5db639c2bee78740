"""What a user may write in a scenario of `kind: tiles`: chains of dependent kernels, by their model or spelt out."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from batchsim import fields, yaml_loader
from batchsim.errors import one_of, shown
from batchsim.fields import Count, Model, OneOrMore, Text, distinct, key_of
from batchsim.refusal import Override, Refusals, refused
from batchsim.tiles.custom import CustomChain, Small
from batchsim.tiles.models import CHANNELS, CONVOLUTIONS, DECODERS, Stage

_PLAIN = {name: decoder for name, decoder in DECODERS.items() if not decoder.gated}
_GATED = {name: decoder for name, decoder in DECODERS.items() if decoder.gated}


def _plain(name: str) -> str:
    if name in _GATED:
        raise refused(f"{name}, whose MLP is gated", f"kind: gated_mlp for it, or {one_of(list(_PLAIN))}")
    return key_of(_PLAIN)(name)


PlainModel = Annotated[str, AfterValidator(_plain), Field(json_schema_extra={"enum": list(_PLAIN)})]
GatedModel = Annotated[str, AfterValidator(key_of(_GATED)), Field(json_schema_extra={"enum": list(_GATED)})]
DecoderModel = Annotated[str, AfterValidator(key_of(DECODERS)), Field(json_schema_extra={"enum": list(DECODERS)})]
ConvModel = Annotated[str, AfterValidator(key_of(CONVOLUTIONS)), Field(json_schema_extra={"enum": list(CONVOLUTIONS)})]

Side = Annotated[int, Field(ge=1, le=4096)]


Sizes = Annotated[OneOrMore[Count], AfterValidator(distinct("each value once"))]


class TileSpec(Model):
    """The tile of a kernel."""

    rows: Side
    """Rows of outputs."""
    cols: Side
    """Columns of outputs; of a product of gate and up halves both together."""
    depth: Side = 64
    """How much of the contraction one step of the main loop takes."""
    slices: Small = 1
    """Shares that the contraction is split into, each a block of its own."""
    occupancy: Small | None = None
    """Blocks that one multiprocessor holds; without it as the profile says for this tile, or 1."""
    cost: Text | None = None
    """The profile's name for the costs; without it those of this tile."""


class QueriesSpec(Model):
    """The tile of an attention kernel: queries of one head, and how many keys they meet in a step."""

    rows: Side
    """Queries of one head."""
    depth: Side = 64
    """Keys in one step of the main loop."""
    occupancy: Small | None = None
    """Blocks that one multiprocessor holds; without it as the profile says for this tile, or 1."""
    cost: Text | None = None
    """The profile's name for the costs; without it those of this tile."""


class MlpTiles(Model):
    """Tiles of the two products."""

    up: TileSpec | None = None
    """Without it, all that the profile has are tried."""
    down: TileSpec | None = None
    """Without it, all that the profile has are tried."""


class GatedTiles(Model):
    """Tiles of the two products."""

    gate_up: TileSpec | None = None
    """Without it, all that the profile has are tried."""
    down: TileSpec | None = None
    """Without it, all that the profile has are tried."""


class AttentionTiles(Model):
    """Tiles of the projections and of the attention between them."""

    qkv: TileSpec | None = None
    """Without it, all that the profile has are tried."""
    attention: QueriesSpec | None = None
    """Without it, all that the profile has are tried."""
    output: TileSpec | None = None
    """Without it, all that the profile has are tried."""


class ConvTiles(Model):
    """The tile of the convolutions, the same for all."""

    conv: TileSpec | None = None
    """Without it, all that the profile has are tried."""


class _Decoders(Model):
    m: Sizes
    """Rows of the input: tokens in the batch. A list makes a case of each."""
    tensor_parallel: Annotated[int, Field(ge=1, le=1024)] = 1
    """Devices that each layer is divided among."""

    def _divided(self, name: str, **sizes: int) -> Self:
        for what, size in sizes.items():
            if size % self.tensor_parallel:
                found = f"{self.tensor_parallel}, which does not divide the {size} {what.replace('_', ' ')} of {name}"
                raise refused(found, "a divisor of it", "tensor_parallel")
        return self


class MlpChain(_Decoders):
    """Two matrix products, the activation in the first one's epilogue."""

    kind: Literal["mlp"]
    """Which kernels of the model."""
    model: PlainModel
    """The model's shape."""
    inner: Count | None = None
    """Columns between the products on one device, in place of the model's."""
    tile: MlpTiles = MlpTiles()
    """Tiles of the kernels."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        return self if self.inner else self._divided(self.model, inner_columns=DECODERS[self.model].inner)

    @property
    def width(self) -> int:
        return self.inner or DECODERS[self.model].inner // self.tensor_parallel


class GatedChain(_Decoders):
    """Gate and up in one matrix product, and a second one of their product."""

    kind: Literal["gated_mlp"]
    """Which kernels of the model."""
    model: GatedModel
    """The model's shape."""
    inner: Count | None = None
    """Columns between the products on one device, in place of the model's."""
    halves: Literal["joined", "apart"] = "joined"
    """A tile holds columns of gate and of up and multiplies them; or it holds either, and the consumer multiplies."""
    tile: GatedTiles = GatedTiles()
    """Tiles of the kernels."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        return self if self.inner else self._divided(self.model, inner_columns=DECODERS[self.model].inner)

    @property
    def width(self) -> int:
        return self.inner or DECODERS[self.model].inner // self.tensor_parallel


class AttentionChain(_Decoders):
    """Projections to queries, keys and values, causal attention over one prompt, output projection."""

    kind: Literal["attention"]
    """Which kernels of the model."""
    model: DecoderModel
    """The model's shape."""
    tile: AttentionTiles = AttentionTiles()
    """Tiles of the kernels."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        decoder = DECODERS[self.model]
        return self._divided(self.model, heads=decoder.heads, key_and_value_heads=decoder.kv_heads)


class ConvChain(Model):
    """The 3x3 convolutions of one layer after each other."""

    kind: Literal["conv"]
    """Which kernels of the model."""
    model: ConvModel
    """The model's shape."""
    images: Sizes
    """Images in the batch. A list makes a case of each."""
    channels: Annotated[OneOrMore[Count], AfterValidator(distinct("each value once"))] = tuple(CHANNELS)
    """Layers by their channels; each makes a case."""
    tile: ConvTiles = ConvTiles()
    """Tiles of the kernels."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        known = [stage.channels for stage in CONVOLUTIONS[self.model]]
        for channels in self.channels:
            if channels not in known:
                raise refused(shown(channels), one_of([str(each) for each in known]), "channels")
        return self

    @property
    def stages(self) -> list[Stage]:
        of = {stage.channels: stage for stage in CONVOLUTIONS[self.model]}
        return [of[channels] for channels in self.channels]


ChainSpec = Annotated[MlpChain | GatedChain | AttentionChain | ConvChain | CustomChain, Field(discriminator="kind")]


class TilesScenario(Model):
    """Chains of dependent kernels, whose tiles may be synchronised instead of whole kernels.

    Frozen and strict. `load` reads one from a file; constructed directly it raises pydantic's ValidationError.
    """

    kind: Literal["tiles"]
    """What is simulated: chains of kernels, tile by tile."""
    name: Text
    """A title for tables and reports."""
    profile: Text
    """Measured costs of tiles: the name of a shipped profile, or the path of a JSON file relative to the scenario's."""
    chain: OneOrMore[ChainSpec]
    """The kernels, or a list of such chains."""


def load(path: Path | str, sets: Iterable[str | Override] = ()) -> TilesScenario:
    """Read a scenario from a YAML (or JSON) file; `sets` are `PATH=VALUE` texts, the values written as in YAML.

    Raises:
        InputError: with everything that is wrong, a line each.
    """
    path = Path(path)
    return fields.read(TilesScenario, _refusals(), yaml_loader.load(path), str(path), sets)


def parse(text: str, file: str = "scenario", sets: Iterable[str | Override] = ()) -> TilesScenario:
    """As `load`, from text; `file` is what errors name."""
    return fields.read(TilesScenario, _refusals(), yaml_loader.parse(text, file), file, sets)


@cache
def _refusals() -> Refusals:
    return fields.refusals_of(TilesScenario)

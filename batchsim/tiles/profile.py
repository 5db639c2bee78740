"""Measured costs of tiles on one device: read and check."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple
from math import isfinite
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, FiniteFloat, PositiveFloat, PositiveInt, ValidationError, model_validator

from batchsim.errors import InputError
from batchsim.shipped import read_profile, shipped
from batchsim.tiles.graph import Kernel
from batchsim.tiles.shapes import Tiling
from batchsim.tiles.sm import TileCost, TileDevice

FOLDER = "tiles"
Kind = Literal["gemm", "gated", "attention", "conv"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TilingEntry(_Model):
    """A tiling that the device's kernels of one kind come in; its `cost` is a key of the profile's costs.

    warps: of a block; the kernels of a chain share one launch, and so their number of warps. None: of no concern.
    least_rows, most_rows: of the chain's input, for which the tiling is worth a try; None: any number.
    """

    kind: Kind
    tiling: Tiling
    warps: PositiveInt | None = None
    least_rows: PositiveInt = 1
    most_rows: PositiveInt | None = None


class LibraryCurve(_Model):
    """Time of a chain in the framework's own kernels, in one CUDA graph, by rows of its input."""

    chain: str
    hidden: PositiveInt
    inner: PositiveInt
    rows: list[PositiveInt]
    ns: list[PositiveFloat]

    def at(self, rows: int) -> float:
        """Nanoseconds; piecewise linear between the measured, proportional to the rows beyond them."""
        if rows >= self.rows[-1]:
            return self.ns[-1] * rows / self.rows[-1]
        import numpy as np

        return float(np.interp(rows, self.rows, self.ns))


class TileProfile(_Model):
    """Everything measured about tiles on one device, and what was fitted to it.

    residuals: of the times that the costs were fitted to, relative. margins: by the tiles of a chain (`tiles_of`), the
    gain over StreamSync below which predictions were seen to be too high: what nine in ten of them stayed within.
    """

    schema_version: Literal[1]
    kind: Literal["tile_profile"]
    name: str
    provenance: dict[str, Any]
    device: TileDevice
    costs: dict[str, TileCost]
    tilings: list[TilingEntry]
    library: list[LibraryCurve] = []
    measured: list[dict[str, Any]] = []
    residuals: dict[str, FiniteFloat] = {}
    margins: dict[str, FiniteFloat] = {}

    @model_validator(mode="after")
    def _sound(self) -> Self:
        for name, cost in self.costs.items():
            if not all(isfinite(value) and value >= 0 for value in astuple(cost)) or not cost.step_ns:
                raise ValueError(f"costs of {name} are times and bytes, none of them negative, and step_ns is above 0")
        numbers = [value for value in astuple(self.device) if not isinstance(value, str)]
        if self.device.sms < 1 or not all(isfinite(value) and value >= 0 for value in numbers):
            raise ValueError("a device has one multiprocessor or more, and no negative times or rates")
        if missing := sorted({entry.tiling.cost for entry in self.tilings} - set(self.costs)):
            raise ValueError(f"tilings name costs that are not there: {', '.join(missing)}")
        return self

    def together(self, tilings: Iterable[Tiling]) -> bool:
        """Whether kernels of these tilings can run as one chain."""
        wanted = {tiling.cost for tiling in tilings}
        return len({entry.warps for entry in self.tilings if entry.warps and entry.tiling.cost in wanted}) <= 1

    def suits(self, kernels: Iterable[Kernel], rows: int) -> bool:
        """Whether all these kernels' tiles are worth a try for a chain with so many rows of input."""
        return all(self._suits(kernel, rows) for kernel in kernels)

    def _suits(self, kernel: Kernel, rows: int) -> bool:
        tile = kernel.cost, kernel.slices, kernel.group
        entries = [e for e in self.tilings if (e.tiling.cost, e.tiling.slices, e.tiling.group) == tile]
        return not entries or any(e.least_rows <= rows <= (e.most_rows or rows) for e in entries)

    def tilings_of(self, kind: Kind) -> list[Tiling]:
        """The tilings of one kind of kernel, in the profile's order."""
        return [entry.tiling for entry in self.tilings if entry.kind == kind]


def load_tile_profile(name: str, base: Path | None = None, key: str = "profile") -> TileProfile:
    """Read a shipped tile profile by name, or any by the path of its JSON, relative to `base`; `key` named it.

    Raises:
        InputError: no such profile, or a file that is not one.
    """
    wanted = "a tile profile's JSON"
    text, source = read_profile(name, base, FOLDER, what="tile profile", wanted=wanted, key=key)
    return parse_tile_profile(text, source)


def parse_tile_profile(text: str, source: str) -> TileProfile:
    """A tile profile from JSON text; `source` is what errors name."""
    try:
        return TileProfile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        found = "a mapping" if isinstance(first["input"], dict) else repr(first["input"])[:80]
        if first["type"] == "json_invalid":
            found = "no JSON"
        raise InputError(source, key, found, f"a tile profile ({first['msg'].removeprefix('Value error, ')})") from None


def tile_profile_of(device: str) -> TileProfile | None:
    """The shipped tile profile that was measured on a device of this name, or None."""
    for name in sorted(shipped(FOLDER)):
        profile = load_tile_profile(name)
        if profile.provenance.get("device") == device:
            return profile
    return None

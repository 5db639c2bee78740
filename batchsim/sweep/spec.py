"""What a user may write in a sweep file: a scenario, and which of its fields take which values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from decimal import Decimal
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from batchsim import fields, yaml_loader
from batchsim.errors import shown
from batchsim.fields import Model, Text
from batchsim.refusal import Override, Refusals, refused
from batchsim.yaml_loader import KeyPath

MAX_POINTS = 10_000
WAYS = ("grid", "list", "latin_hypercube")
_STEPS = {"start", "stop", "step"}
_WANTED_VALUES = "a list of values, or {start, stop, step}"
# Values that a hypercube draws are told to so many digits.
_DIGITS = 6

Number = Annotated[float, Field(ge=-1e18, le=1e18, allow_inf_nan=False)]
IsInteger = Callable[[str, float], bool]


class FieldValue(NamedTuple):
    """What one field of the scenario is in one point, and the key of the sweep file that says so."""

    value: Any
    key: KeyPath


def _path_or_mapping(value: object) -> object:
    if not isinstance(value, str | dict):
        raise refused(shown(value), "a scenario's file, or the scenario itself")
    return value


def _paths(values: dict[str, Any]) -> dict[str, Any]:
    for path in values:
        if not all(path.split(".")):
            raise refused(shown(path), "the path of a key, such as workload.request_rate", path)
    return values


def _values(grid: dict[str, Any]) -> dict[str, list[Any]]:
    if not grid:
        raise refused("an empty mapping", "one or more fields with their values")
    found = {path: _expanded(path, values) for path, values in grid.items()}
    if (points := math.prod(map(len, found.values()))) > MAX_POINTS:
        raise refused(f"{points:,} points", f"at most {MAX_POINTS:,}")
    return found


def _expanded(path: str, values: object) -> list[Any]:
    if isinstance(values, list) and values:
        return values
    if not isinstance(values, dict) or set(values) != _STEPS:
        raise refused(shown(values), _WANTED_VALUES, path)
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e18:
            raise refused(shown(value), "a number", f"{path}.{name}")
    # In decimals, as they are written: 0.1 to 0.5 by 0.1 has 0.3 in it.
    start, stop, step = (Decimal(str(values[name])) for name in ("start", "stop", "step"))
    if step <= 0:
        raise refused(shown(values["step"]), "a number above 0", f"{path}.step")
    if stop < start:
        raise refused(shown(values["stop"]), f"at least start, {values['start']:g}", f"{path}.stop")
    if (count := int((stop - start) / step) + 1) > MAX_POINTS:
        raise refused(f"{count:,} values", f"at most {MAX_POINTS:,}", path)
    kind = int if all(isinstance(value, int) for value in values.values()) else float
    return [kind(start + step * i) for i in range(count)]


def _one_field_at_least(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not any(points):
        raise refused("no field in any point", "a mapping of fields to values for each point")
    return points


class Bounds(Model):
    """The values between two bounds, all equally likely: themselves, or on a logarithmic scale."""

    low: Number
    """The least value."""
    high: Number
    """The largest value."""
    scale: Literal["linear", "log"] = "linear"
    """log: as many values between 1 and 10 as between 10 and 100."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high <= self.low:
            raise refused(f"{self.high:g}, not more than low = {self.low:g}", f"more than {self.low:g}", "high")
        if self.scale == "log" and self.low <= 0:
            raise refused(f"{self.low:g} on a log scale", "a number above 0", "low")
        return self

    def at(self, share: float) -> float:
        """The value below which `share` of all values lie."""
        if self.scale == "log":
            found = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            found = self.low + share * (self.high - self.low)
        return min(max(float(f"{found:.{_DIGITS}g}"), self.low), self.high)


class LatinHypercube(Model):
    """Points at random, such that each field's range, cut into as many equal parts, has one point in each part."""

    points: Annotated[int, Field(ge=1, le=MAX_POINTS)]
    """How many."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Seed of the draws."""
    fields: Annotated[dict[str, Bounds], Field(min_length=1), AfterValidator(_paths)]
    """Fields of the scenario, as dotted paths, and their ranges; where a field takes integers, values are rounded."""

    def drawn(self, is_integer: IsInteger) -> list[dict[str, float]]:
        """The points' values. `is_integer(field, value)` tells of fields that take no fractions."""
        import numpy as np
        from scipy.stats import qmc

        sampler = qmc.LatinHypercube(d=len(self.fields), rng=np.random.default_rng(self.seed))
        shares = sampler.random(self.points).tolist()
        whole = {path: is_integer(path, (each.low + each.high) / 2) for path, each in self.fields.items()}
        return [
            {
                path: round(each.at(share)) if whole[path] else each.at(share)
                for (path, each), share in zip(self.fields.items(), row, strict=True)
            }
            for row in shares
        ]


class SweepSpec(Model):
    """Variants of one scenario. Frozen and strict; `load` reads one from a file."""

    kind: Literal["sweep"]
    """What this is: a sweep."""
    name: Text
    """A title for tables and reports."""
    scenario: Annotated[Text | dict[str, Any], BeforeValidator(_path_or_mapping)]
    """The scenario that is varied: a file's path relative to this one's, or the scenario itself."""
    grid: Annotated[dict[str, Any], AfterValidator(_paths), AfterValidator(_values)] | None = None
    """Fields of the scenario, as dotted paths, and their values: a list, or {start, stop, step}, stop included. Every
    combination is a point, the last field changing fastest."""
    given: (
        Annotated[
            list[Annotated[dict[str, Any], AfterValidator(_paths)]],
            Field(min_length=1, max_length=MAX_POINTS),
            AfterValidator(_one_field_at_least),
        ]
        | None
    ) = Field(None, alias="list")
    """The points one by one, each a mapping of fields to values."""
    latin_hypercube: LatinHypercube | None = None
    """Points at random that cover ranges of several fields evenly."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = [way for way in WAYS if getattr(self, "given" if way == "list" else way) is not None]
        if len(ways) != 1:
            key = ways[1] if ways else "grid"
            raise refused(f"{ways[1]} beside {ways[0]}" if ways else "nothing", f"one of {', '.join(WAYS)}", key)
        return self

    @property
    def fields(self) -> tuple[str, ...]:
        """The swept fields, in the file's order."""
        if self.grid is not None:
            return tuple(self.grid)
        if self.latin_hypercube is not None:
            return tuple(self.latin_hypercube.fields)
        return tuple(dict.fromkeys(path for point in self.given or () for path in point))

    def points(self, is_integer: IsInteger) -> Iterable[dict[str, FieldValue]]:
        """The swept fields of each point, in order. `is_integer` as `LatinHypercube.drawn` takes it."""
        if self.grid is not None:
            for values in product(*self.grid.values()):
                yield {path: FieldValue(value, ("grid", path)) for path, value in zip(self.grid, values, strict=True)}
        elif self.latin_hypercube is not None:
            for drawn in self.latin_hypercube.drawn(is_integer):
                yield {path: FieldValue(value, ("latin_hypercube", "fields", path)) for path, value in drawn.items()}
        else:
            for i, values_of in enumerate(self.given or ()):
                yield {path: FieldValue(value, ("list", i, path)) for path, value in values_of.items()}


def load(path: Path | str, sets: Iterable[str | Override] = ()) -> tuple[SweepSpec, dict[KeyPath, int]]:
    """The sweep in a YAML file, and the lines of its keys.

    Raises:
        InputError: with everything that is wrong, a line each.
    """
    document = yaml_loader.load(Path(path))
    return fields.read(SweepSpec, refusals(), document, str(path), sets), document.lines


@cache
def refusals() -> Refusals:
    """What to say about mistakes in such a file."""
    return fields.refusals_of(SweepSpec)

"""What a user may write of a server's times: batch size -> milliseconds, each a number or a distribution."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Annotated, Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from batchsim.errors import shown
from batchsim.fields import MAX_ENTRIES, Model
from batchsim.refusal import refused
from batchsim.workload_scenario import Family, specified

Float64 = npt.NDArray[np.float64]

MAX_BATCH = 1024
MAX_MS = 1e9
# Equal-count bins that stand for a distribution.
BINS = 4096
_POINTS = 64  # of a bin, at which a distribution of scipy's is looked at
_QUANTILE = re.compile(r"p(\d{1,3}(?:\.\d{1,6})?)")


def _ms(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_MS:
        raise refused(shown(value), f"milliseconds above 0 and at most {MAX_MS:g}")
    return float(value)


Ms = Annotated[float, Field(gt=0, le=MAX_MS), BeforeValidator(_ms)]


class Quantiles(Model):
    """Quantiles of a measured time, milliseconds: keys such as p10, p50 and p99.9.

    Between two quantiles times are taken to be spread evenly; before the first and after the last they are equal to it
    (give p0 and p100 where they are known).
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Ms]

    @model_validator(mode="after")
    def _quantiles(self) -> Self:
        shares = []
        for key in self.__pydantic_extra__:
            match = _QUANTILE.fullmatch(key)
            if match is None or float(match[1]) > 100:
                raise refused("an unknown key", "samples, dist, or quantiles such as p10, p50 and p99.9", key)
            shares.append(float(match[1]))
        ordered = sorted(zip(shares, self.__pydantic_extra__.items(), strict=True))
        for (_, (low_key, low)), (_, (key, high)) in pairwise(ordered):
            if high < low:
                raise refused(f"{high:g}, less than {low_key} = {low:g}", f"at least {low:g}", key)
        return self

    def bins_ms(self) -> Float64:
        """The means of `BINS` equal-count bins, milliseconds."""
        found = sorted((float(key[1:]) / 100, value) for key, value in self.__pydantic_extra__.items())
        shares, values = np.array(found).T
        shares = np.concatenate([[0.0], shares, [1.0]])
        values = np.concatenate([values[:1], values, values[-1:]])
        # The integral of the quantile function, exact at all its corners.
        edges = np.union1d(np.linspace(0, 1, BINS + 1), shares)
        at = np.interp(edges, shares, values)
        areas = np.concatenate([[0.0], np.cumsum(np.diff(edges) * (at[1:] + at[:-1]) / 2)])
        return _differences(edges, areas)


class Samples(Model):
    """Times as they were measured, milliseconds; all of them equally likely."""

    samples: Annotated[tuple[Ms, ...], Field(strict=False, min_length=1, max_length=MAX_ENTRIES)]
    """The times."""

    def bins_ms(self) -> Float64:
        """The means of `BINS` equal-count bins, milliseconds."""
        values = np.sort(self.samples)
        areas = np.concatenate([[0.0], np.cumsum(values)]) / len(values)
        return _differences(np.linspace(0, 1, len(values) + 1), areas)


class Spread(Family):
    """Times of a distribution of `scipy.stats`, milliseconds; its parameters are further keys."""

    @model_validator(mode="after")
    def _times(self) -> Self:
        bins = self.bins_ms()
        if not (np.isfinite(bins).all() and bins.min() >= 0 and 0 < bins.mean() <= MAX_MS):
            raise refused(f"times from {bins.min():g} to {bins.max():g} ms", "times of 0 and more, with a finite mean")
        return self

    def bins_ms(self) -> Float64:
        """The means of `BINS` equal-count bins, milliseconds."""
        from scipy import stats

        # Most of a bin's weight may be close to where the distribution ends: more points there.
        steps = (np.arange(_POINTS) + 0.5) / _POINTS
        weights = 4 * steps**3
        weights /= weights.sum()
        inside = steps**4
        family = getattr(stats, self.dist)(**self.parameters)
        shares = (np.arange(BINS // 2)[:, None] + inside) / BINS
        left = family.ppf(shares) @ weights
        right = family.isf(shares) @ weights
        return np.concatenate([left, right[::-1]])


def _differences(shares: Float64, areas: Float64) -> Float64:
    """The means of bins, by the integral of the quantile function up to some shares."""
    return np.asarray(np.diff(np.interp(np.linspace(0, 1, BINS + 1), shares, areas)) * BINS, np.float64)


ServiceTime: TypeAlias = float | Quantiles | Samples | Spread


def _time(value: object, key: str) -> ServiceTime:
    match value:
        case Quantiles() | Samples() | Spread():
            return value
        case dict() if "samples" in value:
            return specified(Samples, value, key)
        case dict() if "dist" in value:
            return specified(Spread, value, key)
        case dict() if value:
            return specified(Quantiles, value, key)
        case int() | float() if not isinstance(value, bool) and 0 < value <= MAX_MS:
            return float(value)
    wanted = f"milliseconds above 0 and at most {MAX_MS:g}, or a mapping with quantiles (p50, p99), samples or dist"
    raise refused(shown(value), wanted, key)


def _table(value: object) -> dict[str, ServiceTime]:
    wanted = "a mapping of batch sizes to milliseconds, such as {1: 4.2, 8: 9}"
    if not isinstance(value, dict) or not value:
        raise refused(shown(value), wanted)
    found = {}
    for key, entry in value.items():
        text = str(key)
        if not re.fullmatch(r"[1-9]\d{0,5}", text):
            raise refused("a key that is no batch size", "an integer of at least 1", text)
        found[text] = _time(entry, text)
    if len(found) > MAX_ENTRIES:
        raise refused(f"{len(found)} entries", f"at most {MAX_ENTRIES}")
    return found


def _table_schema(schema: dict[str, Any]) -> None:
    schema["propertyNames"] = {"pattern": "^[1-9][0-9]{0,5}$"}
    schema["minProperties"] = 1


class TableService(Model):
    """A server of the user's own: how long it takes for a batch, whatever it does meanwhile."""

    kind: Literal["table"]
    """Where costs come from: this table."""
    batch_ms: Annotated[dict[str, ServiceTime], BeforeValidator(_table), Field(json_schema_extra=_table_schema)]
    """Batch size -> milliseconds: a number; quantiles ({p10: 4, p50: 5, p99: 9}); {samples: [4, 4, 9]}; or a
    distribution of scipy.stats ({dist: expon, scale: 5}). Between the sizes times are interpolated."""

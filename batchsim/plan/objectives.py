"""Objectives of a plan: which figure of a run has to stay under, or reach, what."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from batchsim.errors import nearest, one_of, shown
from batchsim.latency import LATENCIES
from batchsim.refusal import refused

STATISTICS = ("mean", "p50", "p90", "p95", "p99")
# Rates and shares that have to be reached, and what a run must not exceed; all are figures of `batchsim.result`.
_AT_LEAST = ("throughput_tokens_per_s", "throughput_requests_per_s", "goodput_requests_per_s", "slo_attainment")
_AT_MOST = ("total_s",)
_WORDS = {
    "throughput_tokens_per_s": "throughput in tokens/s", "throughput_requests_per_s": "throughput in requests/s",
    "goodput_requests_per_s": "goodput in requests/s", "slo_attainment": "SLO attainment", "total_s": "the whole time",
}  # fmt: skip
# Figures that only requests held to objectives of their own have.
OF_SLO = ("goodput_requests_per_s", "slo_attainment")
_LATENCY = re.compile(rf"({'|'.join(STATISTICS)})_({'|'.join(LATENCIES)})_ms")
_BOUND = re.compile(r"\s*(<=|>=)\s*([0-9.eE+-]+)\s*")


@dataclass(frozen=True, slots=True)
class Objective:
    """`figure` (a key of `batchsim.result.figures`) has to be at most, or with `at_most` false at least, `limit`.

    `key` is its name in a plan; latencies are in milliseconds.
    """

    key: str
    figure: str
    at_most: bool
    limit: float

    def margin(self, value: float | None) -> float:
        """How far `value` is on the right side of the limit, as a share of it; negative where it misses it.

        None, a figure that the run has not, misses by everything.
        """
        if value is None:
            return -math.inf
        return 1 - value / self.limit if self.at_most else value / self.limit - 1

    @property
    def latency(self) -> bool:
        """Whether it bounds a latency."""
        return self.figure.startswith("latency_ms.")

    @property
    def rate(self) -> bool:
        """Whether it bounds what is served a second."""
        return self.key.endswith("_per_s")

    @property
    def words(self) -> str:
        """The figure as sentences name it: `p99 TTFT`."""
        found = _LATENCY.fullmatch(self.key)
        if found is None:
            return _WORDS[self.key]
        return f"{found[1]} {found[2] if found[2] == 'queue' else found[2].upper()}"

    def shown(self, value: float) -> str:
        """`value` with its unit."""
        if self.key == "slo_attainment":
            return f"{value:.1%}"
        text = f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
        return f"{text} ms" if self.latency else f"{text} s" if self.key == "total_s" else text

    def to_json(self) -> dict[str, Any]:
        return {"key": self.key, "figure": self.figure, "bound": "<=" if self.at_most else ">=", "limit": self.limit}


def parse(key: str, value: object) -> Objective:
    """The objective that a plan names `key` and bounds by `value`, such as `<=500`.

    Raises:
        PydanticCustomError: as `batchsim.refusal.refused`, for a validator to raise; with the key.
    """
    found = _LATENCY.fullmatch(key)
    figure = f"latency_ms.{found[2]}.{found[1]}" if found else key
    if not found and key not in _AT_LEAST + _AT_MOST:
        raise refused("an unknown objective", _known(key), key)
    at_most = found is not None or key in _AT_MOST
    sign = "<=" if at_most else ">="
    example = f'"{sign}500"' if at_most else f'"{sign}0.95"' if key == "slo_attainment" else f'"{sign}9.5"'
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise refused(shown(value), f'a bound: "{sign}{value:g}"', key)
    match = _BOUND.fullmatch(value) if isinstance(value, str) else None
    limit = _number(match[2]) if match else None
    if match is None or limit is None:
        raise refused(shown(value), f"a bound such as {example}", key)
    if match[1] != sign:
        why = "a latency or a time is bounded from above" if at_most else "a rate or a share is bounded from below"
        raise refused(shown(value), f'"{sign}{limit:g}": {why}', key)
    if limit <= 0 or (key == "slo_attainment" and limit > 1):
        wanted = "a share above 0 and at most 1" if key == "slo_attainment" else "a number above 0"
        raise refused(shown(value), f"{wanted}, such as {example}", key)
    return Objective(key, figure, at_most, limit)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _known(key: str) -> str:
    every = [f"{statistic}_{latency}_ms" for statistic in STATISTICS for latency in LATENCIES]
    guess = nearest(key, [*every, *_AT_LEAST, *_AT_MOST])
    told = (
        f"{one_of(STATISTICS)}, then {one_of([f'_{name}_ms' for name in LATENCIES])}; or {one_of(_AT_LEAST + _AT_MOST)}"
    )
    return f"{told} (the nearest: {guess})" if guess else told

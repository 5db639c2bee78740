"""The same traffic, but more or less of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchsim.evaluate import resolved


def scaled(document: Mapping[str, Any], factor: float) -> dict[str, Any] | None:
    """A scenario's plain data with `factor` times as many requests a second; None where their rate is not its own.

    The same requests come sooner or later: draws of a rate's arrivals are those of rate 1, stretched.
    """
    workload = document.get("workload", {})
    if workload.get("kind") == "trace":
        return resolved(document, {"workload.rate_scale": workload.get("rate_scale", 1.0) * factor})
    rate = workload.get("request_rate")
    match rate:
        case int() | float():
            changed: Any = rate * factor
        case list():
            # The same pieces, passed through faster, so that the same requests see the same swings.
            changed = [_piece(piece, factor) for piece in rate]
        case dict():
            times = {key: rate[key] / factor for key in ("period_s", "peak_s") if key in rate}
            changed = {**rate, "mean": rate["mean"] * factor, **times}
        case _:
            return None
    return resolved(document, {"workload.request_rate": changed})


def _piece(piece: Mapping[str, Any], factor: float) -> dict[str, Any]:
    lasts = {} if piece.get("duration_s") is None else {"duration_s": piece["duration_s"] / factor}
    return {**piece, "rate": piece["rate"] * factor, **lasts}

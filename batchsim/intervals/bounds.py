"""What a figure stays under, or over, with some confidence."""

from __future__ import annotations

from batchsim.intervals.groups import scale_of
from batchsim.result import ScheduleResult, figures

_NORMAL = 1.6448536269514722  # of 95%, where a 90% interval ends


def bound(result: ScheduleResult, key: str, confidence: float, upper: bool) -> float:
    """The value that the figure `key` of `result` stays under (`upper`) or over with `confidence`, from 0 to 1.

    A 90% interval ends where it does so with 95%; between there and the point, which is even odds, and beyond, errors
    are taken to be normal on the figure's scale. Without an interval it is the point itself.

    Raises:
        KeyError: the result has no such figure.
    """
    point = figures(result)[key]
    interval = result.interval_90.get(key)
    if interval is None:
        return point
    from scipy.special import ndtri

    scale, end = scale_of(key), interval[1] if upper else interval[0]
    at = scale.of(point)
    return scale.back(at + (scale.of(end) - at) * float(ndtri(confidence)) / _NORMAL)

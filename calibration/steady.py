"""What a steady step takes, from steps that were timed one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

LONGEST = 8  # steps of a turn, at most
TURNS = 3  # that have to be seen at least, for steps to be told to differ by turns
EXPLAINED = 0.5  # A turn explains this share at least of how far steps are from their median.
MARGIN = 0.1  # A longer turn explains more than a shorter one by this, or the shorter one is the turn.
STALLED = 3.0  # Steps that last more than this many medians count no more than so many.
OUTLIER = (
    2.0  # Places of a turn that last this many times what is usual are not steady: `calibration.learn` drops them.
)


@dataclass(frozen=True)
class Turn:
    """`length` steps, after which a loop does again what it did; `steady` are places in a turn, from 0."""

    length: int
    steady: tuple[int, ...]

    def typical(self, values: Floats) -> float:
        """The median of values, one a step; where steps differ by turns, the mean of the steady places' medians."""
        return float(np.mean([np.median(values[place :: self.length]) for place in self.steady]))


def turn_of(step_ms: Floats) -> Turn:
    """After how many steps a loop does again what it did: 2 where a long one and a short one take turns; mostly 1.

    Steps that are equally long, drift, or are disturbed at random have a turn of 1. Sums of distances from medians
    tell, to which a few disturbed steps matter little.
    """
    length = _length(np.minimum(step_ms, STALLED * np.median(step_ms)))
    medians = np.array([np.median(step_ms[place::length]) for place in range(length)])
    return Turn(length, tuple(np.flatnonzero(medians <= OUTLIER * np.median(medians)).tolist()))


def _length(step_ms: Floats) -> int:
    whole = _spread(step_ms)
    if not whole:
        return 1
    explained = {
        length: 1 - sum(_spread(step_ms[place::length]) for place in range(length)) / whole
        for length in range(2, min(LONGEST, len(step_ms) // TURNS) + 1)
    }
    enough = max(EXPLAINED, max(explained.values(), default=0.0) - MARGIN)
    return next((length for length, share in explained.items() if share >= enough), 1)


def _spread(values: Floats) -> float:
    return float(np.abs(values - np.median(values)).sum())

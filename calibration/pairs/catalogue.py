"""All pairs, in two sets: what a prediction was fitted on, and what it had not seen when it was tested."""

from __future__ import annotations

from calibration.pairs.fit_set import FIT
from calibration.pairs.loop import Pair
from calibration.pairs.test_set import TEST

SETS: dict[str, tuple[Pair, ...]] = {"fit": FIT, "test": TEST}
PAIRS = FIT + TEST

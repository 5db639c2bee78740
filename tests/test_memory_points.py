"""Predicted memory against what was measured on a GPU: points and edges that no constant is fitted to."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from batchsim.memory.overheads import library_for
from calibration.memory.points import Point, read
from calibration.memory.predict import FEW, predicted_edge, predicted_peak

FOLDER = Path(__file__).parents[1] / "calibration" / "validation" / "memory"
FOUND: dict[str, Any] = json.loads((FOLDER / "h200.json").read_text(encoding="utf-8"))
LIBRARY = library_for(FOUND["provenance"]["device"])
MEASURED = {
    point.name: (point, FOUND["points"][point.name]["measured"])
    for point in read(FOLDER / "points.yaml")
    if point.name in FOUND["points"]
}


def test_the_profile_is_of_the_device_that_was_measured() -> None:
    assert LIBRARY.provenance["device"] == FOUND["provenance"]["device"]
    assert set(FOUND["points"]) == set(MEASURED)


@pytest.mark.parametrize(("taken", "typical", "worst"), [("allocated", 0.02, 0.05), ("reserved", 0.02, 0.05)])
def test_peaks(taken: str, typical: float, worst: float) -> None:
    errors = [
        abs(getattr(predicted_peak(point.program, LIBRARY), taken) / measured[taken] - 1)
        for point, measured in MEASURED.values()
        if point.capacity is None
    ]
    assert len(errors) >= 30
    assert median(errors) <= typical
    assert max(errors) <= worst


@pytest.mark.parametrize("name", [name for name, (point, _) in MEASURED.items() if point.capacity is not None])
def test_edges(name: str) -> None:
    point, measured = MEASURED[name]
    assert isinstance(point, Point)
    largest = measured["largest"]
    assert abs(predicted_edge(point, LIBRARY, largest) - largest) <= (largest > FEW)

"""All three schedules executed on an H200: what was predicted, with the shipped profiles, and what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from batchsim.profile import load_profile
from calibration.predict import predict_again

FOLDER = Path(__file__).parents[1] / "calibration" / "validation" / "tile_schedule"


@pytest.fixture(scope="module", params=sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def point(request: pytest.FixtureRequest) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(request.param.read_text(encoding="utf-8"))
    return content


def test_both_kinds_of_load_were_executed() -> None:
    assert {path.stem.split("-")[0] for path in FOLDER.glob("*.json")} == {"prefill", "decode"}


def test_throughput_is_predicted_under_every_schedule(point: dict[str, Any]) -> None:
    assert set(point["error"]) == {"sync", "async", "tile"}
    assert max(abs(error["throughput_tokens_per_s"]) for error in point["error"].values()) <= 0.03


def test_the_stored_prediction_is_made_again(point: dict[str, Any]) -> None:
    again = predict_again(point, load_profile(point["profile"]))
    assert json.loads(json.dumps(again["predicted"])) == point["predicted"]

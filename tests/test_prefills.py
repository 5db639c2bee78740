"""A profile's forwards with prompts can be measured anew, and nothing else in it changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from batchsim.files import write_text
from batchsim.profile import load_profile
from calibration.calibrate import profile_text
from calibration.prefills import app
from tests.profiles import small_profile

pytest.importorskip("torch")


def test_only_forwards_with_prompts_change(tmp_path: Path) -> None:
    samples, profile = tmp_path / "samples.json", tmp_path / "tiny.json"
    write_text(profile, profile_text(small_profile("tiny")))
    before = load_profile(str(profile))
    done = CliRunner().invoke(app, ["measure", "tiny", "--device", "cpu", "--rounds", "1", "--out", str(samples)])
    assert done.exit_code == 0, done.output
    measured = json.loads(samples.read_text())
    assert measured["cells"] and all(entry["cell"]["chunk"] for entry in measured["cells"])

    done = CliRunner().invoke(app, ["fit", str(profile), str(samples)])
    assert done.exit_code == 0, done.output
    after = load_profile(str(profile))
    assert after.device.prefill != before.device.prefill
    assert set(after.device.prefill.residuals) <= {name(entry) for entry in measured["cells"]}
    unchanged = {"device": before.device, "cells": before.cells, "provenance": before.provenance}
    assert after.model_copy(update=unchanged) == before
    assert (
        after.device.model_copy(
            update={"prefill": before.device.prefill, "prefill_ratios": before.device.prefill_ratios}
        )
        == before.device
    )
    assert after.provenance["prefills"]["command"].startswith("python -m calibration.prefills measure tiny")


def name(entry: dict[str, dict[str, int | str]]) -> str:
    from calibration.cells import Cell

    return Cell(**entry["cell"]).key  # type: ignore[arg-type]

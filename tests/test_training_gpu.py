"""Training calibrated and executed on a GPU, with the smallest model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from batchsim.model import TRAINED
from batchsim.training_profile import PARTS
from calibration.training.calibrate import calibrate
from calibration.training.cells import CPU
from calibration.training.trainer import Trainer, random_tokens
from calibration.training.validate import validate
from tests.training_profiles import training

pytestmark = pytest.mark.gpu


def test_a_small_calibration_predicts_launch_bound_steps(tmp_path: Path) -> None:
    profile = calibrate("tiny", "cuda", tmp_path / "tiny.json", rounds=2, grid=CPU)
    assert profile.overlaps
    host = profile.precisions["mixed"].host
    assert all(host["none"][part].later >= host["none"][part].first for part in PARTS)
    assert host["full"]["layers_backward"].first > host["none"]["layers_backward"].first
    predicted, measured = validate(training(sequence_length=24, steps=10), profile, "cuda")
    for schedule, result in measured.results.items():
        assert predicted.results[schedule].step_ms["mean"] == pytest.approx(result.step_ms["mean"], rel=0.25)


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    tokens = random_tokens(8, 64, TRAINED["tiny"].vocab_size, "cuda")
    found = []
    for parts in (1, 4):
        trainer = Trainer(TRAINED["tiny"], "cuda", precision="fp32", seed=1)
        for part in tokens.chunk(parts):
            trainer.backward(trainer.forward(part, parts))
        found.append(
            torch.cat([weight.grad.flatten() for weight in trainer.model.parameters() if weight.grad is not None])
        )
    whole, accumulated = found
    assert (whole - accumulated).norm() <= 1e-3 * whole.norm()

"""Training executed and calibrated on the CPU, from the programs to points; and fits of times that are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from batchsim.model import TRAINED
from batchsim.schedules.training import TRAINING_SCHEDULES
from batchsim.training import simulate
from batchsim.training_profile import PARTS, TrainingProfile, load_training_profile
from calibration.training import points
from calibration.training.calibrate import calibrate, extend
from calibration.training.cells import CPU, GPU
from calibration.training.device_cells import settled
from calibration.training.executor import Execution, TrainingExecutor, Work
from calibration.training.fit import CALLS, fit_profile, profile_text, refit
from calibration.training.launches import groups_of
from calibration.training.speed import HostSpeed, beside
from calibration.training.trainer import Trainer
from calibration.training.validate import Repeat, counted, predict_again, validate
from tests.training_profiles import small_training_profile, training

TINY = TRAINED["tiny"]
FOLDER = Path(__file__).parents[1] / "calibration" / "validation" / "training"


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> TrainingProfile:
    out = tmp_path_factory.mktemp("profiles") / "cpu-train-tiny.json"
    made = calibrate("tiny", "cpu", out, rounds=1)
    assert load_training_profile(str(out)) == made
    return made


class TestExecutor:
    @pytest.mark.parametrize("schedule", sorted(TRAINING_SCHEDULES))
    def test_it_trains_as_the_trainer_does(self, schedule: str) -> None:
        executor = TrainingExecutor(Trainer(TINY, "cpu", precision="fp32", seed=5))
        work = Work(steps=3, accumulation_steps=2, micro_batch=2, sequence_length=16)
        found = executor.run(TRAINING_SCHEDULES[schedule](), work, seed=7)
        by_hand = Trainer(TINY, "cpu", precision="fp32", seed=5)
        rows = [executor.sequence(offset, 16) for offset in executor.offsets(work, 7)]
        micros = [torch.stack(rows[i : i + 2]) for i in range(0, len(rows), 2)]
        expected = [by_hand.step(micros[i : i + 2]) for i in range(0, len(micros), 2)]
        assert found.losses == pytest.approx(expected, rel=1e-6)

    def test_its_times_add_up(self) -> None:
        executor = TrainingExecutor(Trainer(TINY, "cpu"))
        work = Work(steps=3, accumulation_steps=2, micro_batch=1, sequence_length=16)
        found = executor.run(TRAINING_SCHEDULES["sync"](), work, timed=True)
        assert sum(map(sum, found.host_ns.values())) == pytest.approx(found.total_ns, rel=0.01)
        assert sum(found.steps_ns) == pytest.approx(found.total_ns, rel=0.01)
        for first, count in ((True, 3), (False, 3)):
            assert all(len(found.parts_host_ns[part, first]) == count for part in PARTS)
            assert all(len(found.parts_device_ns[part, first]) == count for part in PARTS)
        stages = [span.stage for span in found.spans if span.lane == "compute"]
        assert stages == ["forward", "backward", "forward", "backward", "optimizer"] * 3

    def test_preparing_data_takes_as_long_as_is_said(self) -> None:
        executor = TrainingExecutor(Trainer(TINY, "cpu"))
        found = executor.run(TRAINING_SCHEDULES["sync"](), Work(1, 1, 3, 16, prepare_ms_per_sequence=2.0))
        assert found.host_ns["prepare"][0] >= 6_000_000


class TestCalibration:
    def test_a_profile_predicts_what_it_was_made_of(self, profile: TrainingProfile) -> None:
        fit = profile.precisions["mixed"]
        assert set(fit.optimizers) == {"sgd", "momentum", "adamw"}
        assert fit.device["layers"].tokens == sorted({*CPU.tokens, *CPU.full_tokens})
        assert not profile.overlaps
        result = simulate(training(sequence_length=32, jitter=False), profile).results["sync"]
        assert result.device_busy_fraction > 0.5

    def test_a_profile_can_be_extended_by_what_it_lacks(self, profile: TrainingProfile, tmp_path: Path) -> None:
        out = tmp_path / "cpu-train-tiny.json"
        out.write_text(profile_text(profile), encoding="utf-8")
        extended = extend(out, "cpu", grid=replace(CPU, uneven=((3, 20), (5, 20))))
        assert load_training_profile(str(out)) == extended == refit(extended)
        assert extended.cells[: len(profile.cells)] == profile.cells
        added = [entry["cell"] for entry in extended.cells[len(profile.cells) :]]
        assert [(cell["micro_batch"], cell["sequence_length"]) for cell in added] == [(3, 20), (5, 20)]
        assert {60, 100} <= set(extended.precisions["mixed"].device["layers"].tokens)
        assert len(extended.provenance["extended"]) == 1

    def test_stored_cells_give_the_same_fit_again(self, profile: TrainingProfile) -> None:
        assert refit(profile) == profile

    def test_validation_predicts_again_from_what_is_stored(self, profile: TrainingProfile) -> None:
        asked = training(sequence_length=24, steps=2)
        predicted, measured = validate(asked, profile, "cpu", repeats=2)
        assert set(measured.results) == {"sync", "async"}
        assert measured.results["sync"].counts == predicted.results["sync"].counts
        from batchsim.result import validation_json

        point = json.loads(json.dumps(validation_json(predicted, measured)))
        assert json.loads(json.dumps(predict_again(point, profile))) == point
        stages = set(point["measured"]["sync"]["stage_ms"])
        assert {"forward", "backward", "optimizer", "prepare", "device_copy_in"} <= stages

    def test_the_whole_command_line(self, profile: TrainingProfile, tmp_path: Path) -> None:
        (tmp_path / "cpu-train-tiny.json").write_text(profile.model_dump_json(), encoding="utf-8")
        (tmp_path / "points.yaml").write_text(
            "profiles: cpu-train\n"
            "defaults: {precision: mixed, steps: 1, model: tiny, sequence_length: 16}\n"
            "points: [{global_batch: 2, micro_batch: 1}]\n"
            "choices: [{global_batch: 4}]\n"
        )
        out = tmp_path / "points"
        for arguments in (
            ["run", str(tmp_path / "points.yaml"), "--device", "cpu", "--out", str(out), "--repeats", "1"],
            ["run", str(tmp_path / "points.yaml"), "--device", "cpu", "--out", str(out / "none"), "--bound", "1e9"],
            ["predict", str(out)],
            ["table", str(out)],
        ):
            told = CliRunner().invoke(points.app, [*arguments, "--profiles", str(tmp_path)])
            assert told.exit_code == 0, told.output
        assert len(list(out.glob("*.json"))) == 7
        assert "Of 6 ways" in told.output and "| tiny-s16-g2-m1 |" in told.output


def known_cells(recompute: float, accumulate_ns: float) -> list[dict[str, Any]]:
    """Cells of a device whose times follow a law: 100 ns a token and 1/8 ns a token and its sequence's length."""
    found: list[dict[str, Any]] = []
    for cell in GPU.cells("mixed"):
        tokens, length = cell.tokens, cell.sequence_length
        law = {"layers": tokens * (100 + length / 8), "head": 30 * tokens, "head_backward": 60 * tokens}
        law["layers_backward"] = 2 * law["layers"]
        if cell.checkpointing == "full":
            law["layers_backward"] += recompute * law["layers"]
        entry: dict[str, Any] = {
            "cell": cell.to_json(),
            "steps": 1,
            "calls": {"prepare": [1000 + 5 * cell.micro_batch + tokens // 4]},
        }
        device = {f"{part}/first": [ns] for part, ns in law.items()}
        device |= {f"{part}/later": [ns] for part, ns in law.items()}
        device["layers_backward/later"] = [law["layers_backward"] + accumulate_ns]
        match cell.purpose:
            case "device":
                entry |= {"device": device, "copies": [5000 + tokens // 8]}
            case "host":
                parts = {f"{part}/first": [900, 1100] for part in PARTS} | {
                    f"{part}/later": [1800, 2200] for part in PARTS
                }
                entry |= {
                    "host": parts,
                    "schedule": "sync",
                    "calls": {phase: [7] for phase in (*CALLS, "wait")},
                }
            case "optimizer":
                entry |= {
                    "host": {"optimizer/True": [500], "zero_grad/True": [50]},
                    "device": {"optimizer/True": [9000]},
                }
        found.append(entry)
    return found


class TestFit:
    def fitted(self, cells: list[dict[str, Any]] | None = None) -> TrainingProfile:
        counts = {kind: dict.fromkeys((*PARTS, "optimizer"), (10, 12)) for kind in ("none", "full")}
        return fit_profile(
            cells or known_cells(0.9, 4000.0), {"mixed": counts}, name="known", model="tiny", facts={},
            device_memory_bytes=1, overlaps=True, layers=2, round_trip_ns=1.0, base_length=512,
        )  # fmt: skip

    @pytest.mark.parametrize(("micro", "length"), [(1, 384), (5, 640), (3, 3072), (7, 896), (2, 6000), (40, 1024)])
    def test_a_known_law_is_found_between_the_cells(self, micro: int, length: int) -> None:
        fit = self.fitted().precisions["mixed"]
        tokens = micro * length
        assert fit.device["layers"].at(tokens, length) == pytest.approx(tokens * (100 + length / 8), rel=1e-3)
        assert fit.device["layers_backward"].at(tokens, length) == pytest.approx(
            2 * tokens * (100 + length / 8), rel=1e-3
        )
        assert fit.device["head"].at(tokens, length) == pytest.approx(30 * tokens, rel=1e-6)

    def test_what_is_computed_anew_and_added_is_found(self) -> None:
        fit = self.fitted().precisions["mixed"]
        assert fit.recompute == pytest.approx(0.9, abs=1e-3)
        assert fit.accumulate_ns == {"head_backward": 0.0, "layers_backward": pytest.approx(4000.0)}
        assert max(map(abs, fit.residuals.values())) < 1e-3

    def test_first_micro_batches_are_told_from_later_ones(self) -> None:
        part = self.fitted().precisions["mixed"].host["none"]["layers"]
        assert (part.host.at(first=True), part.host.at(first=False)) == (1000, 2000)
        assert (part.first, part.later) == (10, 12)

    def test_the_very_first_micro_batch_counts_for_what_leads_it_alone(self) -> None:
        cells = known_cells(0.9, 4000.0)
        for entry in cells:
            if entry["cell"]["purpose"] == "device":
                ns = entry["device"]["layers/first"][0]
                entry |= {"steps": 4, "ahead": False}
                entry["device"]["layers/first"] = [ns + 300, ns, ns, ns]
        found, plain = self.fitted(cells), self.fitted()
        assert found.precisions["mixed"].lead == pytest.approx(300 / 1000)
        assert plain.precisions["mixed"].lead == 0.0
        assert found.precisions["mixed"].device == plain.precisions["mixed"].device

    def test_of_many_steps_the_quantiles_count(self) -> None:
        assert settled([9.0, 1.0, 2.0], steps=3) == [1.0, 2.0]
        assert settled([1.0, 2.0, 9.0], steps=30) == [1.0, 2.0, 9.0]
        assert settled([9.0], steps=1) == [9.0]

    def test_groups_are_told_apart_by_pauses(self) -> None:
        assert groups_of([0, 1, 2, 50, 51, 200], 10) == [3, 2, 1]


class TestHostSpeed:
    def test_host_times_follow_it_each_by_its_thread_and_prescribed_ones_do_not(self) -> None:
        profile = small_training_profile(ratios=(1.0,))
        fast = beside(profile, HostSpeed(forward=2.0, backward=8.0))
        before, after = (each.precisions["mixed"].host["none"] for each in (profile, fast))
        assert after["layers"].host.ns == before["layers"].host.ns / 2
        assert after["layers_backward"].host.later_ns == before["layers_backward"].host.later_ns / 8
        assert fast.calls["copy_in"].ns == profile.calls["copy_in"].ns / 4
        assert fast.precisions["mixed"].device == profile.precisions["mixed"].device
        asked = training(schedules=["sync"], data={"prepare_ms_per_sequence": 2.0}, jitter=False)
        assert simulate(asked, fast).results["sync"].stage_ms["prepare"] == pytest.approx(2.0 * 16, rel=1e-3)
        assert beside(profile, HostSpeed()) == profile

    def test_the_repeat_that_counts_ran_on_a_steady_host(self) -> None:
        def repeat(total_ms: int, before: float, after: float) -> Repeat:
            return Repeat(Execution(total_ns=total_ms * 1_000_000), HostSpeed(before, before), HostSpeed(after, after))

        steady = [repeat(12, 1.0, 1.02), repeat(10, 1.3, 1.29), repeat(11, 1.1, 1.1)]
        shaken = [repeat(30, 0.4, 1.3), repeat(5, 1.3, 1.0)]
        assert counted([*shaken, *steady]).ran.total_ns == 11_000_000
        assert counted(shaken).ran.total_ns == 5_000_000


class TestPointsFiles:
    @pytest.mark.parametrize("name", ["points.yaml", "choices.yaml", "later/points.yaml"])
    def test_no_fit_has_seen_their_shapes(self, name: str) -> None:
        seen = {(cell.micro_batch, cell.sequence_length) for cell in GPU.cells("mixed")}
        for scenario in points.scenarios(FOLDER / name).values():
            assert (scenario.micro_batch, scenario.sequence_length) not in seen

    def test_they_are_of_every_kind(self) -> None:
        found = points.scenarios(FOLDER / "points.yaml")
        assert len(found) >= 20
        assert {each.model for each in found.values()} == set(TRAINED) - {"tiny"}
        assert {each.checkpointing for each in found.values()} == {"none", "full"}
        later = points.scenarios(FOLDER / "later" / "points.yaml")
        assert len(later) >= 14 and not set(later) & set(found)
        assert {each.model for each in later.values()} == {each.model for each in found.values()}
        assert len(points.scenarios(FOLDER / "choices.yaml")) == 2 * (10 + 6 + 6)

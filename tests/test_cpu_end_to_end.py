"""The whole loop on the CPU with a toy model: calibrate, simulate, execute, compare. Nothing is said of accuracy."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from batchsim.cli import app
from batchsim.operations import HOST_PHASES
from batchsim.profile import Profile, load_profile
from batchsim.result import OF_OTHER_KINDS, ScheduleResult
from calibration.calibrate import calibrate

ROOT = Path(__file__).parents[1]
SCENARIO = str(ROOT / "scenarios" / "tiny_cpu.yaml")
FIGURES = {field.name for field in fields(ScheduleResult)} - {"engine_s", *OF_OTHER_KINDS}


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def profile_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile as a newcomer's first command writes it."""
    out = tmp_path_factory.mktemp("calibrated") / "tiny-cpu.json"
    command = [sys.executable, "-m", "batchsim", "calibrate", "--device", "cpu", "--model", "tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"wrote {out}\n")
    return out


@pytest.fixture(scope="module")
def profile(profile_file: Path) -> Profile:
    return load_profile(str(profile_file))


@pytest.fixture(scope="module")
def validated(profile_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """(what `validate --json` prints, the folder that it wrote)."""
    out = tmp_path_factory.mktemp("validated")
    told = call(
        "validate", SCENARIO, "--device", "cpu", "--profile", profile_file, "--repeats", "2", "--out", out, "--json"
    )
    assert told.exit_code == 0, told.stderr
    return json.loads(told.stdout), out


def check_sane(result: dict[str, Any]) -> None:
    assert set(result) - {"interval_90"} == FIGURES
    for key in ("throughput_tokens_per_s", "total_s"):
        assert 0 < result[key] < math.inf
    assert 0 < result["step_ms"]["p50"] <= result["step_ms"]["p95"] <= result["step_ms"]["p99"]
    for key in ("device_busy_fraction", "host_busy_fraction"):
        assert 0 < result[key] <= 1
    idle = result["total_s"] * (1 - result["device_busy_fraction"])
    assert sum(result["idle_ns"].values()) == pytest.approx(idle * 1e9, rel=1e-6, abs=2)
    assert result["counts"]["requests"] == 8
    assert result["counts"]["output_tokens"] == 8 * 32


class TestCalibrate:
    def test_profile_is_whole_and_leaves_nothing_beside_it(self, profile: Profile, profile_file: Path) -> None:
        assert [path.name for path in profile_file.parent.iterdir()] == [profile_file.name]
        assert (profile.name, profile.model, profile.provenance["device"]) == ("tiny-cpu", "tiny", "cpu")
        assert profile.provenance["command"] == "batchsim calibrate --device cpu --model tiny --rounds 2"
        assert set(profile.loops) == {"sync/graph", "sync/eager", "async/graph", "async/eager"}
        assert profile.provenance["runs"] == 2 * len(profile.cells)

    def test_costs_are_positive(self, profile: Profile) -> None:
        for loop in profile.loops.values():
            for phase in ("schedule", "build_inputs", "copy_in", "copy_out", "record", "update"):
                assert all(0 < loop.phases[phase].mean_ns(rows) < math.inf for rows in (1, 8))
            assert loop.kernel_launch.mean_ns(8) > 0
        for curve in profile.device.decode:
            assert all(curve.at(kv_tokens) > 0 for kv_tokens in curve.kv_tokens)

    def test_a_finished_profile_is_not_overwritten(self, profile_file: Path) -> None:
        before = profile_file.read_bytes()
        refused = call("calibrate", "--device", "cpu", "--model", "tiny", "--out", profile_file)
        assert (refused.exit_code, profile_file.read_bytes()) == (2, before)


class TestInterruptedCalibration:
    RUNS = 15

    @pytest.fixture
    def interrupted(self, tmp_path: Path) -> Path:
        """Where a calibration was to write that was interrupted after some of its runs."""
        out = tmp_path / "tiny.json"
        begun = []

        def interrupt(_fraction: float, cell: str) -> None:
            begun.append(cell)
            if len(begun) > self.RUNS:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            calibrate("tiny", "cpu", out, rounds=1, progress=interrupt)
        return out

    def test_keeps_what_was_measured_and_goes_on_from_there(self, interrupted: Path) -> None:
        partial = interrupted.with_name("tiny.json.partial")
        assert list(interrupted.parent.iterdir()) == [partial]
        finished = Counter(cell for cell, _ in json.loads(partial.read_text(encoding="utf-8"))["runs"])
        assert finished.total() == self.RUNS

        refused = call("calibrate", "--device", "cpu", "--model", "tiny", "--out", interrupted)
        assert refused.exit_code == 2
        assert "wanted --resume or --force" in refused.stderr

        fractions: list[float] = []
        resumed = Counter[str]()

        def note(fraction: float, cell: str) -> None:
            fractions.append(fraction)
            resumed[cell] += 1

        profile = calibrate("tiny", "cpu", interrupted, resume=True, rounds=1, progress=note)
        assert set((finished + resumed).values()) == {1}
        assert (finished + resumed).total() == profile.provenance["runs"] == len(profile.cells)
        assert fractions == sorted(fractions)
        assert fractions[0] == pytest.approx(self.RUNS / len(profile.cells))
        assert list(interrupted.parent.iterdir()) == [interrupted]
        assert load_profile(str(interrupted)) == profile

    def test_is_not_gone_on_with_for_another_model_or_device(self, tmp_path: Path) -> None:
        partial = tmp_path / "tiny.json.partial"
        other = json.dumps({"identity": {"model": "llama-3.2-1b", "device": "cpu"}, "runs": []})
        partial.write_text(other, encoding="utf-8")
        failed = call("calibrate", "--device", "cpu", "--model", "tiny", "--out", tmp_path / "tiny.json", "--resume")
        assert failed.exit_code == 1
        assert "was measured for" in failed.stderr
        assert partial.read_text(encoding="utf-8") == other


class TestRun:
    def test_simulates_both_schedules_at_the_profiles_costs(self, profile_file: Path, tmp_path: Path) -> None:
        told = call("run", SCENARIO, "--profile", profile_file, "--out", tmp_path, "--json")
        assert told.exit_code == 0, told.stderr
        value = json.loads(told.stdout)
        assert set(value["schedules"]) == {"sync", "async"}
        assert value["profile"] == "tiny-cpu"
        for result in value["schedules"].values():
            assert result.pop("engine_s") > 0
            check_sane(result)
        assert {path.name for path in tmp_path.iterdir()} == {
            "result.json", "report.html", "trace.json", "requests.parquet",
        }  # fmt: skip

    def test_same_seed_same_bytes(self, profile_file: Path) -> None:
        told = [
            re.sub(r',\n +"engine_s": [-+.\de]+', "", call("run", SCENARIO, "--profile", profile_file, "--json").stdout)
            for _ in range(2)
        ]
        assert "engine_s" not in told[0]
        assert told[0] == told[1]


class TestValidate:
    def test_predicted_and_measured_have_the_same_keys(self, validated: tuple[dict[str, Any], Path]) -> None:
        told, _ = validated
        assert set(told) == {
            "schema_version", "scenario", "profile", "predicted", "measured", "error", "provenance",
        }  # fmt: skip
        for side in ("predicted", "measured"):
            assert set(told[side]) == {"sync", "async"}
            for result in told[side].values():
                check_sane(result)
        for schedule in ("sync", "async"):
            predicted, measured = told["predicted"][schedule], told["measured"][schedule]
            assert predicted["counts"] == measured["counts"]
            assert set(measured["stage_ms"]) - {"wait", "stream_wait"} >= set(HOST_PHASES) - {"wait", "stream_wait"}
            assert all(math.isfinite(error) for error in told["error"][schedule].values())

    def test_says_how_fast_the_host_was(self, validated: tuple[dict[str, Any], Path]) -> None:
        facts = validated[0]["provenance"]["measured"]
        assert facts["device"] == "cpu"
        assert facts["same_machine_as_profile"] is True
        assert 0 < facts["host_speed"] < math.inf
        assert {schedule: len(repeats) for schedule, repeats in facts["repeats"].items()} == {"sync": 2, "async": 2}

    def test_report_and_trace_hold_both_sides(self, validated: tuple[dict[str, Any], Path]) -> None:
        told, out = validated
        assert json.loads((out / "result.json").read_text(encoding="utf-8")) == told
        assert "Predicted against measured" in (out / "report.html").read_text(encoding="utf-8")
        names = [
            event["args"]["name"]
            for event in json.loads((out / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
            if event.get("name") == "process_name"
        ]
        assert any("simulated" in name for name in names)
        assert any("executed" in name for name in names)

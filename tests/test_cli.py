"""The command line: exit codes, one sentence an error, JSON alone on stdout, and nothing imported before its time."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import batchsim.engine
import batchsim.intervals
import batchsim.load  # before anything takes the engine's place
import batchsim.profile
from batchsim import __version__
from batchsim.cli import app
from batchsim.errors import InputError, RunError
from batchsim.result import Run
from tests.sample_runs import sample_runs, serving_runs

ROOT = Path(__file__).parents[1]
SCENARIO = str(ROOT / "scenarios" / "async_8b_h200.yaml")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces profile and engine; holds what they were called with. A `failure` in it is raised, a `run` returned."""
    seen: dict[str, Any] = {}

    def load_profile(name: str, base: Path | None = None) -> object:
        seen["profile"], seen["base"] = name, base
        return object()

    def simulate(scenario: object, profile: object, **options: Any) -> Run:
        seen["scenario"], seen["options"] = scenario, options
        if "failure" in seen:
            raise seen["failure"]
        run: Run = seen.get("run") or sample_runs()[0]
        return run

    monkeypatch.setattr(batchsim.profile, "load_profile", load_profile)
    monkeypatch.setattr(batchsim.engine, "simulate", simulate)
    monkeypatch.setattr(batchsim.intervals, "of_run", lambda run, *_, **__: run)  # a stub has no costs to be off
    return seen


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def python(code: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True, text=True, timeout=120, cwd=ROOT, check=False, **options,
    )  # fmt: skip


class TestRun:
    def test_prints_a_table(self, engine: dict[str, Any]) -> None:
        result = call("run", SCENARIO)
        assert result.exit_code == 0
        assert "tokens/s" in result.stdout
        assert engine["profile"] == "h200-llama-3.1-8b"
        assert engine["base"] == engine["options"]["base"] == Path(SCENARIO).parent

    def test_json_is_all_that_stdout_holds(self, engine: dict[str, Any], tmp_path: Path) -> None:
        result = call("run", SCENARIO, "--json", "--out", str(tmp_path))
        told = json.loads(result.stdout)
        assert set(told) == {"schema_version", "scenario", "profile", "schedules", "provenance"}
        assert set(told["schedules"]) == {"sync", "async"}
        assert told["schedules"]["async"]["gain_over_sync"] > 0
        for schedule in told["schedules"].values():
            del schedule["engine_s"]  # the one thing that another run of the same would not give again
        assert json.loads((tmp_path / "result.json").read_text()) == told

    def test_writes_what_people_look_at(self, engine: dict[str, Any], tmp_path: Path) -> None:
        out = tmp_path / "a" / "b"
        assert call("run", SCENARIO, "--out", str(out)).exit_code == 0
        assert {path.name for path in out.iterdir()} == {"result.json", "report.html", "trace.json"}

    def test_writes_the_requests_of_a_run_that_has_them(self, engine: dict[str, Any], tmp_path: Path) -> None:
        engine["run"] = serving_runs()[0]
        result = call("run", SCENARIO, "--out", str(tmp_path))
        assert result.exit_code == 0
        assert {path.name for path in tmp_path.iterdir()} == {
            "result.json", "report.html", "trace.json", "requests.parquet",
        }  # fmt: skip
        assert "requests.parquet" in result.stderr

    def test_options_replace_values_of_the_file(self, engine: dict[str, Any]) -> None:
        options = [
            "--schedules",
            "async",
            "--set",
            "workload.num_prompts=4",
            "--set",
            "seed=7",
            "--profile",
            "mine.json",
        ]
        assert call("run", SCENARIO, *options).exit_code == 0
        scenario = engine["scenario"]
        assert scenario.schedules == ("async",)
        assert (scenario.workload.num_prompts, scenario.seed) == (4, 7)
        assert (engine["profile"], engine["base"]) == ("mine.json", Path())

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            (["--set", "seed=x"], "--set: seed: found the string 'x'"),
            (["--schedules", "sync,,async"], "--schedules: schedules.1: found the string ''"),
            (
                ["--schedules", "turbo"],
                "--schedules: schedules.0: found the string 'turbo', wanted sync, async or tile",
            ),
            (["--out", SCENARIO], "--out: found a file"),
            (["--profile", ""], "--profile: profile: found the string ''"),
        ],
    )
    def test_refused_options_exit_2_with_one_sentence(
        self, engine: dict[str, Any], options: list[str], told: str
    ) -> None:
        result = call("run", SCENARIO, *options)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(told)
        assert result.stderr.count("\n") == 1
        assert "scenario" not in engine

    def test_a_refusal_by_the_engine_names_the_file(self, engine: dict[str, Any]) -> None:
        engine["failure"] = InputError(None, "max_num_seqs", "too many", "fewer")
        result = call("run", SCENARIO)
        assert result.exit_code == 2
        assert result.stderr == f"{SCENARIO}: max_num_seqs: found too many, wanted fewer\n"

    def test_a_failed_run_exits_1_with_one_sentence(self, engine: dict[str, Any]) -> None:
        engine["failure"] = RunError("it broke")
        result = call("run", SCENARIO)
        assert (result.exit_code, result.stdout, result.stderr) == (1, "", "it broke\n")

    def test_an_interrupted_run_exits_130_with_one_line(self, engine: dict[str, Any]) -> None:
        engine["failure"] = KeyboardInterrupt()
        result = call("run", SCENARIO)
        assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")

    def test_what_an_interrupted_run_had_reached_is_told(self, engine: dict[str, Any]) -> None:
        run = serving_runs()[0]
        cut = replace(run.results["sync"], partial="interrupted after 3 of 600 requests")
        engine["run"] = replace(run, results={"sync": cut})
        result = call("run", SCENARIO)
        assert (result.exit_code, result.stderr) == (130, "interrupted\n")
        assert "interrupted after 3 of 600 requests" in result.stdout
        told = call("run", SCENARIO, "--json")
        assert told.exit_code == 130
        assert json.loads(told.stdout)["schedules"]["sync"]["partial"] == cut.partial

    def test_an_unwritable_folder_exits_1(self, engine: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        result = call("run", SCENARIO, "--out", str(tmp_path / "file" / "below"))
        assert result.exit_code == 1
        assert "Not a directory" in result.stderr


@pytest.mark.parametrize("command", ["run", "validate"])
def test_a_scenario_that_is_not_there_exits_2(command: str) -> None:
    result = call(command, "nowhere.yaml")
    assert result.exit_code == 2
    assert result.stderr == "nowhere.yaml: found no readable file (No such file or directory), wanted a YAML file\n"


@pytest.mark.parametrize(
    "arguments", [["walk"], ["run"], ["run", "a", "b"], ["run", "a", "--sed", "x"], ["validate", "a", "--repeats", "0"]]
)
def test_usage_errors_exit_2(arguments: list[str]) -> None:
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage" in result.stderr


class TestValidate:
    @pytest.fixture
    def module(self) -> Any:
        """Imported before anything takes the engine's place."""
        return pytest.importorskip("calibration.validate")

    @pytest.fixture(autouse=True)
    def device(self, module: Any, engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "Bench", lambda device: device)

        def compare(scenario: object, profile: object, device: str, **options: Any) -> tuple[Run, Run]:
            engine.update(device=device, **options)
            return sample_runs()

        monkeypatch.setattr(module, "validate", compare)
        monkeypatch.setattr("calibration.executed.with_intervals", lambda predicted, *_, **__: predicted)

    def test_one_file_gives_one_object(self, engine: dict[str, Any]) -> None:
        result = call("validate", SCENARIO, "--device", "cpu", "--repeats", "5", "--json")
        told = json.loads(result.stdout)
        assert set(told) == {
            "schema_version", "scenario", "profile", "predicted", "measured", "error", "provenance",
        }  # fmt: skip
        assert told["predicted"]["sync"].keys() == told["measured"]["sync"].keys()
        predicted, measured = (told[side]["sync"]["throughput_tokens_per_s"] for side in ("predicted", "measured"))
        assert told["error"]["sync"]["throughput_tokens_per_s"] == pytest.approx(predicted / measured - 1)
        assert (engine["device"], engine["repeats"]) == ("cpu", 5)

    def test_several_files_give_a_list_and_a_folder_each(self, tmp_path: Path) -> None:
        other = str(Path(SCENARIO).with_name("async_1b_h200.yaml"))
        result = call("validate", SCENARIO, other, "--json", "--out", str(tmp_path))
        assert len(json.loads(result.stdout)) == 2
        assert (tmp_path / "async_8b_h200" / "report.html").exists()
        assert (tmp_path / "async_1b_h200" / "trace.json").exists()

    def test_an_unknown_device_is_refused(self) -> None:
        result = call("validate", SCENARIO, "--device", "tpu")
        assert (result.exit_code, result.stderr) == (2, "--device: found the string 'tpu', wanted cuda or cpu\n")


class TestCalibrate:
    @pytest.fixture(autouse=True)
    def measure(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        module = pytest.importorskip("calibration.calibrate")
        calls: list[Any] = []
        monkeypatch.setattr(module, "calibrate", lambda *arguments, **options: calls.append((arguments, options)))
        return calls

    def test_measures_into_a_new_file(self, measure: list[Any], tmp_path: Path) -> None:
        out = tmp_path / "p.json"
        assert call("calibrate", "--device", "cpu", "--model", "tiny", "--out", str(out)).exit_code == 0
        assert measure == [(("tiny", "cpu", out), {"rounds": 2, "resume": False, "progress": None})]

    def test_what_was_measured_is_not_overwritten_unasked(self, measure: list[Any], tmp_path: Path) -> None:
        out, partial = tmp_path / "p.json", tmp_path / "p.json.partial"
        arguments = ["calibrate", "--device", "cpu", "--model", "tiny", "--out", str(out)]
        partial.write_text("{}")
        refused = call(*arguments)
        assert refused.exit_code == 2
        assert "wanted --resume or --force" in refused.stderr
        assert call(*arguments, "--resume").exit_code == 0
        partial.unlink()
        out.write_text("{}")
        assert call(*arguments).exit_code == 2
        assert call(*arguments, "--resume").exit_code == 2
        assert call(*arguments, "--force").exit_code == 0
        assert [options["resume"] for _, options in measure] == [True, False]

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            (["--model", "tny", "--out", "p.json"], "--model: found the string 'tny'"),
            (["--model", "tiny", "--out", "."], "--out: found the folder ."),
            (["--model", "tiny", "--out", "p.json", "--resume", "--force"], "--resume: found --force as well"),
        ],
    )
    def test_refused_options_exit_2(self, measure: list[Any], options: list[str], told: str) -> None:
        result = call("calibrate", *options)
        assert (result.exit_code, measure) == (2, [])
        assert result.stderr.startswith(told)


def test_schema_is_the_shipped_one() -> None:
    shipped = (ROOT / "scenarios" / "scenario.schema.json").read_text()
    assert call("schema").stdout == shipped


def test_version() -> None:
    assert call("--version").stdout == f"batchsim {__version__}\n"


HEAVY = ("torch", "numpy", "scipy", "plotly", "simpy", "pydantic")


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import batchsim", HEAVY),
        ("import batchsim.scenario", ("torch", "numpy", "scipy", "plotly", "simpy")),
        ("import batchsim.engine, batchsim.report, batchsim.timeline", ("torch", "triton", "calibration.executor")),
        ("import batchsim.cli; batchsim.cli.main()", HEAVY),
    ],
    ids=["package", "scenario", "engine", "help"],
)
def test_imports_are_no_heavier_than_they_need_to_be(code: str, absent: Sequence[str]) -> None:
    done = python(f"import atexit, sys; atexit.register(lambda: print('loaded:', *sys.modules))\n{code}", "--help")
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.rpartition("loaded:")[2].split())
    assert "batchsim" in loaded
    assert loaded.isdisjoint(absent)


def test_a_reader_that_leaves_is_no_failure_to_report() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "batchsim", "schema"],
            stdout=pipe, stderr=subprocess.PIPE, timeout=60, cwd=ROOT, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (141, b"")


def test_ctrl_c_ends_a_command_with_one_line(tmp_path: Path) -> None:
    fifo = tmp_path / "scenario.yaml"
    os.mkfifo(fifo)
    process = subprocess.Popen(
        [sys.executable, "-m", "batchsim", "run", str(fifo)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    # Opening the pipe for writing returns once the command has opened it for reading.
    with process, fifo.open("wb"):
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"interrupted\n")


def test_the_readme_names_every_key_and_every_command() -> None:
    from batchsim.dynamic_scenario import AnswerObjectives, DynamicScenario
    from batchsim.scenario import Objectives, Scenario
    from batchsim.training_scenario import CriticalBatch, Data, TrainingScenario
    from batchsim.workload_scenario import FixedWorkload, RandomWorkload, TraceWorkload

    readme = (ROOT / "README.md").read_text()
    workloads = [key for model in (FixedWorkload, RandomWorkload, TraceWorkload) for key in model.model_fields]
    below = [*(f"workload.{key}" for key in workloads), *(f"slo.{key}" for key in Objectives.model_fields)]
    keys = [*Scenario.model_fields, *below]
    keys += [*DynamicScenario.model_fields, *(f"slo.{key}" for key in AnswerObjectives.model_fields)]
    keys += [*TrainingScenario.model_fields, *(f"critical_batch.{key}" for key in CriticalBatch.model_fields)]
    keys += [f"data.{key}" for key in Data.model_fields]
    assert [key for key in keys if f"`{key}`" not in readme] == []
    commands = re.findall(r"│ (\w+)  ", call("--help").stdout)
    assert {"run", "tiles", "validate", "calibrate", "schema"} <= set(commands)
    assert [name for name in commands if f"batchsim {name}" not in readme] == []

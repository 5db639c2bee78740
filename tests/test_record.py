"""Recording a loop: what the file says of it, what is refused, and that it costs the loop little."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import calibration
from batchsim.cli import app
from batchsim.errors import InputError, RunError
from calibration.recording import write_with_key
from tests.traces_kineto import TracedLoop

SHORT: dict[str, int] = {"warmup": 2, "timed": 8, "traced": 4}
SHORT_STEPS = 2 + 8 + 2 + 4


def recorded(path: Path, steps: int = SHORT_STEPS, sleep_s: float = 2e-3) -> dict[str, Any]:
    """What a loop of `steps` steps writes to `path`; there is no GPU, which is said when all has been written."""
    with pytest.raises(RunError, match="no device events"), calibration.record(path, **SHORT) as recording:  # type: ignore[arg-type]  # noqa: PT012
        for _ in range(steps):
            recording.step()
            with recording.phase("prepare"):
                time.sleep(sleep_s)
            torch.ones(8).sum()
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return dict(json.loads(text))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the loop of these tests is one without a device")
class TestWithoutDevice:
    @pytest.mark.parametrize("name", ["run.trace.json.gz", "deep/run.json"])
    def test_the_file_is_a_trace_with_a_summary_in_front(self, tmp_path: Path, name: str) -> None:
        trace = recorded(tmp_path / name)
        assert next(iter(trace)) == "batchsim"
        steps = [event for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep#")]
        assert len(steps) == SHORT["traced"]
        phases = [event for event in trace["traceEvents"] if event.get("name") == "prepare"]
        assert len(phases) == SHORT["traced"]
        assert all(event["cat"] == "user_annotation" for event in steps + phases)
        assert [path for path in (tmp_path / name).parent.iterdir() if path.is_file()] == [tmp_path / name]

    def test_the_summary_tells_steps_and_phases(self, tmp_path: Path) -> None:
        summary = recorded(tmp_path / "run.json", steps=SHORT_STEPS + 5)["batchsim"]
        assert summary["schema_version"] == 1
        assert summary["steps"] == SHORT["timed"] and summary["traced_steps"] == SHORT["traced"]
        assert 2 <= summary["phases_ms"]["prepare"] <= summary["steady_step_ms"] < 50
        quantiles = list(summary["steady_step_ms_quantiles"].values())
        assert quantiles == sorted(quantiles)
        assert quantiles[0] <= summary["steady_step_ms"] <= quantiles[-1] and 1 <= summary["turn"] <= 2
        assert summary["torch"] == torch.__version__ and summary["host_cores"]

    def test_steps_of_an_iterable_close_the_last_step_at_the_end(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="no device events"), calibration.record(tmp_path / "run", **SHORT) as mine:  # type: ignore[arg-type]
            assert list(mine.steps("x" * SHORT_STEPS)) == ["x"] * SHORT_STEPS
        assert (tmp_path / "run").exists()

    def test_a_phase_may_repeat_and_nest(self, tmp_path: Path) -> None:
        path = tmp_path / "run.json"
        with pytest.raises(RunError), calibration.record(path, **SHORT) as mine:  # type: ignore[arg-type]  # noqa: PT012
            for _ in mine.steps(range(SHORT_STEPS)):
                for _ in range(2):
                    with mine.phase("work"), mine.phase("work"):
                        time.sleep(1e-3)
        phases = json.loads(path.read_text())["batchsim"]["phases_ms"]
        assert 2 <= phases["work"] < 4 + 20

    def test_steps_that_take_turns_are_averaged_and_their_phases_too(self, tmp_path: Path) -> None:
        path, wanted = tmp_path / "run.json", {"warmup": 1, "timed": 12, "traced": 4}
        with pytest.raises(RunError), calibration.record(path, **wanted) as mine:  # type: ignore[arg-type]  # noqa: PT012
            for number in mine.steps(range(1 + 12 + 2 + 4)):
                time.sleep(20e-3)
                if number % 3 == 2:
                    with mine.phase("every third"):
                        time.sleep(15e-3)
        summary = json.loads(path.read_text())["batchsim"]
        assert summary["turn"] == 3
        assert 15 / 3 <= summary["phases_ms"]["every third"] <= 15
        assert 20 + 15 / 3 <= summary["steady_step_ms"] <= 60

    def test_whatif_takes_what_was_recorded(self, tmp_path: Path) -> None:
        summary = recorded(tmp_path / "run.json")["batchsim"]
        loop = TracedLoop(recorded=summary | {"steady_step_ms": 3.7, "phases_ms": {"build": 0.4, "prepare": 0.48}})
        path = loop.write(tmp_path / "loop.trace.json.gz")
        result = CliRunner().invoke(app, ["whatif", str(path), "--json"], catch_exceptions=False)
        answer = json.loads(result.stdout)
        assert answer["steady_step_ms"] == answer["schedules"]["sync"]["step_ms"] == 3.7
        result = CliRunner().invoke(
            app, ["learn", str(path), "--out", str(tmp_path / "p.json")], catch_exceptions=False
        )
        profile = json.loads((tmp_path / "p.json").read_text())
        # Times of phases are with those of the phases inside them, which learn takes out.
        assert profile["phases_ms"]["build"] == pytest.approx(0.4, abs=0.01)
        assert profile["phases_ms"]["prepare"] == pytest.approx(0.08, abs=0.01)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # those of torch's CUDA parts are not this project's
def test_a_recorded_loop_is_learned(tmp_path: Path) -> None:
    weights = torch.randn(2048, 2048, device="cuda")
    results = []
    path = tmp_path / "run.trace.json.gz"
    with calibration.record(path) as recording:
        for number in recording.steps(range(recording.wanted)):
            with recording.phase("prepare"):
                end = time.perf_counter_ns() + 1_000_000
                while time.perf_counter_ns() < end:
                    pass
                inputs = torch.full((2048, 2048), float(number)).cuda()
            with recording.phase("forward"):
                for _ in range(8):
                    inputs = (inputs @ weights).relu_()
            with recording.phase("results"):
                results.append(inputs[0].sum().item())
    arguments = ["learn", str(path), "--out", str(tmp_path / "profile.json")]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    profile = json.loads((tmp_path / "profile.json").read_text())
    summary = json.loads(gzip.decompress(path.read_bytes()))["batchsim"]
    assert profile["steady_step_ms"] == summary["steady_step_ms"] > 1
    assert {"prepare", "forward"} <= {
        operation["phase"] for step in profile["steps"] for operation in step["operations"]
    }
    assert abs(profile["replay_error"]) < 0.1
    answer = json.loads(CliRunner().invoke(app, ["whatif", str(path), "--json"], catch_exceptions=False).stdout)
    assert answer["as_is"] == "sync"
    # The millisecond of Python can be hidden, the device's work cannot.
    assert answer["schedules"]["async"]["step_ms"] < answer["schedules"]["sync"]["step_ms"]


def test_too_few_steps_are_told_and_nothing_is_written(tmp_path: Path) -> None:
    loop = range(SHORT_STEPS - 1)
    wanted = r"called recording.step\(\) 15 times and 16 are wanted"
    with pytest.raises(RunError, match=wanted), calibration.record(tmp_path / "run.json", **SHORT) as recording:  # type: ignore[arg-type]
        list(recording.steps(loop))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [0, 5, 14, SHORT_STEPS + 3])
def test_an_exception_in_the_loop_passes_and_leaves_nothing(tmp_path: Path, steps: int) -> None:
    with pytest.raises(KeyError, match="mine"), calibration.record(tmp_path / "run.json", **SHORT) as recording:  # type: ignore[arg-type]  # noqa: PT012
        for _ in range(steps):
            recording.step()
        raise KeyError("mine")
    assert not list(tmp_path.iterdir())
    with torch.profiler.profile():  # none is still running
        torch.ones(1).sum()


def test_a_folder_and_odd_numbers_of_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found a folder"):
        calibration.record(tmp_path)
    with pytest.raises(InputError, match="traced: found 3, wanted 4 or more"):
        calibration.record(tmp_path / "run.json", traced=3)


def test_an_idle_phase_costs_less_than_a_microsecond(tmp_path: Path) -> None:
    recording = calibration.record(tmp_path / "run.json")
    best = min(_phases_ns(recording, 1000) for _ in range(20))
    assert best < 1000


def _phases_ns(recording: Any, count: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(count):
        with recording.phase("idle"):
            pass
    return (time.perf_counter_ns() - start) / count


@pytest.mark.parametrize(("event", "found"), [("kernel", True), ("gpu_memcpy", True), ("cpu_op", False)])
def test_device_events_are_seen_across_pieces(tmp_path: Path, event: str, found: bool) -> None:
    source, target = tmp_path / "source.json", tmp_path / "target.json"
    for shift in range(24):  # 1 MiB is the size of a piece, after 64 bytes of head
        filler = "x" * ((1 << 20) + 64 - 30 - shift)
        source.write_text('{"filler": "' + filler + '", "cat": "' + event + '"}')
        assert write_with_key(source, target, "batchsim", {"a": 1}) is found
        assert json.loads(target.read_text()) == {"batchsim": {"a": 1}, "filler": filler, "cat": event}

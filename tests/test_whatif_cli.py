"""`batchsim learn` and `batchsim whatif`: what they print and write, how they use untraced times, what they refuse."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from batchsim.cli import app
from batchsim.errors import InputError
from batchsim.learned import LearnedProfile, load_learned
from batchsim.whatif import whatif
from batchsim.whatif.timeline import predicted, write_predicted
from batchsim.whatif.timers import by_name, check_known, known_phases, read_timers, untraced
from batchsim.whatif.traced import replay_traced
from batchsim.whatif.variants import is_overlapped
from calibration.kineto import read_trace
from calibration.learn import learn
from calibration.phases_tree import parents_of
from tests.traces_kineto import TracedLoop

STEADY = "3.6"
NESTED = {"build": "prepare"}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TracedLoop().write(tmp_path_factory.mktemp("traces") / "loop.trace.json.gz")


@pytest.fixture(scope="module")
def profile(file: Path) -> LearnedProfile:
    return learn(read_trace(file))


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def refusal(*arguments: str | Path) -> str:
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.count("\n") == 1
    return result.stderr.strip()


def timers(folder: Path, value: Any) -> Path:
    path = folder / "phases.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_learn_writes_a_profile_that_whatif_reads_as_it_reads_the_trace(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "profile.json"
    result = call("learn", file, "--steady-step-ms", STEADY, "--out", out)
    assert (result.exit_code, result.stderr) == (0, f"wrote {out}\n")
    assert load_learned(out).steady_step_ms == float(STEADY)
    answers = [call("whatif", *args, "--json") for args in ((out,), (file, "--steady-step-ms", STEADY))]
    assert [answer.exit_code for answer in answers] == [0, 0]
    assert answers[0].stdout == answers[1].stdout


def test_learn_tells_what_a_step_consists_of(file: Path, tmp_path: Path) -> None:
    result = call("learn", file, "--out", tmp_path / "p.json")
    for part in ("10 steps found by annotation 'ProfilerStep', on Made-up GPU", "1, of 20 nodes", "build", "not known"):
        assert part in result.stdout
    told = json.loads(call("learn", file, "--out", tmp_path / "p.json", "--json").stdout)
    loop = TracedLoop()
    assert (told["graphs"], told["graph_nodes"], told["kernels"], told["copies"]) == (1, 20, 0, 2)
    assert told["traced_step_ms"] == pytest.approx(loop.step_us / 1e3, rel=0.03)
    assert told["replayed_step_ms"] == pytest.approx(told["traced_step_ms"], rel=0.01)
    assert told["phases"]["build"]["host_ms"] == pytest.approx(loop.build_us / 1e3, rel=0.03)
    assert sum(phase["share"] for phase in told["phases"].values()) == pytest.approx(1)
    assert told["waits_ms"] == pytest.approx(loop.kernels * loop.kernel_us / 1e3, rel=0.03)


def test_json_is_all_of_stdout_and_the_same_every_time(file: Path, tmp_path: Path) -> None:
    result = call("whatif", file, "--steady-step-ms", STEADY, "--json", "--html", tmp_path / "a.html")
    told = json.loads(result.stdout)
    assert result.stderr == f"wrote {tmp_path / 'a.html'}\n"
    assert told["as_is"] == "sync"
    assert told["schedules"]["sync"]["step_ms"] == pytest.approx(float(STEADY))
    for found in told["schedules"].values():
        low, high = found["step_ms_interval"]
        assert 0 < low <= found["step_ms"] <= high
        assert 0 < found["device_busy_fraction"] <= 1
    assert call("whatif", file, "--steady-step-ms", STEADY, "--json").stdout == result.stdout


@pytest.mark.parametrize("command", ["learn", "whatif"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e300", "1e-300"])
def test_a_step_that_is_no_time_is_refused(file: Path, tmp_path: Path, command: str, value: str) -> None:
    out = ("--out", tmp_path / "p.json") if command == "learn" else ()
    text = refusal(command, file, *out, "--steady-step-ms", value)
    assert text.startswith(f"--steady-step-ms: found {float(value)!r}, wanted milliseconds from")
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize("value", ["0.5", "5000"])
def test_a_step_of_another_loop_is_refused(file: Path, value: str) -> None:
    assert "wanted the step time of the loop that was traced" in refusal("whatif", file, "--steady-step-ms", value)


def test_what_is_no_trace_is_refused(file: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "p.json")
    (tmp_path / "cut.json").write_text(gzip.decompress(file.read_bytes()).decode()[:-1000])
    (tmp_path / "other.json").write_text('{"kind": "service", "steps": []}')
    for name, part in (("cut.json", "record"), ("other.json", "no traceEvents"), ("none.json", "no readable file")):
        for command in (("learn", tmp_path / name, *out), ("whatif", tmp_path / name)):
            assert part in refusal(*command)
    assert "a directory" in refusal("whatif", tmp_path)


def test_a_damaged_profile_is_refused(profile: LearnedProfile, tmp_path: Path) -> None:
    text = profile.model_dump_json()
    for damaged in (text[:-500], text.replace('"launch_ns":', '"launch_ns":-')):
        (tmp_path / "p.json").write_text(damaged)
        assert refusal("whatif", tmp_path / "p.json").startswith(str(tmp_path / "p.json"))
    (tmp_path / "p.json").write_text(profile.model_copy(update={"steady_step_ms": 1e-9}).model_dump_json())
    assert "steady_step_ms: found 1e-09, wanted" in refusal("whatif", tmp_path / "p.json")


def test_output_never_replaces_what_is_read(tmp_path: Path) -> None:
    file = TracedLoop().write(tmp_path / "loop.json")
    before = file.read_bytes()
    for command in (
        ("learn", file, "--out", file),
        ("whatif", file, "--html", file),
        ("whatif", file, "--trace-out", file),
    ):
        assert "that is read, wanted another file" in refusal(*command)
    assert "the folder" in refusal("learn", file, "--out", tmp_path)
    assert file.read_bytes() == before


def test_a_recording_brings_its_untraced_times_along(tmp_path: Path) -> None:
    about = {"steady_step_ms": 3.6, "phases_ms": {"prepare": 0.55, "build": 0.5, "gone": 1.0}}
    file = TracedLoop(recorded=about).write(tmp_path / "loop.json")
    told = json.loads(call("learn", file, "--out", tmp_path / "p.json", "--json").stdout)
    assert told["steady_step_ms"] == 3.6
    assert told["untraced_phases_ms"] == {"build": pytest.approx(0.5, rel=0.02), "prepare": pytest.approx(0.05)}
    assert json.loads(call("whatif", file, "--steady-step-ms", "3.7", "--json").stdout)["steady_step_ms"] == 3.7
    for value in (-1, "3.6", True, 1e300):
        TracedLoop(recorded=about | {"steady_step_ms": value}).write(file)
        assert "batchsim.steady_step_ms: found" in refusal("whatif", file)


def test_annotations_stand_in_one_another(file: Path) -> None:
    assert parents_of(read_trace(file)) == NESTED


def test_a_timer_has_the_time_of_phases_inside_it(profile: LearnedProfile) -> None:
    both, notes = untraced(profile, {"prepare": 0.5, "build": 0.4}, NESTED)
    assert notes == []
    assert both == {"build": pytest.approx(0.4, rel=0.02), "prepare": pytest.approx(0.1)}
    # A timer around a phase without one is shared out as the trace has it.
    around, _ = untraced(profile, {"prepare": 0.35}, NESTED)
    assert sum(around.values()) == pytest.approx(0.35, rel=0.02)
    assert around["build"] / around["prepare"] == pytest.approx(6, rel=0.05)
    apart, _ = untraced(profile, {"prepare": 0.35}, {})
    assert apart == {"prepare": pytest.approx(0.35)}


def test_timers_of_waits_and_of_less_than_is_inside_are_left_out(profile: LearnedProfile) -> None:
    found, notes = untraced(profile, {"host": 3.0, "update": 0.1}, NESTED)
    assert found == {"update": pytest.approx(0.1)}
    assert notes == ["the untraced time of host is left out, for the device is waited for in it"]
    found, notes = untraced(profile, {"prepare": 0.3, "build": 0.4}, NESTED)
    assert list(found) == ["build"]
    assert notes == ["the untraced time of prepare is left out, for phases inside it take longer"]


def test_phases_named_like_paths_stand_in_one_another() -> None:
    assert by_name(["a", "a/b", "a/b/c", "a/x/y", "ab", "d/e"]) == {"a/b": "a", "a/b/c": "a/b", "a/x/y": "a"}


def test_parents_that_go_round_in_circles_do_no_harm(profile: LearnedProfile) -> None:
    found, _ = untraced(profile, {"update": 0.1}, {"build": "prepare", "prepare": "build", "update": "update"})
    assert found == {"update": pytest.approx(0.1)}


@pytest.mark.parametrize("learned", [False, True], ids=["trace", "profile"])
def test_host_phases_are_told_and_used(file: Path, tmp_path: Path, learned: bool) -> None:
    source = tmp_path / "p.json"
    call("learn", file, "--out", source)
    phases = timers(tmp_path, {"phases_ms": {"prepare": 0.5, "build": 0.4}})
    given_file = source if learned else file
    page = tmp_path / "page.html"
    result = call("whatif", given_file, "--steady-step-ms", STEADY, "--host-phases", phases, "--json", "--html", page)
    told, plain = (
        json.loads(text) for text in (result.stdout, call("whatif", file, "--steady-step-ms", STEADY, "--json").stdout)
    )
    assert told["schedules"]["async"]["host_ms"] != plain["schedules"]["async"]["host_ms"]
    assert "Untraced times of phases replace the traced ones, 0.4" in page.read_text()


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ({"bild": 1.0}, "bild: found a phase that the trace does not have, wanted "),
        ({"build": -1}, "build: found -1, wanted milliseconds a step, 0 or more"),
        ({"phases_ms": {"build": "1"}}, "phases_ms.build: found the string '1', wanted"),
        ({"timed": {"host_ms_per_step": {"build": None}}}, "timed.host_ms_per_step.build: found null, wanted"),
        ('{"build": NaN}', "build: found nan, wanted"),
        ('{"build": 1e999}', "build: found inf, wanted"),
        ('{"build": ' + "9" * 400 + "}", "build: found 999"),
        ('{"build": ' + "9" * 5000 + "}", "a number of thousands of digits"),
        ({"build": True}, "build: found true, wanted"),
        ([1, 2], "found a list, wanted a JSON object of phases"),
        ("{", "found no JSON (line 1, column 2"),
        ("[" * 100_000, "nested too deep"),
        ({"update": 2.0, "build": 3.0}, "ms of host work in a step of 3.6 ms, wanted times of the same steady steps"),
    ],
)  # fmt: skip
def test_host_phases_that_make_no_sense_are_refused(file: Path, tmp_path: Path, value: Any, part: str) -> None:
    path = timers(tmp_path, value)
    text = refusal("whatif", file, "--steady-step-ms", STEADY, "--host-phases", path)
    assert text.startswith(str(path)) and part in text
    if "does not have" in text:
        assert "update, prepare, build" in text and text.endswith("(the nearest: build)")


KEYS = ("timed", "phases_ms", "host_ms_per_step", "build", "prepare", "x")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
))  # fmt: skip
def test_no_file_of_phases_is_taken_wrongly(tmp_path: Path, profile: LearnedProfile, value: Any) -> None:
    path = timers(tmp_path, value)
    try:
        found = read_timers(path)
        check_known(str(path), found, known_phases(profile, NESTED))
        phases_ms, _ = untraced(profile, found, NESTED)
    except InputError:
        return
    assert set(phases_ms) <= set(profile.phases)
    assert all(0 <= ms <= sum(found.values()) * 1.001 for ms in phases_ms.values())


@pytest.mark.parametrize("schedule", ["sync", "async"])
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "kernels"])
@pytest.mark.parametrize("kernel_us", [150.0, 20.0], ids=["device-bound", "host-bound"])
def test_a_predicted_trace_is_learned_as_what_it_is(
    tmp_path: Path, schedule: str, graph: bool, kernel_us: float
) -> None:
    loop = TracedLoop(graph=graph, kernel_us=kernel_us)
    answer = whatif(learn(read_trace(loop.write(tmp_path / "loop.json"))), loop.step_us * 0.9e-3)
    path = tmp_path / "predicted.json.gz"
    write_predicted(path, answer, [schedule])
    again = learn(read_trace(path))
    assert is_overlapped([step.operations for step in again.steps]) == (schedule == "async")
    assert again.device == "Made-up GPU (predicted)"
    host = [moment for moment in answer.schedules[schedule].moments if moment.lane == "host"]
    steps = host[-1].step - host[0].step + 1
    step_ns = (host[-1].end_ns - host[0].start_ns) / steps
    assert float(replay_traced(again.steps, again.launch_ns).step_ns[0]) == pytest.approx(step_ns, rel=0.02)
    assert set(again.phases) >= {"update", "build", "launch"}


def test_a_predicted_trace_has_enough_steps_to_learn_from(profile: LearnedProfile, tmp_path: Path) -> None:
    answer = whatif(profile.model_copy(update={"steps": profile.steps[:1]}), float(STEADY))
    write_predicted(tmp_path / "p.json", answer, ["async"])
    assert learn(read_trace(tmp_path / "p.json")).steps_in_trace == 8


def test_events_of_a_predicted_trace_lie_apart_or_inside_each_other(profile: LearnedProfile) -> None:
    events = predicted(whatif(profile, float(STEADY)), ["sync", "async"])["traceEvents"]
    threads: defaultdict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    launched: dict[int, int] = {}
    for event in events:
        if event["ph"] == "X":
            begin = round(event["ts"] * 1000)
            end = begin + round(event["dur"] * 1000)
            threads[event["pid"], event["tid"]].append((begin, end))
            if event["cat"] == "cuda_runtime" and "correlation" in event["args"]:
                launched[event["args"]["correlation"]] = begin
    for spans in threads.values():
        spans.sort(key=lambda span: (span[0], -span[1]))
        around: list[int] = []
        for begin, end in spans:
            while around and around[-1] <= begin:
                around.pop()
            assert not around or end <= around[-1]
            around.append(end)
    for event in events:
        if event["ph"] == "X" and event["cat"] in ("kernel", "gpu_memcpy"):
            assert event["ts"] * 1000 >= launched[event["args"]["correlation"]]
    steps = [event for event in events if event["name"].startswith("ProfilerStep#")]
    for before, after in pairwise(steps[: len(steps) // 2]):
        assert round((before["ts"] + before["dur"]) * 1000) == round(after["ts"] * 1000)


def test_both_timelines_in_one_trace_are_two_devices(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "both.json"
    assert call("whatif", file, "--steady-step-ms", STEADY, "--trace-out", path).exit_code == 0
    names = {e["args"]["name"] for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "process_name"}
    assert names == {f"{name} (predicted): {side}" for name in ("sync", "async") for side in ("host", "device")}
    assert "devices 0, 1" in refusal("learn", path, "--out", tmp_path / "p.json")
    text = refusal("whatif", file, "--trace-out", path, "--trace-schedules", "sync,asinc")
    assert "--trace-schedules: found the string 'asinc', wanted sync, async" in text

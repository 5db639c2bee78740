"""A trimmed trace teaches what the whole one does, and holds nothing else."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from batchsim.whatif import whatif
from calibration.kineto import CATEGORIES, Trace, read_trace
from calibration.learn import learn
from calibration.steps import find_steps
from calibration.trim import app, kept, write
from tests.kineto_traces import Row, rows_of, saved
from tests.learn_traces import MAIN, PROCESS, SCHEDULES, Step, Tracer, run
from tests.mlp_traces import gated, traced

STEPS = 16
ALIKE = 0.01
SHORT = Step(prepare=150_000, kernels=(20_000,) * 8, read=60_000)
ARGS = {"External id", "correlation", "device", "stream", "bytes", "graph node id", "Input Dims"}


def trim(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def trimmed(trace: Trace, folder: Path, steps: int = 8) -> Trace:
    path = folder / "trimmed.json.gz"
    write(trace, kept(trace, steps), path)
    return read_trace(path)


def content(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return value


def made(folder: Path, how: str = "sync", steps: int = STEPS, marks: str = "steps", **of: Any) -> Trace:
    """A trace with annotations of its `steps`, of their `parts` alone, or of `nothing`."""
    name = "ProfilerStep#{}" if marks == "steps" else None
    tracer, _ = run(SCHEDULES[how], of.pop("step", SHORT), steps, name=name, **({"jitter": 0.02, "seed": 3} | of))
    if marks == "nothing":
        tracer.events = [event for event in tracer.events if event["cat"] != "user_annotation"]
    return tracer.traced(folder)


@pytest.mark.parametrize("marks", ["steps", "parts", "nothing"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("how", SCHEDULES)
def test_the_same_is_learned(tmp_path: Path, how: str, graph: bool, marks: str) -> None:
    step = Step(prepare=150_000, kernels=(20_000,) * 8, read=60_000, graph=graph)
    trace = made(tmp_path, how, marks=marks, step=step, event_ns=500)
    whole, part = learn(trace), learn(trimmed(trace, tmp_path))
    assert len(part.steps) == len(whole.steps) == 8
    assert part.steps_in_trace < whole.steps_in_trace
    untraced_ms = 0.9 * sum(one.traced_ns for one in whole.steps) / len(whole.steps) / 1e6
    before, after = (whatif(profile, untraced_ms).schedules for profile in (whole, part))
    assert before.keys() == after.keys()
    for schedule, told in before.items():
        assert after[schedule].step_ms == pytest.approx(told.step_ms, rel=ALIKE), schedule
        # Their ends are those of a few draws out of many.
        assert after[schedule].step_ms_interval == pytest.approx(told.step_ms_interval, rel=5 * ALIKE), schedule


def test_as_many_steps_are_learned_as_are_asked_for(tmp_path: Path) -> None:
    trace = made(tmp_path)
    for steps in (2, 3, 8):
        assert len(learn(trimmed(trace, tmp_path, steps)).steps) == steps


def test_a_step_that_is_unusually_long_is_none_of_them(tmp_path: Path) -> None:
    tracer = Tracer()
    for number, _ in enumerate(SCHEDULES["sync"](tracer, SHORT, STEPS)):
        with tracer.around(f"ProfilerStep#{number}"):
            tracer.work(5_000_000 if number == 3 else 50_000)
    part = learn(trimmed(tracer.traced(tmp_path), tmp_path, 6))
    assert len(part.steps) == 6


@pytest.mark.parametrize("how", SCHEDULES)
def test_what_is_kept_is_as_it_was(tmp_path: Path, how: str) -> None:
    trace = made(tmp_path, how)
    part = trimmed(trace, tmp_path)
    chosen = kept(trace)
    start = int(trace.start_ns[chosen[0]])
    rows = rows_of(trace)

    def shifted(row: Row) -> Row:
        return row._replace(start_ns=row.start_ns - start, end_ns=row.end_ns - start)

    assert sorted(rows_of(part)) == sorted(shifted(rows[i]) for i in chosen.tolist())
    # No launch without what it put on the device; what was launched before the first step that is kept has none.
    own = {row.correlation for row in rows if row.kind in ("kernel", "memcpy", "memset")}
    launched = {row.correlation for row in rows_of(part) if row.kind == "runtime"} & own
    on_device = {row.correlation for row in rows_of(part) if row.kind in ("kernel", "memcpy", "memset")}
    assert launched and launched <= on_device


def test_trimming_again_changes_nothing(tmp_path: Path) -> None:
    one, two = tmp_path / "one.json.gz", tmp_path / "two.json.gz"
    trace = made(tmp_path)
    write(trace, kept(trace), one)
    first = one.read_bytes()
    write(trace, kept(trace), one)
    assert one.read_bytes() == first
    again = read_trace(one)
    write(again, kept(again), two)
    assert two.read_bytes() == first


def test_a_trace_with_no_more_steps_is_kept_whole(tmp_path: Path) -> None:
    trace = made(tmp_path, steps=7)
    assert len(kept(trace)) == len(trace)


def test_calls_under_a_second_number_of_the_thread_stay_there(tmp_path: Path) -> None:
    tracer, _ = run(SCHEDULES["sync"], SHORT, STEPS)
    for event in tracer.events:
        if event["cat"] == "cuda_runtime":
            event["tid"] = MAIN + 1
    trace = tracer.traced(tmp_path)
    part = trimmed(trace, tmp_path)
    lanes = {(row.kind, row.lane) for row in rows_of(part)}
    assert ("runtime", (str(PROCESS), str(MAIN + 1))) in lanes
    assert ("op", (str(PROCESS), str(MAIN))) in lanes
    assert lanes == {(row.kind, row.lane) for row in rows_of(trace)}
    assert learn(part).steps == learn(trace).steps


def test_shapes_of_products_are_kept_with_their_operators(tmp_path: Path) -> None:
    trace = traced(tmp_path, gated(4096, 4096, 14336, 900.0), steps=STEPS)
    part = trimmed(trace, tmp_path)
    assert 0 < len(part.dims) < len(trace.dims)
    assert all(trace.dims[number] == dims for number, dims in part.dims.items())
    chains = [profile.chains for profile in (learn(trace), learn(part))]
    assert chains[0] and chains[1] == chains[0]


def test_only_what_the_reader_reads_is_written(tmp_path: Path) -> None:
    tracer, _ = run(SCHEDULES["sync"], SHORT, STEPS)
    about = {"cuda_driver_version": 13000, "traceName": "/somewhere/run.json", "batchsim": {"steady_step_ms": 1.0}}
    tracer.extra |= about
    python = {"ph": "X", "cat": "python_function", "name": "/somewhere/loop.py(12): step", "pid": 1, "tid": 1}
    tracer.events += [python | {"ts": event["ts"], "dur": 1.0, "args": {}} for event in tracer.events[::7]]
    out = tmp_path / "out.json.gz"
    result = trim(saved(tmp_path, tracer.document()), out)
    assert (result.exit_code, result.stdout) == (0, "")
    document = content(out)
    assert document.keys() == {"schemaVersion", "deviceProperties", "cuda_driver_version", "traceEvents"}
    assert "somewhere" not in json.dumps(document)
    for event in document["traceEvents"]:
        assert event.keys() - {"args"} == {"ph", "cat", "name", "pid", "tid", "ts", "dur"}
        assert event["ph"] == "X" and event["cat"] in CATEGORIES
        assert event.get("args", {}).keys() <= ARGS
    assert min(event["ts"] for event in document["traceEvents"]) == 0
    # The header of a gzip file has a time, and a name where a flag says so.
    assert out.read_bytes()[3:8] == bytes(5)


def test_a_name_without_gz_is_written_plain(tmp_path: Path) -> None:
    trace = made(tmp_path)
    out = tmp_path / "out.json"
    write(trace, kept(trace), out)
    assert json.loads(out.read_text())["traceEvents"]
    assert np.array_equal(read_trace(out).start_ns, trimmed(trace, tmp_path).start_ns)


def test_steps_are_found_where_they_were(tmp_path: Path) -> None:
    trace = made(tmp_path, "async")
    before, after = find_steps(trace).starts_ns, find_steps(trimmed(trace, tmp_path)).starts_ns
    assert np.array_equal(np.diff(before)[: len(after) - 1], np.diff(after))


def test_refusals_are_sentences(tmp_path: Path) -> None:
    tracer, _ = run(SCHEDULES["sync"], SHORT, STEPS)
    path = saved(tmp_path, tracer.document())
    few, _ = run(SCHEDULES["sync"], SHORT, 1, name=None)
    (tmp_path / "few").mkdir()
    for arguments, wanted in (
        ((path, path), "another file"),
        ((path, tmp_path), "another file"),
        ((tmp_path / "missing.json", tmp_path / "out.json"), "missing.json"),
        ((saved(tmp_path / "few", few.document()), tmp_path / "out.json"), "steps"),
    ):
        result = trim(*arguments)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.output
        assert wanted in result.stderr
    assert trim(path, tmp_path / "out.json", "--steps", 1).exit_code == 2
    assert not (tmp_path / "out.json").exists()

"""Pairs of loops, in small on the CPU: both loops of each compute the same, and all that is promised is written."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from calibration.pairs.__main__ import app
from calibration.pairs.catalogue import PAIRS, SETS
from calibration.pairs.lab import Lab
from calibration.pairs.loop import Pair
from calibration.pairs.measure import measure, same, trace_both, traces_of


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_both_loops_compute_the_same(pair: Pair) -> None:
    sync, twin = pair.sync(Lab("cpu")), pair.twin(Lab("cpu"))
    for loop in (sync, twin):
        for step in range(7):
            loop.step(step)
            if step == 3:  # in the middle, as between two turns
                loop.finish()
        loop.finish()
    assert len(sync.outputs) == 7
    assert same(sync.outputs, twin.outputs)
    assert len({str(output) for output in sync.outputs}) > 1  # they depend on the inputs


def test_the_catalogue_is_varied() -> None:
    assert len({pair.name for pair in PAIRS}) == len(PAIRS) >= 14
    for pairs in SETS.values():
        outlooks = [pair.outlook for pair in pairs]
        assert outlooks.count("nothing") >= 4 and outlooks.count("loses") >= 2
        assert {pair.annotation for pair in pairs} == {"steps", "own", "none", "record"}


# One for each way to mark steps, and a loop that has two steps on their way when it is traced.
@pytest.mark.parametrize("name", ["fields", "careful", "decode_eager", "images", "two_late"])
def test_a_pair_leaves_figures_and_two_traces(tmp_path: Path, name: str) -> None:
    (pair,) = (pair for pair in PAIRS if pair.name == name)
    found = measure(pair, "cpu", tmp_path, rounds=2, steps=3, turn_ms=1)
    trace_both(pair, "cpu", tmp_path)
    assert json.loads((tmp_path / f"{name}.json").read_text()) == found
    assert found["equal_outputs"] and len(found["sync_step_ms"]) == len(found["async_step_ms"]) == 2
    assert found["sync_p10_ms"] <= max(found["sync_step_ms"]) and min(found["sync_step_ms"]) <= found["sync_p90_ms"]
    for way in ("sync", "async"):
        trace = json.loads(gzip.decompress((tmp_path / f"{name}_{way}.trace.json.gz").read_bytes()))
        marks = [e["name"] for e in trace["traceEvents"] if e.get("cat") == "user_annotation"]
        steps = [mark for mark in marks if mark.startswith(("ProfilerStep#", "serve_step"))]
        assert len(steps) == (0 if pair.annotation == "none" else 10)
        assert ("batchsim" in trace) == (pair.annotation == "record")
        assert ("prepare" in marks) == (pair.annotation in ("own", "record"))


def test_all_pairs_are_timed_before_one_is_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def measured(pair: Pair, _device: str, out: Path, **_: int) -> dict[str, Any]:
        done.append(f"time {pair.name}")
        if pair.name == "scores":
            raise ValueError("mine")
        (out / f"{pair.name}.json").write_text("{}")
        return {"sync_step_ms": [1.0], "async_step_ms": [1.0], "gain": 0, "outlook": "", "equal_outputs": True}

    def traced(pair: Pair, _device: str, out: Path) -> None:
        done.append(f"trace {pair.name}")
        for path in traces_of(pair, out):
            path.touch()

    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda *_, **__: None)  # needs a real stderr
    monkeypatch.setattr("calibration.pairs.__main__.measure", measured)
    monkeypatch.setattr("calibration.pairs.__main__.trace_both", traced)
    names = ["fields", "scores", "training"]
    arguments = ["run", "--device", "cpu", "--out", str(tmp_path), *(f"--only={name}" for name in names)]
    for _ in range(2):  # the second time, nothing is left to do
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0
        assert done == ["time fields", "time scores", "time training", "trace fields", "trace training"]
    assert "ValueError: mine" in (tmp_path / "scores.failed.txt").read_text()
    assert not (tmp_path / "fields.failed.txt").exists()


@pytest.mark.parametrize("arguments", [["--only=nobody"], ["--set=tests"], ["--only=fields", "--set=test"]])
def test_an_unknown_pair_or_set_is_refused(tmp_path: Path, arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["run", "--device", "cpu", "--out", str(tmp_path), *arguments])
    assert result.exit_code == 2 and "unknown" in result.stderr and "wanted one of" in result.stderr


@pytest.mark.parametrize(("a", "b", "equal"), [
    (1.0, 1.0 + 1e-7, True), (1.0, 1.01, False), (float("nan"), float("nan"), False),
    ([1, 2], [1, 2], True), ([1, 2], [1], False), ((1.0, 3), (1.0, 4), False),
])  # fmt: skip
def test_outputs_are_compared_in_depth(a: object, b: object, equal: bool) -> None:
    assert same(a, b) is equal

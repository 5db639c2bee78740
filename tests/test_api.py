"""The Python API: what `batchsim` exports, and that it says what the commands say."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import batchsim
from batchsim import yaml_loader
from batchsim.evaluate import evaluate
from batchsim.result import figures
from tests.sweeps import SERVER

ROOT = Path(__file__).parents[1]
SCENARIOS = ROOT / "scenarios"
SERVING = SCENARIOS / "serving_512_128.yaml"
SMALL = {"kind": "fixed", "num_prompts": 60, "request_rate": 20, "input_len": 200, "output_len": 20}
TILE = {"rows": 128, "cols": 256, "depth": 64}
TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2026-01-05 09:00:{second:02d}.0000000,{100 + second},20\n" for second in range(30)
)


@pytest.fixture(scope="module")
def serving() -> batchsim.LoadedScenario:
    return batchsim.load(SERVING, schedules=["sync", "async"], workload=SMALL)


@pytest.fixture(scope="module")
def served(serving: batchsim.LoadedScenario) -> batchsim.RunView:
    return batchsim.run(serving, draws=4)


# --- what there is


def test_all_is_the_public_surface() -> None:
    """Every name is there, says what it is, and is what type checkers see."""
    assert batchsim.__all__ == sorted(batchsim.__all__) and len(set(batchsim.__all__)) == len(batchsim.__all__)
    for name in batchsim.__all__:
        assert inspect.getdoc(getattr(batchsim, name)), name
    source = Path(batchsim.__file__).read_text(encoding="utf-8")
    typed = {
        alias.name
        for block in ast.parse(source).body
        if isinstance(block, ast.If)
        for line in block.body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    }
    assert typed == set(batchsim.__all__) - {"__version__"} <= set(dir(batchsim))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        batchsim.lode  # type: ignore[attr-defined]  # noqa: B018


def test_functions_stay_what_they_are_when_packages_of_their_names_are_imported() -> None:
    for package in ("batchsim.load", "batchsim.sweep.run", "batchsim.plan.answer", "batchsim.tiles.result"):
        assert importlib.import_module(package).__name__ == package
    for name in ("load", "run", "sweep", "plan", "explain", "tiles"):
        assert inspect.isfunction(getattr(batchsim, name)), name


def test_nothing_is_imported_before_it_is_used() -> None:
    """Neither pandas nor plotly for a run; torch never."""
    code = f"""
import sys, batchsim
assert not {{"numpy", "pydantic", "yaml"}} & set(sys.modules), "on import"
view = batchsim.run({SERVER!r}, draws=0)
assert not {{"pandas", "plotly", "torch"}} & set(sys.modules), "by a run"
view.frame(), view.figure(), view._repr_html_()
assert "torch" not in sys.modules, "by a figure"
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- load


def test_a_file_and_its_content_are_the_same_scenario() -> None:
    """Values are put over both in the same way; what was loaded stays as it was."""
    document = yaml_loader.load(SERVING).data
    loaded = batchsim.load(SERVING, max_num_seqs=np.int64(32), workload__request_rate=np.float64(7.5))
    assert batchsim.load(document, max_num_seqs=32, workload__request_rate=7.5).checked == loaded.checked
    assert (loaded.document["max_num_seqs"], loaded.document["workload"]["request_rate"]) == (32, 7.5)
    assert type(loaded.document["max_num_seqs"]) is int
    before = loaded.document.copy()
    variant = batchsim.load(loaded, schedules=("sync", "async"), workload__num_prompts=5)
    assert loaded.document == before and variant.document["schedules"] == ["sync", "async"]
    assert variant.document["workload"] == {**before["workload"], "num_prompts": 5}


@pytest.mark.parametrize(
    ("sets", "sentence"),
    [
        ({"max_num_seqs": 0}, "load(max_num_seqs=...): max_num_seqs: found 0, wanted an integer from 1 to "),
        ({"max_num_seq": 8}, "load(max_num_seq=...): max_num_seq: found an unknown key, wanted max_num_seqs"),
        ({"workload__request_rat": 8}, "workload.request_rat: found an unknown key, wanted workload.request_rate"),
        ({"name__x": 8}, "load(name__x=...): name.x: found the string"),
    ],
)
def test_a_wrong_value_is_told_in_a_sentence(sets: dict[str, Any], sentence: str) -> None:
    with pytest.raises(batchsim.InputError) as refused:
        batchsim.load(SERVING, **sets)
    assert sentence in str(refused.value)


def refusals() -> list[tuple[Any, str]]:
    tiles = SCENARIOS / "tiles_h200.yaml"
    return [
        (lambda: batchsim.load("nowhere.yaml"), "nowhere.yaml: found no readable file"),
        (lambda: batchsim.run(tiles), "kind: found tiles, wanted serving, dynamic or training: batchsim.tiles takes"),
        (lambda: batchsim.tiles(SERVER), "scenario: kind: found dynamic, wanted tiles: batchsim.run takes this one"),
        (lambda: batchsim.run({**SERVER, "kind": "dynamo"}), "scenario: kind: found the string 'dynamo', wanted"),
        (lambda: batchsim.sweep(), "sweep(): scenario: found nothing, wanted a scenario, or a file"),
        (lambda: batchsim.sweep(scenario=SERVER), "grid: found nothing, wanted one of grid, list, latin_hypercube"),
        (lambda: batchsim.sweep("x.yaml", grid={}), "sweep(): found grid beside a whole one, wanted one of the two"),
        (lambda: batchsim.plan("x.yaml", name="x"), "plan(): found name beside a whole one, wanted one of the two"),
        (lambda: batchsim.plan({"kind": "plan"}, scenario=SERVER), "plan(): found scenario beside a whole one"),
        (lambda: batchsim.plan("x.yaml", draws=0), "plan(): draws: found 0, wanted 1 or more"),
        (lambda: batchsim.explain(SERVER, by=2), "explain(): by: found 2, wanted a share above 0 and below 1"),
    ]


@pytest.mark.parametrize("number", range(len(refusals())))
def test_errors_read_well_in_a_notebook(number: int) -> None:
    """One sentence, and below the caller's own line nothing of how it was found."""
    call, sentence = refusals()[number]
    with pytest.raises(batchsim.InputError) as refused:
        call()
    error = refused.value
    assert sentence in str(error)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    assert [frame.f_code.co_filename for frame in frames[:-1]] == [__file__] * (len(frames) - 1)
    assert frames[-1].f_code.co_name == "called"
    assert error.__cause__ is None and error.__suppress_context__


# --- run


def test_a_run_is_what_evaluating_the_file_gives(served: batchsim.RunView) -> None:
    document = {**yaml_loader.load(SERVING).data, "schedules": ["sync", "async"], "workload": SMALL}
    assert served.results == evaluate(document, file="", base=SCENARIOS, draws=4).results
    assert list(served.results) == ["sync", "async"]


def test_a_frame_has_a_row_for_each_schedule_and_intervals_beside_the_figures(served: batchsim.RunView) -> None:
    frame = served.frame()
    assert list(frame.index) == list(served.results) and frame.index.name == "schedule"
    for name, result in served.results.items():
        told = {key: value for key, value in frame.loc[name].dropna().items() if not key.endswith((".low", ".high"))}
        assert told == figures(result)
        for key, (low, high) in result.interval_90.items():
            assert (frame.loc[name, f"{key}.low"], frame.loc[name, f"{key}.high"]) == (low, high)
            assert low <= frame.loc[name, key] <= high


def test_figures_show_what_the_run_has(served: batchsim.RunView) -> None:
    one, two, every = served.latencies("ttft"), served.latencies("ttft", "e2e"), served.latencies()
    assert served.figure() == every
    names = {"sync", "async"}
    for figure, panels in ((one, 1), (two, 2), (every, 4)):
        lines = [trace for trace in figure.data if trace.mode == "lines" and trace.name in names]
        assert len(lines) == 2 * panels and len({trace.xaxis for trace in lines}) == panels
        assert sorted(trace.name for trace in lines if trace.showlegend) == sorted(names)
        for line in lines:  # a distribution: shares that grow to one, over times that grow
            assert list(line.x) == sorted(line.x) and list(line.y) == sorted(line.y) and line.y[-1] == 1
    for figure in (one, every, served.timeline(), served.timeline(close_up=True), served.idle()):
        assert figure.data and figure.layout.paper_bgcolor == "white"
    with pytest.raises(batchsim.InputError, match=r"found the string 'tfft', wanted .*\(the nearest: ttft\)"):
        served.latencies("tfft")


def test_a_run_shows_itself(served: batchsim.RunView, serving: batchsim.LoadedScenario) -> None:
    """As a table of what matters, with intervals; text of the user's is no markup."""
    html = served._repr_html_()
    low, high = served.results["async"].interval_90["throughput_tokens_per_s"]
    assert f"({low:,.0f} to {high:,.0f})" in html and served.sentences[0] in repr(served)
    named = batchsim.load(serving, name="<script>alert(1)</script>", workload__num_prompts=4)
    for shown in (batchsim.run(named, draws=0)._repr_html_(), named._repr_html_()):
        assert "<script>" not in shown and "&lt;script&gt;" in shown


@pytest.mark.parametrize("file", ["dynamic_table", "training_1b_h200"])
def test_other_kinds_of_scenarios_show_themselves(file: str) -> None:
    sets = {"workload__num_prompts": 300} if file == "dynamic_table" else {}
    view = batchsim.run(batchsim.load(SCENARIOS / f"{file}.yaml", **sets), draws=0)
    assert view.figure().data and view.timeline().data and len(view.frame()) == len(view.results)
    assert f"<th>{next(iter(view.results))}</th>" in view._repr_html_()
    if view.run.scenario["kind"] == "training":
        with pytest.raises(batchsim.InputError, match="those of this run have no latencies"):
            view.latencies()


# --- sweep, plan, explain


def test_a_sweep_by_its_parts_is_the_sweep_of_the_file(tmp_path: Path) -> None:
    rates, delays = np.arange(100, 160, 20), [0, 1000]
    grid = {"workload.request_rate": rates, "max_queue_delay_us": delays}
    none: Any = np.int64(0)
    parts = batchsim.sweep(scenario=SERVER, grid=grid, name="both", draws=none, workers=none)
    points = [{"workload.request_rate": rate, "max_queue_delay_us": delay} for rate in rates for delay in delays]
    listed = batchsim.sweep(scenario=batchsim.load(SERVER), points=points, name="both", draws=0, workers=0)
    whole = {"kind": "sweep", "name": "both", "scenario": SERVER, "list": points}
    kept = batchsim.sweep(whole, out=tmp_path, draws=0, workers=0)
    assert parts == listed == kept == batchsim.SweepResult.load(tmp_path)
    assert len(parts.frame()) == len(points) and not parts.failed


def test_paths_of_a_scenario_are_those_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the notebook is, and whoever runs the scenario; those of a mapping are the notebook's own."""
    document = {
        "kind": "serving", "name": "x", "model": "llama-3.2-1b", "profile": "h200-llama-3.2-1b",
        "workload": {"kind": "trace", "path": "trace.csv"}, "schedules": ["sync", "async"],
    }  # fmt: skip
    folder = tmp_path / "service"
    folder.mkdir()
    (folder / "trace.csv").write_text(TRACE)
    (folder / "scenario.yaml").write_text(repr(document))
    loaded = batchsim.load(folder / "scenario.yaml")
    there = batchsim.run(loaded, draws=0)
    swept = batchsim.sweep(scenario=loaded, grid={"max_num_seqs": [8, 16]}, draws=0, workers=0)
    assert not swept.failed
    objectives, candidates = {"p99_ttft_ms": "<=1000"}, {"hardware": ["h200", "l4"], "replicas": {"max": 2}}
    planned = batchsim.plan(scenario=loaded, objectives=objectives, candidates=candidates, draws=4)
    assert planned.best is not None and planned.best.meets
    assert batchsim.explain(batchsim.load(loaded, schedules=["sync"])).sentences
    with pytest.raises(batchsim.InputError, match=r"trace\.csv"):
        batchsim.run(document)
    monkeypatch.chdir(folder)
    assert batchsim.run(document, draws=0).results == there.results
    inline = {"kind": "plan", "name": "x", "scenario": document, "objectives": objectives, "candidates": candidates}
    assert batchsim.plan(inline, draws=4).to_json() == planned.to_json()


# --- tiles


def test_a_tile_picture_and_its_frame_hold_the_same_tiles() -> None:
    tiles = SCENARIOS / "tiles_h200.yaml"
    view = batchsim.tiles(batchsim.load(tiles, chain__m=512, chain__tile={"up": TILE, "down": TILE}))
    (case,) = view.cases
    frame, told = view.tiles(), view.frame()
    assert len(frame) == sum(len(recorded.run.spans) for recorded in case.runs)
    bars = [trace for trace in view.figure().data if trace.name in ("up", "down")]
    assert sum(len(trace.x) for trace in bars) == len(frame)
    ends = frame.groupby("policy")["end_us"].max()
    assert all(ends[recorded.policy.name] == pytest.approx(recorded.total_us) for recorded in case.runs)
    chosen = told[told["chosen"]]
    assert list(chosen["policy"]) == [case.chosen.policy] and set(told["policy"]) >= {"StreamSync"}
    assert case.why in repr(view) and f"{case.chosen.policy} (chosen)" in view._repr_html_()

"""What is said about tiles: the laws of a comparison, the table, and a page that stands alone."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from batchsim.tiles.policy import STREAM_SYNC
from batchsim.tiles.report import print_tiles, write_tiles_report
from batchsim.tiles.result import DEFINITIONS, TilesRun, compare_all
from batchsim.tiles.scenario import parse
from batchsim.tiles.traced import run_of
from tests.test_report import BROWSERS, References, run_browser
from tests.tile_profiles import SMS, tile_profile

TEXT = """
kind: tiles
name: two products
profile: made-up
chain:
- kind: custom
  name: thirteen tiles on twelve multiprocessors
  kernels:
  - {name: first, rows: 1664, cols: 128, tile: [128, 128], steps: 8, tile_us: 80}
  - {name: second, rows: 1664, cols: 128, tile: [128, 128], steps: 8, tile_us: 80}
  dependences:
  - {kind: row, producer: first, consumer: second}
- kind: custom
  name: twelve tiles
  kernels:
  - {name: first, rows: 1536, cols: 128, tile: [128, 128], steps: 8, tile_us: 80}
  - {name: second, rows: 1536, cols: 128, tile: [128, 128], steps: 8, tile_us: 80}
  dependences:
  - {kind: row, producer: first, consumer: second}
- kind: gated_mlp
  model: llama-3.2-1b
  m: 384
"""


@pytest.fixture(scope="module")
def run() -> TilesRun:
    return compare_all(parse(TEXT), tile_profile())


def printed(run: TilesRun, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_tiles(console, run)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def only(run: TilesRun, number: int) -> TilesRun:
    return TilesRun(run.scenario, run.profile, run.provenance, (run.cases[number],))


def test_the_baseline_is_kernel_after_kernel_and_gains_are_against_it(run: TilesRun) -> None:
    for case in run.cases:
        assert case.baseline.policy == STREAM_SYNC
        assert case.baseline.gain == 0
        assert case.runs[0].policy.barrier
        assert case.runs[0].total_us == case.baseline.time_us
        for result in (*case.policies, *case.comparisons):
            assert result.gain == pytest.approx(1 - result.time_us / case.baseline.time_us)


def test_policies_are_listed_fastest_first_and_the_choice_is_among_them(run: TilesRun) -> None:
    for case in run.cases:
        times = [result.time_us for result in case.policies]
        assert times == sorted(times)
        assert case.chosen in case.policies
        assert case.chosen.gain >= 0
        assert case.runs[-1].total_us == case.chosen.time_us


def test_whole_waves_are_left_as_they_are_and_fractional_ones_are_filled(run: TilesRun) -> None:
    fractional, whole = run.cases[:2]
    assert whole.chosen is whole.baseline
    assert whole.why == "StreamSync: waves are whole, waiting would only cost."
    assert fractional.chosen is not fractional.baseline
    # 13 + 13 equal tiles on 12 multiprocessors: 4 waves one after the other, 3 together.
    assert fractional.chosen.gain == pytest.approx(0.25, abs=0.02)
    assert "The last wave of first fills 1 of 12 slots" in fractional.why
    early = re.search(r"lets (\d+) tiles of second start before their producer has ended", fractional.why)
    assert early is not None
    assert 11 <= int(early[1]) <= 13


def test_waves_that_do_not_become_fewer_are_given_as_the_reason() -> None:
    # Half a wave and a whole one: two waves, whether together or apart.
    kernel = {"cols": 128, "tile": [128, 128], "steps": 8, "tile_us": 80}
    kernels = [{"name": "first", "rows": 768, **kernel}, {"name": "second", "rows": 1536, **kernel}]
    edge = {"kind": "row", "producer": "first", "consumer": "second"}
    chain = {"kind": "custom", "kernels": kernels, "dependences": [edge]}
    text = json.dumps({"kind": "tiles", "name": "n", "profile": "made-up", "chain": chain})
    (case,) = compare_all(parse(text), tile_profile()).cases
    assert case.chosen is case.baseline
    reason = "the last wave of first fills 6 of 12 slots, but the kernels together need 2 waves as well"
    assert case.why == f"StreamSync: {reason}."


def test_spans_are_every_tile_once_and_never_two_in_one_place(run: TilesRun) -> None:
    for case in run.cases:
        for told in case.runs:
            spans = told.run.spans
            assert len(spans) == told.policy.chain.tiles
            assert len({(span.kernel, span.row, span.col, span.slice) for span in spans}) == len(spans)
            assert max(span.end_ns for span in spans) == told.run.total_ns
            busy = sum(s.end_ns - s.start_ns - sum(end - start for start, end in s.waits) for s in spans)
            assert busy == pytest.approx(told.run.utilisation * SMS * told.run.total_ns, rel=1e-6)
            ends: dict[tuple[int, int], int] = {}
            for span in sorted(spans, key=lambda span: span.start_ns):
                assert span.start_ns >= ends.get((span.sm, span.slot), 0)
                ends[span.sm, span.slot] = span.end_ns


def test_json_has_the_case_itself_or_a_list_of_them(run: TilesRun) -> None:
    told = run.to_json()
    assert [case["name"] for case in told["cases"]] == [case.name for case in run.cases]
    single = only(run, 0).to_json()
    assert single.items() >= told["cases"][0].items()
    assert "cases" not in single
    for case in told["cases"]:
        assert case.keys() >= {"name", "device", "baseline_us", "policies", "chosen"}
        baseline = next(each for each in case["policies"] if each["policy"] == STREAM_SYNC)
        assert baseline["time_us"] == case["baseline_us"]
        assert {key for each in case["policies"] for key in each} >= {*DEFINITIONS, "policy"}
    json.dumps(told, allow_nan=False)


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_says_what_the_json_says_within_its_width(run: TilesRun, width: int) -> None:
    for number, case in enumerate(run.cases):
        text = printed(only(run, number), width)
        assert max(len(line) for line in text.splitlines()) <= width
        assert "…" not in text
        told = case.to_json()
        rows = {line.split()[0]: line for line in text.replace("▸", " ").splitlines() if line.strip()}
        for entry in told["policies"]:
            row = rows[entry["policy"]]
            assert f"{entry['time_us']:,.1f}" in row
            assert f"{entry['waves']:.2f}" in row
            assert f"{entry['utilisation']:.1%}" in row
            assert "baseline" in row if entry["policy"] == STREAM_SYNC else f"{entry['gain']:+.1%}" in row
        assert [line.split()[1] for line in text.splitlines() if line.startswith("▸")] == [told["chosen"]]
        for definition in DEFINITIONS.values():
            assert definition in " ".join(text.split())


def test_several_cases_end_with_a_summary(run: TilesRun) -> None:
    summary = printed(run, 100).partition("StreamSync, µs")[2]
    assert all(case.name in summary for case in run.cases)


def test_the_page_refers_to_nothing_outside_itself_and_is_always_the_same(run: TilesRun, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tiles_report(tmp_path / name, run)
    text = (tmp_path / "a").read_text(encoding="utf-8")
    assert (tmp_path / "b").read_text(encoding="utf-8") == text
    parser = References()
    parser.feed(text)
    assert parser.found == []
    assert "default-src 'none'" in text


def test_the_picture_draws_every_tile_and_every_wait(run: TilesRun) -> None:
    from batchsim.tiles.picture import picture

    for case in run.cases:
        figure = picture(case.runs, SMS)
        drawn = sum(len(trace.x) for trace in figure.data)
        spans = [span for told in case.runs for span in told.run.spans]
        assert drawn == len(spans) + sum(len(span.waits) for span in spans)
        assert {trace.name for trace in figure.data} <= {
            *(k.name for k in case.runs[0].policy.chain.kernels),
            "waiting",
        }


def test_of_many_tiles_some_multiprocessors_are_drawn(run: TilesRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from batchsim.tiles import picture

    monkeypatch.setattr(picture, "MAX_BARS", 20)
    assert 0 < sum(len(trace.x) for trace in picture.picture(run.cases[0].runs, SMS).data) <= 30


def test_measured_runs_stand_beside_the_simulated_ones(run: TilesRun, tmp_path: Path) -> None:
    measured = only(run, 0).with_measured(lambda case: [told.run for told in case.runs])
    (case,) = measured.cases
    told = {each["policy"]: each.get("measured_us") for each in case.to_json()["policies"]}
    assert told[case.chosen.policy] == case.chosen.time_us
    assert sum(value is not None for value in told.values()) == len(case.runs)
    assert case.to_json()["measured"]["gain"] == pytest.approx(case.chosen.gain)
    assert "(measured " in printed(measured, 80)
    write_tiles_report(tmp_path / "report.html", measured)
    assert "Measured: multiprocessors over time" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_browser_draws_the_pictures(run: TilesRun, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser found: looked for {', '.join(BROWSERS)}")
    write_tiles_report(tmp_path / "report.html", run)
    dom = run_browser(browser, tmp_path / "report.html", tmp_path, "--dump-dom", "--window-size=1200,2000")
    root = re.search(r"<html[^>]*>", dom)
    assert root is not None
    assert "data-error" not in root[0]
    # The first case is open; the others are drawn when they are opened.
    assert 'data-rendered="1"' in root[0]
    assert dom.count('<g class="point">') >= sum(len(told.run.spans) for told in run.cases[0].runs)


def test_the_times_of_tiles_make_the_run_that_they_came_from(run: TilesRun) -> None:
    for case in run.cases:
        for told in case.runs:
            spans = sorted(told.run.spans, key=lambda span: (span.kernel, span.row, span.col, span.slice))
            start, end, sm = (
                np.array(values) for values in zip(*[(s.start_ns, s.end_ns, s.sm) for s in spans], strict=True)
            )
            waited = np.array([sum(end - start for start, end in span.waits) for span in spans])
            again = run_of(told.policy, told.run, SMS, start + 10**18, end + 10**18, waited, sm)
            assert again.total_ns == told.run.total_ns
            assert again.utilisation == pytest.approx(told.run.utilisation)
            places = [
                {(s.kernel, s.row, s.col, s.sm, s.start_ns, s.end_ns) for s in some} for some in (again.spans, spans)
            ]
            assert places[0] == places[1]
            assert max(span.slot for span in again.spans) <= max(span.slot for span in spans)


def test_every_policy_stands_in_its_best_tiling() -> None:
    from batchsim.tiles.cases import cases
    from batchsim.tiles.compare import rank
    from batchsim.tiles.profile import load_tile_profile
    from batchsim.tiles.result import compare
    from batchsim.tiles.scenario import parse

    text = "kind: tiles\nname: t\nprofile: h200-tiles\nchain: {kind: attention, model: llama-3.1-8b, m: 256}\n"
    profile = load_tile_profile("h200-tiles")
    (case,) = cases(parse(text), profile)
    result = compare(case, profile.device)
    fastest: dict[str, float] = {}
    for candidate in case.candidates:
        for run in rank(candidate.chain, case.costs, profile.device):
            fastest[run.policy] = min(run.total_ns / 1e3, fastest.get(run.policy, float("inf")))
    for row in result.policies:
        if row is not result.chosen:
            assert row.time_us == fastest[row.policy]

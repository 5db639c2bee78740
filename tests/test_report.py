"""What people look at: figures, causes, errors, and a page that stands alone."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from batchsim.report import print_run, write_report
from batchsim.report.shown import error_text
from batchsim.report.words import causes, headline, idle_shares
from batchsim.result import Run, ScheduleResult, errors
from tests.sample_runs import sample_runs

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def runs() -> tuple[Run, Run]:
    return sample_runs()


def slower_async(run: Run) -> Run:
    """The run without graphs: the host feeds every kernel, and async asks it for more."""
    sync, async_ = run.results["sync"], run.results["async"]
    results = {
        "sync": eager(sync, tokens=1_100.0, step_ms=29.1, host=0.985, gap=0.62, launch_ms=26.0),
        "async": eager(async_, tokens=891.0, step_ms=35.9, host=0.998, gap=0.74, launch_ms=31.0, gain=-0.19),
    }
    return replace(run, results=results)


def eager(
    result: ScheduleResult,
    *,
    tokens: float,
    step_ms: float,
    host: float,
    gap: float,
    launch_ms: float,
    gain: float | None = None,
) -> ScheduleResult:
    return replace(
        result,
        throughput_tokens_per_s=tokens,
        step_ms=dict.fromkeys(result.step_ms, step_ms),
        host_busy_fraction=host,
        launch_gap_fraction=gap,
        stage_ms={**result.stage_ms, "launch": launch_ms},
        gain_over_sync=gain,
    )


def printed(width: int, predicted: Run, measured: Run | None = None) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_run(console, predicted, measured)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_errors_are_signed_relative_for_times_and_in_points_for_shares(runs: tuple[Run, Run]) -> None:
    truth = runs[0].results["async"]
    guess = replace(
        truth,
        throughput_tokens_per_s=truth.throughput * 0.98,
        device_busy_fraction=truth.device_busy_fraction - 0.004,
        stage_ms={**truth.stage_ms, "launch": truth.stage_ms["launch"] * 1.5, "invented": 1.0},
        gain_over_sync=None,
    )
    error = errors(guess, truth)
    assert error["throughput_tokens_per_s"] == pytest.approx(-0.02)
    assert error["device_busy_fraction"] == pytest.approx(-0.4)
    assert error["stage_ms.launch"] == pytest.approx(0.5)
    assert error["stage_ms.decode"] == error["step_ms.p99"] == error["total_s"] == 0
    assert "gain_over_sync" not in error
    assert "stage_ms.invented" not in error
    assert all(value == 0 for value in errors(truth, truth).values())


def test_a_stage_measured_as_zero_has_no_relative_error(runs: tuple[Run, Run]) -> None:
    result = runs[0].results["sync"]
    zero = replace(result, stage_ms={"launch": 0.0})
    assert "stage_ms.launch" not in errors(result, zero)
    assert errors(zero, zero)["stage_ms.launch"] == 0


def test_error_texts_have_a_sign_and_a_unit() -> None:
    assert error_text("total_s", 0.0123) == "+1.2%"
    assert error_text("device_busy_fraction", -0.31) == "-0.3 pt"
    assert error_text("gain_over_sync", -0.01) == "+0.0 pt"


def test_idle_shares_are_sorted_and_add_up_to_what_is_not_busy(runs: tuple[Run, Run]) -> None:
    for run in runs:
        for result in run.results.values():
            shares = idle_shares(result)
            assert list(shares.values()) == sorted(shares.values(), reverse=True)
            assert sum(shares.values()) == pytest.approx(1 - result.device_busy_fraction, abs=1e-9)


def test_a_gain_is_explained_by_the_idle_time_that_it_hides(runs: tuple[Run, Run]) -> None:
    sync, async_ = causes(runs[0])
    assert re.search(r"idle 8\.\d% of the time: 4\.\d points waiting for build_inputs, 2\.\d for update", sync)
    assert re.search(r"hides 8\.\d of these 8\.\d points: 4,6\d\d → 5,0\d\d tokens/s \(\+8\.\d%\)", async_)
    assert "faster than sync" in headline(runs[0])


def test_a_loss_is_explained_by_the_host(runs: tuple[Run, Run]) -> None:
    run = slower_async(runs[0])
    async_ = causes(run)[1]
    assert "async is slower: 1,100 → 891 tokens/s (-19.0%): the host is the bottleneck, busy 99.8%" in async_
    assert "35.83 ms of host work a step against 28.66 ms" in async_
    assert "launch is the largest part" in async_
    assert "74.0%" in async_
    assert "19.0% slower than sync" in headline(run)


def test_no_gain_is_said_to_be_none(runs: tuple[Run, Run]) -> None:
    sync = replace(runs[0].results["async"], schedule="sync", gain_over_sync=None)
    run = replace(runs[0], results={"sync": sync, "async": replace(runs[0].results["async"], gain_over_sync=0.0)})
    assert "changes little" in causes(run)[1]
    assert "as fast as sync" in headline(run)


def test_sync_alone_hints_at_the_comparison(runs: tuple[Run, Run]) -> None:
    run = replace(runs[0], results={"sync": runs[0].results["sync"]})
    assert "--schedules sync,async" in causes(run)[0]


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_shows_all_figures_within_its_width(runs: tuple[Run, Run], width: int) -> None:
    predicted, measured = runs
    for text in (printed(width, predicted), printed(width, predicted, measured)):
        assert max(len(line) for line in text.splitlines()) <= width
        assert "…" not in text
        for part in ("tokens/s", "gain over sync", "step p99, ms", "device busy", "host busy", "build_inputs", "+8.8%"):
            assert part in text
        assert text.count("extrapolated") == 1
        assert "share of total_s in which a forward has begun" in " ".join(text.split())
    assert "predicted" in text
    assert "-4.1%" in text


def test_three_schedules_fit_in_eighty_columns(runs: tuple[Run, Run]) -> None:
    wider = [
        replace(run, results={**run.results, "tile": replace(run.results["async"], schedule="tile")}) for run in runs
    ]
    for text in (printed(80, wider[0]), printed(80, *wider)):
        assert max(len(line) for line in text.splitlines()) <= 80
        assert "…" not in text


class References(HTMLParser):
    """Collects whatever a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [f"<{tag} {name}={value}>" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_the_page_refers_to_nothing_outside_itself(runs: tuple[Run, Run], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, *runs)
    text = path.read_text(encoding="utf-8")
    parser = References()
    parser.feed(text)
    assert parser.found == []
    assert "default-src 'none'" in text
    style = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    assert "@import" not in style
    assert "url(" not in style
    assert text.count("Plotly.newPlot(") == 1
    assert 4_000_000 < len(text) < 6_000_000  # plotly.js once


def test_the_same_runs_give_the_same_bytes(runs: tuple[Run, Run], tmp_path: Path) -> None:
    for name, pair in (("a", runs), ("b", sample_runs())):
        write_report(tmp_path / name, *pair)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_texts_of_the_scenario_cannot_become_markup(runs: tuple[Run, Run], tmp_path: Path) -> None:
    name = "</script><script>alert(1)</script>"
    scenario = {**runs[0].scenario, "name": name}
    windows = {name: runs[0].windows["sync"]}
    write_report(tmp_path / "report.html", replace(runs[0], scenario=scenario, windows=windows))
    assert name not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_run_without_windows_has_a_page(runs: tuple[Run, Run], tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", replace(runs[0], windows={}))
    assert (tmp_path / "report.html").exists()


def test_printing_a_run_does_not_import_plotly() -> None:
    code = "import sys, batchsim.report; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_browser_draws_every_figure(runs: tuple[Run, Run], tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser found: looked for {', '.join(BROWSERS)}")
    report = tmp_path / "report.html"
    write_report(report, *runs)
    dom = dumped(browser, report, tmp_path)
    root = re.search(r"<html[^>]*>", dom)
    assert root is not None
    assert "data-error" not in root[0]
    assert 'data-rendered="5"' in root[0]
    for figure in ("timeline", "close-up", "idle", "metric-errors", "stage-errors"):
        assert re.search(rf'id="{figure}"[^>]*js-plotly-plot|js-plotly-plot[^>]*id="{figure}"', dom), figure
    assert dom.count('<svg class="main-svg"') >= 5
    spans = sum(len(spans) for run in runs for spans in run.windows.values())
    drawn = dom.count('<g class="point">')
    assert drawn > spans * 0.75


def test_a_browser_shows_a_picture(runs: tuple[Run, Run], tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser found: looked for {', '.join(BROWSERS)}")
    write_report(tmp_path / "report.html", runs[0])
    picture = tmp_path / "report.png"
    run_browser(browser, tmp_path / "report.html", tmp_path, f"--screenshot={picture}", "--window-size=1200,1600")
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 60_000  # an empty page compresses to a few kilobytes


def dumped(browser: str, page: Path, folder: Path) -> str:
    return run_browser(browser, page, folder, "--dump-dom", "--window-size=1400,3200")


def run_browser(browser: str, page: Path, folder: Path, *arguments: str) -> str:
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        f"--user-data-dir={folder / 'browser'}", "--virtual-time-budget=20000", *arguments, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout

"""What people see of requests that arrive over time: results and their definitions, tables, sentences, pictures."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from batchsim.latency import Slo
from batchsim.report import write_report
from batchsim.report.cumulative import MAX_POINTS, distribution
from batchsim.report.shown import varied
from batchsim.report.words import alerts, causes, headline
from batchsim.result import (
    DEFINITIONS,
    LoadCurve,
    LoadPoint,
    Run,
    ScheduleResult,
    errors,
    figures,
    over_replications,
    run_json,
    validation_json,
)
from batchsim.served import Served
from tests.sample_runs import SLO, requests_at, results_of, sample_runs, serve, serving_runs
from tests.test_report import BROWSERS, dumped, printed

PICTURES = (
    *("latency-ttft", "latency-tpot", "latency-itl", "latency-e2e", "over-time"),
    *("load-throughput", "load-ttft", "load-tpot", "load-e2e"),
)
OLD_PICTURES = ("timeline", "close-up", "idle", "metric-errors", "stage-errors")


@pytest.fixture(scope="module")
def runs() -> tuple[Run, Run]:
    return serving_runs()


@pytest.fixture(scope="module")
def calm() -> Run:
    """A run at a third of what either schedule can serve."""
    requests = requests_at(5.0, 100)
    tables = {
        "sync": serve(*requests, host_ns=880_000, device_ns=4_900_000),
        "async": serve(*requests, host_ns=0, device_ns=4_930_000),
    }
    run = sample_runs()[0]
    return replace(run, results=results_of(run, tables), served=tables)


def fixed(run: Run) -> Run:
    """Equal requests, all at the start, with their latencies."""
    count = 32
    lengths = np.full(count, 256), np.full(count, 40)
    table = serve(np.zeros(count, np.int64), *lengths, host_ns=0, device_ns=1_000_000, max_num_seqs=32)
    return replace(run, results=results_of(run, dict.fromkeys(run.results, table)), served={"sync": table})


def test_every_key_of_a_result_is_defined(runs: tuple[Run, Run]) -> None:
    told = json.loads(json.dumps(run_json(runs[0]), allow_nan=False))
    for result in told["schedules"].values():
        assert result.keys() - DEFINITIONS.keys() == {"schedule", "warnings"}
        assert {f"latency_ms.{name}" for name in result["latency_ms"]} < DEFINITIONS.keys()
        assert list(result["latency_ms"]["ttft"]) == ["mean", "p50", "p90", "p95", "p99", "p99.9"]
    old = run_json(sample_runs()[0])["schedules"]["sync"]
    assert old.keys() == told["schedules"]["sync"].keys()
    assert old["latency_ms"] == {} and old["unstable"] is None
    assert "load_curve" not in run_json(sample_runs()[0])
    assert [point["offered_requests_per_s"] for point in told["load_curve"]["async"]][:2] == [4.0, 8.0]


def test_errors_cover_latencies_and_shares_of_requests(runs: tuple[Run, Run]) -> None:
    predicted, measured = (run.results["async"] for run in runs)
    error = validation_json(*runs)["error"]["async"]
    assert error == errors(predicted, measured)
    p99 = predicted.latency_ms["ttft"]["p99"] / measured.latency_ms["ttft"]["p99"] - 1
    assert error["latency_ms.ttft.p99"] == pytest.approx(p99)
    assert predicted.slo_attainment is not None and measured.slo_attainment is not None
    assert error["slo_attainment"] == pytest.approx(100 * (predicted.slo_attainment - measured.slo_attainment))
    assert error["kv_use.mean"] == pytest.approx(100 * (predicted.kv_use["mean"] - measured.kv_use["mean"]))
    assert {"throughput_requests_per_s", "goodput_requests_per_s", "batch_size.mean", "waiting.mean"} < error.keys()
    assert all(math.isfinite(value) for value in error.values())


def test_replications_become_means_with_intervals(runs: tuple[Run, Run]) -> None:
    results = [run.results["async"] for run in runs]
    mean = over_replications(results)
    assert figures(mean).keys() == figures(results[0]).keys()
    for key, value in figures(mean).items():
        left, right = (figures(result)[key] for result in results)
        assert value == pytest.approx((left + right) / 2)
        assert mean.interval[key] == pytest.approx(12.7062 * abs(left - right) / 2, rel=1e-4)
    assert mean.counts == results[0].counts
    assert sum(mean.idle_ns.values()) == pytest.approx(mean.total_s * 1e9 * (1 - mean.device_busy_fraction))
    assert over_replications(results[:1]) is results[0]
    text = printed(80, replace(runs[0], results={"sync": mean, "async": mean}))
    assert re.search(r"tokens/s +2,389 ±\d+ +2,389 ±\d+", text)
    assert max(len(line) for line in text.splitlines()) <= 80


def test_a_run_without_replications_in_common_keeps_its_own_figures(runs: tuple[Run, Run]) -> None:
    first = runs[0].results["async"]
    mean = over_replications([first, replace(first, unstable="unstable: so", goodput_requests_per_s=None)])
    assert mean.goodput_requests_per_s == first.goodput_requests_per_s
    assert "goodput_requests_per_s" not in mean.interval
    assert mean.unstable is None


def test_the_terminal_shows_latencies_within_eighty_columns(runs: tuple[Run, Run]) -> None:
    alone, both = printed(80, runs[0]), printed(80, *runs)
    for text in (alone, both):
        assert max(len(line) for line in text.splitlines()) <= 80
        assert "…" not in text
        for part in (
            "requests/s",
            "goodput, requests/s",
            "within all SLOs",
            "KV use max",
            "waiting mean",
            "no requests",
        ):
            assert part in text
        assert "⚠ sync" in text
        assert "time to first token: from the intended arrival" in " ".join(text.split())
        assert re.search(r"async: simulated 600 requests, [\d,]+ iterations, [\d,]+ decisions", text)
    for result in runs[0].results.values():
        assert re.search(rf"{result.schedule}, ms +mean +p50 +p90 +p95 +p99 +p99\.9", alone)
        row = " +".join(f"{value:,.2f}" for value in result.latency_ms["ttft"].values())
        assert re.search(f"TTFT +{row}", alone)
    assert re.search(r"preemptions +0 +0", alone)
    left, right = (run.results["async"].latency_ms["ttft"]["p99"] for run in runs)
    assert f"{left:,.2f}  {right:,.2f}" in next(line for line in both.splitlines() if line.startswith("TTFT p99"))
    assert re.search(r"async: tokens/s [^;]*TTFT p50 [-+][\d.]+%, TTFT p99", " ".join(both.split()))


def test_latencies_of_hours_fit_too(runs: tuple[Run, Run]) -> None:
    def slow(result: ScheduleResult) -> ScheduleResult:
        latency = {name: dict.fromkeys(values, 98_765_432.1) for name, values in result.latency_ms.items()}
        return replace(result, latency_ms=latency)

    long = [replace(run, results={name: slow(result) for name, result in run.results.items()}) for run in runs]
    for text in (printed(80, long[0]), printed(80, *long)):
        assert max(len(line) for line in text.splitlines()) <= 80
        assert "…" not in text


def test_runs_of_equal_requests_at_the_start_look_as_before(runs: tuple[Run, Run], tmp_path: Path) -> None:
    run = fixed(runs[0])
    assert run.results["sync"].latency_ms and not varied(replace(run, load_curve=None))
    text = printed(80, run)
    for part in ("TTFT", "requests/s", "queue", "latency_ms", "simulated 32 requests"):
        assert part not in text
    write_report(tmp_path / "report.html", run)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for part in ("Latency of requests", "Requests over time", "TTFT"):
        assert part not in page.split("<body>")[1]


def test_doubtful_figures_are_said_to_be(runs: tuple[Run, Run]) -> None:
    sync, async_ = runs[0].results.values()
    cut = replace(async_, partial="interrupted after 512 of 1,000 requests")
    told = alerts([replace(runs[0], results={"sync": sync, "async": cut})])
    assert told[0].startswith("sync: unstable: 19.3 requests/s arrive and ")
    assert told[1] == "async: interrupted after 512 of 1,000 requests"
    assert [each.split(":")[0] for each in alerts(runs)] == ["sync, simulated", "sync, executed"]


def test_where_both_keep_up_latencies_tell_them_apart(calm: Run) -> None:
    first = headline(calm)
    assert "async should serve what arrives, as sync does" in first
    sync, async_ = (calm.results[name].latency_ms["tpot"]["p50"] for name in ("sync", "async"))
    assert f"TPOT p50 {sync:.2f} ms → {async_:.2f} ms" in first
    assert "async serves what arrives, as sync does" in causes(calm)[1]
    assert "Measured: async serves what arrives, as sync does" in headline(calm, calm)
    alone = replace(calm, results={"async": calm.results["async"]})
    assert re.fullmatch(r"async: [\d,]+ tokens/s, TTFT p50 .* ms, TTFT p99 .* ms, TPOT p50 .* ms\.", headline(alone))


def test_time_without_requests_is_not_the_hosts_fault(calm: Run) -> None:
    sync = calm.results["sync"]
    total_ns = round(sync.total_s * 1e9)
    idle_ns = {"no_requests": round(0.34 * total_ns), "update": round(0.02 * total_ns)}
    idle = replace(sync, device_busy_fraction=0.64, idle_ns=idle_ns, host_busy_fraction=0.60)
    run = replace(
        calm, results={"sync": idle, "async": replace(idle, schedule="async", idle_ns={**idle_ns, "update": 0})}
    )
    text = causes(run)[0]
    assert "idle 36.0% of the time: 34.0 points with no request to serve, 2.0 waiting for update." in text
    assert "points waiting for no" not in " ".join(causes(run))
    asleep = replace(idle, device_busy_fraction=0.66, idle_ns={"no_requests": idle_ns["no_requests"]})
    assert "--schedules" not in causes(replace(calm, results={"sync": asleep}))[0]
    assert "--schedules" in causes(replace(calm, results={"sync": idle}))[0]


def test_a_host_that_never_rests_while_there_are_requests_is_the_bottleneck(calm: Run) -> None:
    sync = calm.results["sync"]
    idle_ns = {"no_requests": round(0.4 * sync.total_s * 1e9)}
    slow = replace(sync, throughput_tokens_per_s=sync.throughput * 0.9, idle_ns=idle_ns)
    slow = replace(slow, schedule="async", device_busy_fraction=0.3, host_busy_fraction=0.594)
    text = causes(replace(calm, results={"sync": sync, "async": slow}))[1]
    assert "the host is the bottleneck, busy 99.0% of the time" in text
    assert "cut host work" in text


@pytest.mark.parametrize("count", [1, 7, MAX_POINTS, 50_000])
def test_a_drawn_distribution_is_the_distribution(count: int) -> None:
    values = np.random.default_rng(count).lognormal(18, 1, count).astype(np.int64)
    times, shares = distribution(values)
    assert len(times) <= MAX_POINTS + 1
    assert (np.diff(times) >= 0).all() and (np.diff(shares) > 0).all() and shares[-1] == 1
    for time, share in zip(times, shares, strict=True):
        assert np.mean(values / 1e6 <= time) == pytest.approx(share, abs=1e-12)
    assert max(np.diff(shares, prepend=0)) <= max(1.001 / count, 0.0051)
    tail = times[np.searchsorted(shares, 0.999)]
    assert tail == pytest.approx(np.quantile(values / 1e6, 0.999, method="inverted_cdf"), rel=0.02)


def test_counted_values_are_drawn_as_if_written_out() -> None:
    values, counts = np.array([30, 10, 20]) * 1_000_000, np.array([1, 6, 3])
    times, shares = distribution(values, counts)
    assert (times.tolist(), shares.tolist()) == ([10, 20, 30], [0.6, 0.9, 1.0])
    times, shares = distribution(np.array([0, 0, 5_000_000]))
    assert (times.tolist(), shares.tolist()) == ([5], [1.0])
    assert not len(distribution(np.zeros(0, np.int64))[0])


def many(table: Served, times: int) -> Served:
    """The table's requests `times` over."""
    return replace(
        table,
        arrival_ns=np.repeat(table.arrival_ns, times),
        started_ns=np.repeat(table.started_ns, times),
        first_token_ns=np.repeat(table.first_token_ns, times),
        finished_ns=np.repeat(table.finished_ns, times),
        generated=np.repeat(table.generated, times),
    )


def test_a_page_does_not_grow_with_the_number_of_requests(runs: tuple[Run, Run], tmp_path: Path) -> None:
    sizes = []
    for times in (1, 300):
        served = {name: many(table, times) for name, table in runs[0].served.items()}
        write_report(tmp_path / "report.html", replace(runs[0], served=served))
        sizes.append((tmp_path / "report.html").stat().st_size)
    assert sizes[1] < sizes[0] + 50_000 < 5_500_000


def test_the_same_requests_give_the_same_bytes(runs: tuple[Run, Run], tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_report(tmp_path / name, *runs)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_page_has_the_sections_of_what_was_recorded(runs: tuple[Run, Run], calm: Run, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, *runs)
    page = path.read_text(encoding="utf-8").split("<body>")[1]
    for part in ("Latency of requests", "Requests over time", "As load grows", "TTFT p99.9, ms", 'class="alerts"'):
        assert part in page
    assert f"SLO, {SLO.ttft_ms:g} ms" in page
    write_report(path, replace(calm, slo=Slo(e2e_ms=777)))
    page = path.read_text(encoding="utf-8").split("<body>")[1]
    assert "As load grows" not in page and 'class="alerts"' not in page
    assert page.count("SLO, 777 ms") == 1
    write_report(path, replace(calm, served={}))
    page = path.read_text(encoding="utf-8").split("<body>")[1]
    assert "Latency of requests, ms" in page.replace("Latency of requests<", "Latency of requests, ms<")
    assert 'id="latency-ttft"' not in page


def test_a_load_curve_may_lack_latencies(runs: tuple[Run, Run], tmp_path: Path) -> None:
    none = replace(runs[0].results["sync"], latency_ms={}, unstable="unstable: so")
    point = LoadPoint.of(3.0, none)
    assert point.unstable and point.ttft_p50_ms is None
    run = replace(runs[0], load_curve=LoadCurve({"sync": (point,)}))
    write_report(tmp_path / "report.html", run)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'id="load-throughput"' in page and 'id="load-ttft"' not in page


def test_a_browser_draws_every_picture(runs: tuple[Run, Run], tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser found: looked for {', '.join(BROWSERS)}")
    write_report(tmp_path / "report.html", *runs)
    dom = dumped(browser, tmp_path / "report.html", tmp_path)
    root = re.search(r"<html[^>]*>", dom)
    assert root is not None
    assert "data-error" not in root[0]
    assert f'data-rendered="{len(PICTURES) + len(OLD_PICTURES)}"' in root[0]
    for name in (*PICTURES, *OLD_PICTURES):
        assert re.search(rf'id="{name}"[^>]*js-plotly-plot|js-plotly-plot[^>]*id="{name}"', dom), name

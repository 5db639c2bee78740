"""What the table of requests says: percentiles against oracles, conservation laws, and when a queue only grows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from fractions import Fraction
from math import ceil, floor, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchsim.latency import Slo, intervals, quantiles, request_figures
from batchsim.served import Int64, Series, Served
from tests.sample_runs import requests_at, serve

NONE = np.zeros(0, np.int64)
FREE = Series(NONE, NONE, NONE, NONE)


def table(
    arrival: Int64 | list[int],
    started: Int64 | list[int],
    first: Int64 | list[int] | None = None,
    finished: Int64 | list[int] | None = None,
    *,
    tokens: Int64 | list[int] | None = None,
    total_ns: int = 0,
    warm_up_ns: int = 0,
    series: Series = FREE,
) -> Served:
    """A table of requests that get one token as they start, unless said otherwise."""
    arrived, begun = np.asarray(arrival, np.int64), np.asarray(started, np.int64)
    zeros = np.zeros(len(arrived), np.int64)
    first_ns = begun if first is None else np.asarray(first, np.int64)
    finished_ns = first_ns if finished is None else np.asarray(finished, np.int64)
    generated = zeros + 1 if tokens is None else np.asarray(tokens, np.int64)
    return Served(
        arrival_ns=arrived, started_ns=begun, first_token_ns=first_ns, finished_ns=finished_ns,
        prompt_tokens=zeros + 1, output_tokens=generated, generated=generated, cached_tokens=zeros, preemptions=zeros,
        priority=zeros, replica=zeros, itl_ns=NONE, itl_count=NONE, batch_sizes=NONE, series=series, kv_blocks=10,
        warm_up_ns=warm_up_ns, total_ns=total_ns or int(finished_ns.max(initial=1)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def busy() -> Served:
    return serve(*requests_at(15.0, 400), host_ns=800_000, device_ns=4_900_000)


def naive(values: list[int], share: float) -> Fraction:
    """The quantile that lies at `share` of the way through the sorted values."""
    ordered = sorted(values)
    place = Fraction(share) * (len(ordered) - 1)
    low, high = ordered[floor(place)], ordered[ceil(place)]
    return low + (high - low) * (place - floor(place))


multisets = st.lists(st.tuples(st.integers(1, 10**12), st.integers(1, 30)), min_size=1, max_size=20)


@given(multisets, st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_quantiles_of_counted_values_are_those_of_the_values_written_out(
    counted: list[tuple[int, int]], shares: list[float]
) -> None:
    values, counts = (np.array(column, np.int64) for column in zip(*counted, strict=True))
    written_out = [value for value, count in counted for _ in range(count)]
    expected = pytest.approx([float(naive(written_out, share)) for share in shares], rel=1e-9)
    assert quantiles(values, shares, counts).tolist() == expected
    assert quantiles(np.array(written_out), shares).tolist() == expected


waits = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 25)), min_size=1, max_size=25)


@given(waits, st.integers(0, 40), st.integers(1, 40))
def test_the_queue_over_time_is_what_the_requests_waited(
    waited: list[tuple[int, int]], warm_up_ns: int, lasts_ns: int
) -> None:
    """Little's law, exactly; requests that had not started when the run ended wait until its end."""
    total_ns = warm_up_ns + lasts_ns
    waited = [(arrival, wait) for arrival, wait in sorted(waited) if arrival <= total_ns] or [(0, 3)]
    arrival = [each[0] for each in waited]
    started = [a + wait if a + wait <= total_ns else -1 for a, wait in waited]
    figures = request_figures(table(arrival, started, total_ns=total_ns, warm_up_ns=warm_up_ns))
    over_time = [
        sum(a <= now and (begun < 0 or now < begun) for a, begun in zip(arrival, started, strict=True))
        for now in range(warm_up_ns, total_ns + 1)
    ]
    assert figures.waiting["max"] == max(over_time)
    assert figures.waiting["mean"] == sum(over_time[:-1]) / lasts_ns
    if not warm_up_ns and min(started) >= 0:
        queue_ns = figures.latency_ms["queue"]["mean"] * 1e6 * len(arrival)
        assert figures.waiting["mean"] * lasts_ns == pytest.approx(queue_ns, rel=1e-12)


def test_latencies_of_requests_worked_out_by_hand() -> None:
    ms = 10**6
    served = table(
        [0, 2 * ms, 5 * ms], [1 * ms, 4 * ms, -1], [3 * ms, 9 * ms, -1], [3 * ms, 29 * ms, -1], tokens=[1, 6, 0]
    )
    latency = request_figures(served).latency_ms
    assert {name: statistics["p50"] for name, statistics in latency.items()} == {
        "ttft": 5.0, "tpot": 4.0, "e2e": 15.0, "queue": 1.5
    }  # fmt: skip
    assert list(latency["ttft"]) == ["mean", "p50", "p90", "p95", "p99", "p99.9"]


def test_gaps_between_tokens_add_up_to_the_time_between_first_and_last(busy: Served) -> None:
    between = busy.finished_ns - busy.first_token_ns
    assert busy.itl_ns @ busy.itl_count == between.sum()
    latency = request_figures(busy).latency_ms
    tokens = int((busy.generated - 1).sum())
    assert latency["itl"]["mean"] * tokens == pytest.approx(between.sum() / 1e6)
    several = busy.generated > 1
    tpot = between[several] / (busy.generated[several] - 1)
    assert latency["tpot"]["mean"] == pytest.approx(tpot.mean() / 1e6)
    assert latency["e2e"]["mean"] == pytest.approx(latency["ttft"]["mean"] + between.mean() / 1e6)
    for statistics in latency.values():
        assert sorted(list(statistics.values())[1:]) == list(statistics.values())[1:]


def test_goodput_is_what_throughput_has_left_within_the_objectives(busy: Served) -> None:
    free = request_figures(busy)
    assert free.goodput_requests_per_s is None and free.slo_attainment is None
    throughput = free.throughput_requests_per_s
    assert throughput == pytest.approx(len(busy.arrival_ns) / busy.total_ns * 1e9)
    every = request_figures(busy, Slo())
    assert (every.goodput_requests_per_s, every.slo_attainment) == (throughput, 1.0)
    p90 = free.latency_ms["ttft"]["p90"]
    last = 1.0
    for slo in (
        Slo(ttft_ms=p90),
        Slo(ttft_ms=p90, tpot_ms=6.5),
        Slo(ttft_ms=p90, tpot_ms=6.5, e2e_ms=500),
        Slo(0, 0, 0),
    ):
        found = request_figures(busy, slo)
        assert throughput is not None and found.goodput_requests_per_s is not None and found.slo_attainment is not None
        assert found.slo_attainment <= last
        assert found.goodput_requests_per_s == pytest.approx(found.slo_attainment * throughput)
        last = found.slo_attainment
    assert request_figures(busy, Slo(ttft_ms=p90)).slo_attainment == pytest.approx(0.9, abs=0.003)
    assert last == 0.0


def test_one_token_has_no_time_per_token_to_bound() -> None:
    assert request_figures(table([0], [1]), Slo(tpot_ms=1e-9)).slo_attainment == 1.0


def test_requests_before_the_warm_up_do_not_count(busy: Served) -> None:
    cut = int(busy.arrival_ns[100])
    late = request_figures(replace(busy, warm_up_ns=cut), Slo(ttft_ms=100))
    by_hand = (busy.first_token_ns - busy.arrival_ns)[100:] / 1e6
    assert late.latency_ms["ttft"]["mean"] == pytest.approx(by_hand.mean())
    assert late.slo_attainment == pytest.approx((by_hand <= 100).mean())
    finished = np.count_nonzero(busy.finished_ns > cut)
    assert late.throughput_requests_per_s == pytest.approx(finished / (busy.total_ns - cut) * 1e9)


def test_an_interrupted_run_counts_what_has_happened() -> None:
    served = serve(*requests_at(15.0, 400), host_ns=800_000, device_ns=4_900_000, until_ns=9_000_000_000)
    assert (served.finished_ns < 0).any() and (served.first_token_ns < 0).any()
    found = request_figures(served, Slo(ttft_ms=1e9), open_loop=True)
    assert found.slo_attainment == 1.0
    assert found.latency_ms["ttft"]["p99.9"] < 1e5
    assert found.goodput_requests_per_s == found.throughput_requests_per_s


@pytest.mark.parametrize("count", [0, 1, 2])
def test_what_has_no_sample_is_left_out(count: int) -> None:
    never = np.full(count, -1, np.int64)
    served = table(np.zeros(count, np.int64), never, tokens=np.zeros(count, np.int64), total_ns=5)
    found = request_figures(served, Slo(1, 1, 1), open_loop=True)
    assert found.latency_ms == {} and found.batch_size == {} and found.kv_use == {}
    assert found.slo_attainment is None and found.unstable is None
    assert found.waiting == {"mean": count, "max": count}
    nothing = request_figures(replace(served, warm_up_ns=5), Slo(1, 1, 1), open_loop=True)
    assert nothing.throughput_requests_per_s is None and nothing.waiting == {}
    for each in (found, nothing):
        json.dumps(asdict(each), allow_nan=False)


def test_sizes_of_batches_are_counted_by_step(busy: Served) -> None:
    sizes = np.repeat(np.arange(len(busy.batch_sizes)), busy.batch_sizes)
    found = request_figures(busy).batch_size
    assert found["mean"] == pytest.approx(sizes.mean())
    assert [found["p50"], found["p90"], found["p99"]] == np.percentile(sizes, (50, 90, 99)).tolist()
    assert found["max"] == sizes.max()
    assert found["mean"] * len(sizes) == pytest.approx(busy.generated.sum())


def test_use_of_the_cache_is_averaged_over_time() -> None:
    series = Series(np.array([0, 10, 40]), NONE, NONE, np.array([2, 10, 5]))
    served = table([0], [1], total_ns=100, series=series)
    assert request_figures(served).kv_use == {"mean": pytest.approx((2 * 10 + 10 * 30 + 5 * 60) / 1000), "max": 1.0}
    late = request_figures(replace(served, warm_up_ns=50)).kv_use
    assert late == {"mean": 0.5, "max": 0.5}
    assert request_figures(replace(served, kv_blocks=0)).kv_use == {}


def queue(seed: int, count: int, load: float, *, variation: float = 1.0, servers: int = 1) -> Served:
    """Deterministic service, a request a second on average; times between arrivals vary by `variation`."""
    draws = np.random.default_rng(seed)
    between = draws.gamma(variation**-2, variation**2 / load, count)
    arrival = (np.cumsum(between) * 1e9).astype(np.int64)
    service = servers * 1_000_000_000
    started = np.empty(count, np.int64)
    for one in range(servers):
        # Lindley: a server begins with its next request when that has come and the one before is done.
        work = service * np.arange(len(arrival[one::servers]))
        started[one::servers] = work + np.maximum.accumulate(arrival[one::servers] - work)
    return table(arrival, started, started + service, total_ns=int(started.max()) + service)


def share_unstable(count: int, load: float, *, variation: float = 1.0, servers: int = 1) -> float:
    tables = [queue(seed, count, load, variation=variation, servers=servers) for seed in range(100)]
    return float(np.mean([request_figures(each, open_loop=True).unstable is not None for each in tables]))


@pytest.mark.parametrize(("count", "load"), [(200, 0.5), (1_000, 0.5), (1_000, 0.9), (1_000, 0.95), (10_000, 0.95)])
@pytest.mark.parametrize("variation", [1.0, 3.0])
def test_a_queue_that_keeps_up_is_hardly_ever_called_unstable(count: int, load: float, variation: float) -> None:
    assert share_unstable(count, load, variation=variation) <= 0.02


@pytest.mark.parametrize(
    ("count", "load", "least"), [(2_000, 1.1, 0.9), (10_000, 1.05, 0.8), (1_000, 1.2, 0.95), (10_000, 1.2, 1.0)]
)
@pytest.mark.parametrize("servers", [1, 32])
def test_a_queue_that_cannot_keep_up_is_called_unstable(count: int, load: float, least: float, servers: int) -> None:
    assert share_unstable(count, load, servers=servers) >= least


def test_an_unstable_run_says_what_arrives_and_what_is_served() -> None:
    served = queue(3, 4_000, 1.25)
    text = request_figures(served, open_loop=True).unstable
    assert text is not None
    found = re.match(r"unstable: (.*) requests/s arrive and (.*) are served; (.*) were waiting when the last", text)
    assert found is not None
    assert [float(found[1]), float(found[2])] == pytest.approx([1.25, 1.0], abs=0.1)
    assert int(found[3].replace(",", "")) == (served.started_ns > served.arrival_ns[-1]).sum()
    assert request_figures(served, open_loop=False).unstable is None


def test_requests_that_come_all_at_once_are_no_open_loop() -> None:
    together = np.zeros(100, np.int64)
    assert request_figures(table(together, np.arange(100)), open_loop=True).unstable is None


def test_intervals_are_students() -> None:
    from scipy import stats

    values = [3.0, 4.5, 3.9, 4.1]
    found = intervals([{"a": value, "b": 2.0, **({"c": 1.0} if value > 4 else {})} for value in values])
    low, high = stats.t.interval(0.95, 3, np.mean(values), np.std(values, ddof=1) / sqrt(4))
    assert list(found["a"]) == pytest.approx([(low + high) / 2, (high - low) / 2])
    assert found["b"] == (2.0, 0.0)
    assert "c" not in found
    assert intervals([{"a": 1.0}]) == intervals([]) == {}


def test_figures_of_requests_need_no_scipy() -> None:
    code = "import sys, batchsim.latency; sys.exit('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""A table of service times: interpolation passes through its entries, rises with them, keeps their distributions."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from batchsim.batching.dynamic import DynamicBatch, Requested
from batchsim.service import TableCosts, service_ns
from batchsim.service_times import BINS, TableService


def table(batch_ms: dict[Any, Any]) -> TableService:
    return TableService.model_validate({"kind": "table", "batch_ms": batch_ms})


def drawn_ms(batch_ms: dict[Any, Any], size: int, count: int = 50_000, **how: Any) -> npt.NDArray[np.float64]:
    """The device times of many batches of a size, milliseconds."""
    costs = TableCosts(table(batch_ms), size, **how)
    batch = DynamicBatch(0, tuple(Requested(i, 0) for i in range(size)), 64)
    return np.array([costs.launch(batch)[0].kernels_ns for _ in range(count)]) / 1e6


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.integers(1, 60), st.floats(0.01, 500), min_size=2, max_size=8))
def test_interpolation_passes_through_the_entries_and_never_beyond_them(entries: dict[int, float]) -> None:
    known = sorted(entries)
    times = service_ns(table(entries), 64)[:, 0] / 1e6
    for low, high in pairwise(known):
        between = times[low : high + 1]
        assert between[0] == pytest.approx(entries[low], abs=1e-6)
        assert between[-1] == pytest.approx(entries[high], abs=1e-6)
        rises = np.diff(between) * np.sign(entries[high] - entries[low])
        assert (rises >= -1e-6).all()
    assert (times[: known[0]] == times[known[0]]).all()
    assert (np.diff(times[known[-1] :]) >= 0).all()


def test_rising_entries_rise_in_every_bin() -> None:
    times = service_ns(table({1: {"samples": [4, 9]}, 4: {"p0": 5, "p50": 10, "p100": 12}, 9: 14}), 20)
    assert times.shape == (21, BINS)
    assert (np.diff(times, axis=0) >= 0).all()
    assert (np.diff(times[[1, 4, 9]], axis=1) >= 0).all()


def test_both_modes_stay_apart_between_two_sizes() -> None:
    """Not the mean of 4 and 9 ms: half of the batches take the one, half the other, of sizes between as well."""
    entries = {1: {"samples": [4, 9]}, 3: {"samples": [5, 10]}}
    drawn = drawn_ms(entries, 2)
    assert set(np.round(drawn, 6).tolist()) == {4.5, 9.5}
    assert np.mean(drawn == 4.5) == pytest.approx(0.5, abs=0.01)
    assert drawn_ms(entries, 2, count=10, jitter=False) == pytest.approx(7.0)


@pytest.mark.parametrize(
    ("entry", "quantile"),
    [
        ({"p10": 3, "p50": 4, "p90": 8}, lambda p: np.interp(p, [0.1, 0.5, 0.9], [3, 4, 8])),
        ({"dist": "lognorm", "s": 0.6, "scale": 5}, stats.lognorm(s=0.6, scale=5).ppf),
        ({"dist": "gamma", "a": 0.7, "scale": 5}, stats.gamma(0.7, scale=5).ppf),
        ({"samples": list(range(1, 101))}, lambda p: np.ceil(p * 100)),
    ],
    ids=["quantiles", "lognormal", "gamma", "samples"],
)
def test_draws_are_distributed_as_the_table_says(entry: dict[str, Any], quantile: Any) -> None:
    drawn = drawn_ms({1: entry}, 1)
    for share in (0.05, 0.255, 0.5, 0.755, 0.95, 0.99):
        # Of the draws, so many are below that: within four standard deviations of a binomial.
        below = np.mean(drawn <= quantile(share) + 1e-6)
        low = np.mean(drawn < quantile(share) - 1e-2)
        reach = 4 * np.sqrt(share * (1 - share) / len(drawn)) + 1 / BINS
        assert low - reach <= share <= below + reach


@pytest.mark.parametrize(
    "law",
    [stats.expon(scale=5), stats.lognorm(s=1.0, scale=3), stats.uniform(2, 6)],
    ids=["expon", "lognorm", "uniform"],
)
def test_bins_keep_mean_and_variance(law: Any) -> None:
    entry = {"dist": law.dist.name, **law.kwds} | ({"loc": 2, "scale": 6} if law.dist.name == "uniform" else {})
    times = service_ns(table({1: entry}), 1)[1] / 1e6
    assert times.mean() == pytest.approx(law.mean(), rel=1e-4)
    assert times.var() == pytest.approx(law.var(), rel=0.03)


def test_beyond_the_table() -> None:
    several = service_ns(table({2: 4.0, 4: 6.0}), 8)[:, 0] / 1e6
    assert several[[1, 2, 8]].tolist() == [4.0, 4.0, 10.0]
    assert service_ns(table({4: 6.0}), 8)[8, 0] == 12_000_000
    falling = service_ns(table({2: 6.0, 4: 4.0}), 8)[8, 0]
    assert falling == 4_000_000
    costs = TableCosts(table({2: 4.0, 4: 6.0}), 8)
    costs.note_sizes([2, 3, 4])
    assert costs.extrapolated() == []
    costs.note_sizes([1, 6])
    assert costs.extrapolated() == ["batches (the table has those of 2..4): extrapolated to 1..6"]


def test_the_nth_batch_has_the_nth_draw_whatever_its_size() -> None:
    entries = {1: {"dist": "expon", "scale": 5}, 2: {"dist": "expon", "scale": 10}}
    np.testing.assert_allclose(drawn_ms(entries, 2, 100), 2 * drawn_ms(entries, 1, 100), atol=2e-6)
    assert (drawn_ms(entries, 1, 100, seed=1) != drawn_ms(entries, 1, 100)).any()

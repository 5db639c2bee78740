"""Requests arrive and are as long as the scenario says: as laws of their distributions, not as numbers of one seed."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from scipy import integrate, stats

from batchsim import fields, yaml_loader
from batchsim.errors import InputError
from batchsim.fields import Model
from batchsim.workload import Requests, requests_of
from batchsim.workload_scenario import (
    Distribution,
    Diurnal,
    Empirical,
    FixedWorkload,
    RandomWorkload,
    TraceWorkload,
    Workload,
)

WORKLOAD: TypeAdapter[Any] = TypeAdapter(Workload)
FIXED: dict[str, Any] = {"kind": "fixed", "num_prompts": 4000, "input_len": 100, "output_len": 10}
RANDOM: dict[str, Any] = {**FIXED, "kind": "random"}
UNLIKELY = 1e-3  # Seeds are fixed: a test that fails once fails for ever.


class Holder(Model):
    """The least that a scenario holds."""

    kind: Literal["serving"]
    workload: Workload


REFUSALS = fields.refusals_of(Holder)


def drawn(keys: dict[str, Any], *, seed: int = 1, replication: int = 0, **more: Any) -> Requests:
    return requests_of(WORKLOAD.validate_python({**keys, **more}), seed=seed, replication=replication)


def refusal(keys: dict[str, Any], **more: Any) -> InputError:
    """What a scenario with such a workload is told; also, that it is told in one line of each problem."""
    document = yaml_loader.Document({"kind": "serving", "workload": {**keys, **more}})
    with pytest.raises(InputError) as caught:
        fields.read(Holder, REFUSALS, document, "x.yaml", ())
    return caught.value


def digest(requests: Requests) -> str:
    arrays = [getattr(requests, name) for name in Requests.__slots__]
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays if isinstance(a, np.ndarray))).hexdigest()


def counted(requests: Requests, edges_s: list[float]) -> list[int]:
    return [int(n) for n in np.histogram(requests.arrival_ns / 1e9, edges_s)[0]]


# Arrivals.


def test_without_a_rate_all_requests_are_there_at_the_start() -> None:
    requests = drawn(FIXED)
    assert len(requests) == 4000
    assert not requests.arrival_ns.any()
    assert not requests.closed


@pytest.mark.parametrize("rate", [0.01, 1, 250.5, 1e6])
def test_gaps_at_a_constant_rate_are_exponential(rate: float) -> None:
    gaps = np.diff(drawn(FIXED, request_rate=rate).arrival_ns, prepend=0) / 1e9
    assert stats.kstest(gaps, "expon", args=(0, 1 / rate)).pvalue > UNLIKELY
    lag_one = float(np.corrcoef(gaps[1:], gaps[:-1])[0, 1])
    assert abs(lag_one) < 4 / math.sqrt(len(gaps))


@pytest.mark.parametrize("burstiness", [0.1, 0.5, 1.0, 4.0, 100.0])
def test_gaps_are_gamma_of_the_shape_that_burstiness_is(burstiness: float) -> None:
    gaps = np.diff(drawn(FIXED, num_prompts=40_000, request_rate=20, burstiness=burstiness).arrival_ns, prepend=0) / 1e9
    at = np.sort(gaps)
    off = np.arange(1, len(at) + 1) / len(at) - stats.gamma(burstiness, scale=1 / 20 / burstiness).cdf(at)
    # Of the burstiest gaps many are shorter than the nanosecond that they are rounded to.
    assert np.abs(off[at > 1e-6]).max() < 1.95 / math.sqrt(len(at))
    assert np.mean(gaps) == pytest.approx(1 / 20, rel=4 / math.sqrt(burstiness * 40_000))
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


PIECES = [
    {"rate": 5, "duration_s": 60},
    {"rate": 0, "duration_s": 100},
    {"rate": 0, "duration_s": 1},
    {"rate": 40, "duration_s": 30},
    {"rate": 2},
]


def test_pieces_have_arrivals_at_their_rates_and_none_at_rate_zero() -> None:
    replications = [drawn(FIXED, request_rate=PIECES, replication=i) for i in range(20)]
    counts = np.sum([counted(requests, [0, 60, 161, 191, 691]) for requests in replications], axis=0)
    expected = [20 * mean for mean in (300, 0, 1200, 1000)]
    assert counts[1] == 0
    for count, mean in zip(counts, expected, strict=True):
        assert abs(count - mean) <= 4 * math.sqrt(mean)
    # Within a piece they are a Poisson process: uniform, given how many there are.
    times = np.concatenate([requests.arrival_ns for requests in replications]) / 1e9
    third = times[(times > 161) & (times < 191)]
    assert stats.kstest(third, "uniform", args=(161, 30)).pvalue > UNLIKELY


def test_a_leading_piece_without_arrivals_only_shifts() -> None:
    later = drawn(FIXED, request_rate=[{"rate": 0, "duration_s": 7}, {"rate": 3}])
    assert np.abs(later.arrival_ns - 7 * 10**9 - drawn(FIXED, request_rate=3).arrival_ns).max() <= 1


@given(
    st.lists(st.tuples(st.floats(0, 1e4), st.floats(0.001, 1e5)), max_size=6), st.floats(0.01, 1e4), st.floats(0.05, 50)
)
@settings(max_examples=50, deadline=None)
def test_pieces_invert_the_cumulated_rate(pieces: list[tuple[float, float]], last: float, burstiness: float) -> None:
    rates = [{"rate": rate, "duration_s": duration} for rate, duration in pieces] + [{"rate": last}]
    keys = {**FIXED, "num_prompts": 50, "burstiness": burstiness}
    times_s = drawn(keys, request_rate=rates).arrival_ns / 1e9
    assert (np.diff(times_s) >= 0).all()
    edges = np.cumsum([0.0, *(duration for _, duration in pieces)])
    reached = np.cumsum([0.0, *(rate * duration for rate, duration in pieces)])
    beyond = reached[-1] + np.maximum(times_s - edges[-1], 0) * last
    cumulated = np.where(times_s < edges[-1], np.interp(times_s, edges, reached), beyond)
    units = drawn(keys, request_rate=1).arrival_ns / 1e9
    resolution = 1e-9 * max(last, *(rate for rate, _ in pieces), 1)
    assert cumulated == pytest.approx(units, rel=1e-9, abs=2 * resolution)


@pytest.mark.parametrize("amplitude", [0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("peak_s", [0.0, 30.0, 100.0, 3333.3])
def test_a_swinging_rate_cumulates_to_what_constant_arrivals_do(amplitude: float, peak_s: float) -> None:
    swing = Diurnal(mean=5.0, amplitude=amplitude, period_s=100.0, peak_s=peak_s)
    times_s = drawn(FIXED, request_rate=swing).arrival_ns / 1e9
    turn = 2 * math.pi / swing.period_s
    swung = np.sin(turn * (times_s - peak_s)) + math.sin(turn * peak_s)
    cumulated = swing.mean * (times_s + amplitude / turn * swung)
    assert cumulated == pytest.approx(drawn(FIXED, request_rate=1).arrival_ns / 1e9, rel=1e-11, abs=2e-8)
    assert (np.diff(times_s) >= 0).all()


def test_a_swinging_rate_has_its_integral_of_arrivals_in_each_part_of_a_day() -> None:
    day, mean, amplitude, peak_s = 86_400.0, 0.5, 0.6, 50_400.0
    requests = drawn(FIXED, num_prompts=200_000, request_rate={"mean": mean, "amplitude": amplitude, "peak_s": peak_s})
    times_s = requests.arrival_ns / 1e9
    days = int(times_s[-1] // day)
    counts = np.histogram(times_s[times_s < days * day] % day, np.linspace(0, day, 25))[0]

    def rate(time_s: float) -> float:
        return mean * (1 + amplitude * math.cos(2 * math.pi * (time_s - peak_s) / day))

    expected = np.array([days * integrate.quad(rate, hour * 3600, hour * 3600 + 3600)[0] for hour in range(24)])
    assert days > 3
    assert ((counts - expected) ** 2 / expected).sum() < stats.chi2.isf(UNLIKELY, 24)
    assert int(np.argmax(expected)) in (13, 14)


@pytest.mark.parametrize("rate", [7, PIECES, {"mean": 3, "amplitude": 0.9, "period_s": 10}])
@pytest.mark.parametrize("burstiness", [0.01, 1, 1000])
def test_arrivals_are_whole_nanoseconds_in_order(rate: object, burstiness: float) -> None:
    requests = drawn(FIXED, request_rate=rate, burstiness=burstiness)
    assert requests.arrival_ns.dtype == np.int64
    assert (np.diff(requests.arrival_ns) >= 0).all()
    assert requests.arrival_ns[0] >= 0


def test_the_first_request_arrives_after_a_gap() -> None:
    firsts = [drawn(FIXED, num_prompts=1, request_rate=2, replication=i).arrival_ns[0] / 1e9 for i in range(500)]
    assert stats.kstest(firsts, "expon", args=(0, 0.5)).pvalue > UNLIKELY


@pytest.mark.parametrize("rate", [1e-6, [{"rate": 0, "duration_s": 1e9}] * 9, {"mean": 1e-6, "amplitude": 0.5}])
def test_arrivals_that_no_clock_holds_are_refused(rate: Any) -> None:
    pieces = [*rate, {"rate": 1}] if isinstance(rate, list) else rate
    with pytest.raises(InputError, match=r"workload\.request_rate: found a last arrival after [\d,]+ years"):
        drawn(FIXED, num_prompts=10_000, request_rate=pieces)


@pytest.mark.parametrize("keys", [FIXED, RANDOM])
def test_a_closed_loop_is_max_concurrency_without_a_rate(keys: dict[str, Any]) -> None:
    closed = drawn(keys, max_concurrency=8)
    assert (closed.closed, closed.max_concurrency) == (True, 8)
    assert not closed.arrival_ns.any()
    held = drawn(keys, max_concurrency=8, request_rate=3)
    assert (held.closed, held.max_concurrency) == (False, 8)
    assert np.array_equal(held.arrival_ns, drawn(keys, request_rate=3).arrival_ns)


# Lengths.


def test_fixed_lengths() -> None:
    requests = drawn(FIXED)
    assert set(requests.prompt_tokens) == {100}
    assert set(requests.output_tokens) == {10}


@pytest.mark.parametrize(
    "keys",
    [
        {"dist": "norm", "loc": 500, "scale": 100},
        {"dist": "lognorm", "s": 1.2, "scale": 400, "max": 3000},
        {"dist": "expon", "scale": 50, "min": 5},
        {"dist": "gamma", "a": 2.5, "scale": 60},
        {"dist": "uniform", "loc": 10, "scale": 90},
        {"dist": "weibull_min", "c": 0.8, "scale": 200},
        {"dist": "pareto", "b": 1.1, "scale": 20, "max": 8192},
        {"dist": "beta", "a": 2, "b": 5, "scale": 1000},
        {"dist": "triang", "c": 0.3, "loc": 20, "scale": 500},
        {"dist": "poisson", "mu": 30},
        {"dist": "geom", "p": 0.05},
        {"dist": "randint", "low": 5, "high": 50},
        {"dist": "nbinom", "n": 5, "p": 0.1, "loc": 3},
        {"dist": "zipf", "a": 2.0, "max": 1000},
    ],
    ids=lambda keys: str(keys["dist"]),
)
def test_lengths_follow_their_distribution_rounded_and_cut(keys: dict[str, Any]) -> None:
    count = 20_000
    requests = drawn(RANDOM, num_prompts=count, input_len=keys, output_len=keys)
    family = getattr(stats, keys["dist"])
    parameters = {name: value for name, value in keys.items() if name not in ("dist", "min", "max")}
    half = 0.5 if isinstance(family, stats.rv_continuous) else 0.0
    low, high = keys.get("min", 1), keys.get("max", 10_000_000)
    for lengths in (requests.prompt_tokens, requests.output_tokens):
        assert low <= lengths.min() and lengths.max() <= high
        at = np.unique(lengths)
        found = np.searchsorted(np.sort(lengths), at, side="right") / count
        expected = np.where(at < high, family(**parameters).cdf(at + half), 1)
        # Kolmogorov's bound at a probability of 0.001; for discrete distributions it is wider than need be.
        assert np.abs(found - expected).max() < 1.95 / math.sqrt(count)
    assert not np.array_equal(requests.prompt_tokens, requests.output_tokens)


def test_values_occur_as_often_as_their_weights_say() -> None:
    weights = [0, 1, 0.5, 2.5, 0]
    requests = drawn(
        RANDOM,
        num_prompts=20_000,
        input_len={"values": [7, 1, 300, 20, 9], "weights": weights},
        output_len={"values": [3, 5]},
    )
    counts = [int((requests.prompt_tokens == value).sum()) for value in (1, 300, 20)]
    assert sum(counts) == 20_000
    assert stats.chisquare(counts, [5000, 2500, 12_500]).pvalue > UNLIKELY
    assert stats.chisquare(np.unique_counts(requests.output_tokens).counts).pvalue > UNLIKELY


def test_priorities_occur_as_often_as_their_shares_say() -> None:
    classes = [{"priority": 5, "share": 3}, {"priority": -1, "share": 1}]
    for keys in (FIXED, RANDOM):
        requests = drawn(keys, priorities=classes)
        counts = [int((requests.priority == priority).sum()) for priority in (5, -1)]
        assert sum(counts) == 4000
        assert stats.chisquare(counts, [3000, 1000]).pvalue > UNLIKELY
        assert not drawn(keys).priority.any()


# What requests have in common.


@pytest.mark.parametrize("length", [16, 100, 512])
def test_requests_share_whole_blocks_of_their_prefix(length: int) -> None:
    requests = drawn(
        RANDOM, input_len={"dist": "uniform", "loc": 1, "scale": 300}, shared_prefix={"len": length, "count": 3}
    )
    size = requests.hash_tokens
    assert size == 16
    assert len(requests.hash_starts) == len(requests) + 1
    assert np.array_equal(np.diff(requests.hash_starts), np.minimum(requests.prompt_tokens, length) // size)
    assert requests.hash_starts[-1] == len(requests.hash_ids)
    owner: dict[int, tuple[int, ...]] = {}
    firsts: list[int] = []
    for i in range(len(requests)):
        ids = tuple(int(one) for one in requests.hash_ids[requests.hash_starts[i] : requests.hash_starts[i + 1]])
        firsts += ids[:1]
        # An equal id stands for the same block after the same ones.
        for place, one in enumerate(ids):
            assert owner.setdefault(one, ids[:place]) == ids[:place]
    assert len(owner) <= 3 * (length // size)
    assert stats.chisquare(np.unique_counts(np.array(firsts)).counts).pvalue > UNLIKELY
    assert len(set(firsts)) == 3


def test_without_a_prefix_there_are_no_hashes() -> None:
    for keys in (FIXED, RANDOM):
        requests = drawn(keys)
        assert (requests.hash_tokens, len(requests.hash_starts), len(requests.hash_ids)) == (0, 0, 0)


def test_more_shared_blocks_than_memory_are_refused() -> None:
    with pytest.raises(InputError, match=r"workload\.shared_prefix: found 250,000,000 blocks"):
        drawn(RANDOM, num_prompts=10_000, input_len=400_000, shared_prefix={"len": 400_000})


# Streams.

EVERYTHING: dict[str, Any] = {
    **RANDOM,
    "request_rate": 9.0,
    "burstiness": 0.7,
    "input_len": {"dist": "lognorm", "s": 1.0, "scale": 200.0},
    "output_len": {"values": [1, 2, 3]},
    "priorities": [{"priority": 0, "share": 0.2}, {"priority": 1, "share": 0.8}],
    "shared_prefix": {"len": 64, "count": 5},
}


def test_another_process_draws_the_same_bytes() -> None:
    script = "from tests.test_workload import *; print(digest(drawn(EVERYTHING, seed=3, replication=2)))"
    root = Path(__file__).parents[1]
    other = subprocess.run([sys.executable, "-c", script], cwd=root, check=True, capture_output=True, text=True)
    assert other.stdout.split() == [digest(drawn(EVERYTHING, seed=3, replication=2))]


@pytest.mark.parametrize("other", [{"seed": 4, "replication": 2}, {"seed": 3, "replication": 1}])
def test_another_seed_or_replication_draws_others(other: dict[str, int]) -> None:
    first, second = drawn(EVERYTHING, seed=3, replication=2), drawn(EVERYTHING, **other)
    for name in ("arrival_ns", "prompt_tokens", "output_tokens", "priority", "hash_ids"):
        assert not np.array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize(
    ("key", "value", "changed"),
    [
        ("request_rate", 20.0, {"arrival_ns"}),
        ("request_rate", None, {"arrival_ns"}),
        ("burstiness", 3.0, {"arrival_ns"}),
        ("output_len", 7, {"output_tokens"}),
        ("input_len", {"values": [70, 80]}, {"prompt_tokens", "hash_starts", "hash_ids"}),
        ("priorities", None, {"priority"}),
        ("shared_prefix", None, {"hash_starts", "hash_ids"}),
        ("max_concurrency", 3, set()),
    ],
)
def test_a_changed_key_shifts_no_other_draws(key: str, value: object, changed: set[str]) -> None:
    keys = {**EVERYTHING, "burstiness": 1.0} if value is None else EVERYTHING
    first, second = drawn(keys), drawn({**keys, key: value})
    arrays = [name for name in Requests.__slots__ if isinstance(getattr(first, name), np.ndarray)]
    assert {name for name in arrays if not np.array_equal(getattr(first, name), getattr(second, name))} == changed


def test_twice_the_rate_is_half_the_time() -> None:
    slow, fast = (drawn(FIXED, request_rate=rate).arrival_ns for rate in (4, 8))
    assert np.abs(slow - 2 * fast).max() <= 1


# What is refused.


@pytest.mark.parametrize(
    ("keys", "key", "text"),
    [
        ({"request_rate": 0}, "request_rate", "found 0, wanted a number from 1e-06"),
        ({"request_rate": -1.5}, "request_rate", "found -1.5"),
        ({"request_rate": math.nan}, "request_rate", "found nan"),
        ({"request_rate": math.inf}, "request_rate", "all at the start without it"),
        ({"request_rate": True}, "request_rate", "found true"),
        ({"request_rate": "5"}, "request_rate", "found the string '5'"),
        ({"request_rate": []}, "request_rate", "found an empty list"),
        ({"request_rate": [4]}, "request_rate.0", "a mapping with rate and duration_s"),
        ({"request_rate": [{"rate": 1}, {"rate": 2}]}, "request_rate.0.duration_s", "found nothing"),
        ({"request_rate": [{"rate": 1, "duration_s": 1}, {"rate": 0}]}, "request_rate.1.rate", "goes on for ever"),
        ({"request_rate": [{"rate": -1, "duration_s": 1}, {"rate": 1}]}, "request_rate.0.rate", "from 0 to"),
        ({"request_rate": [{"rat": 1}]}, "request_rate.0.rat", "wanted rate"),
        ({"request_rate": {"mean": 5}}, "request_rate.amplitude", "found nothing, wanted a number from 0 to 0.999"),
        ({"request_rate": {"mean": 5, "amplitude": 1}}, "request_rate.amplitude", "found 1"),
        ({"request_rate": {"mean": 0, "amplitude": 0.1}}, "request_rate.mean", "found 0"),
        ({"burstiness": 2.0}, "burstiness", "found 2 without request_rate"),
        ({"burstiness": 0, "request_rate": 1}, "burstiness", "from 0.001"),
        ({"max_concurrency": 0}, "max_concurrency", "an integer from 1 to 10000000"),
        ({"num_prompts": 0}, "num_prompts", "an integer from 1 to 10000000"),
        ({"input_len": 0}, "input_len", "an integer from 1 to 10000000, a mapping with dist, or a mapping with values"),
        ({"input_len": 2.5}, "input_len", "found 2.5"),
        ({"input_len": True}, "input_len", "found true"),
        ({"input_len": {}}, "input_len", "found an empty mapping without dist or values"),
        ({"input_len": {"dist": "lognormal", "s": 1}}, "input_len.dist", "(the nearest: lognorm)"),
        ({"input_len": {"dist": "rv_continuous"}}, "input_len.dist", "distribution of scipy.stats"),
        ({"input_len": {"dist": "lognorm"}}, "input_len.s", "lognorm has the parameters s, loc, scale"),
        ({"input_len": {"dist": "norm", "mu": 3}}, "input_len.mu", "wanted loc, scale, min or max"),
        ({"input_len": {"dist": "poisson", "mu": 3, "scale": 2}}, "input_len.scale", "wanted mu, loc, min or max"),
        ({"input_len": {"dist": "norm", "scale": -1}}, "input_len", "found scale = -1"),
        ({"input_len": {"dist": "binom", "n": 1.5, "p": 0.5}}, "input_len", "found n = 1.5, p = 0.5"),
        ({"input_len": {"dist": "poisson", "mu": 1e300}}, "input_len", "that scipy.stats.poisson is defined for"),
        ({"input_len": {"dist": "norm", "scale": "1"}}, "input_len.scale", "found the string '1', wanted a number"),
        ({"input_len": {"dist": "norm", "loc": math.nan}}, "input_len.loc", "found nan"),
        ({"input_len": {"dist": "norm", "min": 9, "max": 8}}, "input_len.max", "found 8, less than min = 9"),
        ({"input_len": {"dist": "norm", "min": 0}}, "input_len.min", "found 0"),
        ({"input_len": {"values": []}}, "input_len.values", "found an empty list"),
        ({"input_len": {"values": [1, 0]}}, "input_len.values.1", "found 0"),
        ({"input_len": {"values": [1], "weights": [1, 2]}}, "input_len.weights", "2 weights for 1 values"),
        ({"input_len": {"values": [1], "weights": [0]}}, "input_len.weights", "all 0"),
        ({"input_len": {"values": [1], "weights": [-1]}}, "input_len.weights.0", "found -1"),
        ({"output_len": "long"}, "output_len", "found the string 'long'"),
        ({"shared_prefix": {"len": 15}}, "shared_prefix.len", "an integer from 16"),
        ({"shared_prefix": {"count": 15}}, "shared_prefix.len", "found nothing"),
        ({"priorities": []}, "priorities", "found an empty list"),
        ({"priorities": [{"priority": 0}]}, "priorities.0.share", "found nothing"),
        ({"priorities": [{"priority": 1, "share": 1}] * 2}, "priorities", "found 1 twice"),
        ({"priorities": [{"priority": 1, "share": 0}]}, "priorities", "all 0"),
        ({"path": "trace.csv"}, "path", "a key of another kind"),
    ],
)
def test_a_wrong_workload_is_refused_by_key(keys: dict[str, Any], key: str, text: str) -> None:
    error = refusal(RANDOM, **keys)
    assert error.key == f"workload.{key}"
    assert text in error.sentence
    assert len(error.problems) == 1


@pytest.mark.parametrize(
    ("keys", "key", "text"),
    [
        ({"format": "azur"}, "format", "(the nearest: azure)"),
        ({"request_rate": 3}, "request_rate", "a key of another kind"),
        ({"num_prompts": 3}, "num_prompts", "a key of another kind"),
        ({"rate_scale": 0}, "rate_scale", "from 0.001"),
        ({"start": -1}, "start", "from 0"),
        ({"limit": 0}, "limit", "from 1"),
        ({"no_output": "skip"}, "no_output", "refuse or drop"),
    ],
)
def test_a_wrong_trace_workload_is_refused_by_key(keys: dict[str, Any], key: str, text: str) -> None:
    error = refusal({"kind": "trace", "path": "trace.csv"}, **keys)
    assert error.key == f"workload.{key}"
    assert text in error.sentence


@pytest.mark.parametrize("key", ["input_len", "output_len", "num_prompts", "kind"])
def test_a_missing_key_is_refused(key: str) -> None:
    error = refusal({name: value for name, value in RANDOM.items() if name != key})
    assert (error.key, error.found) == (f"workload.{key}", "nothing")


def test_an_entry_of_a_mapping_is_blamed_on_its_line() -> None:
    text = (
        "kind: serving\nworkload:\n  kind: random\n  num_prompts: 3\n  output_len: 3\n"
        "  input_len:\n    dist: norm\n    sigma: 4\n"
    )
    with pytest.raises(InputError) as caught:
        fields.read(Holder, REFUSALS, yaml_loader.parse(text, "x.yaml"), "x.yaml", ())
    assert caught.value.line == 8


# The models.

NUMBERS = st.floats(0.01, 1e6)
LENGTHS = (
    st.integers(1, 10_000_000)
    | st.fixed_dictionaries({"dist": st.just("gamma"), "a": st.floats(0.1, 10)}, optional={"loc": st.integers(0, 9)})
    | st.lists(st.integers(1, 99), min_size=1, max_size=5).map(lambda values: {"values": values})
)
RATES = (
    NUMBERS
    | st.lists(st.fixed_dictionaries({"rate": NUMBERS, "duration_s": NUMBERS}), min_size=1, max_size=4)
    | st.fixed_dictionaries({"mean": NUMBERS, "amplitude": st.floats(0, 0.999)}, optional={"peak_s": NUMBERS})
)


@given(
    st.fixed_dictionaries(
        {"kind": st.just("random"), "num_prompts": st.integers(1, 50), "input_len": LENGTHS, "output_len": LENGTHS},
        optional={"request_rate": RATES, "max_concurrency": st.integers(1, 9)},
    )
)
@settings(max_examples=50, deadline=None)
def test_a_workload_dumps_to_json_that_draws_the_same_again(keys: dict[str, Any]) -> None:
    workload = WORKLOAD.validate_python(keys)
    again = WORKLOAD.validate_python(workload.model_dump(mode="json"))
    assert again == workload
    assert digest(requests_of(again, seed=0, replication=0)) == digest(requests_of(workload, seed=0, replication=0))


def test_models_may_be_constructed_directly() -> None:
    length = Distribution.model_validate({"dist": "poisson", "mu": 40})
    workload = RandomWorkload(
        kind="random", num_prompts=5, input_len=length, output_len=Empirical(values=(3,)), request_rate=2.0
    )
    assert set(requests_of(workload, seed=0, replication=0).output_tokens) == {3}
    assert (
        len(requests_of(FixedWorkload(kind="fixed", num_prompts=2, input_len=3, output_len=4), seed=0, replication=0))
        == 2
    )
    with pytest.raises(ValidationError):
        TraceWorkload(kind="trace", path="")


def test_every_key_is_described_in_the_schema() -> None:
    for name, schema in WORKLOAD.json_schema()["$defs"].items():
        assert schema["description"]
        for key, described in schema["properties"].items():
            assert described.get("description"), f"{name}.{key}"


def test_scipy_is_imported_only_for_distributions() -> None:
    script = (
        "import sys; from batchsim.workload import *\nfrom batchsim.workload_scenario import *\n"
        "w = RandomWorkload(kind='random', num_prompts=9, input_len=3, output_len=4, request_rate=2.0)\n"
        "requests_of(w, seed=0, replication=0); sys.exit('scipy' in sys.modules)"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True)

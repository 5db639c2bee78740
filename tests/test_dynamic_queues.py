"""Queues whose theory is known: its figure lies within the 99% interval over replications, which is within 2% of it.

Every replication is a run of its own with other draws; requests of the first tenth of its time do not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from batchsim.answered import ACCEPTED, Answered
from batchsim.dynamic import simulate
from tests.dynamic import scenario

Float64 = npt.NDArray[np.float64]
REPLICATIONS = 10


def assert_contains(values: Sequence[float], theory: float, *, scale: float | None = None) -> None:
    """The 99% Student-t interval of the mean holds `theory`, and half of it is at most 2% of that, or of `scale`."""
    reach = stats.t.ppf(0.995, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    mean = float(np.mean(values))
    assert abs(mean - theory) <= reach, f"{mean} +- {reach} does not hold {theory}"
    assert reach <= 0.02 * (theory if scale is None else scale), f"{mean} +- {reach}"


def replications(
    figure: Callable[[Any], list[float]], batch_ms: dict[int, Any], rate: float, requests: int, **changes: Any
) -> Float64:
    """(figures, replications): what `figure` makes of each replication's run."""
    found = []
    for replication in range(REPLICATIONS):
        asked = scenario(
            {
                "costs": {"kind": "table", "batch_ms": batch_ms}, "max_batch_size": 1, "workload.request_rate": rate,
                "workload.num_prompts": requests, "warm_up_s": 0.1 * requests / rate, "replication": replication,
            }
            | changes
        )  # fmt: skip
        found.append(figure(simulate(asked, None)))
    return np.array(found).T


def queue_ms(run: Any) -> list[float]:
    return [run.results["sync"].latency_ms["queue"]["mean"]]


def pollaczek_khinchine(rate: float, mean_ms: float, square_ms2: float) -> float:
    """The mean wait in the queue M/G/1, ms: lambda E[S^2] / (2 (1 - rho))."""
    per_ms = rate / 1e3
    return per_ms * square_ms2 / (2 * (1 - per_ms * mean_ms))


LOGNORMAL = stats.lognorm(s=0.5, scale=4.0)
SERVERS: dict[str, tuple[Any, float, float, int]] = {
    # a table's entry, E[S] and E[S^2], and how many requests
    "M/M/1": ({"dist": "expon", "scale": 5.0}, 5.0, 50.0, 500_000),
    "M/D/1": (5.0, 5.0, 25.0, 200_000),
    "M/G/1, lognormal": (
        {"dist": "lognorm", "s": 0.5, "scale": 4.0}, LOGNORMAL.mean(), LOGNORMAL.moment(2), 250_000,
    ),
    "M/G/1, bimodal": ({"samples": [4.0, 4.0, 4.0, 9.0]}, 5.25, (3 * 16 + 81) / 4, 200_000),
}  # fmt: skip


@pytest.mark.parametrize("name", SERVERS)
def test_one_server(name: str) -> None:
    entry, mean_ms, square_ms2, requests = SERVERS[name]
    rate = 0.6 / mean_ms * 1e3

    def figure(run: Any) -> list[float]:
        result = run.results["sync"]
        return [*queue_ms(run), result.latency_ms["e2e"]["mean"], result.device_busy_fraction]

    waits, latencies, busy = replications(figure, {1: entry}, rate, requests)
    theory = pollaczek_khinchine(rate, mean_ms, square_ms2)
    assert_contains(list(waits), theory)
    assert_contains(list(latencies), theory + mean_ms)
    assert_contains(list(busy), 0.6)


def erlang_c(servers: int, offered: float) -> float:
    """The probability that all of `servers` are busy, at a load of `offered` Erlangs."""
    full = offered**servers / math.factorial(servers) * servers / (servers - offered)
    return full / (sum(offered**k / math.factorial(k) for k in range(servers)) + full)


@pytest.mark.parametrize("servers", [2, 5])
def test_several_servers(servers: int) -> None:
    """M/M/c: W = C(c, a) / (c mu - lambda) + 1 / mu."""
    mean_ms, load = 5.0, 0.75
    rate = load * servers / mean_ms * 1e3

    def figure(run: Any) -> list[float]:
        answered = run.answered["sync"]
        waits = answered.latencies(answered.after_warm_up())["queue"]
        return [*queue_ms(run), float(np.mean(waits > 0))]

    waits, waited = replications(figure, {1: {"dist": "expon", "scale": mean_ms}}, rate, 700_000, instances=servers)
    busy = erlang_c(servers, load * servers)
    assert_contains(list(waits), busy / (servers / mean_ms - rate / 1e3))
    assert_contains(list(waited), busy)


def bulk_service(times_ms: Sequence[float], rate: float) -> tuple[float, float]:
    """(mean wait in the queue, ms; mean batch) of a server that takes what waits, up to as many as `times_ms` are long.

    A Markov chain of the numbers that wait as a service ends: with n > 0 the next takes b = min(n, cap) of them and
    `times_ms[b - 1]`, in which a Poisson number arrives; with none the next request is served alone as it comes. While
    b are served for s, n - b + lambda s / 2 wait on average.
    """
    per_ms, cap, states = rate / 1e3, len(times_ms), 600
    waiting = np.arange(states)
    batch = np.clip(waiting, 1, cap)
    taken = np.array(times_ms)[batch - 1]
    left = np.maximum(waiting - batch, 0)
    chain = np.asarray(stats.poisson.pmf(waiting[None, :] - left[:, None], per_ms * taken[:, None]))
    chain[:, -1] += 1 - chain.sum(axis=1)
    equations = np.vstack([chain.T - np.eye(states), np.ones(states)])
    share = np.linalg.lstsq(equations, np.append(np.zeros(states), 1.0), rcond=None)[0]
    assert share[-1] < 1e-9
    cycle = share @ taken + share[0] / per_ms
    queue = share @ (left * taken + per_ms * taken**2 / 2)
    return float(queue / cycle / per_ms), float(share @ batch)


@pytest.mark.parametrize(("cap", "rate"), [(8, 1_000.0), (512, 2_000.0)], ids=["a cap of 8", "no cap"])
def test_bulk_service(cap: int, rate: float) -> None:
    """The longer the queue, the larger the batch: its time grows by less than its size."""
    times_ms = [3.0 + 0.4 * size for size in range(1, cap + 1)]
    table = {1: times_ms[0], cap: times_ms[-1]}

    def figure(run: Any) -> list[float]:
        return [*queue_ms(run), run.results["sync"].batch_size["mean"]]

    waits, sizes = replications(figure, table, rate, 400_000, max_batch_size=cap)
    wait, size = bulk_service(times_ms, rate)
    assert size > 2
    assert_contains(list(waits), wait)
    assert_contains(list(sizes), size)


def in_system(answered: Answered, first_ns: int, last_ns: int) -> float:
    """The mean number of requests that have arrived and not been answered, by adding up the times between changes."""
    requests = answered.requests
    kept = requests["outcome"] == ACCEPTED
    moments = np.concatenate([requests["arrival_ns"][kept], answered.finished_ns()[kept]])
    changes = np.repeat([1, -1], kept.sum())
    order = np.argsort(moments, kind="stable")
    moments, number = np.clip(moments[order], first_ns, last_ns), np.cumsum(changes[order])
    return float(np.sum(np.diff(moments) * number[:-1])) / (last_ns - first_ns)


CLASSES = [{"priority": 0, "share": 1.0}, {"priority": 1, "share": 3.0}]


@pytest.mark.parametrize(
    "changes",
    [
        {"max_queue_delay_us": 3_000.0, "workload.priorities": CLASSES},
        {"max_queue_size": 12, "workload.request_rate": 2_500.0},
    ],
    ids=["a delay and priorities", "a bound that refuses"],
)  # fmt: skip
def test_littles_law(changes: dict[str, Any]) -> None:
    """L = lambda W over a window of each run, from independent measurements of the three."""

    def figure(run: Any) -> list[float]:
        answered = run.answered["sync"]
        requests, total_ns = answered.requests, answered.total_ns
        first_ns, last_ns = total_ns // 10, total_ns * 9 // 10
        arrival = requests["arrival_ns"]
        here = (arrival >= first_ns) & (arrival < last_ns) & (requests["outcome"] == ACCEPTED)
        wait_ns = float(np.mean((answered.finished_ns() - arrival)[here]))
        number = in_system(answered, first_ns, last_ns)
        return [number - np.count_nonzero(here) / (last_ns - first_ns) * wait_ns, number]

    table = {1: {"samples": [4, 9]}, 8: {"samples": [5, 11]}}
    differences, number = replications(figure, table, 700.0, 100_000, max_batch_size=8, **changes)
    assert_contains(list(differences), 0.0, scale=float(number.mean()))
    assert np.ptp(differences) > 0

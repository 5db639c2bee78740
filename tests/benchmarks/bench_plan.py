"""Plans against trying every candidate: the same answer, and at which share of the simulations.

    python -m tests.benchmarks.bench_plan [PROBLEMS]

A run with draws of what is uncertain counts as one simulation and one for each draw, on both sides. Every run counts:
screenings, confirmations, and those that are taken back.
"""

from __future__ import annotations

import sys
import time

from batchsim.plan.candidate import Trial
from batchsim.plan.search import Search, exhaustive
from tests.plan_problems import bench_of, candidates_of, real_problem

SHARE = 0.2


def test_plans_find_the_optimum() -> None:
    """At most a fifth of the simulations for each of 20 problems."""
    for number in range(20):
        same, share = compare(number)
        assert same
        assert share <= SHARE


def compare(number: int) -> tuple[bool, float]:
    """(whether both find the same candidate, the search's share of the simulations), printed as well."""
    problem = real_problem(number)
    bench = bench_of(problem)
    began = time.perf_counter()
    search = Search(bench, problem.replicas)
    found = search.cheapest(problem.configurations)
    search_s = time.perf_counter() - began
    every = bench_of(problem)
    wanted, _ = exhaustive(every, candidates_of(problem))
    share = bench.simulations / every.simulations
    same = _of(found) == _of(wanted)
    counted = f"{bench.simulations:3} of {every.simulations:5} simulations ({share:5.1%}, {search_s:.1f} s)"
    verdict = "the same" if same else f"DIFFERENT, wanted {_words(wanted)}"
    seen = f"{len(search.trials):2} of {problem.candidates:3} candidates looked at"
    print(f"{number:2} {seen}: {counted}, {verdict}: {_words(found)}", flush=True)  # noqa: T201
    return same, share


def _of(trial: Trial | None) -> object:
    return None if trial is None else trial.candidate


def _words(trial: Trial | None) -> str:
    return "none" if trial is None else f"{trial.candidate.words}, ${trial.candidate.cost_per_hour:.2f} an hour"


if __name__ == "__main__":
    results = [compare(number) for number in range(int(sys.argv[1]) if len(sys.argv) > 1 else 20)]
    shares = sorted(share for _, share in results)
    print(  # noqa: T201
        f"{sum(same for same, _ in results)} of {len(results)} the same; share of simulations: median "
        f"{shares[len(shares) // 2]:.1%}, worst {shares[-1]:.1%}"
    )

"""Answers to plans to show: plausible, quickly made, the same every time."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

from batchsim.plan.answer import frontier
from batchsim.plan.candidate import Candidate, Configuration, Trial
from batchsim.plan.objectives import parse
from batchsim.plan.result import Change, PlanResult
from batchsim.served import Served
from tests.sample_runs import requests_at, serve
from tests.swept import simulated

OBJECTIVES = (parse("p99_ttft_ms", "<=500"), parse("goodput_requests_per_s", ">=9"))
PRICES = {"h200": 3.8, "h100-sxm": 2.5, "l40s": 0.9}
REFUSED = "hardware: found l40s, with 48 GB; wanted a device with memory for the model, 61 GB"


def planned(replicas: int = 4, batches: tuple[int, ...] = (16, 32, 64)) -> PlanResult:
    """All candidates, tried: those on the smallest device cannot run with the largest batch."""
    configurations = [
        Configuration(order, hardware, 1, schedule, PRICES[hardware], {}, batch)
        for order, (hardware, schedule, batch) in enumerate(itertools.product(PRICES, ("sync", "async"), batches))
    ]
    trials = [_trial(Candidate(each, count)) for each in configurations for count in range(1, replicas + 1)]
    meeting = sorted((trial for trial in trials if trial.meets), key=lambda trial: trial.merit)
    best = meeting[0] if meeting else None
    other = [trial for trial in meeting if best and trial.candidate.configuration.hardware != _hardware(best)]
    return PlanResult(
        name="a chat service",
        plan={"kind": "plan", "objectives": {"p99_ttft_ms": "<=500"}},
        objectives=OBJECTIVES,
        confidence=0.9,
        candidates=len(trials),
        best=best,
        runner_up=other[0] if other else None,
        frontier=frontier(trials, OBJECTIVES[0]),
        latency=OBJECTIVES[0],
        binds=best.tightest if best else None,
        would_change=(Change("traffic", "The answer holds up to about 12% more traffic."),) if best else (),
        evaluated=tuple(trials),
        simulations=len(trials),
        search_simulations=len(trials),
    )


def _trial(candidate: Candidate) -> Trial:
    of = candidate.configuration
    if of.hardware == "l40s" and of.max_num_seqs == 64:
        return Trial(candidate, OBJECTIVES, 0.9, refused=REFUSED)
    fields = {"max_num_seqs": of.max_num_seqs, "hardware": of.hardware, "replicas": candidate.replicas}
    run, _ = simulated(fields)
    result = run.results[of.schedule]
    draws = 0 if candidate.replicas == 1 else 8
    if not draws:
        result = replace(result, interval_90={})
    return Trial(candidate, OBJECTIVES, 0.9, draws, result, run=replace(run, served={of.schedule: _served()}))


@cache
def _served() -> Served:
    return serve(*requests_at(8.0, 60), host_ns=100_000, device_ns=4_900_000)


def _hardware(trial: Trial) -> str:
    return trial.candidate.configuration.hardware

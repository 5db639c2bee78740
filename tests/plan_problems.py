"""Generated plans, small enough to try every candidate; and a service that is a formula, to try many of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from batchsim.plan.bench import ScenarioBench
from batchsim.plan.candidate import Candidate, Configuration, Trial
from batchsim.plan.configurations import Problem, problem_of
from batchsim.plan.objectives import Objective, parse
from batchsim.plan.spec import read
from batchsim.result import ScheduleResult
from batchsim.yaml_loader import Document

SCENARIOS = Path(__file__).parents[1] / "scenarios"
PROFILES = ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b")
HARDWARE = ("h200", "h100-sxm", "h100-pcie", "a100-80", "a100-40", "l40s", "b200")
# What one H200 serves of requests of 300 + 100 tokens at most, requests a second: how traffic is scaled.
_SERVED = {"llama-3.2-1b": 200.0, "llama-3.2-3b": 110.0, "llama-3.1-8b": 60.0}


def real_problem(
    number: int, *, requests: int = 400, replicas: int | None = None, hardware: int | None = None,
    batches: int | None = None,
) -> Problem:  # fmt: skip
    """One of an endless row of plans on shipped profiles: 48 to 216 candidates of different traffic, prices, limits.

    `replicas`, `hardware` and `batches` bound how many of each there are.
    """
    rng = np.random.default_rng(1_000 + number)
    model = PROFILES[number % len(PROFILES)]
    count = int(rng.integers(2, 4))
    devices = [
        {"base": str(name), "price_per_hour": round(float(rng.uniform(0.8, 8.0)), 2)}
        for name in rng.choice(HARDWARE, count, replace=False)
    ]
    sizes = sorted(int(size) for size in rng.choice((8, 16, 32, 64, 128), int(rng.integers(2, 4)), replace=False))
    prompt, output = int(rng.integers(100, 700)), int(rng.integers(40, 200))
    share = 400 / (prompt + 2 * output)
    rate = round(float(_SERVED[model] * share * rng.uniform(0.4, 3.0)), 2)
    slower = 1 if model != "llama-3.1-8b" else 2
    objectives: dict[str, str] = {"p99_ttft_ms": f"<={rng.integers(60, 500) * slower}"}
    if rng.random() < 0.7:
        objectives[str(rng.choice(["mean_tpot_ms", "p90_tpot_ms", "p99_tpot_ms"]))] = (
            f"<={rng.integers(8, 40) * slower}"
        )
    if rng.random() < 0.3:
        objectives["p90_e2e_ms"] = f"<={rng.integers(15, 60) * output}"
    drawn = rng.random() < 0.6
    lengths: dict[str, Any] = (
        {
            "input_len": {"dist": "lognorm", "s": 0.7, "scale": prompt, "max": 3000},
            "output_len": {"dist": "lognorm", "s": 0.6, "scale": output, "max": 800},
        }
        if drawn
        else {"input_len": prompt, "output_len": output}
    )
    plan: dict[str, Any] = {
        "kind": "plan",
        "name": f"problem {number}",
        "scenario": {
            "kind": "serving",
            "name": f"traffic {number}",
            "model": model,
            "profile": f"h200-{model}",
            "workload": {
                "kind": "random" if drawn else "fixed",
                "num_prompts": requests,
                "request_rate": rate,
                "burstiness": float(rng.choice([0.5, 1.0, 2.0])),
                **lengths,
            },
            "max_num_batched_tokens": int(rng.choice([512, 2048, 8192])),
            "router": str(rng.choice(["round_robin", "least_outstanding"])),
            "seed": number,
        },
        "objectives": objectives,
        "confidence": float(rng.choice([0.5, 0.8, 0.9, 0.95])),
        "candidates": {
            "hardware": devices[:hardware],
            "schedules": ["sync", "async"],
            "max_num_seqs": sizes[:batches],
            "replicas": {"max": min(int(rng.choice([6, 8, 12])), replicas or 12)},
        },
    }
    return problem(plan)


def small_plan(**changes: Any) -> dict[str, Any]:
    """A plan of 16 candidates for 20 requests a second of the 1B model; `changes` replace keys of it."""
    return {
        "kind": "plan",
        "name": "a small plan",
        "scenario": {
            "kind": "serving",
            "name": "small traffic",
            "model": "llama-3.2-1b",
            "profile": "h200-llama-3.2-1b",
            "workload": {
                "kind": "fixed", "num_prompts": 100, "request_rate": 20, "input_len": 300, "output_len": 60,
            },
        },
        "objectives": {"p99_ttft_ms": "<=100", "mean_tpot_ms": "<=22"},
        "candidates": {
            "hardware": ["h200", {"base": "l4", "price_per_hour": 0.7}],
            "max_num_seqs": [64, 128],
            "schedules": ["async"],
            "replicas": {"max": 4},
        },
        **changes,
    }  # fmt: skip


def problem(plan: dict[str, Any]) -> Problem:
    """A plan that has been read."""
    return problem_of(read(Document(plan), "plan"), "plan", SCENARIOS)


def candidates_of(problem: Problem) -> list[Candidate]:
    """All of them."""
    return [Candidate(each, count) for each, count in product(problem.configurations, problem.replicas)]


def bench_of(problem: Problem, draws: int = 8) -> ScenarioBench:
    return ScenarioBench(problem, draws=draws)


@dataclass
class Formula:
    """A bench whose service is a formula: a server of so many tokens a second in a queue, batches up to a limit.

    More batch serves more and takes longer over a token. `wobble` is how far chance, the same each time for the same
    candidate, moves a latency; intervals are as wide as the hardware's. `runs` are the runs that were asked for.
    """

    rate: float
    objectives: tuple[Objective, ...]
    confidence: float
    speeds: dict[str, float]
    spreads: dict[str, float]
    slack: float
    wobble: float
    draws: int = 8
    simulations: int = 0
    runs: list[tuple[Candidate, int]] = field(default_factory=list)

    def served(self, of: Configuration) -> float:
        """Requests a second of one replica at most."""
        batch = of.max_num_seqs or 1
        return self.speeds[of.hardware] * batch / self._step_ms(of, batch) * (1.06 if of.schedule == "async" else 1.0)

    def least(self, configuration: Configuration) -> int | None:
        return max(ceil(self.rate * self.slack / self.served(configuration)), 1)

    def screen(self, candidate: Candidate) -> Trial:
        self.simulations += 1
        return self._trial(candidate, 0)

    def confirm(self, screened: Trial) -> Trial:
        self.simulations += self.draws
        return self._trial(screened.candidate, self.draws)

    def whole(self, candidate: Candidate) -> Trial:
        self.simulations += 1 + self.draws
        return self._trial(candidate, self.draws)

    def _trial(self, candidate: Candidate, draws: int) -> Trial:
        self.runs.append((candidate, draws))
        of = candidate.configuration
        load = self.rate / (candidate.replicas * self.served(of))
        growing = load >= 1
        left = max(1 - load, 1e-3)
        chance = crc32(repr((of.hardware, of.schedule, candidate.replicas)).encode()) / 2**32 * 2 - 1
        tpot = self._step_ms(of, max((of.max_num_seqs or 1) * load, 1)) / self.speeds[of.hardware]
        ttft = tpot * 4 * (1 + load / left / candidate.replicas) * (1 + self.wobble * chance)
        latency = {"ttft": {"p50": ttft / 3, "p99": ttft}, "tpot": {"mean": tpot}, "e2e": {"p99": ttft + 50 * tpot}}
        wide = 1 + self.spreads[of.hardware]
        interval = {
            f"latency_ms.{name}.{statistic}": (value / wide, value * wide)
            for name, statistics in latency.items()
            for statistic, value in statistics.items()
        }
        result = ScheduleResult(
            schedule=of.schedule, throughput_tokens_per_s=self.rate * 100, total_s=60.0, step_ms={"mean": tpot},
            device_busy_fraction=min(load, 1.0), launch_gap_fraction=0.0, host_busy_fraction=0.1, idle_ns={},
            stage_ms={}, counts={"steps": 100}, latency_ms=latency, unstable="unstable" if growing else None,
            interval_90=interval if draws else {},
        )  # fmt: skip
        return Trial(candidate, self.objectives, self.confidence, draws, result)

    @staticmethod
    def _step_ms(of: Configuration, batch: float) -> float:
        return 8 + 0.2 * batch + (0.6 if of.schedule == "sync" else 0.0)


def formula_problem(seed: int) -> tuple[Formula, list[Configuration], tuple[int, ...]]:
    """A generated bench, its configurations and numbers of replicas."""
    rng = np.random.default_rng(seed)
    names = [f"device-{i}" for i in range(int(rng.integers(1, 5)))]
    prices = {name: round(float(rng.uniform(0.5, 8.0)), 1) for name in names}
    speeds = {name: float(rng.uniform(0.3, 3.0)) for name in names}
    batches = sorted(int(size) for size in rng.choice((8, 16, 32, 64, 128), int(rng.integers(1, 4)), replace=False))
    replicas = tuple(range(1, int(rng.choice([8, 12, 16, 24])) + 1))
    objectives: Iterable[Objective] = [parse("p99_ttft_ms", f"<={rng.uniform(30, 250):.3g}")]
    if rng.random() < 0.6:
        objectives = [*objectives, parse("mean_tpot_ms", f"<={rng.uniform(4, 60):.3g}")]
    configurations = [
        Configuration(order, name, 1, schedule, prices[name], {}, batch)
        for order, (name, schedule, batch) in enumerate(product(names, ("sync", "async"), batches))
    ]
    bench = Formula(
        rate=float(rng.uniform(1, 40)),
        objectives=tuple(objectives),
        confidence=float(rng.choice([0.5, 0.8, 0.9])),
        speeds=speeds,
        spreads={name: float(rng.uniform(0.02, 0.4)) for name in names},
        slack=float(rng.uniform(0.6, 1.0)),
        wobble=float(rng.choice([0.0, 0.002])),
    )
    return bench, configurations, replicas

"""A plan in, its answer out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from batchsim import yaml_loader
from batchsim.intervals import SWEEP_DRAWS
from batchsim.plan.bench import ScenarioBench
from batchsim.plan.candidate import Candidate, Configuration, Trial
from batchsim.plan.changes import changes
from batchsim.plan.configurations import Problem, problem_of
from batchsim.plan.objectives import Objective
from batchsim.plan.result import Change, PlanResult
from batchsim.plan.search import Search
from batchsim.plan.spec import read
from batchsim.yaml_loader import Document

Tell = Callable[[float], None]

# Where the parts of the work end on a progress bar.
_SEARCHED, _SECOND, _DRAWN = 0.6, 0.8, 0.9
# Replicas beyond the best's that are run for the frontier: one, two and so many times as many.
_MORE, _TIMES = (1, 2), (2,)
# What the frontier is drawn against where no objective is a latency.
_DEFAULT = Objective("p99_ttft_ms", "latency_ms.ttft.p99", at_most=True, limit=inf)


def solve(problem: Problem, *, draws: int, progress: Tell | None = None) -> PlanResult:
    """The cheapest candidate of `problem`, and what else is worth knowing; `draws` as of a confirmed candidate.

    Interrupted by Ctrl-C, what is known by then is returned and says so.

    Raises:
        InputError: no candidate can run at all.
    """
    work = _Work(problem, ScenarioBench(problem, draws=draws), progress)
    try:
        work.run()
    except KeyboardInterrupt:
        work.partial = f"interrupted after {work.bench.simulations} simulations"
        if not work.search.trials:
            raise
        work.best = work.best or work.known(problem.configurations)
    return work.result()


@dataclass
class _Work:
    """What is known so far."""

    problem: Problem
    bench: ScenarioBench
    progress: Tell | None
    search: Search = field(init=False)
    best: Trial | None = None
    runner_up: Trial | None = None
    would_change: tuple[Change, ...] = ()
    searched: int = 0
    partial: str | None = None

    def __post_init__(self) -> None:
        self.search = Search(self.bench, self.problem.replicas)

    def run(self) -> None:
        configurations = self.problem.configurations
        if not any(self.search.least(each) is not None for each in configurations):
            refusal = self.bench.refusal()
            assert refusal is not None
            raise refusal
        self.best = self.search.cheapest(configurations, self._part(0.0, _SEARCHED))
        self.searched = self.bench.simulations
        if self.best is not None:
            others = self._others(self.best.candidate.configuration)
            self.runner_up = self.search.cheapest(others, self._part(_SEARCHED, _SECOND))
            self._more(self.best, self.runner_up)
        self._tell(_DRAWN)
        cheapest = min((self.search.floor(each) for each in configurations), default=inf)
        self.would_change = changes(self.bench, self.search, self.best, self.runner_up, cheapest)
        self._tell(1.0)

    def known(self, configurations: Iterable[Configuration]) -> Trial | None:
        """The best of what has been confirmed."""
        some = set(configurations)
        found = [t for t in self.search.trials.values() if t.meets and t.candidate.configuration in some]
        return min(found, key=lambda trial: trial.merit, default=None)

    def result(self) -> PlanResult:
        problem, best = self.problem, self.best
        latency = next((each for each in problem.plan.bounds if each.latency), _DEFAULT)
        trials = tuple(self.search.trials.values())
        return PlanResult(
            name=problem.plan.name,
            plan={**problem.plan.model_dump(mode="json"), "scenario": problem.document},
            objectives=problem.plan.bounds,
            confidence=problem.plan.confidence,
            candidates=problem.candidates,
            best=best,
            runner_up=self.runner_up,
            frontier=frontier(trials, latency),
            latency=latency,
            binds=None if best is None else best.tightest,
            would_change=self.would_change,
            evaluated=(*trials, *self.bench.refused()),
            simulations=self.bench.simulations,
            search_simulations=self.searched or self.bench.simulations,
            partial=self.partial,
        )

    def _others(self, of: Configuration) -> list[Configuration]:
        """Those on other hardware; where there is none, all other configurations."""
        configurations = self.problem.configurations
        elsewhere = [each for each in configurations if each.hardware != of.hardware]
        return elsewhere or [each for each in configurations if each != of]

    def _more(self, *bases: Trial | None) -> None:
        """Candidates with more replicas, for the frontier: what lower latencies cost."""
        for base in bases:
            if base is None:
                continue
            own = base.candidate.replicas
            wanted = {own + more for more in _MORE} | {own * times for times in _TIMES}
            for count in sorted(wanted & set(self.problem.replicas)):
                self.search.screen(Candidate(base.candidate.configuration, count))

    def _part(self, start: float, end: float) -> Tell:
        return lambda fraction: self._tell(start + (end - start) * fraction)

    def _tell(self, fraction: float) -> None:
        if self.progress is not None:
            self.progress(fraction)


def frontier(trials: Iterable[Trial], latency: Objective) -> tuple[Trial, ...]:
    """Stable trials that no other beats in both cost per million output tokens and `latency`, the cheapest first."""

    def at(trial: Trial) -> tuple[float, float]:
        cost = trial.cost_per_million_tokens
        return inf if cost is None else cost, trial.figures.get(latency.figure, inf)

    kept: list[Trial] = []
    for trial in sorted((trial for trial in trials if trial.stable), key=lambda each: (*at(each), each.merit)):
        if max(at(trial)) < inf and (not kept or at(trial)[1] < at(kept[-1])[1]):
            kept.append(trial)
    return tuple(kept)


def plan(
    what: Path | str | Mapping[str, Any],
    *,
    base: Path | None = None,
    sets: Iterable[str] = (),
    draws: int | None = None,
    progress: Tell | None = None,
) -> PlanResult:
    """The answer to a plan in a file, or given as a mapping; a mapping's paths are relative to `base`.

    `sets` are `PATH=VALUE` texts put over a file's values; `draws` the simulations that an interval takes (without it,
    those of a sweep).

    Raises:
        InputError: what is wrong with the plan or its scenario, or why no candidate can run.
    """
    if isinstance(what, Mapping):
        file, document = "plan", Document(deepcopy(dict(what)))
        base = base or Path()
    else:
        path = Path(what)
        file, document, base = str(path), yaml_loader.load(path), path.parent
    asked = read(document, file, sets)
    problem = problem_of(asked, file, base, document.lines)
    return solve(problem, draws=SWEEP_DRAWS if draws is None else draws, progress=progress)

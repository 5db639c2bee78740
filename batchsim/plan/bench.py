"""Candidates on the bench: each screened by one run, confirmed by draws of what is uncertain, and every run counted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from batchsim.errors import InputError
from batchsim.evaluate import evaluate, placed_in, resolved, scenario_of
from batchsim.intervals import with_intervals
from batchsim.kinds import Kind
from batchsim.plan.candidate import Candidate, Configuration, Trial
from batchsim.plan.capacity import Load, least_replicas
from batchsim.plan.configurations import Problem
from batchsim.plan.objectives import Objective
from batchsim.profile import Profile
from batchsim.result import Run
from batchsim.scenario import Scenario
from batchsim.workload import requests_of


class Bench(Protocol):
    """What a search asks of candidates."""

    objectives: tuple[Objective, ...]
    simulations: int

    def least(self, configuration: Configuration) -> int | None:
        """So many replicas at least can carry the load; None: none can. Nothing is simulated."""

    def screen(self, candidate: Candidate) -> Trial:
        """The candidate in one run, at the costs as they were measured."""

    def confirm(self, screened: Trial) -> Trial:
        """What has been screened, with draws of what is uncertain; as soon as it is known to miss, with no more."""

    def whole(self, candidate: Candidate) -> Trial:
        """The candidate with all draws, whether or not it can still do."""


class ScenarioBench:
    """Candidates of a `Problem` on the simulator; `simulations` counts every run, those of draws included.

    A run in which the batch never came up to its limit is what it would be under any other limit that it stays below,
    and so is taken for those, too.
    """

    def __init__(self, problem: Problem, *, draws: int) -> None:
        self.problem, self.draws, self.simulations = problem, draws, 0
        self.objectives = problem.plan.bounds
        self._loads: dict[str, Load] = {}
        self._runs: dict[tuple[Any, ...], list[tuple[int, Run]]] = {}
        self._refusals: dict[Configuration, InputError] = {}

    def least(self, configuration: Configuration) -> int | None:
        """See `Bench`."""
        try:
            scenario, profile, _ = self._read(self.document(configuration))
            asked = scenario.workload.model_dump_json() + str((scenario.prefix_caching, scenario.seed))
            if asked not in self._loads:
                requests = requests_of(
                    scenario.workload, seed=scenario.seed, replication=scenario.replication, base=self.problem.base
                )
                self._loads[asked] = Load.of(scenario, requests)
            load = self._loads[asked]
            return least_replicas(scenario, profile, configuration.schedule, load, self._rate(scenario, load))
        except InputError as error:
            self._refusals[configuration] = error.within(self.problem.file)
            return None

    def _rate(self, scenario: Scenario, load: Load) -> float:
        """Requests a second that the objectives ask for."""
        each = {"throughput_tokens_per_s": load.output_tokens}
        if not scenario.warm_up_s:  # after it, requests end that began before
            each |= {"throughput_requests_per_s": 1.0, "goodput_requests_per_s": 1.0}
        return max(
            (objective.limit / each[objective.key] for objective in self.objectives if objective.key in each),
            default=0.0,
        )

    def refusal(self) -> InputError | None:
        """Why a configuration cannot run at all, if one cannot."""
        return next(iter(self._refusals.values()), None)

    def refused(self) -> list[Trial]:
        """Configurations that cannot run at all, a candidate of each."""
        confidence, least = self.problem.plan.confidence, self.problem.replicas[0]
        return [
            Trial(Candidate(each, least), self.objectives, confidence, refused=error.problems[0].sentence)
            for each, error in self._refusals.items()
        ]

    def screen(self, candidate: Candidate) -> Trial:
        """See `Bench`."""
        try:
            return self._trial(candidate, self._screened(candidate), 0)
        except InputError as error:
            refused = error.problems[0].sentence
            return Trial(candidate, self.objectives, self.problem.plan.confidence, refused=refused)

    def confirm(self, screened: Trial) -> Trial:
        """See `Bench`.

        An interval grows with how far its draws are off, whichever way. So with draws yet to be made taken to be off by
        nothing, it is at least as wide as it will be told to be: what misses then will miss. The slowest draws come
        first.
        """
        candidate, run, draws = screened.candidate, screened.run, self.draws
        assert run is not None
        scenario, profile, kind = self._read(self.document(candidate.configuration, replicas=candidate.replicas))
        planned: list[tuple[Any, Any]] = []
        drawn: dict[int, Run] = {}

        def plan(*what: Any) -> Run:
            planned.append(what)
            return run

        def told() -> Run:
            place = iter(range(draws))
            return with_intervals(run, scenario, profile, lambda *_: drawn.get(next(place), run), draws=draws)

        with_intervals(run, scenario, profile, plan, draws=draws)
        for i in _slowest_first([costs for _, costs in planned]):
            drawn[i] = self._simulate(kind, *planned[i])
            trial = self._trial(candidate, told(), len(drawn))
            if min(trial.confident_margins.values()) < 0:
                break
        return trial

    def whole(self, candidate: Candidate) -> Trial:
        """See `Bench`."""
        try:
            document = self.document(candidate.configuration, replicas=candidate.replicas)
            return self._trial(candidate, self.evaluate(document, self.draws), self.draws)
        except InputError:
            return self.screen(candidate)

    def document(self, configuration: Configuration, **more: Any) -> dict[str, Any]:
        """The scenario of a configuration, with further values by dotted paths."""
        return resolved(self.problem.document, {**configuration.overrides, **more})

    def evaluate(self, document: dict[str, Any], draws: int = 0) -> Run:
        """One scenario, simulated and counted."""
        run = evaluate(document, file=self.problem.file, base=self.problem.base, draws=draws)
        self.simulations += 1 + draws
        return run

    def _trial(self, candidate: Candidate, run: Run, draws: int) -> Trial:
        result = run.results[candidate.configuration.schedule]
        confidence = self.problem.plan.confidence
        return Trial(candidate, self.objectives, confidence, draws, result, complete=draws in (0, self.draws), run=run)

    def _read(self, document: dict[str, Any]) -> tuple[Scenario, Profile, Kind]:
        kind, scenario = scenario_of(document, file=self.problem.file)
        assert scenario.kind == "serving"
        profile = kind.costs(scenario, self.problem.base)
        assert isinstance(profile, Profile)
        placed = placed_in(scenario, self.problem.base)
        assert placed.kind == "serving"
        return placed, profile, kind

    def _simulate(self, kind: Kind, scenario: Scenario, profile: Profile) -> Run:
        run = kind.simulate(scenario, profile, checks=False, base=self.problem.base, watch=False).whole()
        self.simulations += 1
        return run

    def _screened(self, candidate: Candidate) -> Run:
        of = candidate.configuration
        limit = of.max_num_seqs or 0
        same = (of.hardware, of.tensor_parallel, of.schedule, repr(of.fields), candidate.replicas)
        for other, run in self._runs.setdefault(same, []):
            most = run.results[of.schedule].batch_size.get("max", 0.0)
            # Never at its limit: a higher one would not be felt, nor a lower one that is at least as much.
            if other == limit or (most and most < other and most <= limit):
                return run
        run = self.evaluate(self.document(of, replicas=candidate.replicas))
        self._runs[same].append((limit, run))
        return run


def _slowest_first(profiles: Iterable[Profile]) -> list[int]:
    """The places of profiles, that with the slowest device first."""
    slowness = [profile.device.decode[-1].ns[0] / 1e6 + profile.device.prefill.ns[-1] / 1e6 for profile in profiles]
    return sorted(range(len(slowness)), key=lambda i: (-slowness[i], i))

"""What the tile level says about a case: every policy's time, and which one is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from batchsim.tiles.cases import Candidate, Case, cases
from batchsim.tiles.compare import MARGIN, choose, margin_of, programmatic, rank, stream_k
from batchsim.tiles.graph import Chain
from batchsim.tiles.policy import STREAM_SYNC, Policy, compile_policy, policies
from batchsim.tiles.profile import TileProfile
from batchsim.tiles.scenario import TilesScenario
from batchsim.tiles.sm import TileDevice, TileRun, simulate

SCHEMA_VERSION = 1

# Printed beside the figures.
DEFINITIONS = {
    "time_us": "from the first kernel's first tile to the last one's last, the policy's best tiling",
    "gain": "1 - time / time of StreamSync, each in its best tiling",
    "waves": "tiles over slots, kernels together; for StreamSync rounded up for each kernel",
    "utilisation": "share of the slots' time in which a tile computes, waiting not counted",
}


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """One policy in its best tiling; keys and meanings as in DEFINITIONS. `measured_us`: on a device, where asked."""

    policy: str
    time_us: float
    gain: float
    waves: float
    utilisation: float
    tiling: str
    measured_us: float | None = None


@dataclass(frozen=True)
class Recorded:
    """A policy's run with all its tiles, simulated or on a device."""

    policy: Policy
    run: TileRun

    @property
    def total_us(self) -> float:
        return self.run.total_ns / 1e3


@dataclass(frozen=True)
class CaseResult:
    """A case's policies, the baseline StreamSync among them; `runs` are the baseline and the chosen one.

    `comparisons`: other ways to fill the last wave, which are not to be chosen.
    `measured`: the same two on a device, where that was asked for.
    """

    name: str
    device: TileDevice
    layers: int
    policies: tuple[PolicyResult, ...]
    chosen: PolicyResult
    why: str
    runs: tuple[Recorded, ...]
    comparisons: tuple[PolicyResult, ...] = ()
    measured: tuple[Recorded, ...] = ()

    @property
    def baseline(self) -> PolicyResult:
        return next(result for result in self.policies if result.policy == STREAM_SYNC)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "device": self.device.name,
            "baseline_us": self.baseline.time_us,
            "policies": [_plain(result) for result in self.policies],
            "chosen": self.chosen.policy,
            "tiling": self.chosen.tiling,
            "why": self.why,
            "comparisons": [_plain(result) for result in self.comparisons],
            "layers": self.layers,
            **self._measured_json(),
        }

    @property
    def measured_gain(self) -> float | None:
        """What the chosen policy gains over the baseline on the device."""
        return 1 - self.measured[-1].total_us / self.measured[0].total_us if self.measured else None

    def _measured_json(self) -> dict[str, Any]:
        if not self.measured:
            return {}
        first, last = self.measured[0], self.measured[-1]
        return {"measured": {"baseline_us": first.total_us, "time_us": last.total_us, "gain": self.measured_gain}}


@dataclass(frozen=True)
class TilesRun:
    """All cases of a scenario, on one device."""

    scenario: dict[str, Any]
    profile: str
    provenance: dict[str, Any]
    cases: tuple[CaseResult, ...]

    def to_json(self) -> dict[str, Any]:
        """What `batchsim tiles --json` prints: the only case itself, or several below `cases`."""
        about = {"schema_version": SCHEMA_VERSION, "profile": self.profile, "scenario": self.scenario}
        told = [case.to_json() for case in self.cases]
        if len(told) == 1:
            return {**told[0], **about}
        return {"name": self.scenario["name"], "device": self.cases[0].device.name, "cases": told, **about}

    def with_measured(
        self, measure: Callable[[CaseResult], Sequence[TileRun]], tell: Callable[[float], None] | None = None
    ) -> TilesRun:
        """The same with what a device took; `measure` runs the two policies of a case's `runs`, in their order."""
        results = []
        for number, case in enumerate(self.cases):
            if tell is not None:
                tell(number / len(self.cases))
            results.append(_with_measured(case, measure(case)))
        return replace(self, cases=tuple(results))


@dataclass(frozen=True, slots=True)
class _Tried:
    candidate: Candidate
    run: TileRun


def compare_all(scenario: TilesScenario, profile: TileProfile, tell: Callable[[float], None] | None = None) -> TilesRun:
    """Every case of a scenario at the costs of a profile.

    Raises:
        InputError: a tile that the profile has no costs for, or too many tiles; without a file.
    """
    found, results = cases(scenario, profile), []
    for number, case in enumerate(found):
        if tell is not None:
            tell(number / len(found))
        results.append(compare(case, profile.device))
    return TilesRun(scenario.model_dump(mode="json"), profile.name, profile.provenance, tuple(results))


def compare(case: Case, device: TileDevice) -> CaseResult:
    """Simulate every policy of a case in every tiling that is not hopeless, and choose one of them.

    Each policy counts with its best tiling, StreamSync too. A policy is chosen in tiles in which it promises more of a
    gain than predictions for such tiles were seen to be wrong by.
    """
    barriers = [
        _Tried(candidate, simulate(compile_policy(candidate.chain), case.costs, device))
        for candidate in case.candidates
    ]
    best: dict[str, _Tried] = {}
    believed: dict[str, _Tried] = {}
    others: dict[str, _Tried] = {}
    for barrier in sorted(barriers, key=lambda tried: tried.run.total_ns):
        candidate, chain = barrier.candidate, barrier.candidate.chain
        # No policy is faster than slots that never idle; a tiling whose work alone takes longer need not be tried.
        if best and barrier.run.utilisation * barrier.run.total_ns >= min(each.run.total_ns for each in best.values()):
            continue
        for run in rank(chain, case.costs, device):
            _keep(best, _Tried(candidate, run))
            if run.total_ns < barrier.run.total_ns * (1 - margin_of(chain, case.margins)):
                _keep(believed, _Tried(candidate, run))
        for run in (programmatic(chain, case.costs, device), stream_k(chain, case.costs, device)):
            _keep(others, _Tried(candidate, run))
    baseline_ns = best[STREAM_SYNC].run.total_ns
    believed[STREAM_SYNC] = best[STREAM_SYNC]
    taken = choose([tried.run for tried in believed.values()]).policy
    best[taken] = believed[taken]
    results = [_result(tried, baseline_ns) for tried in best.values()]
    results.sort(key=lambda result: (result.time_us, result.policy != STREAM_SYNC))
    chosen = next(each for each in results if each.policy == taken)
    named = dict.fromkeys((STREAM_SYNC, chosen.policy))
    runs = tuple(_record(best[name], case, device) for name in named)
    runner_up = next((result for result in results if result.policy != STREAM_SYNC), None)
    comparisons = tuple(_result(tried, baseline_ns) for tried in others.values())
    doubt = margin_of(best[runner_up.policy].candidate.chain, case.margins) if runner_up else 0.0
    why = explain(runs[-1], device, runner_up, doubt)
    return CaseResult(case.name, device, case.layers, tuple(results), chosen, why, runs, comparisons)


def _with_measured(result: CaseResult, runs: Sequence[TileRun]) -> CaseResult:
    """The result with what a device took for the policies of its own `runs`, in their order."""
    measured = tuple(Recorded(told.policy, run) for told, run in zip(result.runs, runs, strict=True))
    times = {told.policy.name: told.total_us for told in measured}
    told = tuple(replace(each, measured_us=times.get(each.policy)) for each in result.policies)
    chosen = next(each for each in told if each.policy == result.chosen.policy)
    return replace(result, policies=told, chosen=chosen, measured=measured)


def explain(chosen: Recorded, device: TileDevice, runner_up: PolicyResult | None, doubt: float = 0.0) -> str:
    """One sentence: why the chosen policy gains over the baseline, or why none does.

    `doubt`: by how much gains such as the runner-up's were predicted too high.
    """
    chain = chosen.policy.chain
    last = _last_waves(chain, device)
    producers = sorted({dependence.producer for dependence in chain.dependences})
    emptiest = min(producers, key=lambda kernel: last[kernel][0] / last[kernel][1], default=0)
    filled, slots = last[emptiest]
    name = chain.kernels[emptiest].name
    fills = f"the last wave of {name} fills {filled} of {slots} slots"
    if not chosen.policy.barrier:
        kernel, early = _early(chosen)
        tiles = f"{early} tile{'s'[: early != 1]} of {kernel}"
        return (
            f"{fills[0].upper()}{fills[1:]}; {chosen.policy.name} lets {tiles} start before their producer has ended."
        )
    if runner_up is None:
        return f"{STREAM_SYNC}: no kernel of this chain depends on another tile by tile."
    if runner_up.gain >= MARGIN:
        return (
            f"{STREAM_SYNC}: {runner_up.policy} promises {runner_up.gain:.1%}, but predictions for its tiles were too "
            f"high by up to {doubt:.1%}."
        )
    if all(filled >= 0.9 * slots for filled, slots in (last[kernel] for kernel in producers)):
        return f"{STREAM_SYNC}: waves are whole, waiting would only cost."
    together = ceil(sum(chosen.run.kernel_waves))
    if together == chosen.run.waves:
        return f"{STREAM_SYNC}: {fills}, but the kernels together need {together} waves as well."
    changes = (
        "takes as long"
        if abs(runner_up.gain) < 0.0005
        else (f"takes {abs(runner_up.gain):.1%} {'less' if runner_up.gain > 0 else 'longer'}")
    )
    return f"{STREAM_SYNC}: {fills}, but posting and waiting cost what filling it gains: {runner_up.policy} {changes}."


def _plain(result: PolicyResult) -> dict[str, Any]:
    return {key: value for key, value in asdict(result).items() if value is not None}


def _keep(best: dict[str, _Tried], tried: _Tried) -> None:
    """Put a policy's run into `best` if it is the fastest of its name."""
    name = tried.run.policy
    if name not in best or tried.run.total_ns < best[name].run.total_ns:
        best[name] = tried


def _record(tried: _Tried, case: Case, device: TileDevice) -> Recorded:
    policy = next(policy for policy in policies(tried.candidate.chain) if policy.name == tried.run.policy)
    return Recorded(policy, simulate(policy, case.costs, device, record=True))


def _result(tried: _Tried, baseline_ns: float) -> PolicyResult:
    run = tried.run
    return PolicyResult(
        run.policy, run.total_ns / 1e3, 1 - run.total_ns / baseline_ns, run.waves, run.utilisation,
        tried.candidate.tiling,
    )  # fmt: skip


def _last_waves(chain: Chain, device: TileDevice) -> list[tuple[int, int]]:
    """Of each kernel the tiles in its last wave, and the slots of the device."""
    found = []
    for kernel in chain.kernels:
        slots = device.sms * kernel.occupancy
        found.append(((kernel.tiles - 1) % slots + 1, slots))
    return found


def _early(recorded: Recorded) -> tuple[str, int]:
    """The kernel with the most tiles that start before their producer has ended, and how many those are."""
    ends: dict[int, int] = {}
    spans = recorded.run.spans
    for span in spans:
        ends[span.kernel] = max(ends.get(span.kernel, 0), span.end_ns)
    counts: dict[int, int] = {}
    for dependence in recorded.policy.chain.dependences:
        end = ends[dependence.producer]
        early = sum(span.kernel == dependence.consumer and span.start_ns < end for span in spans)
        counts[dependence.consumer] = max(early, counts.get(dependence.consumer, 0))
    kernel = max(counts, key=lambda index: counts[index])
    return recorded.policy.chain.kernels[kernel].name, counts[kernel]

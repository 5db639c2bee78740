"""How fast a host launches small micro-batches at a moment, relative to a profile's, and the profile on such a host.

A host that shares its cores with other tenants changes its speed by a third from hour to hour and by as much within
seconds. The same probe serves whatever is to be predicted: it measures the host, not the scenario.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from batchsim.schedules.training import TRAINING_SCHEDULES
from batchsim.training import fit_of
from batchsim.training_profile import HostFit, Launches, PrecisionFit, TokenFit, TrainingProfile
from batchsim.training_scenario import TrainingScenario
from calibration.training.executor import TrainingExecutor, Work

# Micro-batches as small as those that the host's costs were measured with.
PROBE = Work(2, 4, 1, 128)
FORWARD, BACKWARD = ("layers", "head"), ("head_backward", "layers_backward")


@dataclass(frozen=True, slots=True)
class HostSpeed:
    """Speed in launching forward passes, and backward passes, which a thread of autograd's own does."""

    forward: float = 1.0
    backward: float = 1.0

    @property
    def both(self) -> float:
        """In everything else."""
        return sqrt(self.forward * self.backward)

    def to_json(self) -> list[float]:
        """Rounded as it is stored."""
        return [round(self.forward, 4), round(self.backward, 4)]


def between(before: HostSpeed, after: HostSpeed) -> HostSpeed:
    """The speed of what ran between two probes."""
    return HostSpeed(*((a + b) / 2 for a, b in zip(before.to_json(), after.to_json(), strict=True)))


def host_speed(executor: TrainingExecutor, profile: TrainingProfile, scenario: TrainingScenario) -> HostSpeed:
    """What the profile expects of launching a few small micro-batches, over what that takes here and now."""
    if not profile.overlaps:
        return HostSpeed()  # a launch is the computation, which says nothing of the interpreter
    found = executor.run(TRAINING_SCHEDULES["sync"](), PROBE)
    parts = fit_of(profile, scenario).host[scenario.checkpointing]

    def speed(names: tuple[str, ...]) -> float:
        expected = took = 0.0
        for micro in PROBE.micro_batches():
            expected += sum(parts[name].host.at(first=micro.first) * parts[name].host.mean_ratio for name in names)
        for name in names:
            took += sum(found.parts_host_ns[name, True]) + sum(found.parts_host_ns[name, False])
        return expected / took

    return HostSpeed(speed(FORWARD), speed(BACKWARD))


def beside(profile: TrainingProfile, speed: HostSpeed) -> TrainingProfile:
    """The profile with all host times as on a host of this speed."""
    both = speed.both

    def precision(fit: PrecisionFit) -> PrecisionFit:
        host = {
            kind: {
                name: _launches(part, speed.forward if name in FORWARD else speed.backward)
                for name, part in parts.items()
            }
            for kind, parts in fit.host.items()
        }
        optimizers = {
            kind: each.model_copy(update={"host": _host(each.host, both), "zero_grad": _host(each.zero_grad, both)})
            for kind, each in fit.optimizers.items()
        }
        return fit.model_copy(update={"host": host, "optimizers": optimizers})

    return profile.model_copy(
        update={
            "prepare": _growing(profile.prepare, both),
            "calls": {phase: _host(call, both) for phase, call in profile.calls.items()},
            "round_trip_ns": profile.round_trip_ns / both,
            "precisions": {name: precision(fit) for name, fit in profile.precisions.items()},
        }
    )


def _launches(part: Launches, speed: float) -> Launches:
    return part.model_copy(update={"host": _host(part.host, speed)})


def _host(fit: HostFit, speed: float) -> HostFit:
    return fit.model_copy(update={"ns": fit.ns / speed, "later_ns": fit.later_ns / speed})


def _growing(fit: TokenFit, speed: float) -> TokenFit:
    costs = {name: getattr(fit, name) / speed for name in ("call_ns", "sequence_ns", "token_ns")}
    return fit.model_copy(update=costs)

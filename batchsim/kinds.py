"""The kinds of scenarios that `batchsim run` takes: how each is read, simulated and executed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from batchsim import yaml_loader
from batchsim.refusal import Override

if TYPE_CHECKING:
    from batchsim.dynamic_scenario import DynamicScenario
    from batchsim.profile import Profile
    from batchsim.result import Run
    from batchsim.scenario import Scenario
    from batchsim.training_profile import TrainingProfile
    from batchsim.training_scenario import TrainingScenario

    AnyScenario: TypeAlias = Scenario | DynamicScenario | TrainingScenario
    AnyProfile: TypeAlias = Profile | TrainingProfile | None


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of scenario: the modules that read, simulate and execute it. They are imported when they are needed."""

    scenario: str
    engine: str
    executor: str
    profile: tuple[str, str] = ("batchsim.profile", "load_profile")

    def load(self, path: Path, sets: Iterable[str | Override]) -> AnyScenario:
        """The scenario in a file of this kind; raises InputError with everything that is wrong."""
        found: AnyScenario = import_module(self.scenario).load(path, sets)
        return found

    def costs(self, scenario: AnyScenario, base: Path) -> AnyProfile:
        """The profile that a scenario names, on the hardware that it names; None where its costs are its own."""
        if scenario.profile is None:
            return None
        module, reader = self.profile
        found: AnyProfile = getattr(import_module(module), reader)(scenario.profile, base)
        return on_hardware(found, scenario)

    def simulate(self, scenario: AnyScenario, costs: AnyProfile, *, checks: bool = True, **options: Any) -> Run:
        """Every schedule of the scenario; `options` as `batchsim.engine.simulate` takes them.

        `checks`: see that it fits the device.

        Raises:
            InputError: without a file; among others of what does not fit the device, with where its memory goes.
        """
        if checks:
            check_memory(scenario, costs, options.get("base", Path()))
        simulate: Callable[..., Run] = import_module(self.engine).simulate
        return simulate(scenario, costs, **options)

    def bench(self, device: str) -> Any:
        """What executes such scenarios on a device, kept from one to the next."""
        return import_module(self.executor).Bench(device)

    def validate(self, scenario: AnyScenario, costs: AnyProfile, device: str, **options: Any) -> tuple[Run, Run]:
        """(predicted, measured); `options` as `calibration.validate.validate` takes them; otherwise as `simulate`."""
        check_memory(scenario, costs, options.get("base", Path()))
        compare: Callable[..., tuple[Run, Run]] = import_module(self.executor).validate
        return compare(scenario, costs, device, **options)


KINDS = {
    "serving": Kind("batchsim.scenario", "batchsim.engine", "calibration.validate"),
    "dynamic": Kind("batchsim.dynamic_scenario", "batchsim.dynamic", "calibration.services.validate"),
    "training": Kind(
        "batchsim.training_scenario",
        "batchsim.training",
        "calibration.training.validate",
        ("batchsim.training_profile", "load_training_profile"),
    ),
}


def kind_of(path: Path) -> Kind:
    """The kind of the scenario in a file; where that says none that is known, the one whose reader says so."""
    kind = yaml_loader.load(path).data.get("kind")
    return KINDS.get(kind, KINDS["serving"]) if isinstance(kind, str) else KINDS["serving"]


def on_hardware(profile: AnyProfile, scenario: AnyScenario) -> AnyProfile:
    """The profile, transferred where the scenario names other hardware than its own.

    Raises:
        InputError: without a file; as `batchsim.hardware.transfer.transferred`.
    """
    if scenario.kind == "training" or (scenario.hardware is None and getattr(scenario, "tensor_parallel", 1) == 1):
        return profile
    from batchsim.hardware.transfer import for_scenario

    return for_scenario(cast("Profile", profile), scenario)


def check_memory(scenario: AnyScenario, costs: AnyProfile, base: Path) -> None:
    """Refuse what does not fit the device; requests that are served take turns, and their engine checks them.

    Raises:
        InputError: without a file; with the largest terms, and what would fit.
    """
    if scenario.kind == "serving" or costs is None:
        return
    from batchsim.memory import breakdown, library_for, peak_bytes

    device_bytes, library = costs.device_memory_bytes, library_for(str(costs.provenance.get("device")))
    if peak_bytes(scenario, device_bytes, library, base) > device_bytes:
        breakdown(scenario, device_bytes, library, base).check()

"""One scenario, given as plain data: read, simulated at its profile's costs, with intervals. What sweeps and plans run.

Profiles are parsed once in a process (`batchsim.profile.parsed`), so that the next scenario at the same costs is quick.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchsim import fields
from batchsim.errors import InputError
from batchsim.kinds import KINDS
from batchsim.refusal import Override, Refusals
from batchsim.yaml_loader import Document, KeyPath

if TYPE_CHECKING:
    from batchsim.kinds import AnyScenario, Kind
    from batchsim.result import Run

_MODELS = {"serving": "Scenario", "dynamic": "DynamicScenario", "training": "TrainingScenario"}


def resolved(document: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `document` with the values of `overrides`, by dotted paths, put into it.

    Raises:
        InputError: a path leads through a value that is no mapping.
    """
    found: dict[str, Any] = deepcopy(dict(document))
    for path, value in overrides.items():
        Override("--set", tuple(path.split(".")), deepcopy(value)).apply(found)
    return found


def scenario_of(
    document: Mapping[str, Any],
    *,
    file: str,
    overrides: Iterable[Override] = (),
    lines: Mapping[KeyPath, int] | None = None,
) -> tuple[Kind, AnyScenario]:
    """The kind and the scenario that `document` describes, with `overrides` put into it; `file` is what errors name.

    Raises:
        InputError: with everything that is wrong.
    """
    named = document.get("kind")
    kind = named if isinstance(named, str) and named in KINDS else "serving"
    model = getattr(import_module(KINDS[kind].scenario), _MODELS[kind])
    whole = Document(deepcopy(dict(document)), dict(lines or {}))
    return KINDS[kind], fields.read(model, _refusals(model), whole, file, overrides)


def evaluate(document: Mapping[str, Any], *, file: str, base: Path, draws: int | None = 0) -> Run:
    """Simulate the scenario that `document` describes, every schedule of it.

    Profiles and traces are looked for relative to `base`; `file` is what errors name. With `draws` the figures get
    their 90% intervals, from so many draws; None: from as many as its length allows.

    Raises:
        InputError: what is wrong with the scenario, or why it cannot run, such as what does not fit the device.
        RunError: the profile lacks a loop that the scenario asks for.
        KeyboardInterrupt: it was interrupted; what was found by then is dropped.
    """
    kind, scenario = scenario_of(document, file=file)
    return evaluate_scenario(kind, scenario, file=file, base=base, draws=draws)


def evaluate_scenario(kind: Kind, scenario: AnyScenario, *, file: str, base: Path, draws: int | None = 0) -> Run:
    """As `evaluate`, of a scenario that has been read."""
    try:
        return _evaluated(kind, scenario, base, draws)
    except InputError as error:
        raise error.within(file) from None


def _evaluated(kind: Kind, scenario: AnyScenario, base: Path, draws: int | None) -> Run:
    placed, costs = placed_in(scenario, base), kind.costs(scenario, base)
    run = kind.simulate(placed, costs, base=base).whole()
    if draws != 0:
        from batchsim.intervals import again, of_run

        run = of_run(run, placed, costs, again(kind, base), draws=draws)
    if placed is not scenario:  # the result tells what was written, wherever that is
        run = replace(run, scenario=run.scenario | {"tile_profile": scenario.model_dump(mode="json")["tile_profile"]})
    return run


def placed_in(scenario: AnyScenario, base: Path) -> AnyScenario:
    """The scenario with the path of a tile profile that lies beside it made one that can be opened from here."""
    if scenario.kind == "serving" and scenario.tile_profile is not None:
        beside = base / scenario.tile_profile
        if beside.is_file():
            return scenario.model_copy(update={"tile_profile": str(beside)})
    return scenario


@cache
def _refusals(model: type[fields.Model]) -> Refusals:
    return fields.refusals_of(model)

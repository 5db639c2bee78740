"""What notebooks use: `load`, `run`, `sweep`, `plan`, `explain`, `tiles`. Results are frames and figures that show
themselves.

Bad input raises `batchsim.InputError` with a sentence that names the file, the key, what was found and what would do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

from batchsim import fields, yaml_loader
from batchsim.errors import BatchSimError, InputError, shown
from batchsim.evaluate import evaluate_scenario, placed_in, scenario_of
from batchsim.kinds import KINDS
from batchsim.refusal import Override
from batchsim.views import RunView, TilesView
from batchsim.yaml_loader import Document

if TYPE_CHECKING:
    from batchsim.explain import Explanation
    from batchsim.kinds import AnyScenario
    from batchsim.plan import PlanResult
    from batchsim.sweep.result import SweepResult
    from batchsim.tiles.scenario import TilesScenario

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def _plainly(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Errors for the user come from the user's own line: what lies between it and the error tells nothing more."""

    @wraps(function)
    def called(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except BatchSimError as error:
            raise error.with_traceback(None) from None

    return called


@contextmanager
def _blaming(file: str) -> Iterator[None]:
    """Names `file` in refusals by code that knows only what stands in it."""
    try:
        yield
    except InputError as error:
        raise error.within(file) from None


@dataclass(frozen=True, repr=False)
class LoadedScenario:
    """A scenario that was read and found possible.

    `document` is what it says, `file` what errors name, `base` the folder that its paths are relative to, and `checked`
    the scenario with all of its defaults.
    """

    document: dict[str, Any]
    file: str
    base: Path
    checked: AnyScenario | TilesScenario

    def __repr__(self) -> str:
        return f"<LoadedScenario {self.checked.name!r}, {self.checked.kind}>"

    def _repr_html_(self) -> str:
        from batchsim.report.html import as_yaml

        return as_yaml(self.document)


Source: TypeAlias = str | Path | Mapping[str, Any] | LoadedScenario
"""A scenario: its file's path, what stands in such a file, or one that was loaded."""


@_plainly
def load(what: Source, **sets: Any) -> LoadedScenario:
    """Read a scenario of any kind from a YAML file or a mapping; from a loaded one, a variant is made.

    `sets` are put over its values, `__` for the dot of a path: `load(file, max_num_seqs=64, workload__request_rate=8)`.
    Its traces and profiles lie relative to the file, a mapping's to the working directory.

    Raises:
        InputError: with everything that is wrong, a line each.
    """
    lines: Mapping[yaml_loader.KeyPath, int] = {}
    if isinstance(what, LoadedScenario):
        document, file, base = what.document, what.file, what.base
    elif isinstance(what, Mapping):
        document, file, base = plain(what), "scenario", Path()
    else:
        found = yaml_loader.load(Path(what))
        document, file, base, lines = found.data, str(what), Path(what).parent, found.lines
    overrides = [
        Override(f"load({key}=...)", tuple(key.replace("__", ".").split(".")), plain(value))
        for key, value in sets.items()
    ]
    checked = _checked(document, file, overrides, lines)
    document = deepcopy(document)
    for override in overrides:
        override.apply(document)
    return LoadedScenario(document, file, base, checked)


@_plainly
def run(scenario: Source, *, draws: int | None = None) -> RunView:
    """Simulate every schedule of a scenario of kind serving, dynamic or training.

    `draws`: simulations that the 90% intervals are made from, by default as many as `batchsim run` makes; 0: none.

    Raises:
        InputError: what is wrong with the scenario, or why it cannot run, such as what does not fit the device.
        RunError: the profile lacks a loop that the scenario asks for.
    """
    loaded, checked = _timed(scenario)
    return RunView(evaluate_scenario(KINDS[checked.kind], checked, file=loaded.file, base=loaded.base, draws=draws))


@_plainly
def sweep(
    what: str | Path | Mapping[str, Any] | None = None,
    *,
    scenario: Source | None = None,
    grid: Mapping[str, Any] | None = None,
    points: Sequence[Mapping[str, Any]] | None = None,
    latin_hypercube: Mapping[str, Any] | None = None,
    name: str | None = None,
    out: str | Path | None = None,
    draws: int | None = None,
    workers: int | None = None,
    engine: str = "processes",
    address: str | None = None,
) -> SweepResult:
    """Simulate variants of a scenario: of a sweep's file or such a mapping, or of `scenario` over a grid or the like.

    `grid` maps dotted fields to values (a list, an array or `{start, stop, step}`); `points` is a list of mappings of
    fields to values; `latin_hypercube` is as in a file. `out`: a folder to keep the points in; a sweep that was
    interrupted goes on from there. `workers`: processes, by default one for each core; 0: none but this one. `engine`
    and `address`: as `batchsim sweep` takes them.

    Raises:
        InputError: with everything that is wrong. A point that fails is recorded, and is no error.
    """
    from batchsim.sweep.run import of, read
    from batchsim.sweep.run import run as swept

    ways = {"name": name, "grid": grid, "list": points, "latin_hypercube": latin_hypercube}
    given = {key: plain(value) for key, value in ways.items() if value is not None}
    if what is not None and not isinstance(what, Mapping):
        _alone("sweep()", scenario, given)
        asked = read(what, draws=draws)
    else:
        document, base = _inline("sweep", what, scenario, given)
        asked = of(document, base=base, draws=draws)
    return swept(asked, None if out is None else Path(out), engine=engine, workers=workers, address=address)


@_plainly
def plan(
    what: str | Path | Mapping[str, Any] | None = None,
    *,
    scenario: Source | None = None,
    objectives: Mapping[str, str] | None = None,
    candidates: Mapping[str, Any] | None = None,
    confidence: float | None = None,
    name: str | None = None,
    draws: int | None = None,
) -> PlanResult:
    """The cheapest candidate that meets objectives: of a plan's file or such a mapping, or for `scenario`'s traffic.

    `objectives`, `candidates` and `confidence` are as in a file; `draws`: simulations that an interval takes.

    Raises:
        InputError: what is wrong with the plan or its scenario, or why no candidate can run.
    """
    from batchsim.plan import plan as solved

    if draws is not None and draws < 1:
        raise InputError("plan()", "draws", shown(draws), "1 or more: how sure an answer is comes from them")
    parts = {"name": name, "objectives": objectives, "candidates": candidates, "confidence": confidence}
    given = {key: plain(value) for key, value in parts.items() if value is not None}
    if what is not None and not isinstance(what, Mapping):
        _alone("plan()", scenario, given)
        with _blaming(str(what)):
            return solved(what, draws=draws)
    document, base = _inline("plan", what, scenario, given)
    with _blaming("plan"):
        return solved(document, base=base, draws=draws)


@_plainly
def explain(scenario: Source, *, by: float = 0.1) -> Explanation:
    """What each stage is worth: the gain of every schedule when one stage gets `by` (a share) faster, for each stage.

    Raises:
        InputError: as `run`.
    """
    from batchsim.explain import explain as explained

    if not 0 < by < 1:
        raise InputError("explain()", "by", shown(by), "a share above 0 and below 1, as 0.1 for 10%")
    loaded, checked = _timed(scenario)
    kind = KINDS[checked.kind]
    with _blaming(loaded.file):
        costs = kind.costs(checked, loaded.base)
        return explained(kind, placed_in(checked, loaded.base), costs, by=by, base=loaded.base)


@_plainly
def tiles(scenario: Source) -> TilesView:
    """Compare the ways to synchronise the tiles of dependent kernels, for a scenario of kind tiles.

    Raises:
        InputError: what is wrong with the scenario, or a tile that its profile has no costs for.
    """
    from batchsim.tiles.profile import load_tile_profile
    from batchsim.tiles.result import compare_all

    loaded = load(scenario)
    checked = loaded.checked
    if checked.kind != "tiles":
        raise InputError(loaded.file, "kind", checked.kind, "tiles: batchsim.run takes this one")
    with _blaming(loaded.file):
        return TilesView(compare_all(checked, load_tile_profile(checked.profile, loaded.base)))


def plain(value: Any) -> Any:
    """The value as a file could hold it: numpy's numbers and arrays as numbers and lists, paths as text."""
    match value:
        case LoadedScenario():
            return deepcopy(value.document)
        case Mapping():
            return {str(key): plain(each) for key, each in value.items()}
        case list() | tuple() | range():
            return [plain(each) for each in value]
        case Path():
            return str(value)
        case _ if hasattr(value, "tolist"):
            return plain(value.tolist())
        case _:
            return value


def _checked(
    document: Mapping[str, Any], file: str, overrides: list[Override], lines: Mapping[yaml_loader.KeyPath, int]
) -> AnyScenario | TilesScenario:
    if document.get("kind") != "tiles":
        return scenario_of(document, file=file, overrides=overrides, lines=lines)[1]
    from batchsim.tiles.scenario import TilesScenario

    whole = Document(deepcopy(dict(document)), dict(lines))
    return fields.read(TilesScenario, fields.refusals_of(TilesScenario), whole, file, overrides)


def _timed(scenario: Source) -> tuple[LoadedScenario, AnyScenario]:
    """A scenario, which is to be one that schedules run."""
    loaded = load(scenario)
    if loaded.checked.kind == "tiles":
        raise InputError(loaded.file, "kind", "tiles", "serving, dynamic or training: batchsim.tiles takes this one")
    return loaded, loaded.checked


def _alone(call: str, scenario: Source | None, given: Mapping[str, Any]) -> None:
    """Refuse what stands beside a whole sweep or plan, which has a place for it."""
    more = ["scenario"] * (scenario is not None) + list(given)
    if more:
        raise InputError(call, "", f"{more[0]} beside a whole one", "one of the two")


def _inline(
    kind: str, what: Mapping[str, Any] | None, scenario: Source | None, given: Mapping[str, Any]
) -> tuple[dict[str, Any], Path]:
    """What would stand in a file of this kind, and the folder that its scenario's paths are relative to."""
    if what is not None:
        _alone(f"{kind}()", scenario, given)
        scenario = what.get("scenario")
        return plain(what), scenario.base if isinstance(scenario, LoadedScenario) else Path()
    if scenario is None:
        raise InputError(f"{kind}()", "scenario", "nothing", "a scenario, or a file")
    loaded = load(scenario)
    return {"kind": kind, "name": loaded.checked.name, "scenario": loaded.document, **given}, loaded.base

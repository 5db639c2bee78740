"""The points of a sweep, each a whole scenario that has been read, and named by all that its result depends on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from batchsim import yaml_loader
from batchsim.errors import InputError
from batchsim.evaluate import scenario_of
from batchsim.refusal import Override
from batchsim.shipped import read_profile, shipped
from batchsim.sweep.point import SCENARIO
from batchsim.sweep.spec import FieldValue, SweepSpec
from batchsim.workload_scenario import TraceWorkload
from batchsim.yaml_loader import KeyPath, key_text

if TYPE_CHECKING:
    from batchsim.kinds import AnyScenario

_SOURCES = (".json", ".py", ".yaml")
# What draws numbers and computes with them beside this package.
_LIBRARIES = ("numba", "numpy", "pydantic", "scipy", "simpy")
_MOST_TOLD = 20
# No file is called so: it tells the problems of swept fields from the scenario's own.
_OPTION = "the sweep's value of "


@dataclass(frozen=True, slots=True)
class Source:
    """The scenario that a sweep varies: its data, the file that errors name, and where its own files lie.

    `inline`: it stands in the sweep's file.
    """

    document: dict[str, Any]
    file: str
    base: Path
    inline: bool
    lines: dict[KeyPath, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Point:
    """One point: its swept fields, the scenario as plain data, and a hash of all that its result depends on.

    `refused` says why its values do not go together; then it is not run.
    """

    fields: dict[str, Any]
    document: dict[str, Any]
    hash: str
    refused: str | None = None


def source_of(spec: SweepSpec, file: Path, lines: Mapping[KeyPath, int]) -> Source:
    """The scenario that the sweep in `file` varies.

    Raises:
        InputError: its file cannot be read.
    """
    if isinstance(spec.scenario, str):
        path = file.parent / spec.scenario
        if not path.is_file():
            raise InputError(str(file), "scenario", f"no file {path}", "a scenario's", line=lines.get(("scenario",)))
        found = yaml_loader.load(path)
        return Source(found.data, str(path), path.parent, inline=False, lines=found.lines)
    own = {path[1:]: line for path, line in lines.items() if path[:1] == ("scenario",)}
    return Source(spec.scenario, str(file), file.parent, inline=True, lines=own)


def points_of(
    spec: SweepSpec, source: Source, *, file: str, lines: Mapping[KeyPath, int], draws: int
) -> tuple[list[Point], dict[Path, bytes]]:
    """The points of a sweep, in order, and the user's own files that their scenarios name: profiles and traces.

    A point whose values are each possible but do not go together is there, and says so.

    Raises:
        InputError: with every field and value that no scenario can have; or if no point could run.
    """
    files, points = Files(source.base), []
    given = list(spec.points(lambda path, value: _is_integer(source, path, value)))
    problems: dict[tuple[str | None, str, str, str], InputError] = {}
    for number, values in enumerate(given):
        try:
            points.append(_point({path: each.value for path, each in values.items()}, source, files, draws))
        except InputError as error:
            for each in error.problems:
                told = _told(each, values, f"in point {number + 1:,} of {len(given):,}", source, file, lines)
                problems.setdefault((told.file, told.key, each.found, each.wanted), told)
    if problems:
        raise InputError.all_of(list(problems.values())[:_MOST_TOLD])
    if all(point.refused for point in points):
        raise InputError(file, "", f"no point whose values go together (the first: {points[0].refused})", "some")
    return points, files.contents


def _point(values: dict[str, Any], source: Source, files: Files, draws: int) -> Point:
    overrides, document = _overrides(values), deepcopy(source.document)
    for override in overrides:
        override.apply(document)
    try:
        _, scenario = scenario_of(document, file=source.file, overrides=overrides, lines=source.lines)
    except InputError as error:
        if not _of_several(error):
            raise
        refused = InputError.all_of(InputError(SCENARIO, each.key, each.found, each.wanted) for each in error.problems)
        return Point(values, document, _hash(values, document, {}, draws), str(refused))
    return Point(values, document, _hash(values, scenario.model_dump(mode="json"), files.digests(scenario), draws))


@cache
def code_version() -> str:
    """A hash of this package's sources and data, of what fits into memory, and of the libraries that compute for it."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in _SOURCES and path.is_file():
            _add(digest, path.relative_to(folder).as_posix().encode(), path.read_bytes())
    for name, entry in sorted(shipped("memory").items()):
        _add(digest, name.encode(), entry.read_bytes())
    for name in _LIBRARIES:
        _add(digest, name.encode(), _installed(name).encode())
    return digest.hexdigest()


def _installed(library: str) -> str:
    """Its version; empty where it is not there, as numba need not be: events are then simulated one by one."""
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


class Files:
    """The files that scenarios name, read once: profiles, shipped or the user's own, and traces.

    `contents` holds the user's own.
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        self.contents: dict[Path, bytes] = {}
        self._known: dict[tuple[str, str], str] = {}

    def digests(self, scenario: AnyScenario) -> dict[str, str]:
        """A hash of each file's content, by the key that names it.

        Raises:
            InputError: there is no such file.
        """
        found = {}
        if scenario.profile is not None:
            folder = "training" if scenario.kind == "training" else "."
            found["profile"] = self._digest("profile", scenario.profile, folder)
        if scenario.kind == "serving" and "tile" in scenario.schedules:
            names = [scenario.tile_profile] if scenario.tile_profile is not None else sorted(shipped("tiles"))
            found |= {f"tile_profile {name}": self._digest("tile_profile", name, "tiles") for name in names}
        if scenario.kind != "training" and isinstance(scenario.workload, TraceWorkload):
            found["workload.path"] = self._digest("workload.path", scenario.workload.path, None)
        return found

    def _digest(self, key: str, name: str, folder: str | None) -> str:
        """Of the file at `name`, or else of the shipped profile of that name in `folder`."""
        if (key, name) not in self._known:
            path = self.base / name
            if folder is not None and not path.is_file():
                text, _ = read_profile(name, self.base, folder, what="profile", wanted="a profile's JSON", key=key)
                content = text.encode()
            else:
                try:
                    content = self.contents[path] = path.read_bytes()
                except OSError as error:
                    found = f"no readable file ({error.strerror or type(error).__name__})"
                    raise InputError(str(path), key, found, "a file that can be read") from None
            self._known[key, name] = hashlib.sha256(content).hexdigest()
        return self._known[key, name]


def _overrides(values: Mapping[str, Any]) -> list[Override]:
    """The values of swept fields; the option of each tells which field it is, should it be refused."""
    return [Override(_OPTION + path, tuple(path.split(".")), deepcopy(value)) for path, value in values.items()]


def _told(
    problem: InputError,
    values: Mapping[str, FieldValue],
    place: str,
    source: Source,
    file: str,
    lines: Mapping[KeyPath, int],
) -> InputError:
    """What is wrong, as of the key of the sweep's file that brought it about, or else of the scenario."""
    blamed = problem.file or ""
    path = blamed.removeprefix(_OPTION) if blamed.startswith(_OPTION) else problem.key
    if path in values:
        key = values[path].key
        line = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), None)
        inner = f" at {problem.key}" if problem.key != path else ""
        return InputError(file, key_text(key), f"{problem.found}{inner} {place}", problem.wanted, line=line)
    if source.inline and problem.file == source.file:
        problem.key = f"scenario.{problem.key}" if problem.key else "scenario"
    return problem


def _of_several(error: InputError) -> bool:
    """Whether each value is possible, and only all of them together are not."""
    cause = error.__context__
    return isinstance(cause, ValidationError) and all(
        each["type"] == "refused" and each["ctx"]["key"] for each in cause.errors()
    )


def _is_integer(source: Source, path: str, value: float) -> bool:
    """Whether the field takes no fractions: with one it is refused for that."""
    fraction = {path: math.floor(value) + 0.5}
    try:
        scenario_of(source.document, file=source.file, overrides=_overrides(fraction))
    except InputError as error:
        return any(each.key == path and each.wanted.startswith("an integer") for each in error.problems)
    return False


def _hash(values: Mapping[str, Any], scenario: Mapping[str, Any], files: Mapping[str, str], draws: int) -> str:
    asked = {"code": code_version(), "draws": draws, "fields": values, "files": files, "scenario": scenario}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _add(digest: hashlib._Hash, *parts: bytes) -> None:
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)

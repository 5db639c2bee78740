"""The configurations of a plan: every combination of its candidates' values, each seen by the scenario's own reader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchsim import fields, yaml_loader
from batchsim.errors import InputError, shown
from batchsim.evaluate import scenario_of
from batchsim.hardware import device_of
from batchsim.plan.candidate import Configuration
from batchsim.plan.objectives import OF_SLO
from batchsim.plan.spec import Plan
from batchsim.profile import load_profile
from batchsim.refusal import Override
from batchsim.yaml_loader import Document, KeyPath

if TYPE_CHECKING:
    from batchsim.kinds import AnyScenario
    from batchsim.scenario import Scenario

MAX_CONFIGURATIONS = 10_000


@dataclass(frozen=True)
class Problem:
    """A plan with its scenario: `document` is the scenario's plain data, `file` and `base` where it comes from."""

    plan: Plan
    document: dict[str, Any]
    file: str
    base: Path
    configurations: tuple[Configuration, ...]
    replicas: tuple[int, ...]

    @property
    def candidates(self) -> int:
        return len(self.configurations) * len(self.replicas)


def problem_of(plan: Plan, file: str, base: Path, lines: Mapping[KeyPath, int] | None = None) -> Problem:
    """The plan that `file` holds, with the scenario that it names or contains; paths are relative to `base`.

    `lines` are those of the file, for errors.

    Raises:
        InputError: a scenario, or a candidate's value, that its reader refuses; or a device without a price.
    """
    if isinstance(plan.scenario, str):
        path = base / plan.scenario
        document, base = yaml_loader.load(path), path.parent
        own_file = str(path)
    else:
        inside = {key[1:]: line for key, line in (lines or {}).items() if key[:1] == ("scenario",)}
        document, own_file = Document(deepcopy(plan.scenario), inside), file
    _check_kind(document, own_file)
    _, scenario = scenario_of(document.data, file=own_file, lines=document.lines)
    assert scenario.kind == "serving"
    reader = _Reader(plan, document.data, file, lines or {}, own_file, base)
    reader.check_objectives(scenario)
    configurations, replicas = reader.configurations(scenario), reader.replicas(scenario)
    return Problem(plan, document.data, own_file, base, configurations, replicas)


def _check_kind(document: Document, file: str) -> None:
    kind = document.data.get("kind")
    if kind == "serving":
        return
    wanted = "serving, whose replicas can be counted"
    if kind in ("dynamic", "training"):
        wanted += f"; `batchsim tune` chooses what one of kind {kind} needs"
    found = "nothing" if kind is None else str(kind) if kind in fields.COMMANDS else shown(kind)
    raise InputError(file, "kind", found, wanted, line=document.lines.get(("kind",)))


class _Reader:
    """Reads the candidates of one plan; what the scenario's reader refuses is blamed on the plan's line."""

    def __init__(
        self,
        plan: Plan,
        document: Mapping[str, Any],
        file: str,
        lines: Mapping[KeyPath, int],
        own_file: str,
        base: Path,
    ) -> None:
        self.plan, self.document, self.file, self.lines = plan, document, file, lines
        self.own_file, self.base = own_file, base

    def check_objectives(self, scenario: Scenario) -> None:
        """Refuse objectives that no run of the scenario can tell of."""
        for objective in self.plan.bounds:
            if objective.key in OF_SLO and scenario.slo is None:
                wanted = "a scenario with slo, which says what a good request is, such as {ttft_ms: 500}"
                raise self._error(("objectives", objective.key), f"{objective.key} without slo in the scenario", wanted)

    def replicas(self, scenario: Scenario) -> tuple[int, ...]:
        wanted = self.plan.candidates.replicas
        if wanted is None:
            return (scenario.replicas,)
        for count in wanted:
            self._read(("candidates", "replicas"), "replicas", count)
        return wanted

    def configurations(self, scenario: Scenario) -> tuple[Configuration, ...]:
        """All of them, in the order of the file: hardware first, then devices a replica, schedules, the rest."""
        asked = self.plan.candidates
        devices = self._devices(scenario)
        parallel = self._values("tensor_parallel", asked.tensor_parallel, [self.document.get("tensor_parallel", 1)])
        schedules = self._values("schedules", asked.schedules, scenario.schedules)
        batches: Sequence[int | None] = self._values("max_num_seqs", asked.max_num_seqs, [None])
        others = [[(path, value) for value in self._others(path, values)] for path, values in asked.fields.items()]
        found = []
        combinations = product(devices, parallel, schedules, batches, *others)
        for order, ((hardware, label, price), ways, schedule, batch, *rest) in enumerate(combinations):
            if order >= MAX_CONFIGURATIONS:
                wanted = f"at most {MAX_CONFIGURATIONS:,} combinations of them beside the replicas"
                raise self._error(("candidates",), "more values", wanted)
            overrides: dict[str, Any] = {"schedules": [schedule], **dict(rest)}
            if hardware is not None:
                overrides["hardware"] = hardware
            if ways != 1:
                overrides["tensor_parallel"] = ways
            if batch is not None:
                overrides["max_num_seqs"] = batch
            limit = batch if batch is not None else int(scenario.max_num_seqs)
            found.append(Configuration(order, label, ways, schedule, price, overrides, limit, dict(rest)))
        return tuple(found)

    def _devices(self, scenario: Scenario) -> list[tuple[Any, str, float]]:
        """(what goes into the scenario, its name, its price) of each device."""
        asked = self.plan.candidates.hardware
        found: list[tuple[Any, str, float]] = []
        seen: Counter[str] = Counter()
        for i, value in enumerate(asked if asked is not None else [self.document.get("hardware")]):
            path = ("candidates", "hardware", i) if asked is not None else ("candidates", "hardware")
            if value is None:
                provenance = load_profile(scenario.profile, self.base).provenance
                device, name = device_of(provenance), str(provenance.get("device"))
            else:
                placed = self._read(path, "hardware", value)
                device, name = placed.hardware.device(), ""  # type: ignore[union-attr]
            label = device.name if device is not None else name
            if device is None or not device.price_per_hour:
                known = device is not None and device.price_per_hour is not None
                what = "for 0" if known else "whose price per hour is not known"
                wanted = "its price: hardware: {base: NAME, price_per_hour: USD}"
                raise self._error(path, f"{label}, {what}", wanted)
            seen[label] += 1
            if seen[label] > 1:
                label = f"{label} #{seen[label]}"
            found.append((value, label, float(device.price_per_hour)))
        return found

    def _values(self, key: str, asked: Sequence[Any] | None, own: Iterable[Any]) -> list[Any]:
        if asked is None:
            return list(own)
        for i, value in enumerate(asked):
            self._read(("candidates", key, i), key, [value] if key == "schedules" else value)
        return list(asked)

    def _others(self, path: str, values: Sequence[Any]) -> Sequence[Any]:
        for i, value in enumerate(values):
            self._read(("candidates", "fields", path, i), path, value)
        return values

    def _read(self, place: KeyPath, path: str, value: Any) -> AnyScenario:
        """The scenario with `value` at `path`; what is wrong with it is blamed on `place` in the plan."""
        override = Override(self.file, tuple(path.split(".")), deepcopy(value))
        try:
            return scenario_of(self.document, file=self.own_file, overrides=[override])[1]
        except InputError as error:
            first = error.problems[0]
            if first.key == path or first.key.startswith(f"{path}."):
                below = tuple(part for part in first.key[len(path) :].split(".")[1:] if not part.isdigit())
                raise self._error((*place, *below), first.found, first.wanted) from None
            # A value that is refused for what it makes of another key.
            found = f"{shown(value)}, with which {first.key} is refused: found {first.found}"
            raise self._error(place, found, f"{first.wanted} there") from None

    def _error(self, place: KeyPath, found: str, wanted: str) -> InputError:
        lines = (self.lines.get(place[:n]) for n in range(len(place), 0, -1))
        key = yaml_loader.key_text(tuple(part for part in place if not isinstance(part, int)))
        return InputError(self.file, key, found, wanted, line=next(filter(None, lines), None))

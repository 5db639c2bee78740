"""Everything that was executed, of every kind, and its prediction with intervals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from batchsim.dynamic_scenario import DynamicScenario
from batchsim.intervals import of_run
from batchsim.intervals.groups import is_exact, scale_of
from batchsim.intervals.learned import TRANSFERRED, Learned, loop_of
from batchsim.intervals.within import draw, offsets
from batchsim.kinds import KINDS
from batchsim.result import Run, ScheduleResult, figures
from batchsim.scenario import Scenario
from batchsim.training_scenario import TrainingScenario

if TYPE_CHECKING:
    from batchsim.kinds import AnyProfile, AnyScenario

_SCENARIOS: Mapping[str, Any] = {"serving": Scenario, "dynamic": DynamicScenario, "training": TrainingScenario}
_AS_CALIBRATED = (1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Point:
    """A scenario that was executed: what its schedules showed, and what was known of the machine beside them."""

    name: str
    folder: str
    scenario: AnyScenario
    costs: AnyProfile
    measured: dict[str, ScheduleResult]
    facts: Mapping[str, Any]

    @property
    def transferred(self) -> bool:
        """Whether its costs were measured on other hardware."""
        return getattr(self.costs, "transfer", None) is not None

    @property
    def told(self) -> bool:
        """Whether widths are learned from it; the split is by name, and so stays when points are added."""
        return crc32(self.name.encode()) % 2 == 0

    def simulate(self, scenario: Any, costs: Any, *, probed: bool = True, base: Path = Path()) -> Run:
        """`scenario`, on a host of the speed that was measured beside the point, or (not `probed`) as calibrated.

        A trace's path is relative to `base`.
        """
        speed: Any = self.facts.get("host_speed", 1.0) if probed else 1.0
        if scenario.kind == "training":
            from calibration.training.validate import predict

            return predict(scenario, costs, speed if probed else dict.fromkeys(scenario.schedules, _AS_CALIBRATED))
        here = scenario.model_copy(update={"host_speed": scenario.host_speed * speed})
        blocks = {"num_kv_blocks": self.facts.get("num_kv_blocks")} if scenario.kind == "serving" else {}
        return KINDS[scenario.kind].simulate(here, costs, checks=False, base=base, **blocks)


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of one schedule of a point; `offset` of its draws, as `batchsim.intervals.within.offsets` tells."""

    point: str
    loop: str  # as `batchsim.intervals.learned.loop_of` tells
    transferred: bool
    told: bool
    schedule: str
    key: str
    measured: float
    predicted: float
    offset: float

    @property
    def kind(self) -> str:
        """What tables call the likes of its point, and what its widths are by."""
        return TRANSFERRED if self.transferred else self.loop

    @property
    def error(self) -> float:
        """Measured over predicted, on the figure's scale."""
        scale = scale_of(self.key)
        return scale.of(self.measured) - scale.of(self.predicted)


def with_intervals(predicted: Run, measured: Run, scenario: AnyScenario, costs: AnyProfile, *, base: Path) -> Run:
    """`predicted`, a prediction for the very requests and the host that were `measured`, with its intervals."""
    point = Point(scenario.name, "", scenario, costs, measured.results, measured.provenance)
    simulate = partial(point.simulate, base=base)
    return of_run(predicted, scenario, costs, simulate, same_requests=True, probed=True)


def points(folder: Path) -> Iterator[Point]:
    """All executed points under `folder`, in the order of their paths."""
    loaded: dict[tuple[str, str], AnyProfile] = {}
    for path in sorted(folder.rglob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or not {"scenario", "measured", "provenance"} <= document.keys():
            continue
        asked = document["scenario"]
        if not isinstance(asked, dict) or asked.get("kind") not in _SCENARIOS:
            continue
        scenario = _SCENARIOS[asked["kind"]].model_validate(asked)
        key = asked["kind"], json.dumps([asked.get(name) for name in ("profile", "hardware", "tensor_parallel")])
        if key not in loaded:
            loaded[key] = KINDS[asked["kind"]].costs(scenario, Path())
        measured = {name: ScheduleResult(**result) for name, result in document["measured"].items()}
        facts = document["provenance"].get("measured", {})
        yield Point(path.stem, str(path.parent.relative_to(folder)), scenario, loaded[key], measured, facts)


def figures_of(point: Point, known: Learned, draws: int, *, probed: bool = True) -> list[Figure]:
    """Every figure of a point that was both measured and predicted, of the requests that were executed."""
    simulate = partial(point.simulate, probed=probed)
    run = simulate(point.scenario, point.costs)
    drawn = list(draw(point.scenario, point.costs, simulate, draws, known, same_requests=True, probed=probed))
    found = []
    for schedule, measured in point.measured.items():
        if schedule in run.results:
            predicted, truth = figures(run.results[schedule]), figures(measured)
            off = offsets(run.results[schedule], [each[schedule] for each in drawn])
            found += [
                Figure(
                    point.name, loop_of(point.scenario), point.transferred, point.told, schedule, key, truth[key],
                    predicted[key], offset,
                )
                for key, offset in off.items()
                if key in truth and not is_exact(key, schedule)
            ]  # fmt: skip
    return found


def figures_of_all(
    chosen: Sequence[Point], known: Learned, draws: int, *, probed: bool = True, workers: int = 1
) -> list[Figure]:
    """Of all points, in their order, in so many processes."""
    work = partial(figures_of, known=known, draws=draws, probed=probed)
    if workers == 1:
        return [each for point in chosen for each in work(point)]
    from multiprocessing import get_context

    with get_context("spawn").Pool(workers) as pool:
        return [each for found in pool.imap(work, chosen) for each in found]

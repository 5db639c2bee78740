"""What executions have told of how far predictions are off; `python -m calibration.coverage fit` writes it."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeFloat

from batchsim.profile import Measured

if TYPE_CHECKING:
    from batchsim.kinds import AnyScenario

FILE = "learned.json"
TRANSFERRED = "transferred"
# Half a 90% interval of the normal distribution, in standard deviations.
NORMAL = 1.6449


class Width(Measured):
    """Half the width of a figure's 90% interval, on the figure's scale.

    The root of the sum of two squares: `spread` times the root mean square of how far draws are off the point, and
    `floor`, which no draw explains.
    """

    spread: NonNegativeFloat = NORMAL
    floor: NonNegativeFloat = 0.0


class Learned(Measured):
    """What executed points told, which `fitted_to` names, by loop as `loop_of` tells them apart.

    `drift`: how far costs were off on other days, a standard deviation of the logarithm by factor. `share`: how much of
    the spread of single costs a whole run of many of them shows. `widths`: by group of figures; of what is simulated at
    transferred costs those of TRANSFERRED.
    """

    schema_version: int
    provenance: dict[str, Any]
    fitted_to: dict[str, list[str]]
    drift: dict[str, dict[str, NonNegativeFloat]]
    share: dict[str, NonNegativeFloat]
    widths: dict[str, dict[str, Width]]

    def widths_of(self, loop: str, transferred: bool) -> dict[str, Width]:
        """By group of figures; of a loop's own where executions at transferred costs do not tell."""
        return {**self.widths.get(loop, {}), **(self.widths.get(TRANSFERRED, {}) if transferred else {})}


@cache
def learned() -> Learned:
    """What is installed."""
    return Learned.model_validate_json((files("batchsim.intervals") / FILE).read_text(encoding="utf-8"))


def loop_of(scenario: AnyScenario) -> str:
    """The kind of a scenario, and of serving whether requests arrive at times of their own.

    A host that waits for requests is slower than one that is kept busy, and what arrives bounds what is served.
    """
    if scenario.kind != "serving":
        return scenario.kind
    from batchsim.engine import is_open_loop

    return "serving/open" if is_open_loop(scenario) else "serving/closed"

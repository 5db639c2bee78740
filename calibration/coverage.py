"""Do 90% intervals hold what was executed? Learns from one half of the executed points, and tells of both.

python -m calibration.coverage fit calibration/validation
python -m calibration.coverage table calibration/validation
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import batchsim.intervals
from batchsim.files import write_json
from batchsim.intervals import DRAWS
from batchsim.intervals.groups import group_of, scale_of
from batchsim.intervals.learned import FILE, Learned, Width, learned
from batchsim.intervals.within import half_width
from calibration.executed import Figure, figures_of_all, points

# The figures that are told of one by one, and what they are called.
HEADLINES = {
    "throughput_tokens_per_s": "tokens/s",
    "throughput_requests_per_s": "requests/s",
    "gain_over_sync": "gain of async",
    "step_ms.mean": "mean step",
    "device_busy_fraction": "device busy",
    "latency_ms.ttft.p50": "TTFT p50",
    "latency_ms.ttft.p99": "TTFT p99",
    "latency_ms.tpot.p50": "TPOT p50",
    "latency_ms.tpot.p99": "TPOT p99",
    "latency_ms.e2e.p50": "E2E p50",
    "latency_ms.e2e.p99": "E2E p99",
}
# One figure of each run: what it generates or trains on a second, or the requests that it answers.
THROUGHPUT = {"serving": "throughput_tokens_per_s", "training": "throughput_tokens_per_s"}
ANSWERED = "throughput_requests_per_s"
HEADER = """\
| {} | figures | inside | of those held out | below | above | median half width |
|---|--:|--:|--:|--:|--:|--:|"""

Folder = Annotated[Path, typer.Argument(help="Folder of executed points, and of folders of them.")]
Draws = Annotated[int, typer.Option(min=2, help="Simulations that an interval is made from.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes.")]
CORES = os.cpu_count() or 1

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class Judged:
    """A figure, half the width of its interval on its scale, and where in it the measured value is: at -1 and 1 are its
    ends."""

    figure: Figure
    half: float
    at: float

    @property
    def inside(self) -> bool:
        return abs(self.at) <= 1


def judged(figure: Figure, known: Learned) -> Judged:
    """A figure beside its interval."""
    half = half_width(
        known.widths_of(figure.loop, figure.transferred).get(group_of(figure.key), Width()), figure.offset
    )
    # What two ways to the same number differ by, in floating point, is no error.
    at = 0.0 if abs(figure.error) < 1e-9 else figure.error / max(half, 1e-12)
    return Judged(figure, half, at)


def throughput_key(figure: Figure) -> str:
    """Which figure is the throughput of the run that `figure` is of."""
    return THROUGHPUT.get(figure.loop.split("/")[0], ANSWERED)


@app.command()
def fit(folder: Folder, draws: Draws = DRAWS, workers: Workers = CORES) -> None:
    """Learn from the points that tell, and write what is installed with the package."""
    from calibration.widths import learn

    every = list(points(folder))
    provenance = {
        "command": f"python -m calibration.coverage fit {folder} --draws {draws}",
        "points": len(every),
        "executed": {name: sorted({str(point.facts.get(name)) for point in every}) for name in ("date", "device")},
    }
    found = learn(every, draws, provenance, workers=workers)
    (place,) = batchsim.intervals.__path__
    write_json(Path(place) / FILE, found.model_dump(mode="json"))
    typer.echo(f"{sum(map(len, found.fitted_to.values()))} points told")


@app.command()
def table(
    folder: Folder,
    draws: Draws = DRAWS,
    workers: Workers = CORES,
    probed: Annotated[bool, typer.Option(help="At the host's speed beside each point, not as calibrated.")] = True,
) -> None:
    """Print what share of the executed figures intervals hold, and how wide they are, as Markdown."""
    known = learned()
    every = figures_of_all(list(points(folder)), known, draws, probed=probed, workers=workers)
    for line in told([judged(figure, known) for figure in every]):
        typer.echo(line)


def told(every: Sequence[Judged]) -> Iterator[str]:
    """Coverage and widths: of headline figures; by kind, schedule and group; and of all."""
    throughput = [each for each in every if each.figure.key == throughput_key(each.figure)]
    runs = {(each.figure.point, each.figure.loop, each.figure.schedule) for each in every}
    names = {(each.figure.point, each.figure.loop) for each in every}
    yield f"{len(names)} executed points, {len(runs)} runs, {len(every):,} figures."
    chosen = sorted(
        (each for each in every if each.figure.key in HEADLINES), key=lambda each: [*HEADLINES].index(each.figure.key)
    )
    yield from _section("figure", chosen, lambda figure: HEADLINES[figure.key])
    yield from _section("throughput of", throughput, lambda figure: figure.kind)
    yield from _section("all figures of", every, lambda figure: figure.kind)
    yield from _section("all figures of", every, lambda figure: figure.schedule)
    yield from _section("group of figures", every, lambda figure: group_of(figure.key))
    yield from _section("of every run", throughput, lambda _: "throughput")
    yield _row("all figures", every)


def _section(title: str, chosen: Iterable[Judged], name: Callable[[Figure], str]) -> Iterator[str]:
    groups: dict[str, list[Judged]] = {}
    for each in chosen:
        groups.setdefault(name(each.figure), []).append(each)
    yield ""
    yield HEADER.format(title)
    for key, found in groups.items():
        yield _row(key, found)


def _row(name: str, found: Sequence[Judged]) -> str:
    held_out = [each for each in found if not each.figure.told]
    linear = all(scale_of(each.figure.key).resolution is None for each in found)
    cells = [
        name,
        f"{len(found):,}",
        f"{_share(each.inside for each in found):.1%}",
        f"{_share(each.inside for each in held_out):.1%} of {len(held_out):,}" if held_out else "",
        f"{_share(each.at < -1 for each in found):.1%}",
        f"{_share(each.at > 1 for each in found):.1%}",
        f"{np.median([each.half for each in found]) * 100:.2g}{' points' if linear else '%'}",
    ]
    return f"| {' | '.join(cells)} |"


def _share(values: Iterable[bool]) -> float:
    return float(np.mean([*values]))


if __name__ == "__main__":
    sys.exit(app())

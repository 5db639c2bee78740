"""The model of the multiprocessors against published times on another GPU: what RowSync and TileSync gain on a V100.

Of each published row only its baseline is used: its grids, and the time of each kernel by itself. From these follow
the costs of its tiles, and from those what tile synchronisation gains.

python -m calibration.cusync fit
python -m calibration.cusync table
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from scipy.optimize import brentq

from batchsim.files import write_json
from batchsim.tiles.graph import Chain, Kernel
from batchsim.tiles.policy import Grouping, Policy, compile_policy, groupings
from batchsim.tiles.shapes import Tiling, mlp, split_gated_mlp
from batchsim.tiles.sm import TileCost, TileDevice, simulate
from batchsim.yaml_loader import load as load_yaml

FOLDER = Path(__file__).parent / "validation" / "cusync"
PUBLISHED, PREDICTED = FOLDER / "published.yaml", FOLDER / "predicted.json"

# The shapes behind the published rows: GPT-3's and LLaMA-65B's, an eighth of their inner sizes; hidden, inner.
SHAPES = {"gpt3": (12288, 6144), "llama": (8192, 2816)}
POLICIES = ("rowsync", "tilesync")
ELEMENT_BYTES = 2  # half precision

# NVIDIA's data sheet: 80 multiprocessors, 900 GB/s, 6 MiB of L2, 125 TFLOP/s. Bandwidth of L2: Jia et al., 2018,
# arXiv 1804.06826, table 3.1. A launch, a post and the filling of a pipeline are round figures; halved or doubled, they
# move the median error by less than half a point. So is the scatter: with none at all, tiles keep step for ever.
V100 = TileDevice(
    "V100", 80, dram_bytes_per_ns=900.0, l2_bytes_per_ns=2155.0, l2_bytes=6 * 2**20, launch_gap_ns=2000.0,
    post_ns=500.0, spread=0.01,
)  # fmt: skip
PRODUCTS_PER_NS = 125_000 / 2 / V100.sms  # of one multiprocessor
START_NS = 1000.0

DRAWS = 5  # of the tiles' scatter that a time is the mean of

# What is fitted: how well loads hide behind arithmetic, and what a poll costs.
GRID = {"overlap": (2.0, 2.25, 2.5, 2.75, 3.0, 3.5), "wait_ns": (300.0, 450.0, 600.0, 900.0, 1200.0)}


class Kind(NamedTuple):
    """How a published kernel is tiled: rows, columns and depth of an iteration; tiles by rows, columns and shares."""

    tile: tuple[int, int, int]
    grid: tuple[int, int, int]
    occupancy: int

    def tiling(self, cost: str) -> Tiling:
        return Tiling(*self.tile, slices=self.grid[2], occupancy=self.occupancy, cost=cost)

    def cost(self, step_ns: float) -> TileCost:
        """Tiles are written at the pace of L2; the share is what an iteration's arithmetic takes at its peak."""
        rows, cols, depth = self.tile
        written_ns = rows * cols * ELEMENT_BYTES / (V100.l2_bytes_per_ns / V100.sms)
        share = min(rows * cols * depth / PRODUCTS_PER_NS / step_ns, 1.0)
        row_bytes, col_bytes = rows * depth * ELEMENT_BYTES, cols * depth * ELEMENT_BYTES
        return TileCost(step_ns, START_NS, written_ns, row_bytes, col_bytes, share)


@dataclass(frozen=True)
class Row:
    """A published row: the baseline by kernels, microseconds, and the gain of each policy, percent of the baseline."""

    model: str
    m: int
    kinds: tuple[Kind, Kind]
    us: tuple[float, float]
    gains: dict[str, float]

    def chain(self) -> Chain:
        hidden, inner = SHAPES[self.model]
        first, second = (kind.tiling(str(number)) for number, kind in enumerate(self.kinds))
        return (split_gated_mlp if self.model == "llama" else mlp)(self.m, hidden, inner, first, second)


class Point(NamedTuple):
    """What a policy gains on one row, percent of the baseline."""

    model: str
    m: int
    policy: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted - self.measured


def published(path: Path = PUBLISHED) -> list[Row]:
    """The published rows that run the same tiles with and without synchronisation."""
    rows = []
    for entry in load_yaml(path).data["rows"]:
        kinds = tuple(
            Kind(tuple(k["tile"]), tuple(k["grid"]), k["occupancy"]) for k in (entry["gemm1"], entry["gemm2"])
        )
        gains = {policy: entry[policy]["improvement_pct"] for policy in POLICIES if policy in entry}
        rows.append(Row(entry["model"], entry["m"], kinds, (entry["gemm1_us"], entry["gemm2_us"]), gains))  # type: ignore[arg-type]
    return rows


def hardware_order(policy: Policy) -> Policy:
    """The policy with its tiles in the order in which CUDA hands out a grid: one share of all tiles, then the next."""
    kernel, row, col, share = policy.places.T
    return replace(policy, order=np.lexsort((col, row, share, kernel)).astype(np.int32))


def step_ns(kernel: Kernel, kind: Kind, us: float, device: TileDevice) -> float:
    """The iteration at which the kernel by itself takes `us` microseconds on the device."""
    quiet = replace(device, wait_ns=0.0, post_ns=0.0)
    policy = hardware_order(compile_policy(Chain(kernel.name, (kernel,))))
    target_ns = us * 1e3 - device.launch_gap_ns

    def late_ns(step: float) -> float:
        return simulate(policy, {kernel.cost: kind.cost(step)}, quiet).total_ns - target_ns

    longest = target_ns / kernel.steps.start
    if late_ns(1.0) > 0:
        return 1.0  # memory alone takes longer
    return float(brentq(late_ns, 1.0, longest, rtol=1e-4, xtol=0.1))


def gains(row: Row, device: TileDevice) -> list[Point]:
    """What the policies of a row gain, from its baseline alone."""
    chain = row.chain()
    costs = {
        kernel.cost: kind.cost(step_ns(kernel, kind, us, device))
        for kernel, kind, us in zip(chain.kernels, row.kinds, row.us, strict=True)
    }

    draws = [replace(device, replication=draw) for draw in range(DRAWS if device.spread else 1)]

    def total_ns(grouping: Grouping | None) -> float:
        policy = hardware_order(compile_policy(chain, None if grouping is None else [grouping, None]))
        return mean(simulate(policy, costs, draw).total_ns for draw in draws) + device.launch_gap_ns

    offered = {grouping.name.lower(): grouping for grouping in groupings(chain, 0)}
    baseline_ns = total_ns(None)
    return [
        Point(row.model, row.m, policy, measured, 100 * (1 - total_ns(offered[policy]) / baseline_ns))
        for policy, measured in row.gains.items()
    ]


@lru_cache(maxsize=1)
def predictions(device: TileDevice) -> tuple[Point, ...]:
    """All points, simulated on `device`."""
    return tuple(point for row in published() for point in gains(row, device))


def wrong_signs(points: Iterable[Point], beyond: float = 3.0) -> list[Point]:
    """Points whose measured gain is `beyond` percent and whose predicted one is not of its sign."""
    return [p for p in points if abs(p.measured) > beyond and p.measured * p.predicted <= 0]


def mean_error(points: Sequence[Point]) -> float:
    return float(np.mean([abs(point.error) for point in points]))


def median_error(points: Sequence[Point]) -> float:
    return float(np.median([abs(point.error) for point in points]))


def _try(fitted: tuple[float, ...]) -> tuple[TileDevice, tuple[Point, ...]]:
    overlap, wait_ns = fitted
    device = replace(V100, overlap=overlap, wait_ns=wait_ns)
    return device, predictions(device)


def fit() -> dict[str, Any]:
    """The point of GRID with the least mean error; also with one model's rows left out, and its error on those."""
    with ProcessPoolExecutor() as pool:
        tried = list(pool.map(_try, product(*GRID.values())))

    def of(points: Iterable[Point], models: Iterable[str]) -> list[Point]:
        return [point for point in points if point.model in models]

    def best(models: Iterable[str]) -> tuple[TileDevice, tuple[Point, ...]]:
        return min(tried, key=lambda each: mean_error(of(each[1], models)))

    held_out = []
    for model in SHAPES:
        device, points = best([other for other in SHAPES if other != model])
        unseen = of(points, [model])
        held_out.append(
            {
                "model": model,
                "fitted_on_the_other": {key: getattr(device, key) for key in GRID},
                "median_error": round(median_error(unseen), 2),
                "mean_error": round(mean_error(unseen), 2),
                "wrong_signs": len(wrong_signs(unseen)),
            }
        )
    device, points = best(SHAPES)
    return {
        "fitted": {key: getattr(device, key) for key in GRID},
        "held_out": held_out,
        "points": [{**point._asdict(), "predicted": round(point.predicted, 2)} for point in points],
    }


def fitted_device(path: Path = PREDICTED) -> TileDevice:
    """The V100 with what was fitted."""
    return replace(V100, **json.loads(path.read_text(encoding="utf-8"))["fitted"])


def report(points: Sequence[Point]) -> Table:
    """Measured and predicted gains, and what is left."""
    table = Table(title="V100: gain over StreamSync, percent of its time")
    for column in ("model", "M", "policy", "measured", "predicted", "error"):
        table.add_column(column, justify="left" if column in ("model", "policy") else "right")
    for p in points:
        table.add_row(p.model, str(p.m), p.policy, f"{p.measured:+.1f}", f"{p.predicted:+.1f}", f"{p.error:+.1f}")
    wrong = ", ".join(f"{p.model} {p.m} {p.policy}" for p in wrong_signs(points)) or "none"
    table.caption = (
        f"{len(points)} points; |error| median {median_error(points):.2f}, mean {mean_error(points):.2f}, largest "
        f"{max(abs(p.error) for p in points):.1f} points; wrong sign where measured beyond 3%: {wrong}"
    )
    return table


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command("fit")
def fit_command() -> None:
    """Fit the parameters and write them, with the predictions, to the table's file."""
    write_json(PREDICTED, fit())


@app.command("table")
def table_command() -> None:
    """Predict anew and print every row beside its measurement."""
    Console().print(report(predictions(fitted_device())))


if __name__ == "__main__":
    app()

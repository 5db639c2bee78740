"""From timed chains to a tile profile: the costs of tiles, and what the device offers them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import lsq_linear

from batchsim.tiles.costs import TileCost, TileDevice
from batchsim.tiles.policy import Policy, policies
from batchsim.tiles.profile import LibraryCurve, TileProfile, TilingEntry
from batchsim.tiles.shapes import Tiling
from batchsim.tiles.sm import simulate
from calibration.tile_runs import LIBRARY, Shape, Timing

Floats = NDArray[np.float64]
ELEMENT_BYTES = 2
# What is fitted of the device, with where the search starts.
DEVICE = {
    "dram_bytes_per_ns": 4200.0, "l2_bytes_per_ns": 15000.0, "launch_gap_ns": 1900.0, "post_ns": 800.0,
    "wait_ns": 50.0, "refill_ns": 1500.0, "overlap": 3.0,
}  # fmt: skip
COST = {"step_ns": 570.0, "start_ns": 3000.0, "end_ns": 3000.0}
STAGES = (("mlp", "gated_mlp"), ("attention",), ("conv",))
# Rows times kernels of the largest chains that are fitted to; larger ones take long to simulate and tell nothing new.
MOST = 8000
# Of a multiprocessor's throughput, by a block that leaves room for another.
FIRST_SHARE = 0.7
FIRST_REDUCE_NS = 2000.0
NUDGE, DAMPING, HUBER = 0.05, 0.01, 0.05


# Compiled in each process that simulates, since handing them over would take longer.
@lru_cache(maxsize=100_000)
def _policies(shape: Shape, tilings: tuple[Tiling, ...]) -> dict[str, Policy]:
    return {policy.name: policy for policy in policies(shape.chain(tilings))}


def policy_of(timing: Timing) -> Policy:
    """The policy that was timed."""
    return _policies(timing.shape, timing.tilings)[timing.policy]


def own(timings: Iterable[Timing]) -> list[Timing]:
    """The timings of our own kernels."""
    return [timing for timing in timings if timing.policy != LIBRARY]


def chain_ns(policy: Policy, costs: Mapping[str, TileCost], device: TileDevice) -> float:
    """Time of a chain as a link of a long graph: the launch of its first kernel counts as well."""
    return simulate(policy, costs, device).total_ns + device.launch_gap_ns


def fit(
    entries: Sequence[TilingEntry], timings: Sequence[Timing], device: TileDevice, *, facts: Mapping[str, Any],
    name: str, workers: int = 2, rounds: int = 4, progress: Callable[[str], None] = lambda _: None,
) -> TileProfile:  # fmt: skip
    """Least squares of the logarithms of simulated over measured times, over the device's parameters and the tiles'.

    In STAGES, each fitting the tiles that are new to it, and the first the device as well.

    Gauss-Newton with a little damping and weights that outliers lose (Huber's): a simulation takes tens of
    milliseconds, so derivatives are one-sided differences, and those by a tile's costs ask only its own timings.
    """
    points = own(timings)
    tiles = {tiling.cost: tiling for point in points for tiling in point.tilings}
    split = frozenset(tiling.cost for point in points for tiling in point.tilings if tiling.slices > 1)
    state = _State({name: _first_guess(tiles[name]) for name in sorted(tiles)}, replace(device, **DEVICE), (), split)  # type: ignore[arg-type]
    with ProcessPoolExecutor(workers) as pool:
        fitted: set[str] = set()
        for kinds in STAGES:
            some = [point for point in points if point.kind in kinds and len(point.tilings) * point.sizes[0] <= MOST]
            free = {tiling.cost for point in some for tiling in point.tilings} - fitted
            state = replace(state, free=(*sorted(free), *(() if fitted else ("",))))
            fitted |= free
            errors = _log_errors(some, state, pool)
            for round_ in range(rounds if some else 0):
                progress(f"{', '.join(kinds)}, round {round_}: median error {np.median(np.abs(errors)):.2%}")
                state, errors = _improved(some, state, errors, pool)
        errors = _log_errors(points, state, pool)
    progress(f"median error {np.median(np.abs(errors)):.2%}")
    return TileProfile(
        schema_version=1,
        kind="tile_profile",
        name=name,
        provenance=dict(facts),
        device=state.device,
        costs=state.costs,
        tilings=[entry for entry in entries if entry.tiling.cost in state.costs],
        library=library_curves(timings),
        residuals={
            _label(point): round(float(np.expm1(error)), 4) for point, error in zip(points, errors, strict=True)
        },
    )


@dataclass(frozen=True, slots=True)
class _State:
    """Costs and device as they are, and which of them are being fitted: tiles by name, the device as ""."""

    costs: Mapping[str, TileCost]
    device: TileDevice
    free: tuple[str, ...]
    split: frozenset[str]

    @property
    def keys(self) -> list[tuple[str, str]]:
        """(tile or "", field) of every parameter."""
        some = [
            (name, key) for name in self.free for key in ("share", "reduce_ns")
            if name and ((key == "share" and self.costs[name].share < 1) or (key == "reduce_ns" and name in self.split))
        ]  # fmt: skip
        return [(name, key) for name in self.free for key in (COST if name else DEVICE)] + some

    def scaled(self, factors: Mapping[tuple[str, str], float]) -> _State:
        def of(value: Any, name: str, fields: Iterable[str]) -> Any:
            found = {f: getattr(value, f) * factors[name, f] for f in fields if (name, f) in factors}
            return replace(value, **{field: float(f"{number:.5g}") for field, number in found.items()})

        costs = {name: of(cost, name, (*COST, "share", "reduce_ns")) for name, cost in self.costs.items()}
        return _State(costs, of(self.device, "", DEVICE), self.free, self.split)


def _improved(points: Sequence[Timing], state: _State, errors: Floats, pool: Executor) -> tuple[_State, Floats]:
    """One step of Gauss-Newton, halved until it helps."""
    jacobian = np.zeros((len(points), len(state.keys)))
    for column, (name, key) in enumerate(state.keys):
        own = [i for i, point in enumerate(points) if not name or name in {t.cost for t in point.tilings}]
        nudged = state.scaled({(name, key): 1 + NUDGE})
        jacobian[own, column] = (_log_errors([points[i] for i in own], nudged, pool) - errors[own]) / np.log1p(NUDGE)
    weights = np.sqrt(np.minimum(1.0, HUBER / np.maximum(np.abs(errors), 1e-9)))
    damped = np.vstack([jacobian * weights[:, None], DAMPING * np.sqrt(len(points)) * np.eye(len(state.keys))])
    wanted = np.concatenate([-errors * weights, np.zeros(len(state.keys))])
    step = np.clip(lsq_linear(damped, wanted).x, -1.0, 1.0)
    for share in (1.0, 0.5, 0.25):
        tried = state.scaled(dict(zip(state.keys, np.exp(share * step).tolist(), strict=True)))
        found = _log_errors(points, tried, pool)
        if _loss(found) < _loss(errors):
            return tried, found
    return state, errors


def _loss(errors: Floats) -> float:
    size = np.abs(errors)
    return float(np.where(size < HUBER, size**2, 2 * HUBER * size - HUBER**2).mean())


def library_curves(timings: Iterable[Timing]) -> list[LibraryCurve]:
    """Times of the framework's own kernels for MLPs, by rows."""
    found: dict[tuple[str, int, int], dict[int, float]] = {}
    for timing in timings:
        if timing.policy == LIBRARY and timing.kind in ("mlp", "gated_mlp"):
            rows, hidden, inner = timing.sizes
            found.setdefault((timing.kind, hidden, inner), {})[rows] = timing.ns
    return [
        LibraryCurve(
            chain=kind, hidden=hidden, inner=inner, rows=sorted(by_rows), ns=[by_rows[r] for r in sorted(by_rows)]
        )
        for (kind, hidden, inner), by_rows in sorted(found.items())
    ]


def _first_guess(tiling: Tiling) -> TileCost:
    scale = tiling.rows * tiling.cols * tiling.depth / (128 * 256 * 64)
    # A convolution reads each pixel once for all nine taps; it finds it in a cache the other times.
    taps = 9 if tiling.cost.startswith("conv") else 1
    return TileCost(
        COST["step_ns"] * scale, COST["start_ns"], COST["end_ns"],
        tiling.rows * tiling.depth * ELEMENT_BYTES / taps, tiling.cols * tiling.depth * ELEMENT_BYTES,
        1.0 if tiling.occupancy == 1 else FIRST_SHARE, FIRST_REDUCE_NS * scale,
    )  # fmt: skip


def _label(timing: Timing) -> str:
    tiles = ", ".join(dict.fromkeys(tiling_text(tiling) for tiling in timing.tilings))
    return f"{timing.shape.name}, {tiles}, {timing.policy}"


def tiling_text(tiling: Tiling) -> str:
    return f"{tiling.cost} split {tiling.slices} group {tiling.group}"


def _log_errors(points: Sequence[Timing], state: _State, pool: Executor) -> Floats:
    return np.concatenate([np.zeros(0), *pool.map(_chunk_errors, [(chunk, state) for chunk in _chunks(points)])])


def _chunks(points: Sequence[Timing], size: int = 24) -> list[Sequence[Timing]]:
    return [points[i : i + size] for i in range(0, len(points), size)]


def _chunk_errors(job: tuple[Sequence[Timing], _State]) -> Floats:
    points, state = job
    return np.array([np.log(chain_ns(policy_of(p), state.costs, state.device) / p.ns) for p in points])

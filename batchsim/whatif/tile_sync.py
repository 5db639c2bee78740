"""What tile-synchronised kernels would take off a loop's steps, where its MLPs are known.

An MLP's baseline are its traced kernels. What ours would take is the tile level's, measured with the device at rest;
where the traced products alone take longer than the same chain did then, the device's clocks are lower in the loop, and
ours would be slower as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from batchsim.learned import Kernels, LearnedProfile, Operation, TracedMlp
from batchsim.shipped import shipped
from batchsim.tiles.level import BETWEEN, TIE, MlpLevel, MlpShape
from batchsim.tiles.profile import FOLDER, TileProfile, load_tile_profile, tile_profile_of

# Under sustained load the power limit lowers the clocks, of tile kernels on an H200 by up to this much.
SLOWEST = 1.17
# Shapes that are simulated, those with most time; of the others nothing is said to be saved.
MOST_SHAPES = 8
# MLPs of more tiles than this, of 128 x 256 outputs, run in so many waves that a row takes as long as with this many.
MOST_TILES = 8192
FEWEST_ROWS = 512  # With fewer rows an MLP may not fill the device, and says nothing of one with more.

WORDS = {"gated_mlp": "gated MLPs", "mlp": "MLPs"}


class Compared(NamedTuple):
    """What one MLP saves, nanoseconds, and its kernels before and after, or why nothing, as words."""

    mlp: TracedMlp
    saved_ns: float
    words: str


def saved_ns(profile: LearnedProfile, tiles: TileProfile | None = None) -> tuple[float, str] | str:
    """Device time that tile-synchronised MLPs save a step on average, nanoseconds, and what to say of it.

    A text alone is why that cannot be told. `tiles`: the device's tile profile; None: the shipped one.
    """
    tiles = tiles or tile_profile_of(profile.device)
    if tiles is None or tiles.provenance.get("device") != profile.device:
        known = sorted({str(load_tile_profile(name).provenance.get("device")) for name in shipped(FOLDER)})
        return f"what tiles cost on this device, {profile.device}, was not measured; it was on {', '.join(known)}"
    if not profile.chains:
        return (
            "no MLP is known by its shapes: record kernel by kernel, without CUDA graphs, and with record_shapes=True"
            " (`calibration.record(FILE, shapes=True)`)"
        )
    compared = [_compared(mlp, tiles) for mlp in profile.chains[:MOST_SHAPES]]
    total = sum(each.saved_ns * each.mlp.count for each in compared)
    most = max(compared, key=lambda each: each.saved_ns * each.mlp.count)
    if not total:
        return 0.0, f"Tile synchronisation has nothing to gain: {_named(most.mlp)} {most.words}."
    return total, (
        f"Tile-synchronised MLPs take {total / 1e6:.2g} ms a step off the device: {_named(most.mlp)} {most.words}."
    )


def apply(steps: Sequence[Sequence[Operation]], saved: float) -> list[list[Operation]]:
    """The steps with their kernels' device time reduced, by `saved` nanoseconds a step on average; graphs stay.

    Each kernel takes its share, as a step's operations do not tell which of its kernels are an MLP's.
    """
    kernels = sum(sum(o.device_ns) for step in steps for o in step if isinstance(o, Kernels) and o.nodes is None)
    kept = max(1 - saved * len(steps) / kernels, 0.0) if kernels else 1.0
    return [[_reduced(operation, kept) for operation in step] for step in steps]


def _compared(mlp: TracedMlp, tiles: TileProfile) -> Compared:
    rows = _simulated_rows(mlp)
    level = MlpLevel(MlpShape(mlp.kind, mlp.hidden, mlp.inner), tiles)
    fastest = level.fastest(rows) if rows else None
    if fastest is None:
        return Compared(mlp, 0.0, "are of a size that the tile profile has no tiles for")
    scale = mlp.rows / rows
    rest_ns = level.library.at(rows) if level.library is not None else fastest.in_order_ns
    slower = min(max(mlp.products_ns / (rest_ns * scale), 1.0), SLOWEST)
    tile_ns = fastest.time_ns * scale * slower
    if level.library is not None and level.choice(rows) is None:
        return Compared(
            mlp, 0.0, f"take {_us(tile_ns)} each in tiles, and the framework's kernels at their best "
            f"{_us(rest_ns * scale * slower)}",
        )  # fmt: skip
    doubt = TIE if level.library is not None else BETWEEN
    if tile_ns >= mlp.ns * (1 - doubt):
        return Compared(mlp, 0.0, f"take {_us(mlp.ns)} each as they are, and {_us(tile_ns)} in tiles")
    how = "with the activation in the first product" if fastest.policy.barrier else f"under {fastest.policy.name}"
    return Compared(mlp, mlp.ns - tile_ns, f"take {_us(tile_ns)} each in place of {_us(mlp.ns)}, {how}")


def _simulated_rows(mlp: TracedMlp) -> int:
    """Up to all the rows that an MLP has; 0: it is too large to simulate."""
    columns = mlp.hidden + mlp.inner * (2 if mlp.kind == "gated_mlp" else 1)
    tiles_a_row = -(-columns // 256)
    most = MOST_TILES // tiles_a_row * 128
    return mlp.rows if mlp.rows <= most else most if most >= FEWEST_ROWS else 0


def _named(mlp: TracedMlp) -> str:
    return f"{mlp.count:.3g} {WORDS[mlp.kind]} a step of {mlp.rows} rows ({mlp.hidden} x {mlp.inner})"


def _us(ns: float) -> str:
    return f"{ns / 1e3:.3g} us" if ns < 1e6 else f"{ns / 1e3:.0f} us"


def _reduced(operation: Operation, kept: float) -> Operation:
    if not isinstance(operation, Kernels) or operation.nodes is not None:
        return operation
    return operation.model_copy(update={"device_ns": [round(ns * kept) for ns in operation.device_ns]})

r"""Tile costs: time chains on a device, fit a tile profile to some of them, and hold it against others.

python -m calibration.tiles measure calibration/tile_shapes.yaml --out calibration/tile_timings.json
python -m calibration.tiles fit calibration/tile_timings.json --out calibration/profiles/tiles/h200-tiles.json
python -m calibration.tiles measure calibration/validation/tiles/points.yaml \
    --out calibration/validation/tiles/h200.json
python -m calibration.tiles table calibration/validation/tiles/h200.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from batchsim.files import write_text
from batchsim.tiles.costs import TileDevice
from batchsim.tiles.profile import TilingEntry, load_tile_profile
from batchsim.tiles.scenario import load
from batchsim.tiles.shapes import Tiling
from calibration.tile_fit import fit as fit_profile
from calibration.tile_points import Verdict, margins_of, predict, summary, verdicts
from calibration.tile_runs import measure as time_shapes
from calibration.tile_runs import provenance_of, read_timings, shapes_of

HEADER = """\
| chain | chosen tiles | policy | measured us | predicted | StreamSync us | gain | best us | library us |
|---|---|---|--:|--:|--:|--:|--:|--:|"""

Timings = Annotated[Path, typer.Argument(help="Timed chains, JSON.", exists=True, dir_okay=False)]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def measure(
    file: Annotated[Path, typer.Argument(help="Chains, a tiles scenario in YAML.")],
    out: Annotated[Path, typer.Option(help="The file of timings; shapes that it holds already are kept.")],
) -> None:
    """Time every chain on the GPU, in all tilings and under all policies, and the framework's own beside them."""
    from calibration.provenance import provenance

    facts = provenance("cuda", f"python -m calibration.tiles measure {file.name}")
    time_shapes(shapes_of(load(file)), out, facts, progress=lambda _, name: typer.echo(name, err=True), check=True)


@app.command()
def fit(
    file: Timings,
    out: Annotated[Path, typer.Option(help="The tile profile to write, JSON.")],
    rounds: Annotated[int, typer.Option(help="Steps of the search.")] = 4,
) -> None:
    """Fit the costs of tiles, and what the device offers them, to timed chains."""
    timings, facts = read_timings(file), provenance_of(file)
    device = TileDevice(facts["device"], facts["multiprocessors"])
    profile = fit_profile(
        entries(), timings, device, facts=facts, name=out.stem, rounds=rounds,
        progress=lambda told: typer.echo(told, err=True),
    )  # fmt: skip
    profile = profile.model_copy(update={"margins": margins_of(predict(timings, profile))})
    write_text(out, profile.model_dump_json(indent=1) + "\n")


@app.command()
def table(
    file: Timings,
    profile: Annotated[str, typer.Option(help="The tile profile that predicts: a name or a file.")] = "h200-tiles",
) -> None:
    """Print what the profile predicts for timed chains that it was not fitted to, as Markdown."""
    timings, costs = read_timings(file), load_tile_profile(profile)
    points = predict(timings, costs)
    typer.echo("\n".join(summary(timings, points, costs.margins)))
    typer.echo(f"\n{HEADER}")
    for verdict in verdicts(timings, points, costs.margins):
        typer.echo(_row(verdict))


def entries() -> list[TilingEntry]:
    """The tilings that `batchsim tiles` tries on its own, for chains of how many rows."""
    from calibration.executor.tiles.builds import ATTENTION_BUILDS, CONV_BUILDS, attention_tiling, conv_tiling
    from calibration.executor.tiles.tilings import BUILDS, tiling

    few, some, many = (1, 64), (65, 512), (513, None)
    found = []
    for kind, name, (least, most), all_slices in (
        ("gemm", "gemm 64x128x64", few, (1, 2, 4)), ("gemm", "gemm 64x256x64", few, (1, 2, 4, 8)),
        ("gemm", "gemm 64x256x64", some, (1,)), ("gemm", "gemm 128x256x64", some, (1, 2)),
        ("gemm", "gemm 128x256x64", many, (1,)), ("gemm", "gemm 256x192x64", (257, None), (1,)),
        ("gated", "gated 64x256x64", few, (1, 2, 4)), ("gated", "gated 64x256x64", some, (1,)),
        ("gated", "gated 128x256x64", some, (1, 2)), ("gated", "gated 128x256x64", many, (1,)),
    ):  # fmt: skip
        found += [_entry(kind, tiling(name, slices), BUILDS[name].warps, least, most) for slices in all_slices]
    # Low groups end their first rows earlier, which matters while there are few rows.
    low = replace(tiling("gemm 128x256x64"), group=2)
    found.append(_entry("gemm", low, BUILDS["gemm 128x256x64"].warps, 513, 2048))
    found += [_entry("attention", attention_tiling(n, 128), b.warps, 1, None) for n, b in ATTENTION_BUILDS.items()]
    found += [_entry("conv", conv_tiling(n), b.warps, 1, None) for n, b in CONV_BUILDS.items()]
    return found


def _entry(kind: str, tiling: Tiling, warps: int, least: int, most: int | None) -> TilingEntry:
    return TilingEntry.model_validate(
        {"kind": kind, "tiling": tiling, "warps": warps, "least_rows": least, "most_rows": most}
    )


def _row(verdict: Verdict) -> str:
    timing = verdict.chosen.timing
    cells = [
        verdict.shape.name,
        tiles_text(timing.tilings),
        timing.policy,
        f"{timing.ns / 1e3:,.1f}",
        f"{verdict.chosen.error:+.1%}",
        f"{verdict.baseline.timing.ns / 1e3:,.1f}",
        f"{verdict.gain:+.1%}",
        f"{verdict.best.timing.ns / 1e3:,.1f}",
        f"{verdict.library_ns / 1e3:,.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def tiles_text(tilings: Sequence[Tiling]) -> str:
    """Tiles of a chain's kernels: rows x columns, / shares, @ group."""
    return " + ".join(
        f"{t.rows}x{t.cols}" + (f"/{t.slices}" if t.slices > 1 else "") + (f"@{t.group}" if t.group > 1 else "")
        for t in tilings
    )


if __name__ == "__main__":
    sys.exit(app())
